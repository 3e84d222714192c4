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


@lru_cache
def nvidia_capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of an NVIDIA GPU; (0, 0) for anything else. AMD's numbers mean other things."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)
