"""Two tensor-parallel ranks on the CPU: each keeps the residues of its own heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from s2_kernels.pattern import S2Pattern
from tests.engine.checkpoints import random_prompts
from tests.engine.oracle import Oracle
from tests.engine.tensor_parallel import CASES, needs_two_cores, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

S2 = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": 7,
    "pattern_heads": "query",
    "dense_layers": [1],
}

PROMPTS = random_prompts([5, 150, 300], seed=11)


@pytest.mark.parametrize("name", CASES)
def test_ranks_keep_different_residues(name: str) -> None:
    """Otherwise a rank that keeps another's would go unnoticed."""
    case = CASES[name]
    heads = case.shape["num_attention_heads"], case.shape["num_key_value_heads"]
    pattern = S2Pattern.build(*heads, **case.s2)
    assert pattern.shard(0, 2).residues != pattern.shard(1, 2).residues


@needs_two_cores
def test_two_ranks_give_the_oracles_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = checkpoint("llama", S2, **heads)
    pattern = S2Pattern.build(8, 4, block_size=16, local_blocks=2, vert_stride=7, pattern_heads="query")
    assert pattern.shard(0, 2).residues != pattern.shard(1, 2).residues

    oracle = Oracle(folder)
    expected = [oracle.greedy(prompt, 10)[0] for prompt in PROMPTS]
    assert run_ranks(2, folder, PROMPTS, 10, tmp_path).tokens == expected


@needs_two_cores
def test_more_ranks_than_kv_heads(tmp_path: Path) -> None:
    """Both ranks have the one KV head, and keep different residues of it."""
    folder = CASES["one_kv_head"].save(tmp_path)
    oracle = Oracle(folder)
    expected = [oracle.greedy(prompt, 10)[0] for prompt in PROMPTS]
    assert run_ranks(2, folder, PROMPTS, 10, tmp_path).tokens == expected
