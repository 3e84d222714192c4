"""What is refused of the arguments of an attention call over contiguous keys and values."""

from __future__ import annotations

import torch

from s2_kernels.contiguous.sequences import Span, first_position
from s2_kernels.masks import BlockMask
from s2_kernels.pattern import S2Pattern


def check_shapes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless these are [batch, tokens, heads, head_size] of one attention call."""
    if q.dim() != 4 or q.shape[3] < 1:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [batch, queries, heads, head_size]")
    if k.dim() != 4 or (k.shape[0], k.shape[3]) != (q.shape[0], q.shape[3]):
        raise ValueError(
            f"k: shape {tuple(k.shape)}, expected [{q.shape[0]}, keys, KV heads, {q.shape[3]}] for q's shape "
            f"{tuple(q.shape)}"
        )
    if k.shape[2] < 1 or q.shape[2] % k.shape[2]:
        raise ValueError(f"k: {k.shape[2]} heads, expected a divisor of q's {q.shape[2]}")
    if v.shape != k.shape:
        raise ValueError(f"v: shape {tuple(v.shape)}, expected {tuple(k.shape)} as k")


def check_dtypes(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise ValueError unless these are of one dtype, on one device."""
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}, expected {q.dtype} on {q.device} as q"
            )


def check_heads(pattern: S2Pattern | BlockMask, num_heads: int, num_kv_heads: int) -> None:
    """Raise ValueError unless the pattern is for as many heads."""
    if isinstance(pattern, S2Pattern):
        if (pattern.num_heads, pattern.num_kv_heads) != (num_heads, num_kv_heads):
            raise ValueError(
                f"pattern: of {pattern.num_heads} query and {pattern.num_kv_heads} KV heads, expected "
                f"{num_heads} and {num_kv_heads} as in q and k"
            )
    elif pattern.num_heads not in (1, num_kv_heads, num_heads):
        raise ValueError(
            f"mask: {pattern.num_heads} heads, expected 1, {num_kv_heads} (KV heads) or {num_heads} "
            "(query heads)"
        )


def check_lengths(pattern: S2Pattern | BlockMask, spans: tuple[Span, ...]) -> None:
    """Raise ValueError unless the pattern covers these sequences."""
    if isinstance(pattern, S2Pattern):
        return
    for span in spans:
        if span.num_keys > pattern.max_tokens:
            raise ValueError(
                f"mask: covers {pattern.max_tokens} tokens, expected at least {span.num_keys}, as k has"
            )
        first = first_position(span, pattern)
        known = (pattern.first_row * pattern.block_size, pattern.num_query_blocks * pattern.block_size)
        if span.num_queries and not known[0] <= first <= first + span.num_queries <= known[1]:
            raise ValueError(
                f"mask: its query blocks are of tokens {known[0]} to {known[1] - 1}, expected to cover q's, "
                f"{first} to {first + span.num_queries - 1}"
            )


def check_scale(scale: float | None) -> None:
    """Raise ValueError unless the factor on the logits is positive, or left to its default."""
    if scale is not None and not scale > 0:
        raise ValueError(f"scale: {scale}, expected a positive number")
