"""S2-Attention of one query per request on the two-tier paged KV cache: decode.

Memory-bound, so a program loads each key once for all query heads of its KV head. A request's keys are
divided over several programs (split-K); a second kernel combines their results by log-sum-exp.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from s2_kernels.layout import TierLayout, head_tables
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import (
    LOG2_E,
    MIN_DOT_SIZE,
    check_paged_arguments,
    largest_power_of_two_divisor,
    load_kv_where,
    load_tile_where,
    query_key,
    softmax_step,
)

MAX_SPLITS = 64
PROGRAMS_PER_PROCESSOR = 2


@triton.jit(do_not_specialize=["num_splits"])
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
    partial,  # [tokens, num_heads, splits, head_size]
    lse,  # [tokens, num_heads, splits], base 2, -inf for a split without keys
    scale_log2,
    num_splits,
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
    partial_stride_token: tl.int64,
    partial_stride_head: tl.int64,
    partial_stride_split: tl.int64,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
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
    """Program (n, g, i): split i of the keys of request n's query, all query heads of KV head g."""
    request = tl.program_id(0)
    query_start = tl.load(query_start_loc + request)
    if tl.load(query_start_loc + request + 1) == query_start:
        return

    kv_head = tl.program_id(1)
    window_cache += kv_head.to(tl.int64) * window_stride_head
    strided_cache += kv_head.to(tl.int64) * strided_stride_head
    window_table += request.to(tl.int64) * window_table_stride
    strided_table += request.to(tl.int64) * strided_table_stride

    # The blocks of the kept residues, in order, are the tier's order too: those older than the window
    # are its first num_strided tokens.
    position = tl.load(seq_lens + request) - 1
    old_blocks = tl.maximum(position // BLOCK_SIZE - LOCAL_BLOCKS + 1, 0)
    kept = tl.arange(0, KEPT_PADDED)
    residues = tl.load(kept_residues + kv_head * NUM_KEPT + kept, mask=kept < NUM_KEPT, other=VERT_STRIDE)
    in_last_super_block = tl.sum((residues < old_blocks % VERT_STRIDE).to(tl.int32), 0)
    num_strided = (old_blocks // VERT_STRIDE * NUM_KEPT + in_last_super_block) * BLOCK_SIZE

    # Split the tiles of both tiers, strided first, evenly.
    window_start = old_blocks * BLOCK_SIZE
    first_window_tile = window_start // BLOCK_N
    strided_tiles = tl.cdiv(num_strided, BLOCK_N)
    num_tiles = strided_tiles + position // BLOCK_N + 1 - first_window_tile
    tiles_per_split = tl.cdiv(num_tiles, num_splits)
    split = tl.program_id(2)
    first_tile = split * tiles_per_split
    end_tile = tl.minimum(first_tile + tiles_per_split, num_tiles)

    rows = tl.arange(0, BLOCK_M)
    is_row = rows < GROUP_SIZE
    heads = kv_head * GROUP_SIZE + rows
    token = query_start.to(tl.int64)
    q_rows = q + token * q_stride_token + heads.to(tl.int64) * q_stride_head
    queries = load_tile_where(q_rows, is_row, HEAD_SIZE, HEAD_PADDED)
    row_ranks = tl.load(ranks + heads, mask=is_row, other=0)
    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    for n in range(first_tile, tl.minimum(end_tile, strided_tiles)):
        first_token = n * BLOCK_N
        keys = first_token + tl.arange(0, BLOCK_N)
        is_key = keys < num_strided
        k, v = load_kv_where(
            is_key,
            strided_cache,
            strided_table,
            first_token,
            strided_stride_page,
            strided_stride_slot,
            PAGE_SLOTS,
            BLOCK_N,
            HEAD_SIZE,
            HEAD_PADDED,
        )
        key_ranks = keys // BLOCK_SIZE % NUM_KEPT
        visible = is_key[None, :] & (key_ranks[None, :] == row_ranks[:, None])
        logits = tl.where(visible, query_key(queries, k), float("-inf"))
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)

    window_shift = first_window_tile - strided_tiles
    for n in range(tl.maximum(first_tile, strided_tiles), end_tile):
        first_token = (n + window_shift) * BLOCK_N
        keys = first_token + tl.arange(0, BLOCK_N)
        is_key = (keys >= window_start) & (keys <= position)
        k, v = load_kv_where(
            is_key,
            window_cache,
            window_table,
            first_token,
            window_stride_page,
            window_stride_slot,
            PAGE_SLOTS,
            BLOCK_N,
            HEAD_SIZE,
            HEAD_PADDED,
        )
        logits = tl.where(is_key[None, :], query_key(queries, k), float("-inf"))
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)

    # A row without keys in this split: result 0, log-sum-exp -inf.
    has_keys = row_sum > 0
    row_sum = tl.where(has_keys, row_sum, 1.0)
    dims = tl.arange(0, HEAD_PADDED)[None, :]
    partial_rows = (
        partial
        + token * partial_stride_token
        + heads.to(tl.int64) * partial_stride_head
        + split.to(tl.int64) * partial_stride_split
    )
    result = (acc / row_sum[:, None]).to(partial.dtype.element_ty)
    tl.store(partial_rows[:, None] + dims, result, mask=is_row[:, None] & (dims < HEAD_SIZE))
    row_lse = tl.where(has_keys, row_max + tl.log2(row_sum), float("-inf"))
    tl.store(lse + (token * NUM_HEADS + heads) * num_splits + split, row_lse, mask=is_row)


