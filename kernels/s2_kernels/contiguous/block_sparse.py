"""Block-sparse attention over contiguous keys and values, with an arbitrary block mask per head.

A program owns BLOCK_M consecutive positions (a tile) of one query head; tiles are aligned to positions, not
to a sequence's first query, so that a tile always covers the same rows of the mask. When blocks are smaller
than the tile it covers several rows (merge-Q): it visits the union of their key blocks, and each visit knows
which of the rows it is for. That holds for any mask, also one in which a dropped block returns.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import triton
import triton.language as tl

from s2_kernels.contiguous.sequences import Span, first_position
from s2_kernels.contiguous.steps import load_row_bits, load_starts, positions_of_step
from s2_kernels.contiguous.visits import GROUP_FIELDS, merge_rows
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.cuda_graphs import hold_for_graph
from s2_kernels.launch.limits import LOG2_E, MIN_DOT_SIZE, padded_head_size
from s2_kernels.masks import BlockMask
from s2_kernels.tiles import (
    has_nan,
    load_tile,
    load_tile_where,
    masked_softmax_step,
    query_key,
    softmax_step,
)

TILE_FIELDS = 7


@lru_cache(maxsize=16)
def tile_table(
    spans: tuple[Span, ...], first_positions: tuple[int, ...], block_m: int, device: torch.device
) -> torch.Tensor:
    """int32 [tiles, TILE_FIELDS], longest rows first.

    The fields: batch, tile, query start, key start, positions of the sequence's first query and of the one
    after the last, keys.
    """
    tiles = []
    for span, first in zip(spans, first_positions, strict=True):
        end = first + span.num_queries
        for tile in range(first // block_m, -(-end // block_m) if span.num_queries else 0):
            tiles.append((span.batch, tile, span.query_start, span.key_start, first, end, span.num_keys))
    tiles.sort(key=lambda fields: -fields[1])
    return torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, TILE_FIELDS)


@triton.jit
def attend_rows(
    first_row,  # position of the first of the rows
    q,  # where the head's query of position 0 would be
    k,  # first key of the sequence and KV head
    v,
    out,  # as q
    lse,
    first_position,
    end_position,
    num_keys,
    starts,
    row_bits,
    table,
    num_unmasked,
    scale_log2,
    q_stride_token,
    k_stride_token,
    v_stride_token,
    out_stride_token,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    GROUP_TOKENS: tl.constexpr,
    CAUSAL: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    ISOLATE: tl.constexpr,
):
    """Attention of BLOCK_M rows of a group of mask rows. Returns whether a result is NaN.

    ISOLATE: values that are not finite reach only the rows that attend to them. It is slow, and needs many
    registers for large tiles.
    """
    positions = first_row + tl.arange(0, BLOCK_M)
    is_row = (positions >= first_position) & (positions < end_position)
    queries = load_tile_where(q + positions.to(tl.int64) * q_stride_token, is_row, HEAD_SIZE, HEAD_PADDED)
    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    # Tables are read a step ahead: a load that the step's own addresses waited for would take pipeline stages
    # of its own.
    start = load_starts(starts, 0, table, num_keys, BLOCK_SIZE, BLOCK_N)

    # Visits of every row to blocks that are older than all of them, as many as fill whole steps.
    unmasked_steps = num_unmasked * BLOCK_SIZE // BLOCK_N
    if ISOLATE or not CAUSAL:
        unmasked_steps = 0
    for step in range(0, unmasked_steps):
        keys = positions_of_step(start, step, BLOCK_SIZE, BLOCK_N).to(tl.int64)
        start = load_starts(starts, step + 1, table, num_keys, BLOCK_SIZE, BLOCK_N)
        logits = query_key(queries, load_tile(k + keys * k_stride_token, HEAD_SIZE, HEAD_PADDED))
        values = load_tile(v + keys * v_stride_token, HEAD_SIZE, HEAD_PADDED)
        acc, row_max, row_sum = softmax_step(logits, values, acc, row_max, row_sum, scale_log2)

    # The rest: for some of the rows, or not older than all of them.
    row_in_group = positions % GROUP_TOKENS // BLOCK_SIZE
    bits = load_row_bits(row_bits, unmasked_steps, table, BLOCK_SIZE, BLOCK_N)
    for step in range(unmasked_steps, tl.cdiv(table[4] * BLOCK_SIZE, BLOCK_N)):
        keys = positions_of_step(start, step, BLOCK_SIZE, BLOCK_N)
        bits_of_keys = tl.zeros((BLOCK_N,), tl.int32) + bits
        start = load_starts(starts, step + 1, table, num_keys, BLOCK_SIZE, BLOCK_N)
        bits = load_row_bits(row_bits, step + 1, table, BLOCK_SIZE, BLOCK_N)
        is_key = keys < num_keys
        k_rows = k + keys.to(tl.int64) * k_stride_token
        v_rows = v + keys.to(tl.int64) * v_stride_token
        logits = query_key(queries, load_tile_where(k_rows, is_key, HEAD_SIZE, HEAD_PADDED))
        attends = (bits_of_keys[None, :] >> row_in_group[:, None]) & 1
        if CAUSAL:
            visible = (attends != 0) & (keys[None, :] <= positions[:, None])
        else:
            visible = (attends != 0) & is_key[None, :]
        values = load_tile_where(v_rows, is_key, HEAD_SIZE, HEAD_PADDED)
        acc, row_max, row_sum = masked_softmax_step(
            logits, visible, values, acc, row_max, row_sum, scale_log2, ISOLATE
        )

    # A row with an empty set has sum 0: zeros, and a log-sum-exp of -inf.
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    dims = tl.arange(0, HEAD_PADDED)[None, :]
    out_rows = out + positions.to(tl.int64) * out_stride_token
    result = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out_rows[:, None] + dims, result, mask=is_row[:, None] & (dims < HEAD_SIZE))
    if WITH_LSE:
        LN_2: tl.constexpr = 0.6931471805599453
        value = tl.where(is_empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
        tl.store(lse + positions, value, mask=is_row)
    return has_nan(acc)


@triton.jit(do_not_specialize=["num_groups", "lse_stride_batch", "lse_stride_head"])
def block_sparse_fwd_kernel(
    q,  # [batch, queries, num_heads, head_size]
    k,  # [batch, keys, num_kv_heads, head_size]
    v,  # as k
    tiles,  # [tiles, TILE_FIELDS]
    groups,  # [masks * num_groups, GROUP_FIELDS]
    starts,  # [visits]
    row_bits,  # [visits that are of one group only]
    mask_of_head,  # [mask heads]
    out,  # as q
    lse,  # [batch, num_heads, queries]
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
    out_stride_batch: tl.int64,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
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
    WITH_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    MIN_TILE: tl.constexpr,
):
    """Program n * num_heads + h: tile n of the table, query head h. (The grid's other axes end at 65535.)"""
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

    first_token = (query_start - first_position).to(tl.int64)
    q += batch * q_stride_batch + head.to(tl.int64) * q_stride_head + first_token * q_stride_token
    out += batch * out_stride_batch + head.to(tl.int64) * out_stride_head + first_token * out_stride_token
    lse += batch * lse_stride_batch + head.to(tl.int64) * lse_stride_head + first_token

    GROUP_TOKENS: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_SIZE else BLOCK_SIZE
    mask = tl.load(mask_of_head + head // MASK_GROUP_SIZE)
    groups += (mask * num_groups + tile * BLOCK_M // GROUP_TOKENS).to(tl.int64) * GROUP_FIELDS
    end_0 = tl.load(groups + 1).to(tl.int32)
    end_1 = end_0 + tl.load(groups + 3).to(tl.int32)
    num_unmasked = end_1 + tl.load(groups + 5).to(tl.int32)
    num_visits = end_1 + tl.load(groups + 6).to(tl.int32)
    start_0, start_1, start_own = tl.load(groups), tl.load(groups + 2), tl.load(groups + 4)
    table = (end_0, start_0, end_1, start_1 - end_0, num_visits, start_own - end_1)

    is_nan = attend_rows(
        tile * BLOCK_M,
        q,
        k,
        v,
        out,
        lse,
        first_position,
        end_position,
        num_keys,
        starts,
        row_bits,
        table,
        num_unmasked,
        scale_log2,
        q_stride_token,
        k_stride_token,
        v_stride_token,
        out_stride_token,
        HEAD_SIZE,
        HEAD_PADDED,
        BLOCK_SIZE,
        GROUP_TOKENS,
        CAUSAL,
        WITH_LSE,
        BLOCK_M,
        BLOCK_N,
        ISOLATE=False,
    )
    # A value that is NaN or infinite reaches every row that shares its visit, so that these rows are computed
    # again with care. What they need takes no registers from the loops above.
    if is_nan:
        tl.debug_barrier()
        for row in range(0, BLOCK_M, MIN_TILE):
            attend_rows(
                tile * BLOCK_M + row,
                q,
                k,
                v,
                out,
                lse,
                first_position,
                end_position,
                num_keys,
                starts,
                row_bits,
                table,
                num_unmasked,
                scale_log2,
                q_stride_token,
                k_stride_token,
                v_stride_token,
                out_stride_token,
                HEAD_SIZE,
                HEAD_PADDED,
                BLOCK_SIZE,
                GROUP_TOKENS,
                CAUSAL,
                WITH_LSE,
                MIN_TILE,
                MIN_TILE,
                ISOLATE=True,
            )


def block_sparse_config(head_padded: int, dtype: torch.dtype, max_queries: int) -> dict[str, int]:
    """Tile shapes and launch options, for sequences of up to `max_queries` queries."""
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles, or registers spill
        defaults = {"BLOCK_M": 32, "BLOCK_N": MIN_DOT_SIZE, "num_warps": 8, "num_stages": 2}
        # The slow loop would take more registers than the others need, and fewer programs would fit.
        defaults["maxnreg"] = 80 if head_padded <= 128 else 128
    elif head_padded > 128:
        defaults = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 4, "num_stages": 2}
    else:
        defaults = {"BLOCK_M": 64, "BLOCK_N": 64, "num_warps": 4, "num_stages": 3}
    config = launch_config("block_sparse", shape_key(head_padded, dtype), defaults)
    if max_queries == 1:
        config |= {"BLOCK_M": MIN_DOT_SIZE, "num_warps": 4}
    return config


def block_sparse_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """Block-sparse attention of the sequences at `spans`, in place.

    Args:
        q: [batch, queries, num_heads, head_size], any strides but a contiguous last dimension.
        k, v: [batch, keys, num_kv_heads, head_size], likewise.
        mask: of 1, num_kv_heads or num_heads heads, and at least as long as the longest sequence.
        spans: the sequences. Tokens that belong to none are neither read nor written.
        scale: factor on the logits, positive.
        out: as q.
        lse: float32 [batch, num_heads, queries], contiguous, or None: natural log-sum-exp of scaled logits.
    """
    head_size = q.shape[3]
    head_padded = padded_head_size(head_size)
    max_queries = max((span.num_queries for span in spans), default=0)
    config = block_sparse_config(head_padded, q.dtype, max_queries)
    first_positions = tuple(first_position(span, mask) for span in spans)
    tiles = tile_table(spans, first_positions, config["BLOCK_M"], q.device)
    if len(tiles) == 0:
        return
    rows, visits_per_step = (max(1, config[extent] // mask.block_size) for extent in ("BLOCK_M", "BLOCK_N"))
    visits = merge_rows(mask, rows, visits_per_step, q.device)
    hold_for_graph(tiles, *visits[:4])
    num_heads = q.shape[2]
    block_sparse_fwd_kernel[(len(tiles) * num_heads,)](
        q,
        k,
        v,
        tiles,
        *visits[:4],
        out,
        out if lse is None else lse,
        scale * LOG2_E,
        visits.num_groups,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *out.stride()[:3],
        *((0, 0) if lse is None else lse.stride()[:2]),
        NUM_HEADS=num_heads,
        GROUP_SIZE=num_heads // k.shape[2],
        MASK_GROUP_SIZE=num_heads // mask.num_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=mask.block_size,
        CAUSAL=mask.is_causal,
        TILE_FIELDS=TILE_FIELDS,
        GROUP_FIELDS=GROUP_FIELDS,
        WITH_LSE=lse is not None,
        MIN_TILE=MIN_DOT_SIZE,
        **config,
    )
