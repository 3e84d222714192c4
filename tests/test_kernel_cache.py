"""Compiled kernels are where the next engine looks for them, or where whoever runs it wants them."""

from __future__ import annotations

import os

import pytest
from triton import knobs

from s2_vllm.kernel_cache import VARIABLE, keep_compiled_kernels


def test_a_folder_named_later_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Inductor names one with its first kernel, where none is named."""
    monkeypatch.setenv(VARIABLE, "")
    monkeypatch.delenv(VARIABLE)
    usual = knobs.cache.dir
    keep_compiled_kernels()
    os.environ.setdefault(VARIABLE, "a folder of the model's own")
    assert knobs.cache.dir == usual


def test_a_named_folder_stays(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(VARIABLE, "kernels")
    keep_compiled_kernels()
    assert os.environ[VARIABLE] == "kernels"
