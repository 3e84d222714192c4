"""Block-sparse attention over contiguous keys and values, with an arbitrary block mask per head.

A program owns BLOCK_M consecutive positions (a tile) of one query head; tiles are aligned to positions, not
to a sequence's first query, so that a tile always covers the same rows of the mask. When blocks are smaller
than the tile it covers several rows (merge-Q): it visits the union of their key blocks, and each visit knows
which of the rows it is for. That holds for any mask, also one in which a dropped block returns.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch
import triton
import triton.language as tl

from s2_kernels.contiguous.sequences import Span
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.cuda_graphs import hold_for_graph
from s2_kernels.launch.limits import LOG2_E, MIN_DOT_SIZE, padded_head_size
from s2_kernels.masks import BlockMask
from s2_kernels.tiles import load_tile, load_tile_where, query_key, softmax_step

TILE_FIELDS = 6


class Visits(NamedTuple):
    """The key blocks that each group of mask rows visits, for all heads.

    Group g of head h covers `rows` consecutive rows of its mask. Its visits are those from
    offsets[2 * n] to offsets[2 * n + 2], n = h * groups + g; of these the ones before offsets[2 * n + 1] need
    no mask: every row attends, and the block is older than the group.

    Attributes:
        offsets: int32 [2 * heads * groups + 1].
        starts: int32 [visits], the first token of the key block.
        row_bits: int32 [visits], bit r is set when row r of the group attends to it.
        num_groups: groups per head.
    """

    offsets: torch.Tensor
    starts: torch.Tensor
    row_bits: torch.Tensor
    num_groups: int


_VISITS: WeakKeyDictionary[BlockMask, dict[tuple[int, torch.device], Visits]] = WeakKeyDictionary()


def merge_rows(mask: BlockMask, rows: int, device: torch.device) -> Visits:
    """The visits of groups of `rows` (at most 31) rows of `mask`, on `device`; made once."""
    made = _VISITS.setdefault(mask, {})
    if (rows, device) not in made:
        made[rows, device] = _merge_rows(mask, rows, device)
    return made[rows, device]


def _merge_rows(mask: BlockMask, rows: int, device: torch.device) -> Visits:
    size = mask.num_blocks
    num_groups = -(-size // rows)
    edges = torch.arange(2 * num_groups, device=device)
    offsets, starts, row_bits = [], [], []
    total = 0
    for crow, col in zip(mask.crow.to(device), mask.col.to(device), strict=True):
        row = torch.arange(size, device=device).repeat_interleave(crow.diff())
        pairs, place = torch.unique(row // rows * size + col[: len(row)], return_inverse=True)
        bits = torch.zeros_like(pairs).index_add_(0, place, 1 << row % rows)
        group, block = pairs // size, pairs % size
        unmasked = (bits == (1 << rows) - 1) & (block < group * rows)
        half = group * 2 + (~unmasked).long()
        half, order = half.sort(stable=True)
        offsets.append(total + torch.searchsorted(half, edges))
        starts.append((block[order] * mask.block_size).int())
        row_bits.append(bits[order].int())
        total += len(pairs)
    offsets.append(torch.tensor([total], device=device))
    return Visits(torch.cat(offsets).int(), torch.cat(starts), torch.cat(row_bits), num_groups)


@lru_cache(maxsize=16)
def tile_table(spans: tuple[Span, ...], block_m: int, device: torch.device) -> torch.Tensor:
    """int32 [tiles, TILE_FIELDS]: batch, tile, query start, key start, past, keys; longest rows first."""
    tiles = []
    for span in spans:
        past = span.num_keys - span.num_queries
        for tile in range(past // block_m, -(-span.num_keys // block_m) if span.num_queries else 0):
            tiles.append((span.batch, tile, span.query_start, span.key_start, past, span.num_keys))
    tiles.sort(key=lambda fields: -fields[1])
    return torch.tensor(tiles, dtype=torch.int32, device=device).view(-1, TILE_FIELDS)


@triton.jit
def load_visits(table, step, num_visits, other, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The entry of a step's one visit, or [BLOCK_N] of each key's visit; `other` after the last visit."""
    first = step * BLOCK_N
    visits = first // BLOCK_SIZE
    if BLOCK_N > BLOCK_SIZE:
        visits = (first + tl.arange(0, BLOCK_N)) // BLOCK_SIZE
    return tl.load(table + visits, mask=visits < num_visits, other=other)


