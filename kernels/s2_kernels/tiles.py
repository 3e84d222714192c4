"""Device functions that the kernels share: a tile of keys or values, a softmax step, a request's tiles.

Seen from one KV head, both tiers are a sequence of tokens cut into pages of `page_slots` slots: the
window tier holds every token in order, the strided tier the blocks of the kept residues in order, one
after the other. So token t of a tier is in slot t mod page_slots of page t // page_slots of its table.
"""

from __future__ import annotations

import triton
import triton.language as tl


def first_tile(query_start, request, TILE_M: tl.constexpr):
    """The first query tile of a request, or of the one past the last: the number of tiles.

    A request has room for at least ceil(queries / TILE_M) tiles, whatever the lengths of those before it, so
    that the number of tiles follows from the batch's shape; in a batch of one request none is left empty.

    Plain Python: the host calls it as it is, Triton and Gluon each compile it.

    Args:
        query_start: where the request's queries start in the batch.
        request: its index.
        TILE_M: queries of a tile.
    """
    return (query_start + request * (TILE_M - 1)) // TILE_M


@triton.jit
def token_rows(
    cache,  # first page's K of one KV head
    page,
    first_token,
    stride_page,
    stride_slot,
    page_slots,
    BLOCK_N: tl.constexpr,
):
    """Pointers [BLOCK_N] to K of consecutive tokens of a tier, which must all lie in `page`."""
    slots = first_token % page_slots + tl.arange(0, BLOCK_N)
    return cache + page.to(tl.int64) * stride_page + slots.to(tl.int64) * stride_slot


@triton.jit
def load_tile(rows, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """[BLOCK_N, HEAD_PADDED]: the vectors of HEAD_SIZE elements at `rows`, padded with zeros."""
    dims = tl.arange(0, HEAD_PADDED)
    pointers = rows[:, None] + dims[None, :]
    if HEAD_SIZE == HEAD_PADDED:
        tile = tl.load(pointers)
    else:
        tile = tl.load(pointers, mask=(dims < HEAD_SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def load_tile_where(rows, keep, HEAD_SIZE: tl.constexpr, HEAD_PADDED: tl.constexpr):
    """As `load_tile`, with zeros (and no access) where `keep` [BLOCK_N] is false."""
    dims = tl.arange(0, HEAD_PADDED)
    pointers = rows[:, None] + dims[None, :]
    if HEAD_SIZE == HEAD_PADDED:
        tile = tl.load(pointers, mask=keep[:, None], other=0.0)
    else:
        tile = tl.load(pointers, mask=keep[:, None] & (dims < HEAD_SIZE)[None, :], other=0.0)
    return tile


@triton.jit
def load_kv(
    cache,  # first page of one KV head
    page,
    first_token,
    stride_page,
    stride_slot,
    page_slots,
    BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """K and V, [BLOCK_N, HEAD_PADDED] each, of consecutive tokens of a tier, all in `page`."""
    rows = token_rows(cache, page, first_token, stride_page, stride_slot, page_slots, BLOCK_N)
    k = load_tile(rows, HEAD_SIZE, HEAD_PADDED)
    v = load_tile(rows + HEAD_SIZE, HEAD_SIZE, HEAD_PADDED)
    return k, v


@triton.jit
def load_kv_where(
    keep,
    cache,
    page,
    first_token,
    stride_page,
    stride_slot,
    page_slots,
    BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """As `load_kv`, with zeros (and no access) where `keep` [BLOCK_N] is false."""
    rows = token_rows(cache, page, first_token, stride_page, stride_slot, page_slots, BLOCK_N)
    k = load_tile_where(rows, keep, HEAD_SIZE, HEAD_PADDED)
    v = load_tile_where(rows + HEAD_SIZE, keep, HEAD_SIZE, HEAD_PADDED)
    return k, v


@triton.jit
def query_key(q, k):
    """[BLOCK_M, BLOCK_N] unscaled logits. Float32 inputs are multiplied in float32, not TF32."""
    return tl.dot(q, tl.trans(k), input_precision="ieee")


@triton.jit
def softmax_step(logits, v, acc, row_max, row_sum, scale_log2):
    """One step of the online softmax (arXiv 2205.14135, algorithm 1) in base 2.

    `logits` are unscaled and -inf where masked; `row_max` is of scaled logits and finite from the start,
    so that a row without any key yet stays at sum 0 and never computes inf - inf.
    """
    new_max = tl.maximum(row_max, tl.max(logits, 1) * scale_log2)
    weights = tl.exp2(logits * scale_log2 - new_max[:, None])
    decay = tl.exp2(row_max - new_max)
    acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
    return acc, new_max, row_sum * decay + tl.sum(weights, 1)


@triton.jit
def masked_softmax_step(logits, visible, v, acc, row_max, row_sum, scale_log2, ISOLATE: tl.constexpr):
    """`softmax_step` with the keys that are `visible` [BLOCK_M, BLOCK_N or 1] to a row.

    ISOLATE: NaN and infinities in `v` reach only the rows that attend to them. Otherwise they reach all rows,
    since a weight of zero times either is NaN.
    """
    logits = tl.where(visible, logits, float("-inf"))
    if ISOLATE:
        finite = tl.where(v - v == 0.0, v, 0.0)
        acc, row_max, row_sum = softmax_step(logits, finite, acc, row_max, row_sum, scale_log2)
        # A row gets the infinities that it attends to, which together are NaN. NaN counts as both.
        attends = tl.where(visible, tl.full(logits.shape, 1.0, tl.float16), 0.0)
        up = tl.dot(attends, ((v == float("inf")) | (v != v)).to(tl.float16))
        acc = tl.where(up > 0.0, acc + float("inf"), acc)
        down = tl.dot(attends, ((v == float("-inf")) | (v != v)).to(tl.float16))
        acc = tl.where(down > 0.0, acc + float("-inf"), acc)
    else:
        acc, row_max, row_sum = softmax_step(logits, v, acc, row_max, row_sum, scale_log2)
    return acc, row_max, row_sum


@triton.jit
def finite_rows(tile):
    """`tile` [rows, HEAD_PADDED] with zeros for NaN and infinities; and [rows], NaN for rows that had any."""
    return tl.where(tile - tile == 0.0, tile, 0.0), tl.sum((tile - tile).to(tl.float32), 1)


@triton.jit
def has_nan(tile):
    """Whether an element of `tile` [BLOCK_M, HEAD_PADDED] is NaN."""
    return tl.max(tl.max((tile != tile).to(tl.int32), 1), 0) > 0
