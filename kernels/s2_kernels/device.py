"""What the launches ask about a device, looked up once."""

from __future__ import annotations

from functools import lru_cache

import torch


@lru_cache
def num_multiprocessors(device: torch.device) -> int:
    """Multiprocessors of a GPU; 1 for anything else."""
    if device.type != "cuda":
        return 1
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


_HELD_FOR_GRAPHS: list[tuple[torch.Tensor, ...]] = []


def hold_for_graph(*tables: torch.Tensor) -> None:
    """While a CUDA graph is captured, keep `tables` for good: its replays read them, come what may."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _HELD_FOR_GRAPHS.append(tables)


@lru_cache
def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for anything else. AMD's numbers mean other things."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)
