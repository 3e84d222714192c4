"""What CUDA graphs that callers capture need of the launches."""

from __future__ import annotations

import torch

_HELD: list[tuple[torch.Tensor, ...]] = []


def hold_for_graph(*tables: torch.Tensor) -> None:
    """While a graph is captured, keep `tables` for good: replays read them, whatever caches let go of."""
    if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
        _HELD.append(tables)
