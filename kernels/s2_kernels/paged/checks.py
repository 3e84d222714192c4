"""What every implementation of the paged operations asks of its arguments."""

from __future__ import annotations

import torch

from s2_kernels.layout import TierLayout
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern


def check_attend(
    q: torch.Tensor, requests: PagedRequests, pattern: S2Pattern, scale: float, out: torch.Tensor
) -> None:
    """Raise ValueError, which names it, when an argument of `attend` has a wrong shape, dtype or value."""
    if q.dim() != 3 or q.shape[1] != pattern.num_heads:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [tokens, {pattern.num_heads}, head_size]")
    if out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"out: {out.dtype} {tuple(out.shape)}, expected {q.dtype} {tuple(q.shape)} as q")
    if not scale > 0:
        raise ValueError(f"scale: {scale}, expected a positive number")
    _check_caches(requests.window_cache, requests.strided_cache, pattern, q.shape[2], q.dtype)
    _check_requests(requests)


def check_write(
    key: torch.Tensor,
    value: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_slots: torch.Tensor,
    strided_slots: torch.Tensor,
    pattern: S2Pattern,
) -> None:
    """Raise ValueError, which names it, when an argument of `write` has a wrong shape or dtype."""
    if key.dim() != 3 or key.shape[1] != pattern.num_kv_heads:
        raise ValueError(
            f"key: shape {tuple(key.shape)}, expected [tokens, {pattern.num_kv_heads}, head_size]"
        )
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"value: {value.dtype} {tuple(value.shape)}, expected {key.dtype} {tuple(key.shape)} as key"
        )
    if window_slots.dim() != 1 or strided_slots.shape != window_slots.shape:
        raise ValueError(
            f"strided_slots: shape {tuple(strided_slots.shape)}, expected one dimension, and the shape "
            f"of window_slots, {tuple(window_slots.shape)}"
        )
    _check_caches(window_cache, strided_cache, pattern, key.shape[2], key.dtype)


def _check_caches(
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    pattern: S2Pattern,
    head_size: int,
    dtype: torch.dtype,
) -> None:
    _check_cache("window_cache", window_cache, pattern.num_kv_heads, head_size, dtype)
    if strided_cache.dim() != 4:
        raise ValueError(f"strided_cache: shape {tuple(strided_cache.shape)}, expected four dimensions")
    rows, slots = strided_cache.shape[1:3]
    blocks, rest = divmod(rows * slots, max(1, pattern.num_virtual_heads) * pattern.block_size)
    if pattern.num_virtual_heads and (blocks == 0 or rest):
        raise ValueError(
            f"strided_cache: {slots} slots in each of {rows} rows of a page, expected some blocks of "
            f"{pattern.block_size} for each of {pattern.num_virtual_heads} kept residues of KV heads"
        )
    layout = TierLayout.of_caches(pattern, window_cache, strided_cache)
    heads, slots = layout.strided_shape
    _check_cache("strided_cache", strided_cache, heads, head_size, dtype)
    if strided_cache.shape[2] != slots:
        raise ValueError(
            f"strided_cache: {strided_cache.shape[2]} slots in a page, expected {slots} with these heads"
        )
    if heads and not layout.is_even and strided_cache.stride(1) != slots * strided_cache.stride(2):
        raise ValueError(
            f"strided_cache: strides {strided_cache.stride()}, expected the slots of a page one after the "
            "other, where they are not those of window_cache"
        )


def _check_cache(name: str, cache: torch.Tensor, heads: int, head_size: int, dtype: torch.dtype) -> None:
    if cache.dim() != 4 or cache.shape[1] != heads or cache.shape[3] != 2 * head_size:
        raise ValueError(
            f"{name}: shape {tuple(cache.shape)}, expected [pages, {heads}, page_slots, {2 * head_size}]"
        )
    if cache.dtype != dtype:
        raise ValueError(f"{name}: dtype {cache.dtype}, expected {dtype} as the other tensors")


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
