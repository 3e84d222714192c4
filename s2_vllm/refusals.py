"""What is not served with a pattern: a model, an engine option or a layer, each refused by name.

A message has the form "key: value, expected what", and is raised before weights load. vLLM is imported by
the functions that need it, and no kernel at all.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2_kernels.config import KEY, S2ConfigError, states_pattern

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from vllm.config import ModelConfig, VllmConfig
    from vllm.model_executor.layers.attention import Attention

    from s2_vllm.plan import CachePlan

PLAIN_ARGUMENTS = frozenset(
    {
        "num_heads",
        "head_size",
        "scale",
        "num_kv_heads",
        "cache_config",
        "quant_config",
        "per_layer_sliding_window",
        "prefix",
        "attn_type",
        "mm_prefix_clamp_sliding_window",
        "head_size_v",
    }
)
"""Of vLLM's `Attention`: all that a sparse layer takes, some of it within limits that are checked."""

_SPECIAL_ARGUMENTS = {
    "alibi_slopes": "uses ALiBi",
    "use_alibi_sqrt": "uses ALiBi",
    "logits_soft_cap": "soft-caps its logits",
    "kv_sharing_target_layer_name": "shares another layer's KV cache",
    "attn_backend": "brings an attention backend of its own",
    "sinks": "has attention sinks",
}
"""Of vLLM's `Attention` and its implementations: what a layer does that is given a value."""


def check_no_pattern(vllm_config: Any, obstacle: str) -> None:
    """Refuse a model with a pattern where the plugin cannot serve it.

    Args:
        vllm_config: of any vLLM: nothing is taken for granted about it.
        obstacle: why not, as "key: value, expected what".
    """
    model_config = getattr(vllm_config, "model_config", None)
    for name in ("hf_config", "hf_text_config"):
        if states_pattern(getattr(model_config, name, None)):
            raise S2ConfigError(f"{obstacle} for a model with '{KEY}'")


def check_backend_names(vllm_config: VllmConfig, *, has_pattern: bool) -> None:
    """Refuse our backend by its name, CUSTOM, where no layer can use it.

    A model with a pattern may ask for it as the attention backend: the sparse layers bring it in any case.
    """
    if not has_pattern and asks_for_our_backend(vllm_config):
        raise S2ConfigError(
            "attention_backend: CUSTOM (S2-Attention), expected a model with a pattern: the key "
            f"'{KEY}' in its config.json or in --hf-overrides '{{\"{KEY}\": {{...}}}}'"
        )
    for name, backend in _other_backends(vllm_config):
        if _is_ours(backend):
            raise S2ConfigError(
                f"{name}: CUSTOM (S2-Attention), expected another backend or none: it serves nothing but "
                f"the sparse layers of a model with '{KEY}', and they bring it"
            )


def asks_for_our_backend(vllm_config: VllmConfig) -> bool:
    """Whether the engine's attention backend is ours, by the name that vLLM keeps for out-of-tree ones."""
    return _is_ours(vllm_config.attention_config.backend)


def check_model(model_config: ModelConfig) -> None:
    """Refuse models whose layers are not all plain causal attention."""
    check_kind(
        model_config.architecture,
        (model_config.hf_config, model_config.hf_text_config),
        uses_mla=model_config.use_mla,
        is_encoder_decoder=model_config.is_encoder_decoder,
        is_recurrent=model_config.is_hybrid or model_config.is_attention_free,
        runner_type=model_config.runner_type,
        is_mm_prefix_lm=model_config.is_mm_prefix_lm,
        is_diffusion=model_config.is_diffusion,
    )


def check_kind(
    architecture: str,
    hf_configs: Sequence[Any],
    *,
    uses_mla: bool,
    is_encoder_decoder: bool,
    is_recurrent: bool,
    runner_type: str,
    is_mm_prefix_lm: bool,
    is_diffusion: bool,
) -> None:
    """Refuse a kind of model. vLLM knows the facts, or config.json says them.

    Args:
        architecture: the model's name.
        hf_configs: the whole of its configuration and the text part, with keys as attributes.
        uses_mla, is_encoder_decoder, is_recurrent, runner_type, is_mm_prefix_lm, is_diffusion: as vLLM's
            `ModelConfig` has them; hybrid models and those free of attention are recurrent.
    """
    # As vLLM's models read it: a null means false.
    is_causal = all(getattr(config, "is_causal", True) for config in hf_configs)
    # "vision": within images, which is what is_mm_prefix_lm says.
    directions = [getattr(config, "use_bidirectional_attention", None) for config in hf_configs]
    refuse_model(
        architecture,
        {
            "uses multi-head latent attention (MLA)": uses_mla,
            "is an encoder-decoder model": is_encoder_decoder,
            "has layers with a recurrent state": is_recurrent,
            f"runs as a {runner_type} model": runner_type != "generate",
            "attends to images in both directions (is_mm_prefix_lm)": is_mm_prefix_lm,
            "is a diffusion model (canvas_length)": is_diffusion,
            "attends in both directions (is_causal: false)": not is_causal,
            "attends in both directions (use_bidirectional_attention)": any(
                direction not in (None, False, "vision") for direction in directions
            ),
        },
    )


