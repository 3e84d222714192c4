"""S2-Attention models for Hugging Face transformers, which knows them where this module is imported.

Right, not fast: every sparse layer computes dense attention under a mask per head. Gradients pass through it.
vLLM is not needed here.
"""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    LlamaForCausalLM,
    MistralForCausalLM,
    MixtralForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2ForCausalLM,
    Qwen3ForCausalLM,
)
from transformers.conversion_mapping import (
    get_checkpoint_conversion_mapping,
    register_checkpoint_conversion_mapping,
)

from s2_kernels.config import KEY, S2Config, S2ConfigError, find_config
from s2_kernels.pattern import S2Pattern
from s2_vllm.models.families import (
    S2LlamaConfig,
    S2MistralConfig,
    S2MixtralConfig,
    S2Qwen2Config,
    S2Qwen3Config,
    family_of,
    register_configs,
)

IMPLEMENTATION = "s2_attention"
"""The name of this attention in transformers: a model's `attn_implementation`."""

_REFUSED = {"sliding_window": "a sliding window", "softcap": "soft-capped logits", "s_aux": "attention sinks"}
"""Arguments with which transformers' models ask for what S2-Attention is not."""


def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """S2-Attention as transformers calls it, for a layer of a model whose config has a pattern.

    Args:
        module: the layer, with `config` and `layer_idx`.
        query: [batch, num_heads, queries, head_size].
        key, value: [batch, num_kv_heads, keys, head_size].
        attention_mask: bool [batch, 1, queries, keys], which tokens a query may see: causality, padding and
            packed sequences. The position of a token is the number of tokens before it that it may see.
        options: those of transformers' `sdpa`.

    Returns:
        [batch, queries, num_heads, head_size], and None for the weights.

    Raises:
        S2ConfigError: the config has no pattern, or the layer asks for what S2-Attention is not.
        ValueError: the mask is not a boolean one.
    """
    for name, what in _REFUSED.items():
        if options.get(name) is not None:
            raise S2ConfigError(
                f"{KEY}: layer {module.layer_idx} has {what}, expected plain causal attention"
            )
    if attention_mask is None or attention_mask.dtype != torch.bool:
        kind = None if attention_mask is None else attention_mask.dtype
        raise ValueError(
            f"attention_mask: {kind} in the layers, expected bool: no mask or a 2-D one of tokens"
        )
    if module.layer_idx not in _s2_config(module.config).dense_layers:
        attention_mask = sparse_mask(_pattern(module.config), attention_mask)
    out: tuple[torch.Tensor, None] = AttentionInterface()["sdpa"](
        module, query, key, value, attention_mask, **options
    )
    return out


def sparse_mask(pattern: S2Pattern, visible: torch.Tensor) -> torch.Tensor:
    """What each head attends to of the tokens that are visible to a query.

    Args:
        pattern: of the layer.
        visible: bool [batch, 1, queries, keys].

    Returns:
        bool [batch, num_heads, queries, keys].
    """
    position = (visible[:, 0].cumsum(-1) - 1).clamp(min=0)
    blocks = pattern.block_mask(-(-visible.shape[-1] // pattern.block_size)).to(visible.device)
    key_block = position // pattern.block_size
    return visible & blocks[:, key_block[..., -1:], key_block].transpose(0, 1)


def _s2_config(config: PreTrainedConfig) -> S2Config:
    found = find_config(vars(config), config.num_hidden_layers)
    if found is None:
        raise S2ConfigError(f"{KEY}: missing in the config, expected the pattern that it was trained with")
    return found


def _pattern(config: PreTrainedConfig) -> S2Pattern:
    return _s2_config(config).pattern(config.num_attention_heads, config.num_key_value_heads)


def _whole_mask(*args: Any, **options: Any) -> torch.Tensor:
    """transformers' boolean mask, also where its `sdpa` could do without one."""
    mask: torch.Tensor = AttentionMaskInterface()["sdpa"](*args, **{**options, "allow_is_causal_skip": False})
    return mask


class _RequiresPattern(PreTrainedModel):
    """What makes one of transformers' causal language models an S2-Attention model.

    Raises:
        S2ConfigError: the config has no pattern or a wrong one, or another attention is asked for.
    """

    _can_compile_fullgraph = False

    def __init__(self, config: PreTrainedConfig) -> None:
        _pattern(config)
        if config._attn_implementation is None:
            config._attn_implementation = IMPLEMENTATION
        _check_implementation(config)
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(lambda module, _: _check_implementation(module.config))


def _check_implementation(config: PreTrainedConfig) -> None:
    """Refuse any other attention: it would be dense."""
    if config._attn_implementation != IMPLEMENTATION:
        raise S2ConfigError(
            f"attn_implementation: {config._attn_implementation!r}, expected {IMPLEMENTATION!r} or none for "
            f"a model that requires a pattern"
        )


class S2LlamaForCausalLM(_RequiresPattern, LlamaForCausalLM):
    """Llama with S2-Attention."""

    config_class = S2LlamaConfig


class S2Qwen2ForCausalLM(_RequiresPattern, Qwen2ForCausalLM):
    """Qwen2 with S2-Attention."""

    config_class = S2Qwen2Config


class S2Qwen3ForCausalLM(_RequiresPattern, Qwen3ForCausalLM):
    """Qwen3 with S2-Attention."""

    config_class = S2Qwen3Config


class S2MistralForCausalLM(_RequiresPattern, MistralForCausalLM):
    """Mistral with S2-Attention."""

    config_class = S2MistralConfig


class S2MixtralForCausalLM(_RequiresPattern, MixtralForCausalLM):
    """Mixtral with S2-Attention."""

    config_class = S2MixtralConfig


MODEL_CLASSES = (
    S2LlamaForCausalLM,
    S2Qwen2ForCausalLM,
    S2Qwen3ForCausalLM,
    S2MistralForCausalLM,
    S2MixtralForCausalLM,
)


def _register() -> None:
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, _whole_mask)
    register_configs()
    for model_class in MODEL_CLASSES:
        config_class = model_class.config_class
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        # How tensors of the checkpoint become parameters, where these are not the same.
        conversions = get_checkpoint_conversion_mapping(family_of(config_class))
        if conversions is not None:
            register_checkpoint_conversion_mapping(config_class.model_type, conversions, overwrite=True)


_register()
