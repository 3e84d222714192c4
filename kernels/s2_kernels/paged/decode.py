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

from s2_kernels import layout as layouts
from s2_kernels.launch import limits
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.device import num_multiprocessors, nvidia_capability
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E, MIN_DOT_SIZE, padded_head_size
from s2_kernels.layout import HeadTables, TierLayout
from s2_kernels.paged.calls import AttendCall, attend_strides
from s2_kernels.paged.decode_combine import prepare_combine
from s2_kernels.paged.decode_schedule import (
    head_items,
    head_of_item,
    item_counts,
    num_old_blocks,
    num_sink_tiles,
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

VARYING = tl.constexpr(limits.VARYING)
ALL_RESIDUES = tl.constexpr(layouts.ALL_RESIDUES)


@triton.jit
def num_kept_blocks(
    residues,  # [num_kept], of the KV head
    num_kept,
    blocks,
    VERT_STRIDE: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
):
    """How many of a sequence's first `blocks` blocks the KV head keeps. They are the first of its tier."""
    kept = tl.arange(0, KEPT_PADDED)
    kept_residues = tl.load(residues + kept, mask=kept < num_kept, other=VERT_STRIDE)
    in_last_super_block = tl.sum((kept_residues < blocks % VERT_STRIDE).to(tl.int32), 0)
    return blocks // VERT_STRIDE * num_kept + in_last_super_block


@triton.jit
def tile_of_tier(tile, sink_tiles, near_tiles, first_window_tile, skipped_tiles, SINK_BLOCKS: tl.constexpr):
    """Where in its tier a tile of a KV head is.

    Args:
        tile: first those of the sinks, then the window's, then the older strided ones.
        sink_tiles: of the sinks.
        near_tiles: of sinks and window, all in the window tier.
        first_window_tile: where in its tier the window starts.
        skipped_tiles: strided tiles before those to attend to: sinks.
    """
    window_tile = first_window_tile + tile
    strided_tile = tile - near_tiles
    if SINK_BLOCKS > 0:
        window_tile = tl.where(tile < sink_tiles, tile, window_tile - sink_tiles)
        strided_tile += skipped_tiles
    return tl.where(tile < near_tiles, window_tile, strided_tile)


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
    residues,  # [num_kept], of the KV head
    num_kept,
    strided_page_slots,  # of the KV head
    window_stride_page,
    window_stride_slot,
    strided_stride_page,
    strided_stride_slot,
    scale_log2,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Online softmax over the tiles first ... end - 1 of a KV head: (acc, row_max, row_sum)."""
    BLOCK_TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    PAGE_TILES: tl.constexpr = PAGE_SLOTS // BLOCK_N
    strided_page_tiles = strided_page_slots // BLOCK_N
    old_blocks = num_old_blocks(seq_len, BLOCK_SIZE, LOCAL_BLOCKS)
    first_window_tile = old_blocks * BLOCK_TILES
    sink_tiles = num_sink_tiles(old_blocks, SINK_BLOCKS, BLOCK_SIZE, BLOCK_N)
    near_tiles = sink_tiles + num_window_tiles(seq_len, old_blocks, BLOCK_SIZE, BLOCK_N)
    skipped_tiles = 0
    if SINK_BLOCKS > 0:
        sinks = tl.minimum(old_blocks, SINK_BLOCKS)
        skipped_tiles = num_kept_blocks(residues, num_kept, sinks, VERT_STRIDE, KEPT_PADDED) * BLOCK_TILES
    old_tiles = num_kept_blocks(residues, num_kept, old_blocks, VERT_STRIDE, KEPT_PADDED) * BLOCK_TILES
    end_tile = tl.minimum(end_tile, near_tiles + old_tiles - skipped_tiles)

    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)
    tier_tile = tile_of_tier(
        first_tile, sink_tiles, near_tiles, first_window_tile, skipped_tiles, SINK_BLOCKS
    )
    is_near = first_tile < near_tiles
    page_tiles = PAGE_TILES
    if NUM_KEPT == VARYING:
        page_tiles = tl.where(is_near, PAGE_TILES, strided_page_tiles)
    entry = tl.where(is_near, window_table, strided_table) + tier_tile // page_tiles
    page = tl.load(entry, mask=first_tile < end_tile, other=0)
    for tile in range(first_tile, end_tile):
        in_window = tile < near_tiles
        tier_tile = tile_of_tier(tile, sink_tiles, near_tiles, first_window_tile, skipped_tiles, SINK_BLOCKS)
        first_token = tier_tile * BLOCK_N
        stride_page = tl.where(in_window, window_stride_page, strided_stride_page)
        stride_slot = tl.where(in_window, window_stride_slot, strided_stride_slot)
        cache = tl.where(in_window, window_cache, strided_cache)
        page_slots = PAGE_SLOTS
        if NUM_KEPT == VARYING:
            page_slots = tl.where(in_window, PAGE_SLOTS, strided_page_slots)
        rows = token_rows(cache, page, first_token, stride_page, stride_slot, page_slots, BLOCK_N)

        # A step ahead: a load that this step's addresses waited for would take pipeline stages of its own.
        next_tile = tl.minimum(tile + 1, end_tile - 1)
        next_tier_tile = tile_of_tier(
            next_tile, sink_tiles, near_tiles, first_window_tile, skipped_tiles, SINK_BLOCKS
        )
        is_near = next_tile < near_tiles
        if NUM_KEPT == VARYING:
            page_tiles = tl.where(is_near, PAGE_TILES, strided_page_tiles)
        page = tl.load(tl.where(is_near, window_table, strided_table) + next_tier_tile // page_tiles)

        num_keys = tl.where(in_window, seq_len - first_token, BLOCK_N)
        is_key = tl.arange(0, BLOCK_N) < num_keys
        k = load_tile_where(rows, is_key, HEAD_SIZE, HEAD_PADDED)
        v = load_tile_where(rows + HEAD_SIZE, is_key, HEAD_SIZE, HEAD_PADDED)
        visible = is_key[None, :]
        if NUM_KEPT != 1:
            if NUM_KEPT == VARYING:
                tile_rank = first_token // BLOCK_SIZE % tl.maximum(num_kept, 1)
                attends = in_window | (row_ranks == tile_rank) | (row_ranks == ALL_RESIDUES)
            else:
                attends = in_window | (row_ranks == first_token // BLOCK_SIZE % NUM_KEPT)
            attends = attends[:, None]
            visible = visible & attends
        logits = tl.where(visible, query_key(queries, k), float("-inf"))
        new_acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)
        if NUM_KEPT != 1:  # a weight of zero does not keep the NaN of another head's block away
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
    kept_residues,  # [virtual heads]
    first_kept,  # [num_kv_heads + 1]
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
    RESIDUE_SLOTS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    KEPT_PADDED: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
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
        first_kept,
        NUM_KV_HEADS,
        NUM_KEPT,
        REQUESTS_PADDED,
        SINK_BLOCKS,
        BLOCK_SIZE,
        LOCAL_BLOCKS,
        VERT_STRIDE,
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
        per_head, per_residue = item_counts(
            seq_len, SINK_BLOCKS, BLOCK_SIZE, LOCAL_BLOCKS, VERT_STRIDE, BLOCK_N
        )
        kv_head = head_of_item(
            item - request_start, per_head, per_residue, first_kept, NUM_KV_HEADS, NUM_KEPT, HEADS_PADDED
        )
        head_start, num_head_items, first_residue, num_kept = head_items(
            kv_head, per_head, per_residue, first_kept, NUM_KEPT
        )
        first = item - request_start - head_start
        stop = tl.minimum(num_head_items, first + end - item)
        strided_row = kv_head
        if NUM_KEPT == VARYING:
            strided_row = first_residue

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
            strided_cache + strided_row.to(tl.int64) * strided_stride_head,
            window_table + request.to(tl.int64) * window_table_stride,
            strided_table + request.to(tl.int64) * strided_table_stride,
            kept_residues + first_residue,
            num_kept,
            # Pages without a slot of the head are never looked up, but divided by their slots.
            tl.maximum(num_kept, 1) * RESIDUE_SLOTS,
            window_stride_page,
            window_stride_slot,
            strided_stride_page,
            strided_stride_slot,
            scale_log2,
            HEAD_SIZE,
            HEAD_PADDED,
            PAGE_SLOTS,
            SINK_BLOCKS,
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
        if (first == 0) & (stop == num_head_items):
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
    layout = TierLayout.of_caches(pattern, requests.window_cache, requests.strided_cache)
    most_kept = max(map(len, pattern.kept_residues))
    config = decode_config(head_padded, pattern.block_size, max(1, most_kept), q.dtype)
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
        "SINK_BLOCKS": limits.sink_blocks(pattern),
        "BLOCK_SIZE": pattern.block_size,
        "LOCAL_BLOCKS": limits.local_blocks(pattern),
        "VERT_STRIDE": pattern.vert_stride,
        "NUM_KEPT": limits.num_kept(layout),
        "REQUESTS_PADDED": max(MIN_REQUESTS_PADDED, triton.next_power_of_2(num_requests)),
        "BLOCK_N": config.pop("BLOCK_N"),
        "USE_PDL": _has_pdl(q.device),
    }
    arguments = {
        "q": q,
        **requests._asdict(),
        "kept_residues": tables.kept,
        "first_kept": tables.first_kept,
        "ranks": tables.rank,
        "out": out,
        "partial": partial,
        "lse": lse,
        "scale_log2": scale * LOG2_E,
        "num_requests": num_requests,
        **attend_strides(q, requests, out),
        "PAGE_SLOTS": requests.window_cache.shape[2],
        "RESIDUE_SLOTS": layout.residue_slots,
        "KEPT_PADDED": triton.next_power_of_2(max(1, most_kept)),
        "HEADS_PADDED": triton.next_power_of_2(pattern.num_kv_heads),
        "BLOCK_M": max(MIN_DOT_SIZE, triton.next_power_of_2(pattern.group_size)),
        **schedule,
    }
    varying = ("q", "window_cache", "strided_cache", "out", "kept_residues", "first_kept", "ranks")
    launch = KernelLaunch(paged_decode_fwd_kernel, (num_programs,), arguments, varying, **config)
    combine = None
    if num_programs > 1:
        combine = prepare_combine(partial, lse, out, requests, pattern, schedule, tables.first_kept)

    def attend(
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        launch(q, window_cache, strided_cache, out, tables.kept, tables.first_kept, tables.rank)
        if combine is not None:
            combine(out, tables.first_kept)

    return attend
