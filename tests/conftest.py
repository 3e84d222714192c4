"""Settings that must be in place before any test module is imported."""

from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

# Both are read when Triton is imported.
if torch.cuda.is_available():
    # vLLM's float32 attention of dense layers leaves the choice to Triton, whose own is TF32: greedy tokens
    # would differ from an oracle's in float32.
    os.environ["TRITON_F32_DEFAULT"] = "ieee"
else:
    # Its interpreter runs the kernels on the CPU.
    os.environ["TRITON_INTERPRET"] = "1"

# A busy machine must not fail a test: nothing here asserts a time.
settings.register_profile("untimed", deadline=None)
settings.load_profile("untimed")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Every process of a run has to find the same tests: an object's address is in nobody's name."""
    for item in items:
        if " at 0x" in item.nodeid:
            raise pytest.UsageError(
                f"{item.nodeid}: the name has an address, expected one that stays: give it an id"
            )
