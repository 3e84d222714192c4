"""S2-Attention models for Hugging Face transformers, which knows them where this module is imported.

Their attention is that of `s2_kernels.transformers`, and no other. vLLM is not needed here.
"""

from __future__ import annotations

import torch
from transformers import (
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

from s2_kernels.config import S2ConfigError
from s2_kernels.transformers import IMPLEMENTATION, layer_patterns
from s2_vllm.models.families import (
    S2LlamaConfig,
    S2MistralConfig,
    S2MixtralConfig,
    S2Qwen2Config,
    S2Qwen3Config,
    family_of,
    register_configs,
)


class _RequiresPattern(PreTrainedModel):
    """What makes one of transformers' causal language models an S2-Attention model.

    Raises:
        S2ConfigError: the config has no pattern or a wrong one, or another attention is asked for.
    """

    _can_compile_fullgraph = False

    def __init__(self, config: PreTrainedConfig) -> None:
        layer_patterns(config)
        if config._attn_implementation is None:
            config._attn_implementation = IMPLEMENTATION
        _check_implementation(config)
        super().__init__(config)
        for layer in self.model.layers:
            layer.self_attn.register_forward_pre_hook(_check_layer)


def _check_layer(module: torch.nn.Module, _: object) -> None:
    _check_implementation(module.config)


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
    register_configs()
    for model_class in MODEL_CLASSES:
        config_class = model_class.config_class
        AutoModelForCausalLM.register(config_class, model_class, exist_ok=True)
        # How tensors of the checkpoint become parameters, where these are not the same.
        conversions = get_checkpoint_conversion_mapping(family_of(config_class))
        if conversions is not None:
            register_checkpoint_conversion_mapping(config_class.model_type, conversions, overwrite=True)


_register()
