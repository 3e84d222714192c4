"""S2-Attention of one query per request on the two-tier paged KV cache: decode.

Memory-bound, so a program loads each key once for all query heads of its KV head. A fixed number of programs
share the keys of the whole batch evenly (split-K, see `decode_schedule`). A KV head whose keys are all in one
split is finished by its program; partial results of several splits are combined by log-sum-exp in a second
kernel.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents

from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.device import num_multiprocessors, nvidia_capability
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E, MIN_DOT_SIZE, local_blocks, padded_head_size
from s2_kernels.layout import HeadTables
from s2_kernels.paged.calls import AttendCall, attend_strides
from s2_kernels.paged.decode_combine import prepare_combine
from s2_kernels.paged.decode_schedule import (
    items_per_head,
    num_old_blocks,
    num_splits,
    num_window_tiles,
    request_ends,
    split_start,
)
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import load_tile_where, query_key, softmax_step, token_rows

MIN_REQUESTS_PADDED = 128
"""Batches up to this size share a compiled kernel."""


@triton.jit
def table_entry(tile, window_tiles, first_window_tile, window_table, strided_table, PAGE_TILES: tl.constexpr):
    """Where the block tables have the page of a tile of a KV head."""
    in_window = tile < window_tiles
    tier_tile = tl.where(in_window, first_window_tile + tile, tile - window_tiles)
    return tl.where(in_window, window_table, strided_table) + tier_tile // PAGE_TILES


@triton.jit
def num_strided_tiles(
    residues,  # [NUM_KEPT], of the KV head
    old_blocks,
    BLOCK_SIZE: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Tiles of the strided blocks older than the window. They are the first ones of the tier."""
    kept = tl.arange(0, KEPT_PADDED)
    kept_residues = tl.load(residues + kept, mask=kept < NUM_KEPT, other=VERT_STRIDE)
    in_last_super_block = tl.sum((kept_residues < old_blocks % VERT_STRIDE).to(tl.int32), 0)
    blocks = old_blocks // VERT_STRIDE * NUM_KEPT + in_last_super_block
    return blocks * (BLOCK_SIZE // BLOCK_N)


@triton.jit
def attend_tiles(
    queries,  # [BLOCK_M, HEAD_PADDED]
    row_ranks,  # [BLOCK_M]
    first_tile,
    end_tile,
    seq_len,
    window_cache,  # first page of the KV head
    strided_cache,
    window_table,  # the request's row
    strided_table,
    residues,  # [NUM_KEPT], of the KV head
    window_stride_page,
    window_stride_slot,
    strided_stride_page,
    strided_stride_slot,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the tiles first ... end - 1 of a KV head: (acc, row_max, row_sum)."""
    PAGE_TILES: tl.constexpr = PAGE_SLOTS // BLOCK_N
    old_blocks = num_old_blocks(seq_len, BLOCK_SIZE, LOCAL_BLOCKS)
    first_window_tile = old_blocks * (BLOCK_SIZE // BLOCK_N)
    window_tiles = num_window_tiles(seq_len, old_blocks, BLOCK_SIZE, BLOCK_N)
    strided_tiles = num_strided_tiles(
        residues, old_blocks, BLOCK_SIZE, VERT_STRIDE, NUM_KEPT, KEPT_PADDED, BLOCK_N
    )
    end_tile = tl.minimum(end_tile, window_tiles + strided_tiles)

    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    entry = table_entry(first_tile, window_tiles, first_window_tile, window_table, strided_table, PAGE_TILES)
    page = tl.load(entry, mask=first_tile < end_tile, other=0)
    for tile in range(first_tile, end_tile):
        in_window = tile < window_tiles
        first_token = tl.where(in_window, first_window_tile + tile, tile - window_tiles) * BLOCK_N
        stride_page = tl.where(in_window, window_stride_page, strided_stride_page)
        stride_slot = tl.where(in_window, window_stride_slot, strided_stride_slot)
        cache = tl.where(in_window, window_cache, strided_cache)
        rows = token_rows(cache, page, first_token, stride_page, stride_slot, PAGE_SLOTS, BLOCK_N)

        # A step ahead: a load that this step's addresses waited for would take pipeline stages of its own.
        next_tile = tl.minimum(tile + 1, end_tile - 1)
        entry = table_entry(
            next_tile, window_tiles, first_window_tile, window_table, strided_table, PAGE_TILES
        )
        page = tl.load(entry)

        num_keys = tl.where(in_window, seq_len - first_token, BLOCK_N)
        is_key = tl.arange(0, BLOCK_N) < num_keys
        k = load_tile_where(rows, is_key, HEAD_SIZE, HEAD_PADDED)
        v = load_tile_where(rows + HEAD_SIZE, is_key, HEAD_SIZE, HEAD_PADDED)
        visible = is_key[None, :]
        if NUM_KEPT > 1:
            tile_rank = first_token // BLOCK_SIZE % NUM_KEPT
            attends = (in_window | (row_ranks == tile_rank))[:, None]
            visible = visible & attends
        logits = tl.where(visible, query_key(queries, k), float("-inf"))
        new_acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)
        if NUM_KEPT > 1:  # a weight of zero does not keep the NaN of another head's block away
            new_acc = tl.where(attends, new_acc, acc)
        acc = new_acc
    return acc, row_max, row_sum


@triton.jit(do_not_specialize=["num_requests"])
def paged_decode_fwd_kernel(
    q,  # [tokens, num_heads, head_size]
    window_cache,  # [pages, num_kv_heads, page_slots, 2 * head_size]
    strided_cache,
    window_table,  # [requests, pages]
    strided_table,
    query_start_loc,  # [requests + 1]
    seq_lens,  # [requests]
    kept_residues,  # [num_kv_heads, num_kept]
    ranks,  # [num_heads]
    out,  # as q
    partial,  # [programs, 2, group_size, head_size]: of a KV head begun by an earlier program; by this one
    lse,  # [programs, 2, group_size], base 2, -inf without keys
    scale_log2,
    num_requests,
    q_stride_token: tl.int64,
    q_stride_head: tl.int64,
    window_stride_page: tl.int64,
    window_stride_head: tl.int64,
    window_stride_slot: tl.int64,
    strided_stride_page: tl.int64,
    strided_stride_head: tl.int64,
    strided_stride_slot: tl.int64,
    window_table_stride: tl.int64,
    strided_table_stride: tl.int64,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    REQUESTS_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program i: split i of the batch's work items, for all query heads of a KV head at once."""
    if USE_PDL:
        gdc_launch_dependents()
    ends = request_ends(
        query_start_loc,
        seq_lens,
        num_requests,
        NUM_KV_HEADS,
        REQUESTS_PADDED,
        BLOCK_SIZE,
        LOCAL_BLOCKS,
        VERT_STRIDE,
        NUM_KEPT,
        BLOCK_N,
    )
    num_items = tl.max(ends, 0)
    splits = num_splits(num_items, tl.num_programs(0))
    program = tl.program_id(0)
    if program >= splits:
        return

    rows = tl.arange(0, BLOCK_M)
    is_row = rows < GROUP_SIZE
    dims = tl.arange(0, HEAD_PADDED)[None, :]
    is_element = is_row[:, None] & (dims < HEAD_SIZE)
    item = split_start(program, num_items, splits)
    end = split_start(program + 1, num_items, splits)
    while item < end:
        request = tl.sum((ends <= item).to(tl.int32), 0)
        request_start = tl.max(tl.where(ends <= item, ends, 0), 0)
        token = tl.load(query_start_loc + request).to(tl.int64)
        seq_len = tl.load(seq_lens + request)
        head_items = items_per_head(seq_len, BLOCK_SIZE, LOCAL_BLOCKS, VERT_STRIDE, NUM_KEPT, BLOCK_N)
        kv_head = (item - request_start) // head_items
        first = (item - request_start) % head_items
        stop = tl.minimum(head_items, first + end - item)

        heads = kv_head * GROUP_SIZE + rows
        q_rows = q + token * q_stride_token + heads.to(tl.int64) * q_stride_head
        queries = load_tile_where(q_rows, is_row, HEAD_SIZE, HEAD_PADDED)
        acc, row_max, row_sum = attend_tiles(
            queries,
            tl.load(ranks + heads, mask=is_row, other=0),
            first,
            stop,
            seq_len,
            window_cache + kv_head.to(tl.int64) * window_stride_head,
            strided_cache + kv_head.to(tl.int64) * strided_stride_head,
            window_table + request.to(tl.int64) * window_table_stride,
            strided_table + request.to(tl.int64) * strided_table_stride,
            kept_residues + kv_head * NUM_KEPT,
            window_stride_page,
            window_stride_slot,
            strided_stride_page,
            strided_stride_slot,
            scale_log2,
            HEAD_SIZE,
            HEAD_PADDED,
            PAGE_SLOTS,
            BLOCK_SIZE,
            LOCAL_BLOCKS,
            VERT_STRIDE,
            NUM_KEPT,
            KEPT_PADDED,
            BLOCK_M,
            BLOCK_N,
        )
        # A row without keys among these tiles: result 0, log-sum-exp -inf.
        has_keys = row_sum > 0
        row_sum = tl.where(has_keys, row_sum, 1.0)
        result = acc / row_sum[:, None]
        if (first == 0) & (stop == head_items):
            out_rows = out + token * out_stride_token + heads.to(tl.int64) * out_stride_head
            tl.store(out_rows[:, None] + dims, result.to(out.dtype.element_ty), mask=is_element)
        else:
            partial_rows = (program.to(tl.int64) * 2 + (first == 0)) * GROUP_SIZE + rows
            tl.store(partial + partial_rows[:, None] * HEAD_SIZE + dims, result, mask=is_element)
            row_lse = tl.where(has_keys, row_max + tl.log2(row_sum), float("-inf"))
            tl.store(lse + partial_rows, row_lse, mask=is_row)
        item += stop - first


def decode_config(head_padded: int, block_size: int, num_kept: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile shape, launch options and programs per multiprocessor. Tiles of keys stay within a block."""
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles, or registers spill
        defaults = {"BLOCK_N": MIN_DOT_SIZE, "num_warps": 4, "num_stages": 4}
    else:
        defaults = {"BLOCK_N": 64 if head_padded <= 128 else 32, "num_warps": 4, "num_stages": 3}
    defaults["programs_per_processor"] = 2
    config = launch_config("decode", shape_key(head_padded, dtype, kept=num_kept), defaults)
    return config | {"BLOCK_N": min(block_size, config["BLOCK_N"])}


def _has_pdl(device: torch.device) -> bool:
    """Whether a kernel can be started before the one it depends on ends (programmatic dependent launch)."""
    return nvidia_capability(device) >= (9, 0) and not triton.knobs.runtime.interpret


def prepare_decode(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    tables: HeadTables,
    num_programs: int | None = None,
) -> AttendCall:
    """`s2_kernels.paged.attend` of a batch of requests with one query each, or none, after its checks.

    Calls share the memory of the partial results: they must follow each other on one stream.

    Args:
        num_programs: programs that share the keys of the batch; by default enough to fill the device.
        others: as in `attend`.

    Raises:
        ValueError: `num_programs` is not positive.
    """
    if num_programs is not None and num_programs < 1:
        raise ValueError(f"num_programs: {num_programs}, expected a positive integer")
    head_size = q.shape[2]
    num_requests = len(requests.seq_lens)
    head_padded = padded_head_size(head_size)
    config = decode_config(head_padded, pattern.block_size, pattern.num_kept, q.dtype)
    programs_per_processor = config.pop("programs_per_processor")
    if num_programs is None:
        num_programs = programs_per_processor * num_multiprocessors(q.device)

    lse = torch.empty(num_programs, 2, pattern.group_size, dtype=torch.float32, device=q.device)
    partial = torch.empty(*lse.shape, head_size, dtype=torch.float32, device=q.device)
    schedule = {
        "NUM_KV_HEADS": pattern.num_kv_heads,
        "GROUP_SIZE": pattern.group_size,
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": head_padded,
        "BLOCK_SIZE": pattern.block_size,
        "LOCAL_BLOCKS": local_blocks(pattern),
        "VERT_STRIDE": pattern.vert_stride,
        "NUM_KEPT": pattern.num_kept,
        "REQUESTS_PADDED": max(MIN_REQUESTS_PADDED, triton.next_power_of_2(num_requests)),
        "BLOCK_N": config.pop("BLOCK_N"),
        "USE_PDL": _has_pdl(q.device),
    }
    arguments = {
        "q": q,
        **requests._asdict(),
        "kept_residues": tables.kept,
        "ranks": tables.rank,
        "out": out,
        "partial": partial,
        "lse": lse,
        "scale_log2": scale * LOG2_E,
        "num_requests": num_requests,
        **attend_strides(q, requests, out),
        "PAGE_SLOTS": requests.window_cache.shape[2],
        "KEPT_PADDED": triton.next_power_of_2(pattern.num_kept),
        "BLOCK_M": max(MIN_DOT_SIZE, triton.next_power_of_2(pattern.group_size)),
        **schedule,
    }
    varying = ("q", "window_cache", "strided_cache", "out", "kept_residues", "ranks")
    launch = KernelLaunch(paged_decode_fwd_kernel, (num_programs,), arguments, varying, **config)
    combine = None
    if num_programs > 1:
        combine = prepare_combine(partial, lse, out, requests, pattern, schedule)

    def attend(
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        launch(q, window_cache, strided_cache, out, tables.kept, tables.rank)
        if combine is not None:
            combine(out)

    return attend
