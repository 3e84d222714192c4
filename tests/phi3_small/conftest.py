"""Fixtures: checkpoints made once, and one thread (tiny models lose by more)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

import s2_vllm
from tests.phi3_small.checkpoints import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _plugin() -> None:
    """transformers knows the model in any order of the tests; an engine would load the plugin as well."""
    s2_vllm.register()


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_checkpoint` into a folder of its own, once for the same arguments."""
    made: dict[str, Path] = {}

    def make(**options: Any) -> Path:
        key = json.dumps(options, sort_keys=True)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp("phi3-small"), **options)
        return made[key]

    return make
