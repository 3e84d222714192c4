"""Which of several implementations of an operation takes a call."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import torch

Impl = Literal["reference", "torch", "triton", "hopper"]
"""The plain specification, vectorised PyTorch, the portable Triton kernels, those for Hopper GPUs."""

Refusals = Mapping[Impl, Callable[[], str | None]]
"""For each implementation of an operation: why it does not take a call, None when it does."""


def choose(impl: Impl | None, device: torch.device, refusals: Refusals) -> Impl:
    """The implementation that the caller has asked for, or else the fastest that takes the call.

    On the CPU that is PyTorch. On a GPU it is a Hopper kernel or else the Triton one, never PyTorch: what
    neither takes is an error there, and not a slow answer.

    Args:
        impl: what the caller asks for; None for the fastest.
        device: where the call's tensors are.
        refusals: of the operation's implementations.

    Raises:
        ValueError: the operation has no such implementation, or it does not take the call; the message names
            the fact, its value and what the implementation takes.
    """
    if impl is not None:
        if impl not in refusals:
            raise ValueError(f"impl: {impl!r}, expected None or one of {', '.join(map(repr, refusals))}")
        reason = refusals[impl]()
        if reason is not None:
            raise ValueError(f"{reason} (impl {impl!r})")
        return impl
    if device.type == "cpu":
        return "torch"
    if "hopper" in refusals and refusals["hopper"]() is None:
        return "hopper"
    reason = refusals["triton"]()
    if reason is not None:
        raise ValueError(reason)
    return "triton"
