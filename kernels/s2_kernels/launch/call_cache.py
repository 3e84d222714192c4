"""Keeping prepared calls: most of what a launch costs the host is the same for all tensors of one layout."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from threading import Lock
from typing import Generic, TypeVar

import torch

Call = TypeVar("Call")


class CallCache(Generic[Call]):
    """Prepared calls by what they were prepared for; the oldest goes where there are too many.

    Args:
        size: how many to keep.
    """

    def __init__(self, size: int = 64) -> None:
        self._calls: dict[Hashable, Call] = {}
        self._size = size
        self._lock = Lock()

    def get(self, key: Hashable, prepare: Callable[[], Call]) -> Call:
        """The call of `key`, by `prepare` if there is none yet."""
        call = self._calls.get(key)
        if call is None:
            call = prepare()
            with self._lock:
                while len(self._calls) >= self._size:
                    del self._calls[next(iter(self._calls))]
                self._calls[key] = call
        return call


def layouts(*tensors: torch.Tensor | None) -> tuple[Hashable, ...]:
    """All that a `KernelLaunch` asks of the tensors that it is repeated with."""
    return tuple(
        None if x is None else (x.shape, x.stride(), x.dtype, x.device, x.data_ptr() % 16 == 0)
        for x in tensors
    )
