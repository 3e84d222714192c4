"""Where the pattern is absent, or sparse in name only, the plugin leaves plain dense vLLM."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from s2_vllm.compat import BACKEND
from tests.engine.checkpoints import random_prompts
from tests.engine.engines import (
    assert_all_pages_free,
    attention_layers,
    cache_specs,
    engine,
    generate,
    greedy,
    greedy_params,
)
from tests.engine.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    from vllm import LLM

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}

PROMPTS = random_prompts([3, 77, 250], seed=10)

NUM_TOKENS = 12

CHUNK = 75


@pytest.fixture(scope="module")
def plain(checkpoint: Callable[..., Path]) -> Path:
    """A checkpoint without the key."""
    return checkpoint("llama")


@pytest.fixture(scope="module")
def dense_run(plain: Path) -> tuple[list[list[int]], torch.Tensor, dict[str, str], Any]:
    """Tokens, log-probabilities, attention layers and cache specs of vLLM without a pattern."""
    with engine(plain, max_num_batched_tokens=CHUNK) as llm:
        tokens, logprobs = _tokens_and_logprobs(llm)
        return tokens, logprobs, attention_layers(llm), cache_specs(llm)


def test_no_key_changes_nothing(plain: Path, dense_run: Any) -> None:
    """Without the key every layer is vLLM's own, in the one group and page size that vLLM chooses."""
    tokens, _, layers, specs = dense_run
    assert set(layers.values()) == {"Attention"}
    block_size = 16 if torch.cuda.is_available() else 128
    assert {(type(spec).__name__, spec.block_size) for spec in specs.values()} == {
        ("FullAttentionSpec", block_size)
    }
    oracle = Oracle(plain)
    assert tokens == [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in PROMPTS]


@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_window_over_the_whole_context_equals_dense(plain: Path, dense_run: Any, block_size: int) -> None:
    """`local_blocks` that cover the context make every layer dense in effect."""
    s2 = {"block_size": block_size, "local_blocks": 1024 // block_size, "vert_stride": 4}
    with engine(plain, max_num_batched_tokens=CHUNK, hf_overrides={"s2_attention": s2}) as llm:
        assert "S2Attention" in attention_layers(llm).values()
        tokens, logprobs = _tokens_and_logprobs(llm)
        assert_all_pages_free(llm)
    assert tokens == dense_run[0]
    torch.testing.assert_close(logprobs, dense_run[1], atol=2e-4, rtol=0)


def test_hf_overrides_give_a_pattern(plain: Path, dense_run: Any) -> None:
    """The key on the command line does what it does in config.json."""
    oracle = Oracle(plain, S2)
    with engine(plain, max_num_batched_tokens=CHUNK, hf_overrides={"s2_attention": S2}) as llm:
        tokens = greedy(llm, PROMPTS, NUM_TOKENS)
        assert_all_pages_free(llm)
    assert tokens == [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in PROMPTS]
    assert tokens != dense_run[0]


def test_pattern_beside_another_plugins_backend(plain: Path) -> None:
    """Sparse layers bring their backend: the name CUSTOM may be taken."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

    oracle = Oracle(plain, S2)
    register_backend(AttentionBackendEnum.CUSTOM, "another_plugin.Backend")
    try:
        with engine(plain, max_num_batched_tokens=CHUNK, hf_overrides={"s2_attention": S2}) as llm:
            tokens = greedy(llm, PROMPTS, NUM_TOKENS)
    finally:
        register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    assert tokens == [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in PROMPTS]


def test_dense_engine_after_a_sparse_one(plain: Path, dense_run: Any) -> None:
    """A pattern leaves nothing behind in the process."""
    with engine(plain, hf_overrides={"s2_attention": S2}) as llm:
        assert "S2Attention" in attention_layers(llm).values()
    with engine(plain, max_num_batched_tokens=CHUNK) as llm:
        assert attention_layers(llm) == dense_run[2]
        assert greedy(llm, PROMPTS, NUM_TOKENS) == dense_run[0]


def _tokens_and_logprobs(llm: LLM) -> tuple[list[list[int]], torch.Tensor]:
    """Greedy tokens, and the log-probability of each."""
    outputs = [output.outputs[0] for output in generate(llm, PROMPTS, greedy_params(NUM_TOKENS, logprobs=0))]
    tokens = [list(output.token_ids) for output in outputs]
    logprobs = [
        [step[token].logprob for step, token in zip(output.logprobs, output.token_ids, strict=True)]
        for output in outputs
    ]
    return tokens, torch.tensor(logprobs)
