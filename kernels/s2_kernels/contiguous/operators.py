"""Attention as operators of PyTorch, `torch.ops.s2`: what autograd and torch.compile see of a call.

An operator takes tensors, numbers and text. So a pattern is given by its handle, and sequences are rows of a
tensor on the CPU, with the fields of a `Span`, or None for those of a batch. Operators that read lengths make
such a tensor, where a compiled function cannot look at them.
"""

from __future__ import annotations

from functools import lru_cache
from typing import Any, TypeAlias

import torch

from s2_kernels.contiguous.checks import check_dtypes, check_heads, check_lengths, check_scale, check_shapes
from s2_kernels.contiguous.dispatch import run, run_backward
from s2_kernels.contiguous.sequences import (
    Span,
    batch_spans,
    covers,
    is_causal,
    packed_spans,
    padded_spans,
)
from s2_kernels.contiguous.torch_path import wide_dtype
from s2_kernels.launch.choice import Impl
from s2_kernels.launch.limits import has_contiguous_last_dim
from s2_kernels.masks import BlockMask
from s2_kernels.pattern import S2Pattern

Spans: TypeAlias = tuple[Span, ...] | torch.Tensor | None
"""The sequences of a call: themselves, as an operator takes them, or None for all entries of a batch."""

_HELD_BY_GRAPHS: dict[str, S2Pattern | BlockMask] = {}
"""By handle, the patterns of calls that have been traced: kept for good, as a graph has only the handle."""


def forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: Spans,
    scale: float | None,
    out: torch.Tensor | None,
    return_lse: bool,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """A call without gradients: as `s2_kernels.attention.attend` documents it."""
    check_shapes(q, k, v)
    check_dtypes(q, k, v)
    check_heads(pattern, q.shape[2], k.shape[2])
    check_scale(scale)
    spans = _as_tuple(spans, q, k, pattern)
    check_lengths(pattern, spans)
    has_gaps = not covers([span.num_queries for span in spans], q)
    if out is None:
        out = torch.zeros_like(q) if has_gaps else torch.empty_like(q)
    elif out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"out: {out.dtype} {tuple(out.shape)}, expected {q.dtype} {tuple(q.shape)} as q")
    lse = None
    if return_lse:
        lse = _empty_lse(q)
        if has_gaps:
            lse.fill_(float("-inf"))
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(q, k, v, pattern, spans, _scale_of(scale, q), out, lse, impl)
    return out, lse


