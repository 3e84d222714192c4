"""The gradient of the queries of block-sparse attention: a program owns a tile, as in the forward pass.

With P the attention weights, made again from the log-sum-exp, dP = dO V^T and delta = rowsum(dO * O), the
gradient of the scaled logits is dS = P * (dP - delta), and dQ = scale * dS K (arXiv 2205.14135, appendix
B.4). A gradient of the log-sum-exp adds P times it to dS: delta has it subtracted.
"""

from __future__ import annotations

import triton
import triton.language as tl

from s2_kernels.contiguous.steps import load_row_bits, load_starts, positions_of_step
from s2_kernels.tiles import finite_rows, load_tile, load_tile_where, query_key


@triton.jit(do_not_specialize=["num_groups", "lse_stride_batch", "lse_stride_head"])
def block_sparse_bwd_dq_kernel(
    q,  # [batch, queries, num_heads, head_size]
    k,  # [batch, keys, num_kv_heads, head_size]
    v,  # as k
    d_out,  # as q
    lse,  # [batch, num_heads, queries]
    delta,  # as lse
    tiles,  # [tiles, TILE_FIELDS]
    groups,  # [masks * num_groups, GROUP_FIELDS]
    starts,  # [visits]
    row_bits,  # [visits that are of one group only]
    mask_of_head,  # [mask heads]
    dq,  # as q
    scale,
    scale_log2,
    num_groups,
    q_stride_batch: tl.int64,
    q_stride_token: tl.int64,
    q_stride_head: tl.int64,
    k_stride_batch: tl.int64,
    k_stride_token: tl.int64,
    k_stride_head: tl.int64,
    v_stride_batch: tl.int64,
    v_stride_token: tl.int64,
    v_stride_head: tl.int64,
    d_out_stride_batch: tl.int64,
    d_out_stride_token: tl.int64,
    d_out_stride_head: tl.int64,
    dq_stride_batch: tl.int64,
    dq_stride_token: tl.int64,
    dq_stride_head: tl.int64,
    lse_stride_batch: tl.int64,
    lse_stride_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    MASK_GROUP_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    GROUP_FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program n * num_heads + h: tile n of the table, query head h."""
    program = tl.program_id(0)
    head = program % NUM_HEADS
    tiles += program // NUM_HEADS * TILE_FIELDS
    batch = tl.load(tiles).to(tl.int64)
    tile = tl.load(tiles + 1)
    query_start = tl.load(tiles + 2)
    key_start = tl.load(tiles + 3)
    first_position = tl.load(tiles + 4)
    end_position = tl.load(tiles + 5)
    num_keys = tl.load(tiles + 6)

    kv_head = (head // GROUP_SIZE).to(tl.int64)
    k += batch * k_stride_batch + kv_head * k_stride_head + key_start.to(tl.int64) * k_stride_token
    v += batch * v_stride_batch + kv_head * v_stride_head + key_start.to(tl.int64) * v_stride_token
    positions = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = (positions >= first_position) & (positions < end_position)
    tokens = (query_start - first_position + positions).to(tl.int64)
    of_head = head.to(tl.int64)
    q += batch * q_stride_batch + of_head * q_stride_head
    d_out += batch * d_out_stride_batch + of_head * d_out_stride_head
    queries = load_tile_where(q + tokens * q_stride_token, is_row, HEAD_SIZE, HEAD_PADDED)
    d_rows = load_tile_where(d_out + tokens * d_out_stride_token, is_row, HEAD_SIZE, HEAD_PADDED)
    LOG2_E: tl.constexpr = 1.4426950408889634
    row = batch * lse_stride_batch + of_head * lse_stride_head + tokens
    row_lse = tl.load(lse + row, mask=is_row, other=0.0) * LOG2_E
    row_delta = tl.load(delta + row, mask=is_row, other=0.0)
    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)

    GROUP_TOKENS: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_SIZE else BLOCK_SIZE
    mask = tl.load(mask_of_head + head // MASK_GROUP_SIZE)
    groups += (mask * num_groups + tile * BLOCK_M // GROUP_TOKENS).to(tl.int64) * GROUP_FIELDS
    end_0 = tl.load(groups + 1).to(tl.int32)
    end_1 = end_0 + tl.load(groups + 3).to(tl.int32)
    num_unmasked = end_1 + tl.load(groups + 5).to(tl.int32)
    num_visits = end_1 + tl.load(groups + 6).to(tl.int32)
    start_0, start_1, start_own = tl.load(groups), tl.load(groups + 2), tl.load(groups + 4)
    table = (end_0, start_0, end_1, start_1 - end_0, num_visits, start_own - end_1)

    # Tables are read a step ahead, as in the forward pass.
    start = load_starts(starts, 0, table, num_keys, BLOCK_SIZE, BLOCK_N)
    unmasked_steps = num_unmasked * BLOCK_SIZE // BLOCK_N
    if not CAUSAL:
        unmasked_steps = 0
    for step in range(0, unmasked_steps):
        keys = positions_of_step(start, step, BLOCK_SIZE, BLOCK_N).to(tl.int64)
        start = load_starts(starts, step + 1, table, num_keys, BLOCK_SIZE, BLOCK_N)
        key_tile = load_tile(k + keys * k_stride_token, HEAD_SIZE, HEAD_PADDED)
        values = load_tile(v + keys * v_stride_token, HEAD_SIZE, HEAD_PADDED)
        weights = tl.exp2(query_key(queries, key_tile) * scale_log2 - row_lse[:, None])
        d_logits = weights * (query_key(d_rows, values) - row_delta[:, None])
        acc = tl.dot(d_logits.to(key_tile.dtype), key_tile, acc, input_precision="ieee")

    # The rest: for some of the rows, or not older than all of them. What is not finite must not reach the
    # rows that do not attend to it.
    row_in_group = positions % GROUP_TOKENS // BLOCK_SIZE
    bits = load_row_bits(row_bits, unmasked_steps, table, BLOCK_SIZE, BLOCK_N)
    for step in range(unmasked_steps, tl.cdiv(num_visits * BLOCK_SIZE, BLOCK_N)):
        keys = positions_of_step(start, step, BLOCK_SIZE, BLOCK_N)
        bits_of_keys = tl.zeros((BLOCK_N,), tl.int32) + bits
        start = load_starts(starts, step + 1, table, num_keys, BLOCK_SIZE, BLOCK_N)
        bits = load_row_bits(row_bits, step + 1, table, BLOCK_SIZE, BLOCK_N)
        is_key = keys < num_keys
        key_rows = k + keys.to(tl.int64) * k_stride_token
        value_rows = v + keys.to(tl.int64) * v_stride_token
        key_tile, not_finite = finite_rows(load_tile_where(key_rows, is_key, HEAD_SIZE, HEAD_PADDED))
        values = load_tile_where(value_rows, is_key, HEAD_SIZE, HEAD_PADDED)
        attends = (bits_of_keys[None, :] >> row_in_group[:, None]) & 1
        if CAUSAL:
            visible = (attends != 0) & (keys[None, :] <= positions[:, None])
        else:
            visible = (attends != 0) & is_key[None, :]
        weights = tl.exp2(query_key(queries, key_tile) * scale_log2 - row_lse[:, None])
        d_logits = weights * (query_key(d_rows, values) - row_delta[:, None]) + not_finite[None, :]
        d_logits = tl.where(visible, d_logits, 0.0)
        acc = tl.dot(d_logits.to(key_tile.dtype), key_tile, acc, input_precision="ieee")

    dims = tl.arange(0, HEAD_PADDED)[None, :]
    dq += batch * dq_stride_batch + of_head * dq_stride_head
    rows = dq + tokens[:, None] * dq_stride_token + dims
    tl.store(rows, (acc * scale).to(dq.dtype.element_ty), mask=is_row[:, None] & (dims < HEAD_SIZE))
