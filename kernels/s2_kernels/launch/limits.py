"""What the Triton kernels take, and the constants that their launches share."""

from __future__ import annotations

import math

import torch

from s2_kernels.layout import MAX_HEAD_SIZE, TierLayout
from s2_kernels.pattern import S2Pattern

LOG2_E = math.log2(math.e)
DTYPES = (torch.float16, torch.bfloat16, torch.float32)
MIN_DOT_SIZE = 16
"""The smallest extent that `tl.dot` takes."""
VARYING = 0
"""As a number of kept residues: kernels read that of each KV head."""


def padded_head_size(head_size: int) -> int:
    """Elements of a head's vector in a kernel: a power of two that `tl.dot` takes."""
    return max(MIN_DOT_SIZE, 1 << (head_size - 1).bit_length())


def local_blocks(pattern: S2Pattern) -> int:
    """The window's blocks as the kernels count them, in 32 bits: no more than any sequence can have."""
    return min(pattern.local_blocks, 2**31 // pattern.block_size)


def sink_blocks(pattern: S2Pattern) -> int:
    """The sinks as the kernels count them, likewise."""
    return min(pattern.sink_blocks, 2**31 // pattern.block_size)


def num_kept(layout: TierLayout) -> int:
    """Residues of each KV head, as kernels are compiled for them; VARYING where pages of the tiers differ."""
    return layout.pattern.num_kept if layout.is_even else VARYING


def refusal(
    device: torch.device, dtype: torch.dtype, head_size: int, block_size: int, **tensors: torch.Tensor
) -> str | None:
    """Why the Triton kernels do not take a call, None when they do.

    Args:
        device, dtype: of the call's tensors.
        head_size: elements of a query's vector.
        block_size: tokens of a block.
        tensors: what needs a contiguous last dimension, by the names of the call's arguments.
    """
    if device.type == "cpu" and not _interprets():
        return "device: cpu, expected a GPU, or Triton's interpreter"
    if not 1 <= head_size <= MAX_HEAD_SIZE:
        return f"q: head size {head_size}, expected 1 to {MAX_HEAD_SIZE}"
    if dtype not in DTYPES:
        return f"q: dtype {dtype}, expected one of {DTYPES}"
    if block_size < MIN_DOT_SIZE:
        return f"block_size: {block_size}, expected at least {MIN_DOT_SIZE}"
    for name, tensor in tensors.items():
        if not has_contiguous_last_dim(tensor):
            return f"{name}: strides {tensor.stride()}, expected a contiguous last dimension"
    return None


def has_contiguous_last_dim(tensor: torch.Tensor) -> bool:
    """Whether elements of the last dimension are next to each other."""
    return tensor.shape[-1] <= 1 or tensor.stride(-1) == 1


def _interprets() -> bool:
    import triton  # not on every machine with a CPU alone

    return bool(triton.knobs.runtime.interpret)
