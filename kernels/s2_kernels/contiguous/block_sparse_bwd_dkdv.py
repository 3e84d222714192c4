"""The gradients of the keys and values of block-sparse attention: a program owns a tile of keys of a KV head.

It meets all queries of all query heads that read the KV head, one after the other, and so needs no atomic
addition: two runs give the same bits, and the query heads share the tile's keys and values. With P, dP and
dS as in `block_sparse_bwd_dq`, dV = P^T dO and dK = scale * dS^T Q. Everything is computed transposed, with
keys as rows: products of two tiles then need no transposition of P and dS.
"""

from __future__ import annotations

import triton
import triton.language as tl

from s2_kernels.contiguous.steps import load_row_bits, load_starts, positions_of_step
from s2_kernels.tiles import finite_rows, load_tile, load_tile_where, query_key


@triton.jit
def add_head(
    d_keys,
    d_values,
    key_tile,
    values,
    keys,  # [BLOCK_N], their positions
    q,  # where the head's query of position 0 would be
    d_out,
    lse,
    delta,
    visits,
    starts,
    row_bits,
    first_position,
    end_position,
    block_of_key,  # [BLOCK_N], in the tile
    scale_log2,
    q_stride_token,
    d_out_stride_token,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
):
    """Add to the gradients [BLOCK_N, HEAD_PADDED] of keys (without scale) and values what one head gives."""
    LOG2_E: tl.constexpr = 1.4426950408889634
    num_shared = tl.load(visits + 1).to(tl.int32)
    num_unmasked = num_shared + tl.load(visits + 3).to(tl.int32)
    num_visits = num_shared + tl.load(visits + 4).to(tl.int32)
    table = (
        num_shared,
        tl.load(visits),
        num_shared,
        tl.load(visits),
        num_visits,
        tl.load(visits + 2) - num_shared,
    )
    start = load_starts(starts, 0, table, end_position, BLOCK_SIZE, BLOCK_M)
    unmasked_steps = num_unmasked * BLOCK_SIZE // BLOCK_M
    for step in range(0, unmasked_steps):
        positions = positions_of_step(start, step, BLOCK_SIZE, BLOCK_M).to(tl.int64)
        start = load_starts(starts, step + 1, table, end_position, BLOCK_SIZE, BLOCK_M)
        queries = load_tile(q + positions * q_stride_token, HEAD_SIZE, HEAD_PADDED)
        d_rows = load_tile(d_out + positions * d_out_stride_token, HEAD_SIZE, HEAD_PADDED)
        row_lse = tl.load(lse + positions) * LOG2_E
        weights = tl.exp2(query_key(key_tile, queries) * scale_log2 - row_lse[None, :])
        d_values = tl.dot(weights.to(d_rows.dtype), d_rows, d_values, input_precision="ieee")
        d_logits = weights * (query_key(values, d_rows) - tl.load(delta + positions)[None, :])
        d_keys = tl.dot(d_logits.to(queries.dtype), queries, d_keys, input_precision="ieee")

    # The rest: for some of the tile's blocks, not later than all of its keys, or not of the sequence as a
    # whole. What is not finite must not reach the keys that it does not attend to.
    bits = load_row_bits(row_bits, unmasked_steps, table, BLOCK_SIZE, BLOCK_M)
    for step in range(unmasked_steps, tl.cdiv(num_visits * BLOCK_SIZE, BLOCK_M)):
        positions = positions_of_step(start, step, BLOCK_SIZE, BLOCK_M)
        bits_of_rows = tl.zeros((BLOCK_M,), tl.int32) + bits
        start = load_starts(starts, step + 1, table, end_position, BLOCK_SIZE, BLOCK_M)
        bits = load_row_bits(row_bits, step + 1, table, BLOCK_SIZE, BLOCK_M)
        is_row = (positions >= first_position) & (positions < end_position)
        places = positions.to(tl.int64)
        q_rows, d_out_rows = q + places * q_stride_token, d_out + places * d_out_stride_token
        queries, of_queries = finite_rows(load_tile_where(q_rows, is_row, HEAD_SIZE, HEAD_PADDED))
        d_rows, of_d_rows = finite_rows(load_tile_where(d_out_rows, is_row, HEAD_SIZE, HEAD_PADDED))
        row_lse = tl.load(lse + places, mask=is_row, other=0.0) * LOG2_E
        row_delta = tl.load(delta + places, mask=is_row, other=0.0)
        attends = (bits_of_rows[None, :] >> block_of_key[:, None]) & 1
        visible = (attends != 0) & is_row[None, :]
        if CAUSAL:
            visible &= keys[:, None] <= positions[None, :]
        not_finite = (of_queries + of_d_rows)[None, :]
        weights = tl.exp2(query_key(key_tile, queries) * scale_log2 - row_lse[None, :]) + not_finite
        weights = tl.where(visible, weights, 0.0)
        d_values = tl.dot(weights.to(d_rows.dtype), d_rows, d_values, input_precision="ieee")
        d_logits = weights * (query_key(values, d_rows) - row_delta[None, :])
        d_logits = tl.where(visible, d_logits, 0.0)
        d_keys = tl.dot(d_logits.to(queries.dtype), queries, d_keys, input_precision="ieee")
    return d_keys, d_values


