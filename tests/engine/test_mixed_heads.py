"""Full, streaming and strided heads, sinks, and layers that differ: greedy output equals the oracle's."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest

from s2_kernels.config import S2Config
from s2_vllm.cli import main
from s2_vllm.plan import ModelGeometry, plan_of
from s2_vllm.planning import make_plan
from tests.engine.checkpoints import random_prompts, save_checkpoint
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

NUM_BLOCKS = 36

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
    other_heads = {"full_heads": [0], "num_dense_heads": 0, "layers": {}}
    for other in ({}, {**s2, "sink_blocks": 3}, {**s2, **other_heads}):
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


def test_reused_pages_and_preemption(checkpoint: Callable[..., Path]) -> None:
    """A pool far too small for its requests: pages are reused all the time, requests start over."""
    folder = checkpoint("llama", STREAMING, **SHAPE)
    oracle = Oracle(folder)
    prompts = random_prompts([180, 220, 150, 200, 170, 210], seed=7)
    expected = [oracle.greedy(prompt, 60)[0] for prompt in prompts]
    pool = {"max_model_len": 320, "num_gpu_blocks_override": NUM_BLOCKS, "async_scheduling": False}
    with engine(folder, max_num_batched_tokens=CHUNK, **pool) as llm:
        before = preemptions(llm)
        with pages_handed_out(llm) as pages:
            assert greedy(llm, prompts, 60) == expected
        assert preemptions(llm) > before
        assert len(pages) > 2 * NUM_BLOCKS
        assert_all_pages_free(llm)


def test_prefix_hits_far_behind_the_window(checkpoint: Callable[..., Path]) -> None:
    """Of a prefix whose window pages were freed during prefill a hit needs the sinks, and they are there."""
    folder = checkpoint("qwen3", STRIDED, **SHAPE)
    oracle = Oracle(folder)
    prefix, *suffixes = random_prompts([400, 1, 40], seed=2)
    prompts = [prefix + suffix for suffix in suffixes]
    with engine(folder, max_num_batched_tokens=CHUNK) as llm:
        greedy(llm, [prefix], 1)
        outputs = generate(llm, prompts, greedy_params(NUM_TOKENS))
        for prompt, output in zip(prompts, outputs, strict=True):
            assert output.num_cached_tokens == 384
            assert list(output.outputs[0].token_ids) == oracle.greedy(prompt, NUM_TOKENS)[0]
        assert_all_pages_free(llm)


def test_layers_lead_entries_as_planned(checkpoint: Callable[..., Path]) -> None:
    """Otherwise no layer would lead the one tier and share the other."""
    with engine(checkpoint("qwen3", STRIDED, **SHAPE)) as llm:
        plan = plan_of(llm.llm_engine.vllm_config)
        assert plan is not None
        windows = [plan.window_place(index).leader for index in range(5)]
        strided = [plan.strided_place(index, 0) for index in range(5)]
        assert windows == [0, 0, 0, 0, 4]
        assert [place and place.leader for place in strided] == [0, 1, 0, 1, None]
        kinds = attention_layers(llm)
        assert [name for name, kind in kinds.items() if kind == "StridedTier"] == [
            f"model.layers.{layer}.self_attn.attn.strided" for layer in (0, 1)
        ]


RANKS = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": 4,
    "full_heads": {"0": [2], "1": [0, 1], "3": [0, 1, 2, 3]},
    "dense_layers": [4],
    "layers": {"0,2": {"vert_stride": None, "sink_blocks": 1}, "3": {"vert_stride": None}},
}
"""Of two ranks the first has no row of layer 0's strided tier, and the other plain heads in layer 1."""


def test_ranks_differ() -> None:
    plan = make_plan(S2Config.parse(RANKS, 5), ModelGeometry(5, 8, 4, 32, 4), 2)
    assert plan.strided is not None
    assert plan.strided.sizes[0][0] == 0 < plan.strided.sizes[0][1]
    assert plan.strided_place(0, 0) is not None
    assert plan.pattern_of(1, 1).kinds is None
    assert not plan.layout_of(1, 1).is_even


@needs_two_cores
def test_two_ranks(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    folder = checkpoint("llama", RANKS, **SHAPE)
    oracle = Oracle(folder)
    prompts = random_prompts([5, 150, 300], seed=11)
    expected = [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in prompts]
    assert run_ranks(2, folder, prompts, NUM_TOKENS, tmp_path).tokens == expected


KNOWN_HEADS: dict[str, Any] = {
    "block_size": 64,
    "local_blocks": 2,
    "vert_stride": None,
    "sink_blocks": 1,
    "full_heads": {"0": [1], "2": [0]},
    "dense_layers": [1],
}
"""What the files below say of a model with three layers of two KV heads."""

DUO_ATTENTION = "0.1\t0.9\n0.8\t0.7\n0.6\t0.2\n"

RTPURBO = {"0": [0, 0, 0, 1], "2": [1, 0, 0, 0], "sink_token_num": 4, "swa_token_num": 50}


def check_known_heads(folder: Path, **options: Any) -> None:
    """An engine for the checkpoint serves KNOWN_HEADS."""
    (prompt,) = random_prompts([500], seed=3)
    oracle = Oracle(folder, KNOWN_HEADS)
    with engine(folder, **options) as llm:
        assert greedy(llm, [prompt], NUM_TOKENS) == [oracle.greedy(prompt, NUM_TOKENS)[0]]
    assert Oracle(folder, {}).greedy(prompt, NUM_TOKENS) != oracle.greedy(prompt, NUM_TOKENS)


def test_a_dense_checkpoint_with_the_heads_of_duoattention(
    checkpoint: Callable[..., Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the published file to the engine, by `s2-vllm heads` and `--hf-overrides`."""
    scores = tmp_path / "full_attention_heads.tsv"
    scores.write_text(DUO_ATTENTION)
    assert main(["heads", str(scores), "--sparsity", "0.33", "--sink", "4", "--recent", "50"]) == 0
    check_known_heads(checkpoint("llama"), hf_overrides=json.loads(capsys.readouterr().out))


def test_a_checkpoint_with_the_heads_of_rtpurbo(tmp_path: Path) -> None:
    check_known_heads(save_checkpoint(tmp_path, "qwen3", names={"headwise_config": RTPURBO}))
