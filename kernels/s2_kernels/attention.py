"""S2-Attention over contiguous keys and values, without an engine: for training code and research.

On a GPU the Triton kernel of `s2_kernels.contiguous` runs, or for a served pattern on a Hopper GPU the one of
`s2_kernels.hopper`. Tensors on the CPU take plain PyTorch: a right answer for small sizes, not a fast one.
"""

from __future__ import annotations

import torch

from s2_kernels.contiguous.operators import Spans, differentiable_forward, forward, read_packed
from s2_kernels.contiguous.sequences import is_causal
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
    """Sparsely-Sharded attention (arXiv 2407.17678, section 3), differentiable in q, k and v.

    The queries of a sequence are its last tokens: with fewer queries than keys the rest is a past. (With a
    block mask that is not causal they start with the mask's first row.) A query whose set is empty, as an
    arbitrary mask can have it, gets zeros. A call can be captured in a CUDA graph after one with the same
    lengths, which makes its tables, and with `cu_seqlens` on the CPU.

    Gradients flow from the result and from the log-sum-exp; the same inputs give the same bits. What is kept
    for them, beside q, k, v and the result, is the log-sum-exp. There is no second derivative. The function
    can be compiled by torch.compile as a whole; its pattern is made outside. Under autocast inputs are cast
    to its dtype.

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
        (float64 for inputs of that, which only PyTorch's implementations take.)

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, or `impl` does not take the call; the
            message names it.
        NotImplementedError: a gradient of a gradient is asked for, which no kernel computes.
    """
    is_packed = q.dim() == 3
    spans = None
    if is_packed:
        if cu_seqlens_q is None:
            raise ValueError("cu_seqlens_q: None, expected where each sequence of the packed q starts")
        cu_seqlens_k = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        spans = read_packed(cu_seqlens_q, cu_seqlens_k, q.shape[0], k.shape[0], is_causal(pattern))
        q, k, v = q[None], k[None], v[None]
    elif cu_seqlens_q is not None or cu_seqlens_k is not None:
        raise ValueError(f"q: shape {tuple(q.shape)}, expected [tokens, heads, head_size] with cu_seqlens")
    out, lse = attend(q, k, v, pattern, spans, scale=scale, return_lse=return_lse, impl=impl)
    if is_packed:
        out, lse = out[0], None if lse is None else lse[0]
    return out if lse is None else (out, lse)


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: Spans,
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
        spans: the sequences, None for one in each entry of the batch. Tokens that belong to none are neither
            read nor written; their gradients are zeros.
        scale: factor on the logits, positive; None for head_size ** -0.5.
        out: as q, written in place; None for a new tensor, zeros where no sequence is. Without gradients and
            torch.compile only.
        return_lse: whether to compute the log-sum-exp.
        impl: as in `s2_attention`.

    Returns:
        out, and the log-sum-exp, float32 (or float64, for inputs of that) [batch, num_heads, queries], -inf
        for tokens of no sequence, or None.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, or `impl` does not take the call; the
            message names it.
        NotImplementedError: a gradient of a gradient is asked for, which no kernel computes.
    """
    q, k, v = _cast_for_autocast(q, k, v)
    is_differentiated = torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v))
    if not is_differentiated and not torch.compiler.is_compiling():
        return forward(q, k, v, pattern, spans, scale, out, return_lse, impl)
    if out is not None:
        raise ValueError(
            f"out: shape {tuple(out.shape)}, expected None where an input requires a gradient, and in "
            "torch.compile"
        )
    out, lse = differentiable_forward(q, k, v, pattern, spans, scale, impl)
    return out, lse if return_lse else None


def _cast_for_autocast(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """In autocast's dtype where it is on, as PyTorch's own attention gets its inputs; float64 stays."""
    device_type = tensors[0].device.type
    if not torch.is_autocast_enabled(device_type):
        return tensors
    dtype = torch.get_autocast_dtype(device_type)
    return tuple(x if x.dtype == torch.float64 else x.to(dtype) for x in tensors)
