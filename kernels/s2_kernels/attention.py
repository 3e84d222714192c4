"""S2-Attention over contiguous keys and values, without an engine: for training code and research.

On a GPU the Triton kernel of `s2_kernels.contiguous` runs, or for a served pattern on a Hopper GPU the one of
`s2_kernels.hopper`. Tensors on the CPU take plain PyTorch: a right answer for small sizes, not a fast one.
"""

from __future__ import annotations

import torch

from s2_kernels.contiguous.dispatch import run
from s2_kernels.contiguous.sequences import Span, batch_spans, first_position, packed_spans
from s2_kernels.launch.choice import Impl
from s2_kernels.masks import BlockMask
from s2_kernels.pattern import S2Pattern


def s2_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    *,
    scale: float | None = None,
    cu_seqlens_q: torch.Tensor | None = None,
    cu_seqlens_k: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Sparsely-Sharded attention (arXiv 2407.17678, section 3), forward only.

    The queries of a sequence are its last tokens: with fewer queries than keys the rest is a past. (With a
    block mask that is not causal they start with the mask's first row.) A query whose set is empty, as an
    arbitrary mask can have it, gets zeros. A call can be captured in a CUDA graph after one with the same
    lengths, which makes its tables, and with `cu_seqlens` on the CPU.

    Args:
        q: [batch, queries, num_heads, head_size], or packed: [tokens, num_heads, head_size].
        k, v: [batch, keys, num_kv_heads, head_size], or [keys, num_kv_heads, head_size]; query head h reads
            KV head h // (num_heads // num_kv_heads). Any strides but a contiguous last dimension.
        pattern: who attends to what. A block mask has 1, num_kv_heads or num_heads heads.
        scale: factor on the logits, positive; None for head_size ** -0.5.
        cu_seqlens_q: for packed inputs, [sequences + 1]: where each sequence's queries start, and the total.
            Best on the CPU, where reading it costs no wait for the GPU.
        cu_seqlens_k: the same for keys; None when every token is also a query.
        return_lse: whether to return the log-sum-exp as well.
        impl: "reference", "torch", "triton" or "hopper"; None for the fastest that takes the call.

    Returns:
        As q, in q's dtype. With `return_lse` also the natural logarithm of the sum of the exponentials of
        the scaled logits, -inf for an empty set: float32 [batch, num_heads, queries], or [num_heads, tokens].

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, or `impl` does not take the call; the
            message names it.
        NotImplementedError: an input needs a gradient; there is no backward pass.
    """
    causal = isinstance(pattern, S2Pattern) or pattern.is_causal
    is_packed = q.dim() == 3
    if is_packed:
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_q: None, expected where each sequence of the packed q starts")
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        spans = packed_spans(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], causal=causal)
        q, k, v = q[None], k[None], v[None]
    else:
        if cu_seqlens_q is not None or cu_seqlens_k is not None:
            raise ValueError(
                f"q: shape {tuple(q.shape)}, expected [tokens, heads, head_size] with cu_seqlens"
            )
        check_shapes(q, k, v)
        spans = batch_spans(q.shape[0], q.shape[1], k.shape[1], causal=causal)
    out, lse = attend(q, k, v, pattern, spans, scale=scale, return_lse=return_lse, impl=impl)
    if is_packed:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None else (out, lse)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: tuple[Span, ...],
    *,
    scale: float | None = None,
    out: torch.Tensor | None = None,
    return_lse: bool = False,
    impl: Impl | None = None,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Attention of the sequences at `spans`: what every call of this library comes down to.

    Args:
        q: [batch, queries, num_heads, head_size].
        k, v: [batch, keys, num_kv_heads, head_size].
        pattern: who attends to what. A block mask has 1, num_kv_heads or num_heads heads.
        spans: the sequences; tokens that belong to none are neither read nor written.
        scale: factor on the logits, positive; None for head_size ** -0.5.
        out: as q, written in place; None for a new tensor.
        return_lse: whether to compute the log-sum-exp.
        impl: as in `s2_attention`.

    Returns:
        out, and the log-sum-exp, float32 [batch, num_heads, queries] (-inf for tokens of no sequence), or
        None.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, or `impl` does not take the call; the
            message names it.
        NotImplementedError: an input needs a gradient; there is no backward pass.
    """
    check_shapes(q, k, v)
    _check_no_gradient(q, k, v)
    _check_pattern(pattern, q.shape[2], k.shape[2], spans)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if not scale > 0:
        raise ValueError(f"scale: {scale}, expected a positive number")
    if out is None:
        out = torch.empty_like(q)
    elif out.shape != q.shape or out.dtype != q.dtype:
        raise ValueError(f"out: {out.dtype} {tuple(out.shape)}, expected {q.dtype} {tuple(q.shape)} as q")
    lse = None
    if return_lse:
        lse = q.new_full((q.shape[0], q.shape[2], q.shape[1]), float("-inf"), dtype=torch.float32)
    with torch.cuda.device_of(q):  # Triton launches on the current device
        run(q, k, v, pattern, spans, scale, out, lse, impl)
    return out, lse


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
    for name, tensor in (("k", k), ("v", v)):
        if tensor.dtype != q.dtype or tensor.device != q.device:
            raise ValueError(
                f"{name}: {tensor.dtype} on {tensor.device}, expected {q.dtype} on {q.device} as q"
            )


def _check_no_gradient(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Raise NotImplementedError when autograd expects a gradient: that there is none would go unnoticed."""
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if torch.is_grad_enabled() and tensor.requires_grad:
            raise NotImplementedError(
                f"{name}: requires a gradient, and this attention is forward only; call it under "
                "torch.no_grad(), or detach its inputs"
            )


def _check_pattern(
    pattern: S2Pattern | BlockMask, num_heads: int, num_kv_heads: int, spans: tuple[Span, ...]
) -> None:
    """Raise ValueError unless the pattern is for these heads and sequences."""
    if isinstance(pattern, S2Pattern):
        if (pattern.num_heads, pattern.num_kv_heads) != (num_heads, num_kv_heads):
            raise ValueError(
                f"pattern: of {pattern.num_heads} query and {pattern.num_kv_heads} KV heads, expected "
                f"{num_heads} and {num_kv_heads} as in q and k"
            )
        return
    if pattern.num_heads not in (1, num_kv_heads, num_heads):
        raise ValueError(
            f"mask: {pattern.num_heads} heads, expected 1, {num_kv_heads} (KV heads) or {num_heads} "
            "(query heads)"
        )
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
