"""Launching a compiled kernel again without asking Triton which one it is."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any


class KernelLaunch:
    """A launch of a Triton or Gluon kernel that can be repeated with other tensors.

    Triton looks at every argument of every launch to find the compiled kernel, which costs the host more
    than starting it. Here that is done once, and the compiled kernel is started as Triton documents it
    (`kernel[grid](*arguments)` of what a warm-up returns). So the tensors of a call must be like those that
    the launch was made for, in all that Triton compiles for: dtype, alignment to 16 bytes, and whatever a
    descriptor says but its address.

    Args:
        kernel: the jitted function.
        grid: programs, in up to three dimensions.
        arguments: of the kernel by name, compile-time constants included, with tensors like those to come.
        varying: the names of the arguments that a call gives, in its order.
        options: of the compilation, `num_warps` and the like.
    """

    def __init__(
        self,
        kernel: Any,
        grid: tuple[int, ...],
        arguments: Mapping[str, object],
        varying: Sequence[str],
        **options: object,
    ) -> None:
        names: list[str] = kernel.arg_names
        values = [arguments[name] for name in names]
        compiled = kernel.run(*values, grid=grid, warmup=True, **options)
        self._start: Callable[..., object]
        if compiled is None:  # Triton's interpreter, which compiles nothing
            self._start = partial(kernel[grid], **options)
        else:
            self._start = compiled[(*grid, 1, 1)[:3]]
        self._indices = [names.index(name) for name in varying]
        # What varies is not kept alive from here.
        self._values = [None if name in varying else value for name, value in zip(names, values, strict=True)]

    def __call__(self, *varying: object) -> None:
        """Start the kernel with these in the places that the names in `varying` have."""
        values = self._values.copy()
        for index, value in zip(self._indices, varying, strict=True):
            values[index] = value
        self._start(*values)
