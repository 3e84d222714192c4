"""Two tensor-parallel ranks on two GPUs, in float32: one GPU's tokens, and the oracle's."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.oracle import Oracle
from tests.engine.tensor_parallel import CASES, assert_agrees, assert_equal_up_to_near_ties

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA GPUs")


@pytest.mark.parametrize("name", CASES)
def test_two_ranks_give_the_tokens_of_one_and_of_the_oracle(name: str, tmp_path: Path) -> None:
    """Chunked prefill, decode and preemption, eager; and an oracle without the pattern disagrees."""
    case = CASES[name]
    folder = case.save(tmp_path)
    oracle = Oracle(folder)
    two = case.run(2, folder, tmp_path)
    assert_agrees(oracle, two.tokens)
    with pytest.raises(AssertionError):
        assert_agrees(Oracle(folder, {}), two.tokens)
    one = case.run(1, folder, tmp_path)
    assert_equal_up_to_near_ties(oracle, one.tokens, two.tokens)


def test_two_ranks_compiled(tmp_path: Path) -> None:
    """Compiled and with CUDA graphs: the oracle's tokens again."""
    case = CASES["query"]
    folder = case.save(tmp_path)
    two = case.run(2, folder, tmp_path, enforce_eager=False)
    assert_agrees(Oracle(folder), two.tokens)
