"""Real vLLM on a GPU, eager and in its default mode (compiled, with CUDA graphs), against the oracle."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from s2_vllm.plan import plan_of
from tests.engine.checkpoints import random_prompts, save_checkpoint
from tests.engine.engines import (
    assert_all_pages_free,
    attention_layers,
    engine,
    greedy,
    pages_handed_out,
    preemptions,
)
from tests.engine.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

PATTERNS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "kv": ({"block_size": 64, "local_blocks": 2, "vert_stride": 3, "dense_layers": [1]}, {"head_dim": 64}),
    "query_4": (
        {
            "block_size": 32,
            "local_blocks": 2,
            "vert_stride": 8,
            "head_sliding_offset": 1,
            "pattern_heads": "query",
            "dense_layers": [1],
        },
        {"head_dim": 64, "num_attention_heads": 8},
    ),
    # All heads of layer 1 are streaming heads, and all of layer 2 full ones.
    "mixed": (
        {
            "block_size": 64,
            "local_blocks": 2,
            "vert_stride": None,
            "sink_blocks": 1,
            "full_heads": {"0": [1], "2": [0, 1, 2, 3], "3": [0, 2, 3]},
        },
        {"head_dim": 64, "num_attention_heads": 8, "num_key_value_heads": 4, "num_hidden_layers": 4},
    ),
}

# The largest difference of two logits seen between transformers' own run in the dtype and in float32;
# and the standard deviation of weights for which most margins are larger than that.
ERROR_BOUNDS = {"float32": 1e-3, "bfloat16": 0.1}
WEIGHT_STDS = {"float32": 0.13, "bfloat16": 0.05}

HEADS: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"sink_blocks": 1, "full_heads": [1], "layers": {"1": {"vert_stride": None, "full_heads": []}}},
}
"""Keys of `s2_attention` by which a model has heads of one kind, or of several."""

PROMPTS = random_prompts([3, 100, 129, 400, 701, 800])

NUM_TOKENS = 24

Run = tuple[list[list[int]], bool]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Path]:
    """A checkpoint with a pattern of PATTERNS, its weights in a dtype."""

    @lru_cache
    def make(pattern: str, dtype: str) -> Path:
        s2, shape = PATTERNS[pattern]
        return save_checkpoint(
            tmp_path_factory.mktemp(pattern),
            "llama",
            s2,
            dtype=getattr(torch, dtype),
            weight_std=WEIGHT_STDS[dtype],
            **shape,
        )

    return make


@pytest.fixture(scope="module")
def run(folder: Callable[[str, str], Path]) -> Callable[[str, str, bool], Run]:
    """Greedy tokens of PROMPTS, and whether CUDA graphs were on: once for each pattern, dtype and mode."""

    @lru_cache
    def generate(pattern: str, dtype: str, eager: bool) -> Run:
        options = {"dtype": dtype, "enforce_eager": eager, "max_num_batched_tokens": 331}
        with engine(folder(pattern, dtype), **options) as llm:
            assert "S2Attention" in attention_layers(llm).values()
            graphs = llm.llm_engine.vllm_config.compilation_config.cudagraph_mode.name != "NONE"
            tokens = greedy(llm, PROMPTS, NUM_TOKENS)
            assert_all_pages_free(llm)
        return tokens, graphs

    return generate


def assert_agrees(oracle: Oracle, tokens: list[list[int]], error_bound: float) -> None:
    """No token differs where the oracle's margin decides, and most are decided."""
    agreements = [
        oracle.agreement(prompt, out, error_bound) for prompt, out in zip(PROMPTS, tokens, strict=True)
    ]
    assert [mismatch for agreement in agreements for mismatch in agreement.mismatches] == []
    assert sum(a.decided for a in agreements) > sum(a.total for a in agreements) / 2


