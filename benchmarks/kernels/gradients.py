"""How each implementation is called for gradients, on a case's inputs.

A launch of "backward" is the backward pass alone, of "forward_backward" both; each returns the gradients of
queries, keys and values, [tokens, heads, head_size]. Where an implementation has no GQA it returns the
gradients of keys and values for every query head, and whoever checks them adds them up.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels.inputs import Inputs
from benchmarks.kernels.timing import Launch
from s2_kernels.attention import s2_attention
from s2_kernels.launch.choice import Impl

Attention = Callable[[torch.Tensor, torch.Tensor, torch.Tensor], torch.Tensor]
"""Of q, k and v [batch, heads, tokens, head_size], or with the dimensions in the order of the inputs."""
MakeAttention = Callable[[Inputs], Attention]


def prepare(make: MakeAttention, op: str, head_major: bool, repeat_heads: bool, inputs: Inputs) -> Launch:
    """The launch of an operation.

    Args:
        make: makes the attention of a case.
        op: "backward" or "forward_backward".
        head_major: whether it takes [batch, heads, tokens, head_size], and not [batch, tokens, heads, ...].
        repeat_heads: whether it wants a KV head for every query head.
        inputs: of the case.
    """
    group = inputs.case.pattern.group_size if repeat_heads else 1
    arranged = [
        _arranged(x, inputs, head_major, n) for x, n in ((inputs.q, 1), (inputs.k, group), (inputs.v, group))
    ]
    leaves = [x.requires_grad_() for x in arranged]
    d_out = _arranged(inputs.d_out, inputs, head_major, 1)
    attention = make(inputs)

    def rows(gradients: tuple[torch.Tensor, ...]) -> tuple[torch.Tensor, ...]:
        return tuple((x.transpose(1, 2) if head_major else x).flatten(0, 1) for x in gradients)

    if op == "forward_backward":

        def launch() -> tuple[torch.Tensor, ...]:
            return rows(torch.autograd.grad(attention(*leaves), leaves, d_out))

        return launch
    out = attention(*leaves)

    def launch_backward() -> tuple[torch.Tensor, ...]:
        return rows(torch.autograd.grad(out, leaves, d_out, retain_graph=True))

    return launch_backward


def s2(impl: Impl | None, inputs: Inputs) -> Attention:
    return partial(s2_attention, pattern=inputs.case.pattern, scale=inputs.scale, impl=impl)


def sdpa(backend: SDPBackend, inputs: Inputs) -> Attention:
    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.scale)

    return attention


def flex(inputs: Inputs) -> Attention:
    """Heads of a size that Flex has no backward pass for are padded, as its users do."""
    from torch._functorch import config
    from torch.nn.attention.flex_attention import flex_attention

    from benchmarks.kernels.flex import flex_block_mask, gradient_key_block

    # A backward pass that runs more than once must not take the buffers of the forward pass for itself.
    config.donated_buffer = False
    case, head_size = inputs.case, inputs.q.shape[2]
    key_block = gradient_key_block(head_size)
    mask = flex_block_mask(case.pattern, case.total_len, inputs.q.device, key_block)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    attend = partial(compiled, block_mask=mask, scale=inputs.scale, enable_gqa=case.pattern.group_size > 1)
    missing = (1 << (head_size - 1).bit_length()) - head_size
    if head_size > 128 or not missing:
        return attend

    def attend_padded(*tensors: torch.Tensor) -> torch.Tensor:
        return attend(*(F.pad(x, (0, missing)) for x in tensors))[..., :head_size]

    return attend_padded


def _arranged(packed: torch.Tensor, inputs: Inputs, head_major: bool, group: int) -> torch.Tensor:
    """Packed rows as one batch entry per request, each head `group` times; a tensor of its own."""
    x = packed.repeat_interleave(group, dim=1).unflatten(0, (inputs.case.batch, -1))
    return (x.transpose(1, 2) if head_major else x).contiguous().detach().clone()
