"""What the attention kernels share: the arguments they accept, a tile of keys or values, a softmax step.

Seen from one KV head, both tiers are a sequence of tokens cut into pages of `page_slots` slots: the
window tier holds every token in order, the strided tier the blocks of the kept residues in order, one
after the other. So token t of a tier is in slot t mod page_slots of page t // page_slots of its table.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl

from s2_kernels.layout import MAX_HEAD_SIZE, TierLayout
from s2_kernels.paged import PagedRequests
from s2_kernels.pattern import S2Pattern

LOG2_E = math.log2(math.e)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_DOT_SIZE = 16
"""The smallest extent that `tl.dot` takes."""


def check_paged_arguments(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
) -> TierLayout:
    """The page geometry of a paged attention call, whose arguments are checked (their shapes only).

    Raises:
        ValueError: an argument has a wrong shape, dtype or value; the message names it.
    """
    if q.dim() != 3 or q.shape[1] != pattern.num_heads or not 1 <= q.shape[2] <= MAX_HEAD_SIZE:
        raise ValueError(
            f"q: shape {tuple(q.shape)}, expected [tokens, {pattern.num_heads}, at most {MAX_HEAD_SIZE}]"
        )
    if q.dtype not in DTYPES:
        raise ValueError(f"q: dtype {q.dtype}, expected one of {DTYPES}")
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"out: {out.dtype} {tuple(out.shape)}, expected {q.dtype} {tuple(q.shape)} as q")
    for name, tensor in (("q", q), ("out", out)):
        check_contiguous_last_dim(name, tensor)
    if pattern.block_size < MIN_DOT_SIZE:
        raise ValueError(
            f"pattern.block_size: {pattern.block_size}, expected at least {MIN_DOT_SIZE} for these kernels"
        )
    if not scale > 0:
        raise ValueError(f"scale: {scale}, expected a positive number")
    layout = check_caches(requests.window_cache, requests.strided_cache, pattern, q.shape[2], q.dtype)
    _check_requests(requests)
    return layout


def _check_requests(requests: PagedRequests) -> None:
    """Raise ValueError unless the tables and lengths are int32 arrays for the same requests."""
    for name, dimensions in (
        ("seq_lens", 1),
        ("query_start_loc", 1),
        ("window_table", 2),
        ("strided_table", 2),
    ):
        tensor = getattr(requests, name)
        if tensor.dim() != dimensions or tensor.dtype != torch.int32:
            raise ValueError(
                f"{name}: {tensor.dtype} {tuple(tensor.shape)}, expected torch.int32, {dimensions} dimensions"
            )
        check_contiguous_last_dim(name, tensor)
    count = requests.seq_lens.shape[0]
    if requests.query_start_loc.shape[0] != count + 1:
        raise ValueError(
            f"query_start_loc: shape {tuple(requests.query_start_loc.shape)}, expected [{count + 1}], "
            "one more than seq_lens"
        )
    for name in ("window_table", "strided_table"):
        rows = getattr(requests, name).shape[0]
        if rows < count:
            raise ValueError(f"{name}: {rows} rows, expected one for each of {count} requests")


def num_query_tiles(num_tokens: int, num_requests: int, tile_rows: int) -> int:
    """Query tiles of a batch, from its shape alone: where the prefill kernels' `tile_start` puts its end."""
    return (num_tokens + num_requests * (tile_rows - 1)) // tile_rows


def check_caches(
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    pattern: S2Pattern,
    head_size: int,
    dtype: torch.dtype,
) -> TierLayout:
    """The page geometry of two caches, which are checked.

    Raises:
        ValueError: a cache has a wrong shape or dtype; the message names it.
    """
    for name, cache in (("window_cache", window_cache), ("strided_cache", strided_cache)):
        if cache.dim() != 4 or cache.shape[1] != pattern.num_kv_heads or cache.shape[3] != 2 * head_size:
            raise ValueError(
                f"{name}: shape {tuple(cache.shape)}, expected "
                f"[pages, {pattern.num_kv_heads}, page_slots, {2 * head_size}]"
            )
        if cache.dtype != dtype:
            raise ValueError(f"{name}: dtype {cache.dtype}, expected {dtype} as the other tensors")
        check_contiguous_last_dim(name, cache)
    if strided_cache.shape[2] != window_cache.shape[2]:
        raise ValueError(
            f"strided_cache: {strided_cache.shape[2]} slots in a page, expected "
            f"{window_cache.shape[2]} as in window_cache"
        )
    return TierLayout(pattern, window_cache.shape[2])


def check_contiguous_last_dim(name: str, tensor: torch.Tensor) -> None:
    """Raise ValueError when elements of the last dimension are not next to each other."""
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(f"{name}: strides {tensor.stride()}, expected a contiguous last dimension")


@triton.jit
def token_rows(
    cache,  # first page's K of one KV head
    page,
    first_token,
    stride_page,
    stride_slot,
    PAGE_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Pointers [BLOCK_N] to K of consecutive tokens of a tier, which must all lie in `page`."""
    slots = first_token % PAGE_SLOTS + tl.arange(0, BLOCK_N)
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
    PAGE_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """K and V, [BLOCK_N, HEAD_PADDED] each, of consecutive tokens of a tier, all in `page`."""
    rows = token_rows(cache, page, first_token, stride_page, stride_slot, PAGE_SLOTS, BLOCK_N)
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
    PAGE_SLOTS: tl.constexpr,
    BLOCK_N: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
):
    """As `load_kv`, with zeros (and no access) where `keep` [BLOCK_N] is false."""
    rows = token_rows(cache, page, first_token, stride_page, stride_slot, PAGE_SLOTS, BLOCK_N)
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
