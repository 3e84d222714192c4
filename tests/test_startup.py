"""The KV cache that vLLM has set up against the plan, before the first request."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec

from benchmarks.geometries import SERVED
from s2_vllm.config import S2ConfigError
from s2_vllm.plan import attach_plan
from s2_vllm.startup import check_and_report
from tests.plans import cache_config, cache_groups, cache_specs, engine_config, reference_plan

if TYPE_CHECKING:
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from s2_vllm.plan import CachePlan

MEMORY = 1 << 30


def check(plan: CachePlan, specs: dict[str, KVCacheSpec]) -> None:
    """Check what vLLM makes of `specs` against `plan`."""
    config = engine_config()
    attach_plan(config, plan)
    check_and_report(config, cache_config(cache_groups(specs), MEMORY))


@pytest.mark.parametrize("name", SERVED)
def test_what_vllm_makes_of_the_plan(name: str) -> None:
    check(reference_plan(name), cache_specs(reference_plan(name)))


def test_another_plan() -> None:
    with pytest.raises(RuntimeError, match="KV cache groups"):
        check(reference_plan("hhst-8b"), cache_specs(reference_plan("s2-1.3b")))


def test_a_layer_that_did_not_ask_for_pages() -> None:
    plan = reference_plan("hhst-8b")
    specs = cache_specs(plan)
    del specs["model.layers.1.self_attn.attn"]
    with pytest.raises(RuntimeError, match="KV cache"):
        check(plan, specs)


def test_a_dense_layer_without_full_attention_is_named() -> None:
    plan = reference_plan("hhst-8b")
    specs = cache_specs(plan)
    dense = specs["model.layers.0.self_attn.attn"]
    specs["model.layers.0.self_attn.attn"] = ChunkedLocalAttentionSpec(
        block_size=dense.block_size,
        num_kv_heads=dense.num_kv_heads,
        head_size=dense.head_size,
        dtype=dense.dtype,
        attention_chunk_size=4096,
    )
    message = (
        r"s2_attention\.dense_layers: layer model\.layers\.0\..*ChunkedLocalAttentionSpec.*full attention"
    )
    with pytest.raises(S2ConfigError, match=message):
        check(plan, specs)
