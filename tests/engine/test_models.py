"""Model families and patterns: greedy output equals the oracle's, token for token, in float32."""

from __future__ import annotations

from collections import Counter
from copy import copy
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import pytest
from vllm.config.utils import replace

from s2_kernels.layout import HeadTables, head_tables
from s2_vllm.attention import S2Attention
from s2_vllm.plan import plan_of
from tests.engine.checkpoints import FAMILIES, random_prompts
from tests.engine.engines import (
    assert_all_pages_free,
    attention_layers,
    cache_specs,
    engine,
    generate,
    greedy,
    greedy_params,
    model,
    scheduler,
)
from tests.engine.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

NUM_TOKENS = 12


@dataclass(frozen=True)
class Case:
    """A pattern, the model shape it needs and a chunk size that cuts its blocks."""

    s2: dict[str, Any]
    shape: dict[str, Any] = field(default_factory=dict)
    family: str = "llama"
    chunk: int = 53


MIXED = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}

QUERY_4 = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": 8,
    "head_sliding_offset": 1,
    "pattern_heads": "query",
}

CASES = {family: Case(MIXED, family=family) for family in FAMILIES} | {
    "stride_5": Case({"block_size": 16, "local_blocks": 2, "vert_stride": 5}),
    "local_1": Case({"block_size": 16, "local_blocks": 1, "vert_stride": 4}),
    "homo_head": Case(
        {
            "block_size": 32,
            "local_blocks": 2,
            "vert_stride": 3,
            "homo_head": True,
            "head_sliding_offset": 1,
            "dense_layers": [0],
        }
    ),
    "step_3_offset_2": Case(
        {
            "block_size": 16,
            "local_blocks": 3,
            "vert_stride": 7,
            "head_sliding_step": 3,
            "head_sliding_offset": 2,
        },
        {"num_key_value_heads": 4},
    ),
    "query_4": Case(QUERY_4, {"num_attention_heads": 8}),
    "query_4_mixed": Case(
        {**QUERY_4, "dense_layers": [1, 3]}, {"num_attention_heads": 8, "num_hidden_layers": 4}
    ),
    "group_3": Case(
        {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [2]},
        {"num_attention_heads": 6, "hidden_size": 192},
    ),
    # The default step counts the six query heads, not the two KV heads that h counts: 1, and not 2.
    "default_step": Case(
        {"block_size": 16, "local_blocks": 2, "vert_stride": 5},
        {"num_attention_heads": 6, "hidden_size": 192},
    ),
    "block_64": Case({"block_size": 64, "local_blocks": 2, "vert_stride": 3, "dense_layers": [0]}, chunk=97),
    "block_128": Case(
        {"block_size": 128, "local_blocks": 1, "vert_stride": 2, "dense_layers": [2]}, chunk=97
    ),
    "head_size_64": Case(MIXED, {"head_dim": 64}),
    "shared_entries": Case({**MIXED, "vert_stride": 8, "dense_layers": [4]}, {"num_hidden_layers": 9}),
    "padding_entries": Case({**MIXED, "dense_layers": [0, 1, 2, 4, 5, 6]}, {"num_hidden_layers": 7}),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_greedy_equals_oracle(case: Case, checkpoint: Callable[..., Path]) -> None:
    """Chunked prefill that cuts blocks, decode, and a second run on a prefix hit."""
    folder = checkpoint(case.family, case.s2, **case.shape)
    oracle, dense = Oracle(folder), Oracle(folder, {})
    prompts = random_prompts(_lengths(case.s2))
    expected = [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in prompts]
    # Otherwise a dense engine would pass.
    assert dense.greedy(prompts[-1], NUM_TOKENS)[0] != expected[-1]

    with engine(folder, max_num_batched_tokens=case.chunk) as llm:
        layers = Counter(attention_layers(llm).values())
        num_dense = len(case.s2.get("dense_layers", []))
        num_layers = case.shape.get("num_hidden_layers", 3)
        assert (layers["S2Attention"], layers["Attention"]) == (num_layers - num_dense, num_dense)

        assert greedy(llm, prompts, NUM_TOKENS) == expected
        again = generate(llm, prompts[-1:], greedy_params(NUM_TOKENS))[0]
        assert again.num_cached_tokens > 0
        assert list(again.outputs[0].token_ids) == expected[-1]
        assert_all_pages_free(llm)


def test_many_sparse_layers_share_entries(checkpoint: Callable[..., Path]) -> None:
    """The case of that name is what it says: fewer strided entries than sparse layers."""
    case = CASES["shared_entries"]
    with engine(checkpoint(case.family, case.s2, **case.shape)) as llm:
        layers = Counter(attention_layers(llm).values())
        assert 0 < layers["StridedTier"] < layers["S2Attention"]


def test_few_sparse_layers_bring_padding_entries(checkpoint: Callable[..., Path]) -> None:
    """The case of that name is what it says; and the scheduler's groups have the plugin's managers."""
    case = CASES["padding_entries"]
    with engine(checkpoint(case.family, case.s2, **case.shape)) as llm:
        layers = Counter(attention_layers(llm).values())
        assert (layers["S2Attention"], layers["StridedTier"], layers["BareEntry"]) == (1, 1, 2)
        managers = scheduler(llm).kv_cache_manager.coordinator.single_type_managers
        kinds = {"QuickSlidingWindowManager": 1, "QuickFullAttentionManager": 4}
        assert Counter(type(manager).__name__ for manager in managers) == kinds


def test_what_vllm_remakes_and_keeps_has_the_plan_and_the_tables(checkpoint: Callable[..., Path]) -> None:
    """vLLM's autotuning remakes the configuration; its sleep mode keeps what is a parameter or a buffer."""
    with engine(checkpoint("llama", MIXED)) as llm:
        config = llm.llm_engine.vllm_config
        remade = replace(config, cache_config=copy(config.cache_config))
        assert plan_of(remade) == plan_of(config) is not None
        assert remade.cache_config.block_size == config.cache_config.block_size
        kept = {buffer.data_ptr() for _, buffer in model(llm).named_buffers()}
        device = next(model(llm).parameters()).device
        layers = [layer for layer in model(llm).modules() if isinstance(layer, S2Attention)]
        used = [pointers(layer.impl.tables) for layer in layers]
        assert set.union(*used) <= kept
        # Each layer's own: an engine puts them to sleep, and neither another nor the library may notice.
        assert len(set.union(*used)) == sum(map(len, used)) == len(HeadTables._fields) * len(layers) > 0
        of_library = head_tables(plan_of(config).pattern_of(0, 0), device)
        assert not pointers(of_library) & kept


def test_new_weights_leave_the_tables_where_they_are(checkpoint: Callable[..., Path]) -> None:
    """CUDA graphs, once captured, read them there."""
    folder = checkpoint("llama", MIXED)
    with engine(folder) as llm:
        layers = [layer for layer in model(llm).modules() if isinstance(layer, S2Attention)]
        before = [pointers(layer.impl.tables) for layer in layers]
        llm.collective_rpc("reload_weights")
        assert [pointers(layer.impl.tables) for layer in layers] == before
        assert set.union(*before) <= {buffer.data_ptr() for _, buffer in model(llm).named_buffers()}
        (prompt,) = random_prompts([_lengths(MIXED)[-1]])
        assert greedy(llm, [prompt], NUM_TOKENS) == [Oracle(folder).greedy(prompt, NUM_TOKENS)[0]]


def test_options_that_name_the_page_and_the_backend(checkpoint: Callable[..., Path]) -> None:
    """A block size that the plan can honour is the dense layers' page; CUSTOM is this backend's name."""
    folder = checkpoint("llama", MIXED)
    prompts = random_prompts(_lengths(MIXED))
    with engine(folder, block_size=96, attention_backend="CUSTOM", max_num_batched_tokens=53) as llm:
        assert cache_specs(llm)["model.layers.1.self_attn.attn"].block_size == 96
        oracle = Oracle(folder)
        assert greedy(llm, prompts, NUM_TOKENS) == [oracle.greedy(p, NUM_TOKENS)[0] for p in prompts]
        assert_all_pages_free(llm)


def pointers(tables: HeadTables) -> set[int]:
    return {table.data_ptr() for table in tables}


def _lengths(s2: dict[str, Any]) -> list[int]:
    """Less than a block; just past the window; and one and over two super-blocks past it."""
    block, super_block = s2["block_size"], s2["block_size"] * s2["vert_stride"]
    window = block * s2["local_blocks"]
    return [3, window + 1, window + super_block + block // 2, window + 2 * super_block + block + 5]