@triton.jit(do_not_specialize=["num_splits"])
def paged_decode_combine_kernel(
    partial,  # [tokens, num_heads, splits, head_size]
    lse,  # [tokens, num_heads, splits]
    out,  # [tokens, num_heads, head_size]
    query_start_loc,  # [requests + 1]
    num_splits,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    SPLITS_PADDED: tl.constexpr,
):
    """Program (n, h): the splits of request n's query head h, weighted by their share of the softmax."""
    request = tl.program_id(0)
    query_start = tl.load(query_start_loc + request)
    if tl.load(query_start_loc + request + 1) == query_start:
        return
    token = query_start.to(tl.int64)
    head = tl.program_id(1)
    splits = tl.arange(0, SPLITS_PADDED)
    dims = tl.arange(0, HEAD_PADDED)
    first = (token * NUM_HEADS + head) * num_splits
    split_lse = tl.load(lse + first + splits, mask=splits < num_splits, other=float("-inf"))
    weights = tl.exp2(split_lse - tl.max(split_lse, 0))
    results = tl.load(
        partial + (first + splits)[:, None] * HEAD_SIZE + dims[None, :],
        mask=(splits < num_splits)[:, None] & (dims < HEAD_SIZE)[None, :],
        other=0.0,
    )
    combined = tl.sum(results * weights[:, None], 0) / tl.sum(weights, 0)
    out_row = out + token * out_stride_token + head.to(tl.int64) * out_stride_head
    tl.store(out_row + dims, combined.to(out.dtype.element_ty), mask=dims < HEAD_SIZE)


