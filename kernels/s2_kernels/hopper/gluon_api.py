"""The few names of Gluon that differ between the Triton versions this package runs with (3.6 to 3.9)."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon.language import shared_memory_descriptor
from triton.experimental.gluon.language.nvidia.hopper import tma

# Renamed in Triton 3.7; the old name is gone in 3.9.
tma_load = tma.async_load if hasattr(tma, "async_load") else tma.async_copy_global_to_shared

if hasattr(shared_memory_descriptor, "reinterpret"):

    @gluon.jit
    def reinterpret(memory, dtype, shape, layout):
        """The same shared memory seen with another shape and layout."""
        return memory.reinterpret(dtype, shape, layout)

else:

    @gluon.jit
    def reinterpret(memory, dtype, shape, layout):
        """The same shared memory seen with another shape and layout."""
        return memory._reinterpret(dtype, shape, layout)