def refuse_model(architecture: str, facts: Mapping[str, Any]) -> None:
    """Refuse a model for the first of `facts` that is so."""
    for fact, is_so in facts.items():
        if is_so:
            raise S2ConfigError(
                f"{KEY}: {architecture} {fact}, expected a causal decoder-only model whose layers are vLLM's "
                "Attention"
            )


def check_options(vllm_config: VllmConfig) -> None:
    """Refuse engine options that this version does not serve."""
    from vllm import envs

    model_config, cache_dtype = vllm_config.model_config, vllm_config.cache_config.cache_dtype
    check_kv_cache_dtype(cache_dtype, _dtype_name(model_config), _kv_cache_scheme(model_config))
    parallel, cache = vllm_config.parallel_config, vllm_config.cache_config
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
        "diffusion_config": (vllm_config.diffusion_config, None),
        "attention_config.use_non_causal": (vllm_config.attention_config.use_non_causal, False),
        # How decode splits its work depends on the batch, and with it the order of its sums.
        "VLLM_BATCH_INVARIANT": (int(envs.VLLM_BATCH_INVARIANT), 0),
    }
    for name, (value, default) in values_and_defaults.items():
        if value != default:
            raise S2ConfigError(f"{name}: {value}, expected {default} for a model with '{KEY}'")


def layer_index(name: str, plan: CachePlan) -> int:
    """The index of a layer, from its name (vLLM's `prefix`).

    Raises:
        S2ConfigError: the name has no index, several, or one that is no layer's of the plan.
    """
    numbers = [int(part) for part in name.split(".") if part.isdecimal()]
    if len(numbers) != 1 or numbers[0] >= plan.model.num_layers:
        raise S2ConfigError(
            f"{KEY}: layer {name!r} has the indices {numbers} in its name (prefix), expected one, below "
            f"{plan.model.num_layers}"
        )
    return numbers[0]


def check_dense_layer(cls: type[Attention], arguments: dict[str, Any]) -> None:
    """Refuse a dense layer that is not full attention: the plan has no place for other pages.

    Args:
        cls: the class that the model constructs.
        arguments: of its constructor, by name.
    """
    from vllm.model_executor.layers.attention import Attention

    window = arguments.get("per_layer_sliding_window")
    if window is None:
        window = getattr(arguments.get("cache_config"), "sliding_window", None)
    facts = {
        f"is a {cls.__name__}": cls is not Attention,
        f"is {_attention_type(arguments)} attention": _attention_type(arguments) != "decoder",
        "shares another layer's KV cache": arguments.get("kv_sharing_target_layer_name"),
        f"has a sliding window ({window} tokens)": window is not None,
    }
    for fact, is_so in facts.items():
        if is_so:
            raise S2ConfigError(
                f"{KEY}.dense_layers: layer {arguments['prefix']} {fact}, expected layers with full attention"
            )


def check_sparse_layer(cls: type[Attention], arguments: dict[str, Any]) -> None:
    """Refuse what S2-Attention does not compute, before the layer is made.

    Args:
        cls: the class that the model constructs.
        arguments: of its constructor, by name.
    """
    import torch
    from vllm.model_executor.layers.attention import Attention

    name = arguments["prefix"]
    if cls is not Attention:
        raise _layer_refusal(name, f"is a {cls.__name__}")
    for key, value in arguments.items():
        if key in _SPECIAL_ARGUMENTS:
            if isinstance(value, torch.Tensor) or value:
                raise _layer_refusal(name, _SPECIAL_ARGUMENTS[key])
        elif key not in PLAIN_ARGUMENTS and value is not None:
            raise _layer_refusal(name, f"passes {key}")
    if _attention_type(arguments) != "decoder":
        raise _layer_refusal(name, f"is {_attention_type(arguments)} attention")
    if arguments["head_size_v"] not in (None, arguments["head_size"]):
        raise _layer_refusal(name, f"has values of another size ({arguments['head_size_v']})")


def check_made_layer(layer: Attention, plan: CachePlan, vllm_config: VllmConfig) -> None:
    """Refuse a sparse layer that has come out unlike the plan, or asks its backend for too much.

    Args:
        layer: made by vLLM's `Attention`, which looks some of its properties up in the configuration.
        plan: of its model.
        vllm_config: the engine's.
    """
    name, pattern = layer.layer_name, plan.pattern_of(0, 0)
    if (layer.num_heads, layer.num_kv_heads) != (pattern.num_heads, pattern.num_kv_heads):
        raise _layer_refusal(
            name,
            f"has {layer.num_heads} query and {layer.num_kv_heads} KV heads instead of the model's "
            f"{pattern.num_heads} and {pattern.num_kv_heads}",
        )
    if layer.head_size != plan.model.head_size:
        raise _layer_refusal(name, f"has a head size of its own ({layer.head_size})")
    if layer.sliding_window is not None:
        raise S2ConfigError(
            f"{KEY}: layer {name} has a sliding window ({layer.sliding_window} tokens), "
            "expected plain causal attention"
        )
    if layer.kv_cache_torch_dtype.itemsize != plan.model.dtype_bytes:
        value, model_config = f"{layer.kv_cache_dtype} in layer {name}", vllm_config.model_config
        raise _kv_cache_dtype_refusal(value, _dtype_name(model_config), _kv_cache_scheme(model_config))
    reasons = _reasons_against_backend(layer, vllm_config)
    if reasons:
        raise S2ConfigError(
            f"{KEY}: layer {name}: {', '.join(reasons)} by the attention backend of sparse layers, expected "
            "a model and options that do without"
        )