@triton.jit
def keys_of_step(start, step, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions [BLOCK_N] of the keys of a step whose visits start at `start`.

    The table holds first tokens, not block numbers to be multiplied here: Triton 3.6 takes every lane of
    loaded * BLOCK_SIZE + lane % BLOCK_SIZE for a multiple of BLOCK_SIZE, and then compares it with only one
    of BLOCK_SIZE consecutive positions.
    """
    return start + (step * BLOCK_N + tl.arange(0, BLOCK_N)) % BLOCK_SIZE


@triton.jit(do_not_specialize=["num_groups", "lse_stride_batch", "lse_stride_head"])
def block_sparse_fwd_kernel(
    q,  # [batch, queries, num_heads, head_size]
    k,  # [batch, keys, num_kv_heads, head_size]
    v,  # as k
    tiles,  # [tiles, TILE_FIELDS]
    offsets,  # [2 * mask heads * groups + 1]
    starts,  # [visits]
    row_bits,  # [visits]
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
    TILE_FIELDS: tl.constexpr,
    WITH_LSE: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Program n * num_heads + h: tile n of the table, query head h. (The grid's other axes end at 65535.)"""
    program = tl.program_id(0)
    head = program % NUM_HEADS
    tiles += program // NUM_HEADS * TILE_FIELDS
    batch = tl.load(tiles).to(tl.int64)
    tile = tl.load(tiles + 1)
    query_start = tl.load(tiles + 2)
    key_start = tl.load(tiles + 3)
    past = tl.load(tiles + 4)
    num_keys = tl.load(tiles + 5)

    kv_head = (head // GROUP_SIZE).to(tl.int64)
    k += batch * k_stride_batch + kv_head * k_stride_head + key_start.to(tl.int64) * k_stride_token
    v += batch * v_stride_batch + kv_head * v_stride_head + key_start.to(tl.int64) * v_stride_token

    positions = tile * BLOCK_M + tl.arange(0, BLOCK_M)
    is_row = (positions >= past) & (positions < num_keys)
    tokens = (query_start + positions - past).to(tl.int64)
    q_rows = q + batch * q_stride_batch + head.to(tl.int64) * q_stride_head + tokens * q_stride_token
    queries = load_tile_where(q_rows, is_row, HEAD_SIZE, HEAD_PADDED)
    acc = tl.zeros((BLOCK_M, HEAD_PADDED), tl.float32)
    row_max = tl.full((BLOCK_M,), -1e30, tl.float32)
    row_sum = tl.zeros((BLOCK_M,), tl.float32)

    GROUP_TOKENS: tl.constexpr = BLOCK_M if BLOCK_M > BLOCK_SIZE else BLOCK_SIZE
    group = tile * BLOCK_M // GROUP_TOKENS
    offsets += 2 * ((head // MASK_GROUP_SIZE) * num_groups + group)
    first = tl.load(offsets)
    num_unmasked = tl.load(offsets + 1) - first
    num_visits = tl.load(offsets + 2) - first
    starts += first
    row_bits += first

    # Tables are read a step ahead: a load that the step's own addresses waited for would take pipeline stages
    # of its own.
    start = load_visits(starts, 0, num_visits, num_keys, BLOCK_SIZE, BLOCK_N)

    # Visits of every row to blocks that are older than all of them, as many as fill whole steps.
    unmasked_steps = num_unmasked * BLOCK_SIZE // BLOCK_N
    for step in range(0, unmasked_steps):
        keys = keys_of_step(start, step, BLOCK_SIZE, BLOCK_N).to(tl.int64)
        start = load_visits(starts, step + 1, num_visits, num_keys, BLOCK_SIZE, BLOCK_N)
        logits = query_key(queries, load_tile(k + keys * k_stride_token, HEAD_SIZE, HEAD_PADDED))
        values = load_tile(v + keys * v_stride_token, HEAD_SIZE, HEAD_PADDED)
        acc, row_max, row_sum = softmax_step(logits, values, acc, row_max, row_sum, scale_log2)

    # The rest: for some of the rows, or not older than all of them.
    row_in_group = positions % GROUP_TOKENS // BLOCK_SIZE
    bits = load_visits(row_bits, unmasked_steps, num_visits, 0, BLOCK_SIZE, BLOCK_N)
    for step in range(unmasked_steps, tl.cdiv(num_visits * BLOCK_SIZE, BLOCK_N)):
        keys = keys_of_step(start, step, BLOCK_SIZE, BLOCK_N)
        bits_of_keys = tl.zeros((BLOCK_N,), tl.int32) + bits
        start = load_visits(starts, step + 1, num_visits, num_keys, BLOCK_SIZE, BLOCK_N)
        bits = load_visits(row_bits, step + 1, num_visits, 0, BLOCK_SIZE, BLOCK_N)
        is_key = keys < num_keys
        k_rows = k + keys.to(tl.int64) * k_stride_token
        v_rows = v + keys.to(tl.int64) * v_stride_token
        logits = query_key(queries, load_tile_where(k_rows, is_key, HEAD_SIZE, HEAD_PADDED))
        attends = (bits_of_keys[None, :] >> row_in_group[:, None]) & 1
        visible = (attends != 0) & (keys[None, :] <= positions[:, None])
        logits = tl.where(visible, logits, float("-inf"))
        values = load_tile_where(v_rows, is_key, HEAD_SIZE, HEAD_PADDED)
        acc, row_max, row_sum = softmax_step(logits, values, acc, row_max, row_sum, scale_log2)

    # A row with an empty set has sum 0: zeros, and a log-sum-exp of -inf.
    is_empty = row_sum == 0.0
    row_sum = tl.where(is_empty, 1.0, row_sum)
    dims = tl.arange(0, HEAD_PADDED)[None, :]
    out_rows = (
        out + batch * out_stride_batch + head.to(tl.int64) * out_stride_head + tokens * out_stride_token
    )
    result = (acc / row_sum[:, None]).to(out.dtype.element_ty)
    tl.store(out_rows[:, None] + dims, result, mask=is_row[:, None] & (dims < HEAD_SIZE))
    if WITH_LSE:
        LN_2: tl.constexpr = 0.6931471805599453
        value = tl.where(is_empty, float("-inf"), (row_max + tl.log2(row_sum)) * LN_2)
        lse += batch * lse_stride_batch + head.to(tl.int64) * lse_stride_head
        tl.store(lse + tokens, value, mask=is_row)


def block_sparse_config(head_padded: int, dtype: torch.dtype, max_queries: int) -> dict[str, int]:
    """Tile shapes and launch options, for sequences of up to `max_queries` queries."""
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles, or registers spill
        defaults = {"BLOCK_M": 32, "BLOCK_N": MIN_DOT_SIZE, "num_warps": 8, "num_stages": 2}
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
    tiles = tile_table(spans, config["BLOCK_M"], q.device)
    if len(tiles) == 0:
        return
    visits = merge_rows(mask, max(1, config["BLOCK_M"] // mask.block_size), q.device)
    hold_for_graph(tiles, visits.offsets, visits.starts, visits.row_bits)
    num_heads = q.shape[2]
    block_sparse_fwd_kernel[(len(tiles) * num_heads,)](
        q,
        k,
        v,
        tiles,
        visits.offsets,
        visits.starts,
        visits.row_bits,
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
        TILE_FIELDS=TILE_FIELDS,
        WITH_LSE=lse is not None,
        **config,
    )
