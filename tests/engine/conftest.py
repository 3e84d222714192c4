"""Fixtures of the engine tests: checkpoints made once, and one thread (tiny models lose by more)."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.checkpoints import save_checkpoint

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.fixture(scope="session", autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`save_checkpoint` into a folder of its own, once for the same arguments."""
    made: dict[str, Path] = {}

    def make(family: str = "llama", s2: dict[str, Any] | None = None, **options: Any) -> Path:
        if family == "mixtral" and not _serves_experts():
            pytest.skip("this build of vLLM has no kernels for experts")
        key = json.dumps([family, s2, options], sort_keys=True, default=str)
        if key not in made:
            made[key] = save_checkpoint(tmp_path_factory.mktemp(family), family, s2, **options)
        return made[key]

    return make


def _serves_experts() -> bool:
    """Whether vLLM, built for this GPU, has its compiled kernels for mixtures of experts."""
    import vllm._custom_ops  # noqa: F401, loads them

    return not torch.cuda.is_available() or hasattr(torch.ops._moe_C, "topk_softmax")