def _is_ours(backend: Any) -> bool:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return backend is AttentionBackendEnum.CUSTOM and backend.get_path().startswith("s2_vllm.")


def _other_backends(vllm_config: VllmConfig) -> Iterator[tuple[str, Any]]:
    """The options, but the engine's attention backend, that may name a backend, and what they name."""
    for kind, backend in vllm_config.attention_config.backend_per_kind.items():
        yield f"attention_config.backend_per_kind.{kind}", backend
    yield (
        "speculative_config.attention_backend",
        getattr(vllm_config.speculative_config, "attention_backend", None),
    )
    multimodal_config = getattr(vllm_config.model_config, "multimodal_config", None)
    yield "mm_encoder_attn_backend", getattr(multimodal_config, "mm_encoder_attn_backend", None)


def kv_cache_scheme(quantization: Mapping[str, Any] | None) -> Any:
    """How a checkpoint's quantization configuration wants the KV cache quantized, None if it does not."""
    quantization = quantization or {}
    keys = ("kv_cache_scheme", "kv_cache_quant_algo")
    for config in (quantization, quantization.get("quantization") or {}):
        for key in keys:
            if config.get(key):
                return config[key]
    return None


def check_kv_cache_dtype(asked: str, dtype: str, scheme: Any) -> None:
    """Refuse a KV cache of another type than the model's, be it the user's wish or the checkpoint's.

    Args:
        asked: vLLM's `kv_cache_dtype`.
        dtype: of the model.
        scheme: the checkpoint's own, if any (`kv_cache_scheme`).
    """
    if asked == "auto":
        if scheme:
            raise _kv_cache_dtype_refusal("auto (the checkpoint declares a quantized one)", dtype, scheme)
    elif asked != dtype:
        raise _kv_cache_dtype_refusal(asked, dtype, scheme)


def _kv_cache_dtype_refusal(value: str, dtype: str, scheme: Any) -> S2ConfigError:
    """The error for a KV cache of type `value`, with the types that will be taken.

    What a checkpoint declares is overruled by a type that the user names, and vLLM has names for types of 16
    bits only.
    """
    if dtype == "float32":
        expected = "bfloat16 or float16 together with the same dtype" if scheme else "auto"
    else:
        expected = dtype if scheme else f"auto or {dtype}"
    return S2ConfigError(f"kv_cache_dtype: {value}, expected {expected} for a model with '{KEY}'")


def _kv_cache_scheme(model_config: ModelConfig) -> Any:
    return kv_cache_scheme(model_config.model_arch_config.quantization_config)


def _dtype_name(model_config: ModelConfig) -> str:
    return str(model_config.dtype).removeprefix("torch.")


def _attention_type(arguments: dict[str, Any]) -> str:
    """The value of vLLM's `AttentionType`, a string under another name."""
    kind = arguments.get("attn_type") or "decoder"
    return getattr(kind, "value", kind)


def _reasons_against_backend(layer: Attention, vllm_config: VllmConfig) -> list[str]:
    """What vLLM says against the layer's backend, for which it asks only where it has chosen the backend.

    The arguments are those of `vllm.v1.attention.selector.get_attn_backend`, vLLM 0.32.0.
    """
    from vllm import envs
    from vllm.platforms import current_platform

    parallel, transfer = vllm_config.parallel_config, vllm_config.kv_transfer_config
    return layer.attn_backend.validate_configuration(
        head_size=layer.head_size,
        dtype=layer.dtype,
        kv_cache_dtype=layer.kv_cache_dtype,
        block_size=vllm_config.cache_config.block_size,
        use_mla=False,
        has_sink=layer.has_sink,
        use_sparse=False,
        use_mm_prefix=layer.use_mm_prefix,
        use_per_head_quant_scales=False,
        device_capability=current_platform.get_device_capability(),
        attn_type=layer.attn_type,
        has_sliding_window=layer.sliding_window is not None,
        use_non_causal=vllm_config.attention_config.use_non_causal,
        use_batch_invariant=envs.VLLM_BATCH_INVARIANT,
        use_kv_connector=transfer is not None and transfer.is_kv_transfer_instance,
        use_pcp=parallel.prefill_context_parallel_size > 1,
        use_adaptive_verification=getattr(
            vllm_config.speculative_config, "enable_adaptive_verification", False
        ),
        use_dcp=parallel.decode_context_parallel_size > 1,
        use_rswa=vllm_config.model_config.rswa_window is not None,
    )


def _layer_refusal(name: str, what: str) -> S2ConfigError:
    return S2ConfigError(
        f"{KEY}: layer {name} {what}, expected plain causal attention (or the layer's index in dense_layers)"
    )
