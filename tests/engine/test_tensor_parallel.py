"""Two tensor-parallel ranks on the CPU: each keeps the residues of its own heads."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2_kernels.pattern import S2Pattern
from tests.engine.checkpoints import random_prompts
from tests.engine.oracle import Oracle
from tests.engine.two_ranks import NUM_TOKENS, needs_two_cores, output_of_two_ranks

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


@needs_two_cores
def test_two_ranks_give_the_oracles_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = checkpoint("llama", S2, **heads)
    pattern = S2Pattern.build(8, 4, block_size=16, local_blocks=2, vert_stride=7, pattern_heads="query")
    assert pattern.shard(0, 2).residues != pattern.shard(1, 2).residues
    prompts = random_prompts([5, 150, 300], seed=11)

    output = output_of_two_ranks(folder, prompts, tmp_path)
    oracle = Oracle(folder)
    assert f"tokens {[oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in prompts]}" in output
