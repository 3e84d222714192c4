"""What happens at engine start: the plan is made before anything loads, and checked once all is set up."""

from __future__ import annotations

from collections import Counter
from typing import TYPE_CHECKING, Any

from s2_vllm.compat import SUPPORTED_VLLM
from s2_vllm.config import KEY, S2Config, S2ConfigError, find_config
from s2_vllm.plan import CachePlan, ModelGeometry, attach_plan, make_plan, plan_of
from s2_vllm.specs import STRIDED_SUFFIX

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheConfig


def prepare(vllm_config: VllmConfig) -> bool:
    """Validate an engine's configuration, make its plan and set the block size the plan needs.

    Returns:
        Whether the model has a pattern.

    Raises:
        S2ConfigError: the model, the pattern or an engine option cannot be served.
    """
    model_config = vllm_config.model_config
    config = None if model_config is None else _read_config(model_config)
    asks_by_name = _asks_for_custom_backend(vllm_config)
    if config is None:
        if asks_by_name:
            raise S2ConfigError(
                "attention_backend: CUSTOM (S2-Attention), expected a model with a pattern: the key "
                f"'{KEY}' in its config.json or in --hf-overrides '{{\"{KEY}\": {{...}}}}'"
            )
        return False
    _check_versions()
    _check_model(model_config)
    _check_options(vllm_config)
    if asks_by_name:
        vllm_config.attention_config.backend = None
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
    return True


def check_and_report(vllm_config: VllmConfig, kv_cache_config: KVCacheConfig) -> None:
    """Compare the KV cache that vLLM has laid out with the plan, and log one line about it.

    Raises:
        S2ConfigError: a dense layer has something else than full attention.
        RuntimeError: vLLM's groups are not the planned ones.
    """
    plan = plan_of(vllm_config)
    if plan is None:
        return
    _check_groups(plan, kv_cache_config)
    _report(plan, vllm_config, kv_cache_config)


def _check_groups(plan: CachePlan, kv_cache_config: KVCacheConfig) -> None:
    actual: Counter[tuple[str, int, int]] = Counter()
    entries: Counter[str] = Counter()
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        name = _tier_of(group.layer_names[0], spec, plan)
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
    from vllm.logger import init_logger

    length = vllm_config.model_config.max_model_len
    blocks = plan.blocks_per_request(length, vllm_config.max_in_flight_tokens)
    capacity = kv_cache_config.num_blocks / blocks
    memory = kv_cache_config.num_blocks * plan.block_bytes
    dense_capacity = memory / plan.dense_bytes_per_request(length)
    init_logger("vllm.s2_vllm").info(
        "S2-Attention: %d sparse and %d dense layers; tiers: %s; a sparse layer stores %.1f%% of a "
        "dense one at %d tokens; KV cache for %.2f requests of that length, %.2f if all were dense.%s",
        len(plan.sparse_layers),
        len(plan.dense_layers),
        ", ".join(f"{t.name} ({t.block_size}-token pages)" for t in plan.tiers),
        100 * plan.pattern.stored_fraction(length),
        length,
        capacity,
        dense_capacity,
        "" if plan.pattern.is_union_complete else " Some old blocks are in no head's set.",
    )


def _read_config(model_config: ModelConfig) -> S2Config | None:
    num_layers = model_config.get_total_num_hidden_layers()
    for hf_config in (model_config.hf_config, model_config.hf_text_config):
        found = find_config(vars(hf_config), num_layers)
        if found is not None:
            return found
    return None


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


def _asks_for_custom_backend(vllm_config: VllmConfig) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    return vllm_config.attention_config.backend is custom and custom.get_path().startswith("s2_vllm.")


def _check_versions() -> None:
    import vllm

    if not vllm.__version__.startswith(SUPPORTED_VLLM):
        raise S2ConfigError(f"vllm: version {vllm.__version__}, expected {SUPPORTED_VLLM}*")


def _check_model(model_config: ModelConfig) -> None:
    def refuse(what: str) -> None:
        raise S2ConfigError(
            f"{KEY}: {model_config.architecture} {what}, expected a decoder-only model whose layers "
            "are vLLM's Attention"
        )

    if model_config.use_mla:
        refuse("uses multi-head latent attention (MLA)")
    if model_config.is_encoder_decoder:
        refuse("is an encoder-decoder model")
    if model_config.is_hybrid or model_config.is_attention_free:
        refuse("has layers with a recurrent state")
    if model_config.runner_type != "generate":
        refuse(f"runs as a {model_config.runner_type} model")


def _check_options(vllm_config: VllmConfig) -> None:
    """Refuse engine options that this version does not serve, each by name."""
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
    dtype_name = str(vllm_config.model_config.dtype).removeprefix("torch.")
    if cache.cache_dtype not in ("auto", dtype_name):
        raise S2ConfigError(
            f"kv_cache_dtype: {cache.cache_dtype}, expected auto or {dtype_name} for a model with '{KEY}'"
        )
    values_and_defaults: dict[str, tuple[Any, Any]] = {
        "pipeline_parallel_size": (parallel.pipeline_parallel_size, 1),
        "decode_context_parallel_size": (parallel.decode_context_parallel_size, 1),
        "prefill_context_parallel_size": (parallel.prefill_context_parallel_size, 1),
        "enable_dbo": (parallel.enable_dbo, False),
        "ubatch_size": (max(1, parallel.ubatch_size), 1),
        "kv_offloading_size": (cache.kv_offloading_size, None),
        "kv_sharing_fast_prefill": (cache.kv_sharing_fast_prefill, False),
        "disable_hybrid_kv_cache_manager": (
            bool(vllm_config.scheduler_config.disable_hybrid_kv_cache_manager),
            False,
        ),
        "speculative_config": (getattr(vllm_config.speculative_config, "method", None), None),
        "kv_transfer_config": (getattr(vllm_config.kv_transfer_config, "kv_connector", None), None),
    }
    for name, (value, default) in values_and_defaults.items():
        if value != default:
            raise S2ConfigError(f"{name}: {value}, expected {default} for a model with '{KEY}'")
