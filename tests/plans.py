"""What vLLM makes of a plan: specs, KV cache groups, blocks."""

from __future__ import annotations

from copy import copy
from functools import cache
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from vllm.config import VllmConfig

from benchmarks import engine_cache
from benchmarks.geometries import GEOMETRIES, PRETRAINED
from s2_vllm.plan import CachePlan
from s2_vllm.planning import make_plan
from s2_vllm.specs import STRIDED_SUFFIX

if TYPE_CHECKING:
    from collections.abc import Mapping

    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheGroupSpec, KVCacheSpec

DTYPE = torch.bfloat16


def reference_plan(name: str, **options: Any) -> CachePlan:
    """The plan of the reference geometry called `name`."""
    geometry = (GEOMETRIES | PRETRAINED)[name]
    return make_plan(geometry.config, geometry.model(DTYPE.itemsize), **options)


def engine_config(max_model_len: int = 131072, max_num_batched_tokens: int = 2048) -> VllmConfig:
    """An engine's configuration without a model: all that vLLM's KV cache code asks about is its length."""
    config = copy(_bare_config())
    config.model_config = SimpleNamespace(max_model_len=max_model_len)
    config.scheduler_config = copy(config.scheduler_config)
    config.scheduler_config.max_num_batched_tokens = max_num_batched_tokens
    return config


@cache
def _bare_config() -> VllmConfig:
    config = VllmConfig()
    # vLLM's default depends on the machine.
    config.scheduler_config.async_scheduling = False
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def cache_specs(plan: CachePlan) -> dict[str, KVCacheSpec]:
    """The specs of a model's KV cache entries, by the names and in the order in which vLLM collects them."""
    return engine_cache.cache_specs(plan, DTYPE)


def cache_groups(specs: Mapping[str, KVCacheSpec]) -> list[KVCacheGroupSpec]:
    """vLLM's own grouping of the entries."""
    return engine_cache.kv_cache_planning.get_kv_cache_groups(engine_config(), dict(specs))


def cache_config(groups: list[KVCacheGroupSpec], memory: int) -> KVCacheConfig:
    """vLLM's own division of `memory` bytes into blocks."""
    return engine_cache.kv_cache_planning.get_kv_cache_config_from_groups(engine_config(), groups, memory)


def tier_of(group: KVCacheGroupSpec) -> str:
    """The tier whose entries a group consists of."""
    tiers = {
        "strided"
        if name.endswith(STRIDED_SUFFIX)
        else "window"
        if getattr(group.kv_cache_spec, "sliding_window", None)
        else "dense"
        for name in group.layer_names
    }
    assert len(tiers) == 1, f"a group of several tiers: {group}"
    return tiers.pop()