def differentiable_forward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: Spans,
    scale: float | None,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The same through operators: a call that needs gradients, or that torch.compile traces."""
    if isinstance(spans, tuple):
        spans = _as_tensor(spans)
    out, lse = torch.ops.s2.attention(q, k, v, spans, pattern.handle, scale, impl)
    return out, lse


def read_packed(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_queries: int, num_keys: int, causal: bool
) -> Spans:
    """`packed_spans`, by an operator where torch.compile traces the call."""
    if torch.compiler.is_compiling():
        return torch.ops.s2.packed_spans(cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, causal)
    return packed_spans(cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, causal=causal)


def read_padded(
    left_paddings: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> Spans:
    """`padded_spans`, by an operator where torch.compile traces the call."""
    if torch.compiler.is_compiling():
        return torch.ops.s2.padded_spans(left_paddings, seqlens, batch, num_queries, num_keys)
    return padded_spans(left_paddings, seqlens, batch, num_queries, num_keys)


@torch.library.custom_op(
    "s2::attention",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor? spans, str pattern, float? scale, str? impl) "
    "-> (Tensor, Tensor)",
)
def _attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    out, lse = forward(q, k, v, _pattern_of(pattern), spans, scale, None, True, impl)
    assert lse is not None
    return out, lse


@_attention.register_fake
def _(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    check_shapes(q, k, v)
    check_dtypes(q, k, v)
    of_handle = _pattern_of(pattern)
    check_heads(of_handle, q.shape[2], k.shape[2])
    check_scale(scale)
    _HELD_BY_GRAPHS[pattern] = of_handle
    return torch.empty_like(q), _empty_lse(q)


@torch.library.custom_op(
    "s2::attention_backward",
    mutates_args=(),
    schema="(Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor d_out, Tensor? d_lse, "
    "Tensor? spans, str pattern, float? scale, str? impl) -> (Tensor, Tensor, Tensor)",
)
def _attention_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    spans: torch.Tensor | None,
    pattern: str,
    scale: float | None,
    impl: Impl | None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    of_handle = _pattern_of(pattern)
    sequences = _as_tuple(spans, q, k, of_handle)
    has_gaps = not covers([span.num_queries for span in sequences], q)
    dq = torch.zeros_like(q) if has_gaps else torch.empty_like(q)
    has_gaps = not covers([span.num_keys for span in sequences], k)
    dk, dv = (torch.zeros_like(x) if has_gaps else torch.empty_like(x) for x in (k, v))
    if not has_contiguous_last_dim(d_out):  # the gradient of a sum is one number, expanded
        d_out = d_out.contiguous()
    d_lse = None if d_lse is None else d_lse.contiguous()
    scale = _scale_of(scale, q)
    with torch.cuda.device_of(q):
        run_backward(q, k, v, of_handle, sequences, scale, out, lse, d_out, d_lse, dq, dk, dv, impl)
    return dq, dk, dv


@_attention_backward.register_fake
def _(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *others: object
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


def _save_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[torch.Tensor, torch.Tensor]) -> None:
    q, k, v, spans, pattern, scale, impl = inputs
    ctx.save_for_backward(q, k, v, *output, spans)
    ctx.pattern = _pattern_of(pattern)  # a mask may have no other user left by then
    ctx.scale, ctx.impl = scale, impl
    ctx.set_materialize_grads(False)


def _gradients(
    ctx: Any, d_out: torch.Tensor | None, d_lse: torch.Tensor | None
) -> tuple[torch.Tensor | None, ...]:
    q, k, v, out, lse, spans = ctx.saved_tensors
    d_out = torch.zeros_like(out) if d_out is None else d_out
    gradients = torch.ops.s2.attention_backward(
        q, k, v, out, lse, d_out, d_lse, spans, ctx.pattern.handle, ctx.scale, ctx.impl
    )
    return *gradients, None, None, None, None


def _refuse_second_derivative(ctx: Any, *gradients: torch.Tensor) -> None:
    """No kernel computes it, which is said by the name of the function that was called."""
    raise NotImplementedError(
        "s2_attention: the gradient of its gradient, expected first derivatives only (no create_graph)"
    )


_attention.register_autograd(_gradients, setup_context=_save_for_backward)
_attention_backward.register_autograd(_refuse_second_derivative)


@torch.library.custom_op(
    "s2::packed_spans",
    mutates_args=(),
    schema="(Tensor cu_seqlens_q, Tensor cu_seqlens_k, SymInt num_queries, SymInt num_keys, bool causal) "
    "-> Tensor",
)
def _packed_spans(
    cu_seqlens_q: torch.Tensor, cu_seqlens_k: torch.Tensor, num_queries: int, num_keys: int, causal: bool
) -> torch.Tensor:
    return _as_tensor(packed_spans(cu_seqlens_q, cu_seqlens_k, num_queries, num_keys, causal=causal))


@_packed_spans.register_fake
def _(cu_seqlens_q: torch.Tensor, *others: object) -> torch.Tensor:
    return _empty_spans(cu_seqlens_q.shape[0] - 1)


@torch.library.custom_op(
    "s2::padded_spans",
    mutates_args=(),
    schema="(Tensor? left_paddings, Tensor? seqlens, SymInt batch, SymInt num_queries, SymInt num_keys) "
    "-> Tensor",
)
def _padded_spans(
    left_paddings: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> torch.Tensor:
    return _as_tensor(padded_spans(left_paddings, seqlens, batch, num_queries, num_keys))


@_padded_spans.register_fake
def _(
    left_paddings: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> torch.Tensor:
    return _empty_spans(batch)


def _empty_spans(num_sequences: int) -> torch.Tensor:
    return torch.empty(num_sequences, len(Span._fields), dtype=torch.int64, device="cpu")


def _as_tensor(spans: tuple[Span, ...]) -> torch.Tensor:
    """int64 [sequences, fields of a Span], on the CPU."""
    rows = [list(span) for span in spans]
    return torch.tensor(rows, dtype=torch.int64, device="cpu").view(-1, len(Span._fields))


def _as_tuple(
    spans: Spans, q: torch.Tensor, k: torch.Tensor, pattern: S2Pattern | BlockMask
) -> tuple[Span, ...]:
    if spans is None:
        return batch_spans(q.shape[0], q.shape[1], k.shape[1], causal=is_causal(pattern))
    return tuple(Span(*row) for row in spans.tolist()) if isinstance(spans, torch.Tensor) else spans


@lru_cache(maxsize=64)
def _pattern_of_s2(handle: str) -> S2Pattern:
    return S2Pattern.from_handle(handle)


def _pattern_of(handle: str) -> S2Pattern | BlockMask:
    return BlockMask.from_handle(handle) if BlockMask.is_handle(handle) else _pattern_of_s2(handle)


def _empty_lse(q: torch.Tensor) -> torch.Tensor:
    return q.new_empty((q.shape[0], q.shape[2], q.shape[1]), dtype=wide_dtype(q.dtype))


def _scale_of(scale: float | None, q: torch.Tensor) -> float:
    return float(q.shape[-1] ** -0.5) if scale is None else scale
