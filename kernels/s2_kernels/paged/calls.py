"""What the implementations of the paged operations prepare, and what they have in common in doing so.

Preparing takes everything that a call depends on; a prepared call takes the tensors that differ from layer to
layer of one step. They must be like those that it was prepared with: in shape, strides, dtype and alignment.
"""

from __future__ import annotations

from collections.abc import Callable

import torch

from s2_kernels.layout import HeadTables
from s2_kernels.paged.requests import PagedRequests

WriteCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, HeadTables], None]
"""Of key, value, window_cache, strided_cache and the pattern's tables."""

AttendCall = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, HeadTables], None]
"""Of q, window_cache, strided_cache, out and the pattern's tables."""


def cache_strides(window_cache: torch.Tensor, strided_cache: torch.Tensor) -> dict[str, int]:
    """The strides of both caches by the names of the Triton kernels' arguments."""
    return {
        f"{tier}_stride_{dimension}": stride
        for tier, cache in (("window", window_cache), ("strided", strided_cache))
        for dimension, stride in zip(("page", "head", "slot"), cache.stride(), strict=False)
    }


def attend_strides(q: torch.Tensor, requests: PagedRequests, out: torch.Tensor) -> dict[str, int]:
    """All strides of `attend` by the names of the Triton kernels' arguments."""
    return {
        "q_stride_token": q.stride(0),
        "q_stride_head": q.stride(1),
        **cache_strides(requests.window_cache, requests.strided_cache),
        "window_table_stride": requests.window_table.stride(0),
        "strided_table_stride": requests.strided_table.stride(0),
        "out_stride_token": out.stride(0),
        "out_stride_head": out.stride(1),
    }