def decode_config(head_padded: int, page_slots: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile shape and launch options. Tiles of keys stay within a page, and may span blocks."""
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles, or registers spill
        widest, num_stages = MIN_DOT_SIZE, 2
    else:
        widest, num_stages = 64, 5
    block_n = min(largest_power_of_two_divisor(page_slots), widest)
    return {"BLOCK_N": block_n, "num_warps": 4, "num_stages": num_stages}


def choose_num_splits(programs: int, device: torch.device) -> int:
    """Splits that give every multiprocessor a few programs, when there are `programs` without any."""
    return max(1, min(MAX_SPLITS, PROGRAMS_PER_PROCESSOR * _num_multiprocessors(device) // programs))


@lru_cache
def _num_multiprocessors(device: torch.device) -> int:
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


def _most_tiles(
    window_table: torch.Tensor, strided_table: torch.Tensor, layout: TierLayout, block_n: int
) -> int:
    """No query has more tiles of keys than this, whatever its length."""
    window_slots = window_table.shape[1] * layout.page_slots
    strided_slots = strided_table.shape[1] * layout.page_slots
    window_tokens = min(window_slots, layout.pattern.window_tokens + block_n)
    return max(1, (window_tokens + strided_slots) // block_n)


def paged_decode(
    q: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_table: torch.Tensor,
    strided_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    num_splits: int | None = None,
) -> None:
    """S2-Attention of a batch of requests with one query each, or none.

    The keys and values of the queries' own tokens must be in the caches already. Nothing outside a
    query's set is read, neither a page nor what the block table says about it. The launch depends on
    shapes only, so that it can be captured in a CUDA graph, once a first call has put the pattern's
    tables on the device.

    Args:
        q: [tokens, num_heads, head_size], any strides but a contiguous last dimension; a request's
            query is the last token of its sequence.
        window_cache, strided_cache: [pages, num_kv_heads, page_slots, 2 * head_size], likewise.
        window_table, strided_table: int32 [requests, *], page of each span of a tier's page tokens.
        query_start_loc: int32 [requests + 1], rising by 1, or by 0 for a padding request.
        seq_lens: int32 [requests], context and query.
        pattern: the pattern of these heads.
        scale: factor on the logits, positive.
        out: as q; rows of tokens that belong to no request are left as they are.
        num_splits: programs that share the keys of a request and KV head; by default enough to fill the
            device. At most MAX_SPLITS, and no more than there can be tiles of keys.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value; the message names it.
    """
    layout = check_paged_arguments(
        q,
        window_cache,
        strided_cache,
        window_table,
        strided_table,
        query_start_loc,
        seq_lens,
        pattern,
        scale,
        out,
    )
    if num_splits is not None and num_splits < 1:
        raise ValueError(f"num_splits: {num_splits}, expected a positive integer")
    num_tokens, num_heads, head_size = q.shape
    num_requests = seq_lens.shape[0]
    if num_tokens == 0 or num_requests == 0:
        return
    head_padded = max(MIN_DOT_SIZE, triton.next_power_of_2(head_size))
    config = decode_config(head_padded, layout.page_slots, q.dtype)
    if num_splits is None:
        num_splits = choose_num_splits(num_requests * pattern.num_kv_heads, q.device)
    most_tiles = _most_tiles(window_table, strided_table, layout, config["BLOCK_N"])
    num_splits = min(num_splits, MAX_SPLITS, most_tiles)

    lse = torch.empty(num_tokens, num_heads, num_splits, dtype=torch.float32, device=q.device)
    if num_splits == 1:
        partial = out[:, :, None]
    else:
        partial = torch.empty(*lse.shape, head_size, dtype=torch.float32, device=q.device)
    tables = head_tables(pattern, q.device)
    paged_decode_fwd_kernel[(num_requests, pattern.num_kv_heads, num_splits)](
        q,
        window_cache,
        strided_cache,
        window_table,
        strided_table,
        query_start_loc,
        seq_lens,
        tables.kept,
        tables.rank,
        partial,
        lse,
        scale * LOG2_E,
        num_splits,
        *q.stride()[:2],
        *window_cache.stride()[:3],
        *strided_cache.stride()[:3],
        window_table.stride(0),
        strided_table.stride(0),
        *partial.stride()[:3],
        NUM_HEADS=num_heads,
        GROUP_SIZE=pattern.group_size,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        PAGE_SLOTS=layout.page_slots,
        BLOCK_SIZE=pattern.block_size,
        LOCAL_BLOCKS=pattern.local_blocks,
        VERT_STRIDE=pattern.vert_stride,
        NUM_KEPT=pattern.num_kept,
        KEPT_PADDED=triton.next_power_of_2(pattern.num_kept),
        BLOCK_M=max(MIN_DOT_SIZE, triton.next_power_of_2(pattern.group_size)),
        **config,
    )
    if num_splits > 1:
        paged_decode_combine_kernel[(num_requests, num_heads)](
            partial,
            lse,
            out,
            query_start_loc,
            num_splits,
            *out.stride()[:2],
            NUM_HEADS=num_heads,
            HEAD_SIZE=head_size,
            HEAD_PADDED=head_padded,
            SPLITS_PADDED=triton.next_power_of_2(num_splits),
            num_warps=4 if head_padded <= 128 else 8,
        )
