"""Full, streaming and strided heads, sinks, and layers that differ: greedy output equals the oracle's."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from s2_vllm.plan import plan_of
from tests.engine.checkpoints import random_prompts
from tests.engine.engines import (
    assert_all_pages_free,
    attention_layers,
    engine,
    generate,
    greedy,
    greedy_params,
    kv_caches,
    pages_handed_out,
    preemptions,
)
from tests.engine.oracle import Oracle
from tests.engine.tensor_parallel import needs_two_cores, run_ranks

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NUM_TOKENS = 10

CHUNK = 53
"""Tokens per step: not a multiple of a block, so that chunks cut them."""

SHAPE = {"num_hidden_layers": 5, "num_attention_heads": 8, "num_key_value_heads": 4}

STREAMING: dict[str, Any] = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": None,
    "sink_blocks": 1,
    "full_heads": {"0": [2], "1": [0, 1, 2, 3], "4": [0, 1, 3]},
    "dense_layers": [3],
}
"""All heads of layer 1 are full, and none of layer 2."""

STRIDED: dict[str, Any] = {
    "block_size": 16,
    "local_blocks": 3,
    "vert_stride": 4,
    "sink_blocks": 2,
    "full_heads": [3],
    "layers": {
        # Plain S2-Attention, beside layers of other kinds; a stride of its own; streaming heads alone.
        "1": {"full_heads": [], "sink_blocks": 0},
        "2-3": {"vert_stride": 8, "local_blocks": 2, "full_heads": [0, 1]},
        "4": {"vert_stride": None, "full_heads": [], "sink_blocks": 1},
    },
}

QUERY_HEADS: dict[str, Any] = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": 8,
    "pattern_heads": "query",
    "head_sliding_offset": 1,
    "num_dense_heads": 1,
    "layers": {"0": {"num_dense_heads": 0}, "3,4": {"vert_stride": 4, "num_dense_heads": 2}},
}

NO_OLD_BLOCKS: dict[str, Any] = {
    "block_size": 16,
    "local_blocks": 3,
    "vert_stride": None,
    "layers": {"1": {"sink_blocks": 2}},
}

CASES = {
    "llama-streaming": ("llama", STREAMING),
    "qwen3-strided": ("qwen3", STRIDED),
    "mistral-query": ("mistral", QUERY_HEADS),
    "llama-no-old-blocks": ("llama", NO_OLD_BLOCKS),
}


@pytest.mark.parametrize("case", CASES)
def test_greedy_equals_oracle(case: str, checkpoint: Callable[..., Path]) -> None:
    """Chunked prefill that cuts blocks, decode, and a second run on a prefix hit.

    What was not written is NaN, where there is no dense layer: vLLM's attention reads it on a CPU.
    """
    family, s2 = CASES[case]
    folder = checkpoint(family, s2, **SHAPE)
    oracle = Oracle(folder)
    prompts = random_prompts([3, 40, 130, 213])
    expected = [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in prompts]
    for other in ({}, {**s2, "sink_blocks": 3}, {**s2, "full_heads": [0], "num_dense_heads": 0, "layers": {}}):
        assert Oracle(folder, other).greedy(prompts[-1], NUM_TOKENS)[0] != expected[-1]
    with engine(folder, max_num_batched_tokens=CHUNK) as llm:
        if "dense_layers" not in s2:
            for cache in kv_caches(llm):
                cache.fill_(float("nan"))
        assert greedy(llm, prompts, NUM_TOKENS) == expected
        again = generate(llm, prompts[-1:], greedy_params(NUM_TOKENS))[0]
        assert again.num_cached_tokens > 0
        assert list(again.outputs[0].token_ids) == expected[-1]
        assert_all_pages_free(llm)
