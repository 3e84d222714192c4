"""The KV cache that an engine would ask vLLM for, without the engine."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec

from s2_vllm.specs import PADDING_SUFFIX, STRIDED_SUFFIX, strided_spec, window_spec

if TYPE_CHECKING:
    import torch
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from s2_vllm.plan import CachePlan


def cache_specs(plan: CachePlan, dtype: torch.dtype) -> dict[str, KVCacheSpec]:
    """The specs of a model's KV cache entries, by the names and in the order in which vLLM collects them."""
    specs: dict[str, KVCacheSpec] = {}
    for layer in range(plan.model.num_layers):
        name = layer_name(layer)
        if layer in plan.dense_layers:
            specs[name] = dense_spec(plan, plan.dense_block_size, dtype)
            continue
        index = plan.sparse_layers.index(layer)
        entries = [name] if index % plan.layers_per_entry == 0 else []
        if index == 0:
            entries += [f"{name}{PADDING_SUFFIX}{number}" for number in range(plan.padding_entries)]
        for entry in entries:
            specs[entry] = window_spec(plan, dtype)
            specs[entry + STRIDED_SUFFIX] = strided_spec(plan, dtype)
    return specs


def layer_name(layer: int) -> str:
    """What vLLM calls the attention layer of index `layer` of a Llama."""
    return f"model.layers.{layer}.self_attn.attn"


def dense_spec(plan: CachePlan, block_size: int, dtype: torch.dtype) -> FullAttentionSpec:
    """A dense layer's pages of `block_size` tokens."""
    return FullAttentionSpec(
        block_size=block_size, num_kv_heads=plan.num_kv_heads, head_size=plan.model.head_size, dtype=dtype
    )