@pytest.mark.parametrize("eager", [True, False], ids=["eager", "default"])
@pytest.mark.parametrize("dtype", ERROR_BOUNDS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_greedy_agrees_with_oracle(
    folder: Callable[[str, str], Path],
    run: Callable[[str, str, bool], Run],
    pattern: str,
    dtype: str,
    eager: bool,
) -> None:
    """Chunked prefill and decode; and an oracle without the pattern disagrees."""
    tokens, graphs = run(pattern, dtype, eager)
    assert graphs is not eager
    path = folder(pattern, dtype)
    assert_agrees(Oracle(path), tokens, ERROR_BOUNDS[dtype])
    with pytest.raises(AssertionError):
        assert_agrees(Oracle(path, {}), tokens, ERROR_BOUNDS[dtype])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_default_mode_gives_the_eager_output(run: Callable[[str, str, bool], Run], pattern: str) -> None:
    """In float32, token for token."""
    assert run(pattern, "float32", True)[0] == run(pattern, "float32", False)[0]


def test_layers_that_share_a_cache_entry(tmp_path: Path) -> None:
    """Four sparse layers on the pages of one entry, and a dense layer with pages four times as long."""
    s2 = {"block_size": 32, "local_blocks": 2, "vert_stride": 4, "dense_layers": [0]}
    path = save_checkpoint(tmp_path, "llama", s2, head_dim=64, num_hidden_layers=5)
    with engine(path, enforce_eager=False, max_num_batched_tokens=331) as llm:
        plan = plan_of(llm.llm_engine.vllm_config)
        assert plan is not None
        assert plan.layers_per_entry == 4
        tokens = greedy(llm, PROMPTS, NUM_TOKENS)
        assert_all_pages_free(llm)
    # vLLM's float32 attention of the dense layer, the first of five, multiplies in TF32: rounding its
    # operands so moves the oracle's own logits by up to 0.21.
    assert_agrees(Oracle(path), tokens, error_bound=0.25)
    with pytest.raises(AssertionError):
        assert_agrees(Oracle(path, {}), tokens, error_bound=0.25)


def test_reused_pages_and_preemption(tmp_path: Path) -> None:
    """With CUDA graphs, in a pool far too small: no replay reads a page that has changed hands.

    All layers are sparse: vLLM's float32 attention of a dense layer multiplies in TF32, whose error over
    thousands of tokens would need a bound that hides more.
    """
    s2, shape = PATTERNS["kv"]
    path = save_checkpoint(tmp_path, "llama", {**s2, "dense_layers": []}, **shape)
    oracle = Oracle(path)
    prompts = random_prompts([200 + 5 * n for n in range(8)], seed=7)
    options = {"max_num_batched_tokens": 331, "max_model_len": 640, "num_gpu_blocks_override": 18}
    with engine(path, enforce_eager=False, **options) as llm:
        before = preemptions(llm)
        with pages_handed_out(llm) as pages:
            tokens = greedy(llm, prompts, 400)
        assert preemptions(llm) > before
        assert len(pages) > 2 * 18
        assert_all_pages_free(llm)
    for prompt, out in zip(prompts, tokens, strict=True):
        assert oracle.agreement(prompt, out, ERROR_BOUNDS["float32"]).mismatches == []


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("dtype", ERROR_BOUNDS)
def test_nothing_is_compiled_while_serving(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: str, heads: str
) -> None:
    """Prompts within the window and past it, alone and after decodes, find their kernels made at start."""
    from triton import knobs

    # A pattern of no other test: what this process has compiled already would not be compiled again.
    s2 = {"block_size": 64, "local_blocks": 3, "vert_stride": 4, "dense_layers": [], **HEADS[heads]}
    path = save_checkpoint(tmp_path, "llama", s2, dtype=getattr(torch, dtype), head_dim=64)
    compiled = []
    with engine(path, dtype=dtype, enforce_eager=False, max_num_batched_tokens=331) as llm:
        monkeypatch.setattr(
            knobs.runtime, "jit_post_compile_hook", lambda **made: compiled.append(made["fn"].name)
        )
        greedy(llm, PROMPTS[:1], NUM_TOKENS)
        greedy(llm, PROMPTS, NUM_TOKENS)
    assert compiled == []
