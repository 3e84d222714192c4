"""What is not served with a pattern: a model, an engine option or a layer, each refused by name.

A message has the form "key: value, expected what", and is raised before weights load.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2_vllm.config import KEY, S2ConfigError

if TYPE_CHECKING:
    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.attention import Attention

    from s2_vllm.plan import CachePlan

_SPECIAL_ARGUMENTS = {
    "alibi_slopes": "uses ALiBi",
    "use_alibi_sqrt": "uses ALiBi",
    "logits_soft_cap": "soft-caps its logits",
    "kv_sharing_target_layer_name": "shares another layer's KV cache",
    "attn_backend": "brings an attention backend of its own",
    "sinks": "has attention sinks",
}
"""Of vLLM's `Attention` and its implementations: what a layer does that passes a value."""


def check_no_pattern(vllm_config: Any, obstacle: str) -> None:
    """Refuse a model with a pattern where the plugin cannot serve it.

    Args:
        vllm_config: of any vLLM: nothing is taken for granted about it.
        obstacle: why not, as "key: value, expected what".
    """
    model_config = getattr(vllm_config, "model_config", None)
    for name in ("hf_config", "hf_text_config"):
        if getattr(getattr(model_config, name, None), KEY, None) is not None:
            raise S2ConfigError(f"{obstacle} for a model with '{KEY}'")


def check_backend_without_pattern(vllm_config: VllmConfig) -> None:
    """Refuse our backend by name where no layer can use it."""
    if asks_for_custom_backend(vllm_config):
        raise S2ConfigError(
            "attention_backend: CUSTOM (S2-Attention), expected a model with a pattern: the key "
            f"'{KEY}' in its config.json or in --hf-overrides '{{\"{KEY}\": {{...}}}}'"
        )


def asks_for_custom_backend(vllm_config: VllmConfig) -> bool:
    """Whether the user has asked for our backend by the name that vLLM keeps for out-of-tree ones."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    custom = AttentionBackendEnum.CUSTOM
    return vllm_config.attention_config.backend is custom and custom.get_path().startswith("s2_vllm.")


def check_model(model_config: ModelConfig) -> None:
    """Refuse models whose layers are not all plain causal attention."""

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


def check_options(vllm_config: VllmConfig) -> None:
    """Refuse engine options that this version does not serve."""
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


def check_dense_layer(name: str, arguments: dict[str, Any]) -> None:
    """Refuse a sliding window in a dense layer: the plan has no place for its pages.

    Args:
        name: of the layer.
        arguments: of vLLM's `Attention`, by name.
    """
    window = arguments.get("per_layer_sliding_window")
    if window is None:
        window = getattr(arguments.get("cache_config"), "sliding_window", None)
    if window is not None:
        raise S2ConfigError(
            f"{KEY}.dense_layers: layer {name} has a sliding window ({window} tokens), expected layers "
            "with full attention"
        )


def check_sparse_layer(name: str, arguments: dict[str, Any]) -> None:
    """Refuse what S2-Attention does not compute, before the layer is made.

    Args:
        name: of the layer.
        arguments: of vLLM's `Attention`, all of them, by name.
    """
    import torch

    extra = arguments["extra_impl_args"]
    for key, value in {**arguments, **extra}.items():
        if key in _SPECIAL_ARGUMENTS and (isinstance(value, torch.Tensor) or value):
            raise layer_refusal(name, _SPECIAL_ARGUMENTS[key])
        if key in extra and key not in _SPECIAL_ARGUMENTS and value is not None:
            raise layer_refusal(name, f"passes {key}")
    if arguments["attn_type"] != "decoder":
        raise layer_refusal(name, f"is {arguments['attn_type']} attention")
    if arguments["head_size_v"] not in (None, arguments["head_size"]):
        raise layer_refusal(name, f"has values of another size ({arguments['head_size_v']})")


def check_made_layer(layer: Attention, plan: CachePlan) -> None:
    """Refuse a sparse layer that has come out unlike the plan.

    Args:
        layer: made by vLLM's `Attention`, which looks some of its properties up in the configuration.
        plan: of its model, all tensor-parallel ranks together.
    """
    name, pattern = layer.layer_name, plan.layout.pattern
    if (layer.num_heads, layer.num_kv_heads) != (pattern.num_heads, pattern.num_kv_heads):
        raise layer_refusal(
            name,
            f"has {layer.num_heads} query and {layer.num_kv_heads} KV heads instead of the model's "
            f"{pattern.num_heads} and {pattern.num_kv_heads}",
        )
    if layer.head_size != plan.model.head_size:
        raise layer_refusal(name, f"has a head size of its own ({layer.head_size})")
    if layer.sliding_window is not None:
        raise S2ConfigError(
            f"{KEY}: layer {name} has a sliding window ({layer.sliding_window} tokens), "
            "expected plain causal attention"
        )
    if layer.kv_cache_torch_dtype.itemsize != plan.model.dtype_bytes:
        raise S2ConfigError(f"kv_cache_dtype: {layer.kv_cache_dtype} in layer {name}, expected auto")


def layer_refusal(name: str, what: str) -> S2ConfigError:
    """The error for a sparse layer that is something else than S2-Attention can be."""
    return S2ConfigError(
        f"{KEY}: layer {name} {what}, expected plain causal attention (or the layer's index in dense_layers)"
    )
