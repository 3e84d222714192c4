"""Phi-3-small in real vLLM, token for token against an oracle that shares no code with it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from tests.engine.engines import (
    assert_all_pages_free,
    attention_layers,
    engine,
    generate,
    greedy,
    greedy_params,
    pages_handed_out,
    preemptions,
)
from tests.phi3_small.checkpoints import LONG_ROPE, ORIGINAL_LENGTH, REAL_PATTERN, random_prompts
from tests.phi3_small.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vllm import LLM

CHUNK = 75
"""Tokens per step: not a multiple of a block, so that chunks cut them."""

NUM_TOKENS = 10

NO_LIMIT = 1e30

VARIANTS: dict[str, dict[str, Any]] = {
    "homo_head-ff_dim_multiplier_padded": {
        "blocksparse_homo_head_pattern": True,
        "ff_intermediate_size": None,
        "ff_dim_multiplier": 1,
    },
    "4_kv_heads": {"num_attention_heads": 16, "num_key_value_heads": 4, "hidden_size": 512},
    "no_mup-ff_dim_multiplier": {
        "mup_use_scaling": False,
        "mup_embedding_multiplier": None,
        "mup_width_multiplier": None,
        "ff_intermediate_size": None,
        "ff_dim_multiplier": 1,
        "gegelu_pad_to_256": False,
    },
    "other_numbers": {
        "rope_embedding_base": 10000,
        "rope_position_scale": 0.5,
        "mup_attn_multiplier": 2.0,
        "mup_embedding_multiplier": 5.0,
        "mup_width_multiplier": 2.0,
        "gegelu_limit": 7.0,
        "layer_norm_epsilon": 0.1,
    },
    "every_3rd_layer_dense": {"dense_attention_every_n_layers": 3, "num_hidden_layers": 4},
    "no_dense_layer": {"dense_attention_every_n_layers": None, "num_hidden_layers": 2},
}


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    """The 8k model in miniature."""
    return checkpoint()


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> Iterator[LLM]:
    with engine(folder, max_num_batched_tokens=CHUNK) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The module's engine, with nothing cached before and no page missing after."""
    assert shared_llm.reset_prefix_cache()
    yield shared_llm
    assert_all_pages_free(shared_llm)


