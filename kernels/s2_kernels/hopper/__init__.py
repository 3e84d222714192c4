"""Kernels for Hopper GPUs (compute capability 9.0), written in Gluon, beside the portable Triton ones.

`refusal` tells whether they take a call; everything else here imports Gluon.
"""

from __future__ import annotations

import torch

from s2_kernels.launch.device import nvidia_capability
from s2_kernels.pattern import S2Pattern

BLOCK_SIZE = 64
HEAD_SIZES = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def refusal(pattern: S2Pattern, q: torch.Tensor, **keys_and_values: torch.Tensor) -> str | None:
    """Why the kernels of this package do not take these tensors, None when they do.

    Args:
        pattern: of the heads.
        q: [tokens, num_heads, head_size].
        keys_and_values: what TMA is to load beside q, by the names of the call's arguments: paged caches
            [pages, num_kv_heads, page_slots, *], or keys and values [tokens, num_kv_heads, head_size].
    """
    if not _is_hopper(q.device):
        return f"device: {q.device}, expected a GPU of compute capability 9.0"
    if pattern.block_size != BLOCK_SIZE:
        return f"block_size: {pattern.block_size}, expected {BLOCK_SIZE}"
    if q.shape[-1] not in HEAD_SIZES:
        return f"q: head size {q.shape[-1]}, expected one of {HEAD_SIZES}"
    if q.dtype not in DTYPES:
        return f"q: dtype {q.dtype}, expected one of {DTYPES}"
    for name, tensor in {"q": q, **keys_and_values}.items():
        if not has_rows(tensor):
            return (
                f"{name}: shape {tuple(tensor.shape)} and strides {tensor.stride()}, expected rows as TMA "
                "loads them: equally far apart, 16-byte aligned"
            )
    return None


def _is_hopper(device: torch.device) -> bool:
    return nvidia_capability(device) == (9, 0)


def has_rows(tensor: torch.Tensor) -> bool:
    """Whether the tensor's memory is some equally spaced, 16-byte aligned rows, as TMA wants it.

    Of four dimensions, a row is a slot, which lies at a multiple of the rows' distance from the first;
    of three, a token with its heads side by side.
    """
    strides = tensor.stride()
    row = strides[-2] if tensor.dim() == 4 else strides[0]
    if row == 0 or tensor.numel() == 0:
        return False
    if tensor.dim() == 4:
        regular = strides[0] % row == 0 and strides[1] % row == 0
    else:
        regular = strides[1] == tensor.shape[2]
    return (
        regular and strides[-1] == 1 and row * tensor.element_size() % 16 == 0 and tensor.data_ptr() % 16 == 0
    )
