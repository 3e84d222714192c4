"""Two tensor-parallel ranks on the CPU: an even KV head on one, an odd one on the other."""

from __future__ import annotations

from typing import TYPE_CHECKING

from tests.engine.tensor_parallel import needs_two_cores, run_ranks
from tests.phi3_small.checkpoints import random_prompts
from tests.phi3_small.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@needs_two_cores
def test_two_ranks_give_the_oracles_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Their KV heads keep different residues; fused QKV, interleaved MLP and tied embeddings are divided."""
    folder = checkpoint()
    prompts = random_prompts([5, 150, 300], seed=11)
    run = run_ranks(2, folder, prompts, 10, tmp_path)
    oracle = Oracle(folder)
    assert run.tokens == [oracle.greedy(prompt, 10)[0] for prompt in prompts]
