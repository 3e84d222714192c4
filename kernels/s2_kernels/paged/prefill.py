"""S2-Attention of many queries per request on the two-tier paged KV cache: prefill, chunked or not.

A program owns BLOCK_M consecutive queries (a tile) of one query head. Tiles start at a request's first
query, wherever that is in a block, and may span several blocks: strided blocks sit at absolute positions,
so the rows of a tile share them, and only the edges of the window differ from row to row (merge-Q).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from s2_kernels import layout as layouts
from s2_kernels import pattern as patterns
from s2_kernels.launch import limits
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E, MIN_DOT_SIZE, padded_head_size
from s2_kernels.layout import HeadTables, TierLayout
from s2_kernels.paged.calls import AttendCall, attend_strides
from s2_kernels.paged.requests import UNALIGNED, PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import (
    first_tile,
    has_nan,
    load_kv,
    load_kv_where,
    load_tile_where,
    masked_softmax_step,
    query_key,
    softmax_step,
)

VARYING = tl.constexpr(limits.VARYING)
ALL_RESIDUES = tl.constexpr(layouts.ALL_RESIDUES)
NO_RESIDUE = tl.constexpr(patterns.NO_RESIDUE)

first_tile_of = triton.jit(first_tile)


@triton.jit
def request_of_tile(query_start_loc, tile, num_requests, BLOCK_M: tl.constexpr):
    """The last request whose tiles start at or before `tile`."""
    low = tl.full((), 0, tl.int32)
    high = low + num_requests
    while high - low > 1:
        middle = (low + high) // 2
        starts_before = first_tile_of(tl.load(query_start_loc + middle), middle, BLOCK_M) <= tile
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle)
    return low


@triton.jit
def strided_token(n, rank, num_kept, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The strided tier's token that tile n of the blocks of one kept residue starts with."""
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    return (n // TILES * num_kept + rank) * BLOCK_SIZE + n % TILES * BLOCK_N


@triton.jit
def edge_token(n, num_old, old_first, causal_first, BLOCK_N: tl.constexpr):
    """The token that tile n of the window's edges starts with: first the old edge, then the causal one."""
    return tl.where(n < num_old, old_first + n, causal_first + n - num_old) * BLOCK_N


@triton.jit
def attend_rows(
    first_row,  # of BLOCK_M, among the request's queries
    query_len,
    context_len,
    q,  # the head's part of the request's first query
    window_cache,  # first page of the KV head
    strided_cache,
    window_table,  # the request's row
    strided_table,
    residue,
    rank,
    stride,  # of the head's strided blocks, and how many of its KV head are between them
    num_kept,
    strided_page_slots,  # of the KV head
    out,  # as q
    scale_log2,
    q_stride_token,
    window_stride_page,
    window_stride_slot,
    strided_stride_page,
    strided_stride_slot,
    out_stride_token,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ISOLATE: tl.constexpr,
):
    """Attention of BLOCK_M queries of a request. Returns whether a result is NaN.

    ISOLATE: values that are not finite reach only the queries that attend to them. It is slow, and needs many
    registers for large tiles.
    """
    # Rows past the last query repeat it, so that no row of the tile is without keys.
    rows = first_row + tl.arange(0, BLOCK_M)
    is_row = rows < query_len
    last_position = context_len + tl.minimum(first_row + BLOCK_M, query_len) - 1
    positions = tl.minimum(context_len + rows, last_position)
    window_starts = (positions // BLOCK_SIZE - LOCAL_BLOCKS + 1) * BLOCK_SIZE
    first_block = (context_len + first_row) // BLOCK_SIZE
    last_block = last_position // BLOCK_SIZE

    queries = load_tile_where(q + rows.to(tl.int64) * q_stride_token, is_row, HEAD_SIZE, HEAD_PADDED)
    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    # Everywhere below, a tile's page is loaded a step ahead: a load that the step's own addresses waited for
    # would take pipeline stages of its own.

    # Strided blocks older than the window: of all rows, then of the last rows only.
    TILES: tl.constexpr = BLOCK_SIZE // BLOCK_N
    tiles_all = tl.maximum(first_block - LOCAL_BLOCKS - residue + stride, 0) // stride * TILES
    tiles_any = tl.maximum(last_block - LOCAL_BLOCKS - residue + stride, 0) // stride * TILES
    first_strided = 0
    if SINK_BLOCKS > 0:
        first_strided = tl.maximum(SINK_BLOCKS - residue + stride - 1, 0) // stride * TILES
    first_token = strided_token(first_strided, rank, num_kept, BLOCK_SIZE, BLOCK_N)
    page = tl.load(strided_table + first_token // strided_page_slots, mask=tiles_any > first_strided, other=0)
    for n in range(first_strided, tiles_all):
        first_token = strided_token(n, rank, num_kept, BLOCK_SIZE, BLOCK_N)
        k, v = load_kv(
            strided_cache,
            page,
            first_token,
            strided_stride_page,
            strided_stride_slot,
            strided_page_slots,
            BLOCK_N,
            HEAD_SIZE,
            HEAD_PADDED,
        )
        next_token = strided_token(tl.minimum(n + 1, tiles_any - 1), rank, num_kept, BLOCK_SIZE, BLOCK_N)
        page = tl.load(strided_table + next_token // strided_page_slots)
        logits = query_key(queries, k)
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)
    for n in range(tl.maximum(first_strided, tiles_all), tiles_any):
        first_token = strided_token(n, rank, num_kept, BLOCK_SIZE, BLOCK_N)
        k, v = load_kv(
            strided_cache,
            page,
            first_token,
            strided_stride_page,
            strided_stride_slot,
            strided_page_slots,
            BLOCK_N,
            HEAD_SIZE,
            HEAD_PADDED,
        )
        next_token = strided_token(tl.minimum(n + 1, tiles_any - 1), rank, num_kept, BLOCK_SIZE, BLOCK_N)
        page = tl.load(strided_table + next_token // strided_page_slots)
        block_start = (n // TILES * stride + residue) * BLOCK_SIZE
        is_older = block_start < window_starts
        acc, row_max, row_sum = masked_softmax_step(
            query_key(queries, k), is_older[:, None], v, acc, row_max, row_sum, scale_log2, ISOLATE
        )

    # The sinks that are older than the window.
    if SINK_BLOCKS > 0:
        sink_tiles = tl.minimum(tl.maximum(last_block - LOCAL_BLOCKS + 1, 0), SINK_BLOCKS) * TILES
        for n in range(0, sink_tiles):
            first_token = n * BLOCK_N
            page = tl.load(window_table + first_token // PAGE_SLOTS)
            k, v = load_kv(
                window_cache,
                page,
                first_token,
                window_stride_page,
                window_stride_slot,
                PAGE_SLOTS,
                BLOCK_N,
                HEAD_SIZE,
                HEAD_PADDED,
            )
            is_older = first_token < window_starts
            acc, row_max, row_sum = masked_softmax_step(
                query_key(queries, k), is_older[:, None], v, acc, row_max, row_sum, scale_log2, ISOLATE
            )

    # The part of the window that every row sees, then its old and its causal edge.
    window_first = tl.maximum(first_block - LOCAL_BLOCKS + 1, 0)
    shared_first = tl.maximum(last_block - LOCAL_BLOCKS + 1, 0)
    shared_end = first_block * TILES
    first_token = shared_first * BLOCK_SIZE
    page = tl.load(window_table + first_token // PAGE_SLOTS, mask=shared_first < first_block, other=0)
    for n in range(shared_first * TILES, shared_end):
        first_token = n * BLOCK_N
        k, v = load_kv(
            window_cache,
            page,
            first_token,
            window_stride_page,
            window_stride_slot,
            PAGE_SLOTS,
            BLOCK_N,
            HEAD_SIZE,
            HEAD_PADDED,
        )
        page = tl.load(window_table + tl.minimum(n + 1, shared_end - 1) * BLOCK_N // PAGE_SLOTS)
        logits = query_key(queries, k)
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)
    old_first = window_first * TILES
    num_old = shared_first * TILES - old_first
    causal_first = tl.maximum(first_block, shared_first) * TILES
    num_edge = num_old + last_position // BLOCK_N + 1 - causal_first
    first_token = edge_token(0, num_old, old_first, causal_first, BLOCK_N)
    page = tl.load(window_table + first_token // PAGE_SLOTS)
    for n in range(0, num_edge):
        first_token = edge_token(n, num_old, old_first, causal_first, BLOCK_N)
        keys = first_token + tl.arange(0, BLOCK_N)
        is_written = keys <= last_position
        k, v = load_kv_where(
            is_written,
            window_cache,
            page,
            first_token,
            window_stride_page,
            window_stride_slot,
            PAGE_SLOTS,
            BLOCK_N,
            HEAD_SIZE,
            HEAD_PADDED,
        )
        next_token = edge_token(tl.minimum(n + 1, num_edge - 1), num_old, old_first, causal_first, BLOCK_N)
        page = tl.load(window_table + next_token // PAGE_SLOTS)
        visible = (keys[None, :] >= window_starts[:, None]) & (keys[None, :] <= positions[:, None])
        acc, row_max, row_sum = masked_softmax_step(
            query_key(queries, k), visible, v, acc, row_max, row_sum, scale_log2, ISOLATE
        )

    dims = tl.arange(0, HEAD_PADDED)[None, :]
    out_rows = out + rows.to(tl.int64) * out_stride_token
    result = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out_rows[:, None] + dims, result, mask=is_row[:, None] & (dims < HEAD_SIZE))
    return has_nan(acc)


@triton.jit(
    do_not_specialize=["num_requests", "window_table_stride", "strided_table_stride"],
    do_not_specialize_on_alignment=UNALIGNED,
)
def paged_prefill_fwd_kernel(
    q,  # [tokens, num_heads, head_size]
    window_cache,  # [pages, num_kv_heads, page_slots, 2 * head_size]
    strided_cache,
    window_table,  # [requests, pages]
    strided_table,
    query_start_loc,  # [requests + 1]
    seq_lens,  # [requests]
    residues,  # [num_heads]
    ranks,  # [num_heads]
    first_kept,  # [num_kv_heads + 1]
    out,  # as q
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
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILE: tl.constexpr,
):
    """Program (h, -t): query head h, query tile t; late tiles, which have more keys, start first."""
    tile = tl.num_programs(1) - 1 - tl.program_id(1)
    request = request_of_tile(query_start_loc, tile, num_requests, BLOCK_M)
    query_start = tl.load(query_start_loc + request)
    query_len = tl.load(query_start_loc + request + 1) - query_start
    first_row = (tile - first_tile_of(query_start, request, BLOCK_M)) * BLOCK_M
    if first_row >= query_len:
        return

    head = tl.program_id(0)
    kv_head = (head // GROUP_SIZE).to(tl.int64)
    window_cache += kv_head * window_stride_head
    window_table += request.to(tl.int64) * window_table_stride
    strided_table += request.to(tl.int64) * strided_table_stride

    context_len = tl.load(seq_lens + request) - query_len
    residue = tl.load(residues + head)
    rank = tl.load(ranks + head)
    if NUM_KEPT == VARYING:
        strided_row = tl.load(first_kept + kv_head).to(tl.int64)
        num_kept = tl.load(first_kept + kv_head + 1) - strided_row.to(tl.int32)
        strided_page_slots = tl.maximum(num_kept, 1) * RESIDUE_SLOTS
        # A full head is one of stride 1; a streaming head has a residue that no block comes to.
        is_full = rank == ALL_RESIDUES
        stride = tl.where(is_full, 1, VERT_STRIDE)
        num_kept = tl.where(is_full, 1, num_kept)
        residue = tl.where(is_full, 0, tl.where(rank == NO_RESIDUE, 1 << 30, residue))
        rank = tl.maximum(rank, 0)
    else:
        strided_row = kv_head
        num_kept = NUM_KEPT
        strided_page_slots = PAGE_SLOTS
        stride = VERT_STRIDE
    strided_cache += strided_row * strided_stride_head
    q += query_start.to(tl.int64) * q_stride_token + head.to(tl.int64) * q_stride_head
    out += query_start.to(tl.int64) * out_stride_token + head.to(tl.int64) * out_stride_head
    is_nan = attend_rows(
        first_row,
        query_len,
        context_len,
        q,
        window_cache,
        strided_cache,
        window_table,
        strided_table,
        residue,
        rank,
        stride,
        num_kept,
        strided_page_slots,
        out,
        scale_log2,
        q_stride_token,
        window_stride_page,
        window_stride_slot,
        strided_stride_page,
        strided_stride_slot,
        out_stride_token,
        HEAD_SIZE,
        HEAD_PADDED,
        PAGE_SLOTS,
        SINK_BLOCKS,
        BLOCK_SIZE,
        LOCAL_BLOCKS,
        BLOCK_M,
        BLOCK_N,
        ISOLATE=False,
    )
    # A value that is NaN or infinite reaches every row that shares its tile of keys, so that these rows are
    # computed again with care. What they need takes no registers from the loops above.
    if is_nan:
        tl.debug_barrier()
        for row in range(first_row, tl.minimum(first_row + BLOCK_M, query_len), MIN_TILE):
            attend_rows(
                row,
                query_len,
                context_len,
                q,
                window_cache,
                strided_cache,
                window_table,
                strided_table,
                residue,
                rank,
                stride,
                num_kept,
                strided_page_slots,
                out,
                scale_log2,
                q_stride_token,
                window_stride_page,
                window_stride_slot,
                strided_stride_page,
                strided_stride_slot,
                out_stride_token,
                HEAD_SIZE,
                HEAD_PADDED,
                PAGE_SLOTS,
                SINK_BLOCKS,
                BLOCK_SIZE,
                LOCAL_BLOCKS,
                MIN_TILE,
                MIN_TILE,
                ISOLATE=True,
            )


def prefill_config(head_padded: int, block_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Tile shapes and launch options. Tiles of keys stay within a block."""
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles, or registers spill
        defaults = {"BLOCK_M": 32, "BLOCK_N": MIN_DOT_SIZE, "num_warps": 8, "num_stages": 2}
        # The slow loops would take more registers than the others need, and fewer programs would fit.
        defaults["maxnreg"] = 80 if head_padded <= 128 else 128
    elif head_padded > 128:
        defaults = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    else:
        num_warps = 8 if head_padded == 128 else 4
        defaults = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": num_warps, "num_stages": 3}
    config = launch_config("prefill", shape_key(head_padded, dtype), defaults)
    return config | {"BLOCK_N": min(block_size, config["BLOCK_N"])}


def prepare_prefill(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    tables: HeadTables,
) -> AttendCall:
    """`s2_kernels.paged.attend` of a batch of requests with any number of queries each, after its checks."""
    num_tokens, num_heads, head_size = q.shape
    num_requests = len(requests.seq_lens)
    head_padded = padded_head_size(head_size)
    layout = TierLayout.of_caches(pattern, requests.window_cache, requests.strided_cache)
    config = prefill_config(head_padded, pattern.block_size, q.dtype)
    arguments = {
        "q": q,
        **requests._asdict(),
        "residues": tables.residue,
        "ranks": tables.rank,
        "first_kept": tables.first_kept,
        "out": out,
        "scale_log2": scale * LOG2_E,
        "num_requests": num_requests,
        **attend_strides(q, requests, out),
        "GROUP_SIZE": pattern.group_size,
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": head_padded,
        "PAGE_SLOTS": requests.window_cache.shape[2],
        "RESIDUE_SLOTS": layout.residue_slots,
        "SINK_BLOCKS": limits.sink_blocks(pattern),
        "BLOCK_SIZE": pattern.block_size,
        "LOCAL_BLOCKS": limits.local_blocks(pattern),
        "VERT_STRIDE": pattern.vert_stride,
        "NUM_KEPT": limits.num_kept(layout),
        "MIN_TILE": MIN_DOT_SIZE,
        "BLOCK_M": config.pop("BLOCK_M"),
        "BLOCK_N": config.pop("BLOCK_N"),
    }
    grid = (num_heads, first_tile(num_tokens, num_requests, arguments["BLOCK_M"]))
    varying = ("q", "window_cache", "strided_cache", "out", "residues", "ranks", "first_kept")
    launch = KernelLaunch(paged_prefill_fwd_kernel, grid, arguments, varying, **config)

    def attend(
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        launch(q, window_cache, strided_cache, out, tables.residue, tables.rank, tables.first_kept)

    return attend
