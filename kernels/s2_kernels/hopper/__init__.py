"""Kernels for Hopper GPUs (compute capability 9.0), written in Gluon, beside the portable Triton ones.

`supports` tells whether they take a call; everything else here imports Gluon.
"""

from __future__ import annotations

import torch

from s2_kernels.device import nvidia_capability
from s2_kernels.pattern import S2Pattern

BLOCK_SIZE = 64
HEAD_SIZES = (64, 128)
DTYPES = (torch.float16, torch.bfloat16)


def supports(pattern: S2Pattern, q: torch.Tensor, *keys_and_values: torch.Tensor) -> bool:
    """Whether the kernels of this package take these tensors.

    Args:
        pattern: of the heads.
        q: [tokens, num_heads, head_size].
        keys_and_values: what TMA is to load beside q: paged caches [pages, num_kv_heads, page_slots, *],
            or keys and values [tokens, num_kv_heads, head_size].
    """
    return (
        _is_hopper(q.device)
        and pattern.block_size == BLOCK_SIZE
        and q.shape[-1] in HEAD_SIZES
        and q.dtype in DTYPES
        and all(_has_rows(tensor) for tensor in (q, *keys_and_values))
    )


def _is_hopper(device: torch.device) -> bool:
    return nvidia_capability(device) == (9, 0)


def _has_rows(tensor: torch.Tensor) -> bool:
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
