"""The KV cache that an engine would set up, without the engine: configuration, specs, groups and blocks."""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.core.kv_cache_utils import generate_scheduler_kv_cache_config
from vllm.v1.kv_cache_interface import FullAttentionSpec

import s2_vllm
from s2_vllm.plan import plan_of
from s2_vllm.specs import STRIDED_SUFFIX, padding_entries, strided_spec, window_spec

try:  # vLLM 0.33
    from vllm.v1.core import kv_cache_planning
except ImportError:  # vLLM 0.32
    from vllm.v1.core import kv_cache_utils as kv_cache_planning

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from benchmarks.geometries import Geometry
    from s2_vllm.plan import CachePlan

DTYPE = torch.bfloat16
DENSE_BLOCK_SIZE = 16
"""vLLM's own, on a GPU."""


def engine_config(geometry: Geometry, sparse: bool, **options: Any) -> VllmConfig:
    """The configuration of an engine on a GPU, with or without the pattern, wherever this runs.

    Args:
        geometry: the model's attention.
        sparse: whether the model has the pattern.
        options: engine arguments.
    """
    s2_vllm.register()
    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(geometry.hf_config(sparse)))
        config = EngineArgs(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            block_size=None if sparse else DENSE_BLOCK_SIZE,
            **options,
        ).create_engine_config()
    # vLLM's defaults on a GPU.
    config.scheduler_config.async_scheduling = True
    config.cache_config.kv_cache_layout = "LBHNC"
    return config


def cache_config(config: VllmConfig, geometry: Geometry, memory: int) -> KVCacheConfig:
    """The groups and blocks that vLLM makes of `memory` bytes, as its scheduler sees them.

    Raises:
        ValueError: vLLM's, where not even one request of the longest length fits.
    """
    plan = plan_of(config)
    specs = dense_specs(geometry) if plan is None else cache_specs(plan, DTYPE)
    arguments: list[Any] = [config, [specs], [memory]]
    if hasattr(kv_cache_planning, "get_global_kv_cache_groups"):  # vLLM 0.33 groups in a step of its own
        arguments.append(kv_cache_planning.get_global_kv_cache_groups(config, [specs]))
    return generate_scheduler_kv_cache_config(kv_cache_planning.get_kv_cache_configs(*arguments))


def cache_specs(plan: CachePlan, dtype: torch.dtype) -> dict[str, KVCacheSpec]:
    """The specs of a model's KV cache entries, by the names and in the order in which vLLM collects them."""
    specs: dict[str, KVCacheSpec] = {}
    for layer in range(plan.model.num_layers):
        name = _layer_name(layer)
        if layer in plan.dense_layers:
            specs[name] = FullAttentionSpec(
                block_size=plan.dense_block_size,
                num_kv_heads=plan.num_kv_heads,
                head_size=plan.model.head_size,
                dtype=dtype,
            )
            continue
        index = plan.sparse_layers.index(layer)
        if plan.window_place(index).leader == index:
            specs[name] = window_spec(plan, dtype)
        place = plan.strided_place(index, rank=0)
        if place is not None and place.leader == index:
            specs[name + STRIDED_SUFFIX] = strided_spec(plan, dtype)
        if index == 0:
            specs.update(padding_entries(plan, name, dtype))
    return specs


def dense_specs(geometry: Geometry) -> dict[str, KVCacheSpec]:
    """The same of a model whose layers are all dense."""
    spec = FullAttentionSpec(
        block_size=DENSE_BLOCK_SIZE,
        num_kv_heads=geometry.num_kv_heads,
        head_size=geometry.head_size,
        dtype=DTYPE,
    )
    return {_layer_name(layer): spec for layer in range(geometry.num_layers)}


def _layer_name(layer: int) -> str:
    return f"model.layers.{layer}.self_attn.attn"