@pytest.mark.parametrize(
    "change",
    [
        {"dense_attention_every_n_layers": 1},
        {"blocksparse_homo_head_pattern": True},
        {"blocksparse_num_local_blocks": 4},
        {"gegelu_limit": NO_LIMIT},
        {"mup_use_scaling": False},
        {"mup_embedding_multiplier": None},
        {"rope_embedding_base": 10000},
        {"layer_norm_epsilon": 0.1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_part_of_the_checkpoint_matters(folder: Path, oracle: Oracle, change: dict[str, Any]) -> None:
    """Each of these mistakes gives other tokens: equality with the oracle rules it out."""
    prompt = random_prompts([333])[0]
    assert Oracle(folder, **change).greedy(prompt, NUM_TOKENS)[0] != oracle.greedy(prompt, NUM_TOKENS)[0]


def test_chunked_prefill_of_many_lengths(llm: LLM, oracle: Oracle) -> None:
    """Prefills and decodes share their steps."""
    kinds = {
        name.split(".")[2]: kind for name, kind in attention_layers(llm).items() if "strided" not in name
    }
    assert kinds == {"0": "S2Attention", "1": "Attention", "2": "S2Attention"}
    prompts = random_prompts([1, 5, 16, 48, 75, 120, 256, 333, 700], seed=1)
    assert greedy(llm, prompts, NUM_TOKENS) == [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in prompts]


def test_prefix_hits(llm: LLM, oracle: Oracle) -> None:
    """Requests that share a prefix, longer than the window, read the pages that the first of them wrote."""
    prefix, *suffixes = random_prompts([600, 1, 40, 111], seed=2)
    greedy(llm, [prefix], 1)
    prompts = [prefix + suffix for suffix in suffixes]
    outputs = generate(llm, prompts, greedy_params(NUM_TOKENS))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert 300 < output.num_cached_tokens < len(prefix)
        assert list(output.outputs[0].token_ids) == oracle.greedy(prompt, NUM_TOKENS)[0]


def test_reused_pages_and_preemption(folder: Path, oracle: Oracle) -> None:
    """A pool far too small for its requests: pages are reused all the time, requests start over."""
    prompts = random_prompts([180, 220, 150, 200, 170, 210, 190, 160], seed=3)
    expected = [oracle.greedy(prompt, 60)[0] for prompt in prompts]
    pool = 36
    with engine(folder, max_num_batched_tokens=CHUNK, max_model_len=320, num_gpu_blocks_override=pool) as llm:
        before = preemptions(llm)
        with pages_handed_out(llm) as pages:
            assert greedy(llm, prompts, 60) == expected
        assert preemptions(llm) > before
        assert len(pages) > 2 * pool
        assert_all_pages_free(llm)


def test_real_pattern_beyond_2048_tokens(checkpoint: Callable[..., Path]) -> None:
    """Blocks of 64, 16 local ones, stride 8; a dense run says something else."""
    folder = checkpoint(**REAL_PATTERN)
    oracle, dense = Oracle(folder), Oracle(folder, dense_attention_every_n_layers=1)
    prompts = random_prompts([2100, 2600], seed=4)
    with engine(folder, max_num_batched_tokens=700, max_model_len=4096) as llm:
        tokens = greedy(llm, prompts, NUM_TOKENS)
        assert_all_pages_free(llm)
    for prompt, generated in zip(prompts, tokens, strict=True):
        assert generated == oracle.greedy(prompt, NUM_TOKENS)[0]
        assert generated != dense.greedy(prompt, NUM_TOKENS)[0]


def test_every_layer_dense(folder: Path) -> None:
    """`dense_attention_every_n_layers: 1` leaves no sparse layer, and vLLM's own attention serves all."""
    oracle = Oracle(folder, dense_attention_every_n_layers=1)
    prompts = random_prompts([5, 333], seed=5)
    with engine(folder, hf_overrides={"dense_attention_every_n_layers": 1}) as llm:
        assert set(attention_layers(llm).values()) == {"Attention"}
        assert greedy(llm, prompts, NUM_TOKENS) == [oracle.greedy(p, NUM_TOKENS)[0] for p in prompts]


@pytest.mark.parametrize("variant", VARIANTS)
def test_config_values(checkpoint: Callable[..., Path], variant: str) -> None:
    folder = checkpoint(**VARIANTS[variant])
    oracle = Oracle(folder)
    prompts = random_prompts([40, 333], seed=6)
    with engine(folder, max_num_batched_tokens=CHUNK, max_model_len=512) as llm:
        assert greedy(llm, prompts, NUM_TOKENS) == [oracle.greedy(p, NUM_TOKENS)[0] for p in prompts]


@pytest.mark.parametrize(
    ("max_model_len", "mscales"),
    [
        (ORIGINAL_LENGTH, "given"),
        (ORIGINAL_LENGTH, "by_formula"),
        (ORIGINAL_LENGTH + 1, "given"),
        (2048, "given"),
        (2048, "by_formula"),
    ],
)
def test_long_rope(checkpoint: Callable[..., Path], max_model_len: int, mscales: str) -> None:
    """The 128k model: short factors up to the original length, long ones beyond.

    vLLM decides by `max_model_len`, for all its LongRoPE models, so that keys in the cache stay valid. The
    original model decides by the length of the sequence so far: it uses the short factors for a sequence
    within the original length whatever the engine would allow, and mixes keys of both kinds in its cache
    when it generates across that length. Served with a longer `max_model_len`, short sequences therefore
    get the long factors. Without mscales in the config, short factors have none, and long ones a formula's.
    """
    rope = dict(LONG_ROPE["rope_scaling"])
    if mscales == "by_formula":
        del rope["short_mscale"], rope["long_mscale"]
    folder = checkpoint(long_rope=True, rope_scaling=rope)
    oracle, other = Oracle(folder, max_model_len), Oracle(folder, 2048 if max_model_len <= 512 else 0)
    lengths = [n for n in (60, 400, ORIGINAL_LENGTH - 5, 900) if n + NUM_TOKENS <= max_model_len]
    prompts = random_prompts(lengths, seed=7)
    with engine(folder, max_num_batched_tokens=CHUNK, max_model_len=max_model_len) as llm:
        tokens = greedy(llm, prompts, NUM_TOKENS)
        assert_all_pages_free(llm)
    for prompt, generated in zip(prompts, tokens, strict=True):
        assert generated == oracle.greedy(prompt, NUM_TOKENS)[0]
        assert generated != other.greedy(prompt, NUM_TOKENS)[0]