@triton.jit(do_not_specialize=["num_tiles", "lse_stride_batch", "lse_stride_head"])
def block_sparse_bwd_dkdv_kernel(
    q,  # [batch, queries, num_heads, head_size]
    k,  # [batch, keys, num_kv_heads, head_size]
    v,  # as k
    d_out,  # as q
    lse,  # [batch, num_heads, queries]
    delta,  # as lse
    tiles,  # [classes * num_tiles, TILE_FIELDS]
    key_starts,  # [classes * num_tiles, blocks of a tile]
    visits,  # [pairs * num_tiles, VISIT_FIELDS]
    starts,  # [entries]
    row_bits,  # [visits that are of one tile only]
    class_of_kv_head,  # [num_kv_heads]
    pair_of_head,  # [num_heads]
    dk,  # as k
    dv,  # as k
    scale,
    scale_log2,
    num_tiles,
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
    dk_stride_batch: tl.int64,
    dk_stride_token: tl.int64,
    dk_stride_head: tl.int64,
    dv_stride_batch: tl.int64,
    dv_stride_token: tl.int64,
    dv_stride_head: tl.int64,
    lse_stride_batch: tl.int64,
    lse_stride_head: tl.int64,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    CAUSAL: tl.constexpr,
    TILE_FIELDS: tl.constexpr,
    VISIT_FIELDS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program (n * parts + p) * num_kv_heads + h: part p of tile n of KV head h.

    Where a block is larger than BLOCK_N it is a tile, which several programs share.
    """
    PARTS: tl.constexpr = BLOCK_SIZE // BLOCK_N if BLOCK_SIZE > BLOCK_N else 1
    BLOCKS: tl.constexpr = BLOCK_N // BLOCK_SIZE if BLOCK_N > BLOCK_SIZE else 1
    program = tl.program_id(0)
    kv_head = program % NUM_KV_HEADS
    tile = program // NUM_KV_HEADS // PARTS
    of_class = tl.load(class_of_kv_head + kv_head) * num_tiles + tile
    tiles += of_class.to(tl.int64) * TILE_FIELDS
    batch = tl.load(tiles).to(tl.int64)
    query_start = tl.load(tiles + 1)
    key_start = tl.load(tiles + 2).to(tl.int64)
    first_position = tl.load(tiles + 3)
    end_position = tl.load(tiles + 4)
    num_keys = tl.load(tiles + 5)

    lanes = program // NUM_KV_HEADS % PARTS * BLOCK_N + tl.arange(0, BLOCK_N)
    block_of_key = lanes // BLOCK_SIZE
    keys = tl.load(key_starts + of_class.to(tl.int64) * BLOCKS + block_of_key) + lanes % BLOCK_SIZE
    is_key = keys < num_keys
    tokens = key_start + keys
    of_kv_head = kv_head.to(tl.int64)
    k += batch * k_stride_batch + of_kv_head * k_stride_head
    v += batch * v_stride_batch + of_kv_head * v_stride_head
    key_tile = load_tile_where(k + tokens * k_stride_token, is_key, HEAD_SIZE, HEAD_PADDED)
    values = load_tile_where(v + tokens * v_stride_token, is_key, HEAD_SIZE, HEAD_PADDED)
    d_keys = tl.zeros((BLOCK_N, HEAD_PADDED), tl.float32)
    d_values = tl.zeros((BLOCK_N, HEAD_PADDED), tl.float32)

    first_token = (query_start - first_position).to(tl.int64)
    q += batch * q_stride_batch + first_token * q_stride_token
    d_out += batch * d_out_stride_batch + first_token * d_out_stride_token
    first_row = batch * lse_stride_batch + first_token
    for member in range(GROUP_SIZE):
        head = kv_head * GROUP_SIZE + member
        of_pair = tl.load(pair_of_head + head) * num_tiles + tile
        of_head = head.to(tl.int64)
        d_keys, d_values = add_head(
            d_keys,
            d_values,
            key_tile,
            values,
            keys,
            q + of_head * q_stride_head,
            d_out + of_head * d_out_stride_head,
            lse + first_row + of_head * lse_stride_head,
            delta + first_row + of_head * lse_stride_head,
            visits + of_pair.to(tl.int64) * VISIT_FIELDS,
            starts,
            row_bits,
            first_position,
            end_position,
            block_of_key,
            scale_log2,
            q_stride_token,
            d_out_stride_token,
            HEAD_SIZE,
            HEAD_PADDED,
            BLOCK_SIZE,
            CAUSAL,
            BLOCK_M,
        )

    dims = tl.arange(0, HEAD_PADDED)[None, :]
    is_element = is_key[:, None] & (dims < HEAD_SIZE)
    dk += batch * dk_stride_batch + of_kv_head * dk_stride_head
    dv += batch * dv_stride_batch + of_kv_head * dv_stride_head
    d_keys = (d_keys * scale).to(dk.dtype.element_ty)
    tl.store(dk + tokens[:, None] * dk_stride_token + dims, d_keys, mask=is_element)
    d_values = d_values.to(dv.dtype.element_ty)
    tl.store(dv + tokens[:, None] * dv_stride_token + dims, d_values, mask=is_element)
