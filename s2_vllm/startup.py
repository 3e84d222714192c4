"""What happens at engine start: the plan is made before anything loads, and checked once all is set up."""

from __future__ import annotations

import logging
from collections import Counter
from typing import TYPE_CHECKING, Any

from s2_kernels.config import KEY, S2Config, S2ConfigError, find_model_config
from s2_vllm import refusals
from s2_vllm.plan import CachePlan, ModelGeometry, attach_plan, plan_of
from s2_vllm.planning import make_plan
from s2_vllm.specs import STRIDED_SUFFIX

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig

_logger = logging.getLogger("vllm.s2_vllm")


def prepare(vllm_config: VllmConfig) -> bool:
    """Validate an engine's configuration, make its plan and set the block size the plan needs.

    vLLM makes new configurations of an engine's, also when the plan has been carried out: they keep it.

    Returns:
        Whether the model has a pattern.

    Raises:
        S2ConfigError: the model, the pattern or an engine option cannot be served.
    """
    model_config = vllm_config.model_config
    config = None if model_config is None else _read_config(model_config)
    refusals.check_backend_names(vllm_config, has_pattern=config is not None)
    if config is None:
        return False
    refusals.check_model(model_config)
    refusals.check_options(vllm_config)
    if refusals.asks_for_our_backend(vllm_config):
        # Of no use to the dense layers; the sparse ones bring it.
        vllm_config.attention_config.backend = None
    if plan_of(vllm_config) is None:
        _attach_new_plan(vllm_config, config)
    return True


def _attach_new_plan(vllm_config: VllmConfig, config: S2Config) -> None:
    cache_config = vllm_config.cache_config
    plan = make_plan(
        config,
        _geometry(vllm_config),
        vllm_config.parallel_config.tensor_parallel_size,
        cache_config.block_size if cache_config.user_specified_block_size else None,
    )
    cache_config.block_size = plan.dense_block_size
    cache_config.user_specified_block_size = True
    attach_plan(vllm_config, plan)


def settle_kv_cache(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Compare the KV cache that vLLM has laid out with the plan, log one line, and choose its managers.

    Args:
        vllm_config: the engine's configuration.
        kv_cache_config: the scheduler's; without a plan it is left alone.

    Raises:
        S2ConfigError: a dense layer has something else than full attention.
        RuntimeError: vLLM's groups are not the planned ones.
    """
    plan = plan_of(vllm_config)
    if plan is None:
        return
    from s2_vllm.managers import use_quick_managers

    _check_groups(plan, kv_cache_config)
    _report(plan, vllm_config, kv_cache_config)
    use_quick_managers(kv_cache_config)


def _check_groups(plan: CachePlan, kv_cache_config: KVCacheConfig) -> None:
    actual: Counter[tuple[str, int, int]] = Counter()
    entries: Counter[str] = Counter()
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        name = _tier_of(group.layer_names[0], spec, plan)
        if name == "window" and getattr(spec, "sink_pages", 0) != plan.sink_pages:
            raise RuntimeError(
                f"KV cache group of the window tier: vLLM made it a {type(spec).__name__}, expected one that "
                f"keeps the first {plan.sink_pages} pages of a sequence"
            )
        actual[name, spec.block_size, spec.page_size_bytes] += 1
        entries[name] += len(group.layer_names)
    expected = Counter({(t.name, t.block_size, plan.page_bytes): plan.num_groups(t) for t in plan.tiers})
    if actual != expected:
        raise RuntimeError(
            "KV cache groups (tier, block size, page bytes): vLLM set up "
            f"{dict(actual)}, expected {dict(expected)}"
        )
    for tier in plan.tiers:
        if entries[tier.name] != tier.num_entries:
            raise RuntimeError(
                f"KV cache entries of the {tier.name} tier: {entries[tier.name]}, expected "
                f"{tier.num_entries}: some layers of this model do not use vLLM's Attention layer"
            )


def _tier_of(layer_name: str, spec: Any, plan: CachePlan) -> str:
    from vllm.model_executor.models.utils import extract_layer_index
    from vllm.v1.kv_cache_interface import FullAttentionSpec

    if layer_name.endswith(STRIDED_SUFFIX):
        return "strided"
    if extract_layer_index(layer_name) not in plan.dense_layers:
        return "window"
    if not isinstance(spec, FullAttentionSpec):
        raise S2ConfigError(
            f"{KEY}.dense_layers: layer {layer_name} has a KV cache of its own kind ({type(spec).__name__}), "
            "expected layers with full attention"
        )
    return "dense"


def _report(plan: CachePlan, vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    length = vllm_config.model_config.max_model_len
    memory = kv_cache_config.num_blocks * plan.block_bytes
    counted = plan.bytes_per_request(length, vllm_config.max_in_flight_tokens)
    _logger.info(
        "S2-Attention: %d sparse and %d dense layers; %stiers: %s; %d KV cache groups, padding %s; a "
        "sparse layer stores %.1f%% of a dense one at %d tokens; KV cache for %.2f requests of that length "
        "while they decode, %.2f by vLLM's count, which has window pages for %d tokens in flight of every "
        "request, %.2f if all were dense.%s",
        len(plan.sparse_layers),
        len(plan.dense_layers),
        _heads(plan),
        ", ".join(f"{t.name} ({t.block_size}-token pages)" for t in plan.tiers),
        plan.total_groups,
        _padding(plan),
        100 * plan.stored_fraction(length),
        length,
        memory / plan.bytes_per_request(length),
        memory / counted,
        vllm_config.max_in_flight_tokens,
        memory / plan.dense_bytes_per_request(length),
        _old_blocks(plan),
    )


def _heads(plan: CachePlan) -> str:
    if not plan.is_mixed:
        return ""
    sinks = f", {plan.sink_blocks} sink blocks" if plan.sink_blocks else ""
    kinds = ", ".join(f"{count} {kind}" for kind, count in plan.heads.items())
    return f"KV heads of the sparse layers: {kinds}{sinks}; "


def _padding(plan: CachePlan) -> str:
    """What padding there is, the strided tier's apart from the rest where its entries are packed."""
    if not plan.is_mixed:
        return f"{float(plan.padding):.1%}"
    by_tier = ", ".join(f"{tier.name} {float(plan.padding_of(tier)):.1%}" for tier in plan.tiers)
    return f"{by_tier} (for less full ranks {float(plan.rank_padding):.1%})" if plan.rank_padding else by_tier


def _old_blocks(plan: CachePlan) -> str:
    incomplete, layers = plan.num_incomplete_layers, len(plan.sparse_layers)
    if plan.strided is None:
        return " No head of a sparse layer sees more than its window and the sinks."
    if 0 < incomplete < layers:
        return f" In {incomplete} sparse layers some old blocks are in no head's set."
    return " Some old blocks are in no head's set." if incomplete else ""


def _read_config(model_config: ModelConfig) -> S2Config | None:
    num_layers = model_config.get_total_num_hidden_layers()
    return find_model_config(model_config.hf_config, model_config.hf_text_config, num_layers)


def _geometry(vllm_config: VllmConfig) -> ModelGeometry:
    model_config, parallel_config = vllm_config.model_config, vllm_config.parallel_config
    ranks = parallel_config.tensor_parallel_size
    return ModelGeometry(
        num_layers=model_config.get_total_num_hidden_layers(),
        num_heads=model_config.get_num_attention_heads(parallel_config) * ranks,
        num_kv_heads=model_config.get_total_num_kv_heads(),
        head_size=model_config.get_head_size(),
        dtype_bytes=model_config.dtype.itemsize,
    )
