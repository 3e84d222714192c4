"""What the softmax takes off the gradients of a row's weights: delta (arXiv 2205.14135, appendix B.4)."""

from __future__ import annotations

import triton
import triton.language as tl

from s2_kernels.tiles import load_tile_where


@triton.jit(do_not_specialize=["num_queries", "num_row_tiles", "lse_stride_batch", "lse_stride_head"])
def block_sparse_bwd_delta_kernel(
    out,  # [batch, queries, num_heads, head_size]
    d_out,  # as out
    d_lse,  # [batch, num_heads, queries]
    delta,  # as d_lse
    num_queries,
    num_row_tiles,
    out_stride_batch: tl.int64,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    d_out_stride_batch: tl.int64,
    d_out_stride_token: tl.int64,
    d_out_stride_head: tl.int64,
    lse_stride_batch: tl.int64,
    lse_stride_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    WITH_D_LSE: tl.constexpr,
    ROWS: tl.constexpr,
):
    """rowsum(dO * O), less the gradient of the log-sum-exp.

    Program (b * num_row_tiles + n) * num_heads + h: tile n of the queries of batch entry b, query head h.
    """
    program = tl.program_id(0)
    head = (program % NUM_HEADS).to(tl.int64)
    row_tile = program // NUM_HEADS % num_row_tiles
    batch = (program // NUM_HEADS // num_row_tiles).to(tl.int64)
    tokens = row_tile * ROWS + tl.arange(0, ROWS).to(tl.int64)
    is_row = tokens < num_queries
    out += batch * out_stride_batch + head * out_stride_head
    d_out += batch * d_out_stride_batch + head * d_out_stride_head
    rows = load_tile_where(out + tokens * out_stride_token, is_row, HEAD_SIZE, HEAD_PADDED)
    d_rows = load_tile_where(d_out + tokens * d_out_stride_token, is_row, HEAD_SIZE, HEAD_PADDED)
    result = tl.sum(rows.to(tl.float32) * d_rows.to(tl.float32), 1)
    row = batch * lse_stride_batch + head * lse_stride_head + tokens
    if WITH_D_LSE:
        result -= tl.load(d_lse + row, mask=is_row, other=0.0)
    tl.store(delta + row, result, mask=is_row)
