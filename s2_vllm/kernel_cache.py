"""Where compiled kernels are kept from one start of an engine to the next."""

from __future__ import annotations

import os

VARIABLE = "TRITON_CACHE_DIR"


def keep_compiled_kernels() -> None:
    """Have Triton keep what this process compiles where the next engine looks for it.

    The first start of a model compiles it by Inductor, which points Triton to a folder of the model's own
    from then on (vLLM's `compiler_interface`, torch's `triton_heuristics`). A later start loads the compiled
    model instead, looks for kernels in Triton's usual folder, and finds none: they were compiled again. So
    the usual folder is named before anything is compiled. One that somebody has named stays.
    """
    from triton import knobs  # not on every machine with a CPU alone

    os.environ.setdefault(VARIABLE, knobs.cache.dir)
