"""Names by which a checkpoint says itself that it needs S2-Attention.

Under an ordinary name, transformers and a vLLM without this plugin run a checkpoint that has `s2_attention`
as a dense model, without a word. Neither knows these names: both stop.
"""

from __future__ import annotations

from transformers import (
    AutoConfig,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)
from transformers.models.auto.tokenization_auto import (
    MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS,
    TOKENIZER_MAPPING_NAMES,
)

ARCHITECTURES = {
    "S2LlamaForCausalLM": "vllm.model_executor.models.llama:LlamaForCausalLM",
    "S2Qwen2ForCausalLM": "vllm.model_executor.models.qwen2:Qwen2ForCausalLM",
    "S2Qwen3ForCausalLM": "vllm.model_executor.models.qwen3:Qwen3ForCausalLM",
    "S2MistralForCausalLM": "vllm.model_executor.models.mistral:MistralForCausalLM",
    "S2MixtralForCausalLM": "vllm.model_executor.models.mixtral:MixtralForCausalLM",
}
"""vLLM's class for each of the architectures that require a pattern."""


class S2LlamaConfig(LlamaConfig):
    """Llama's keys, and `s2_attention`."""

    model_type = "s2_llama"


class S2Qwen2Config(Qwen2Config):
    """Qwen2's keys, and `s2_attention`."""

    model_type = "s2_qwen2"


class S2Qwen3Config(Qwen3Config):
    """Qwen3's keys, and `s2_attention`."""

    model_type = "s2_qwen3"


class S2MistralConfig(MistralConfig):
    """Mistral's keys, and `s2_attention`."""

    model_type = "s2_mistral"


class S2MixtralConfig(MixtralConfig):
    """Mixtral's keys, and `s2_attention`."""

    model_type = "s2_mixtral"


CONFIG_CLASSES: tuple[type[PreTrainedConfig], ...] = (
    S2LlamaConfig,
    S2Qwen2Config,
    S2Qwen3Config,
    S2MistralConfig,
    S2MixtralConfig,
)


def register_configs() -> None:
    """Make transformers read these configs, and choose their tokenizers as it does for the family."""
    for config_class in CONFIG_CLASSES:
        AutoConfig.register(config_class.model_type, config_class, exist_ok=True)
        family = family_of(config_class)
        if family in TOKENIZER_MAPPING_NAMES:
            TOKENIZER_MAPPING_NAMES[config_class.model_type] = TOKENIZER_MAPPING_NAMES[family]
        if family in MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS:
            MODELS_WITH_INCORRECT_HUB_TOKENIZER_CLASS.add(config_class.model_type)


def family_of(config_class: type[PreTrainedConfig]) -> str:
    """The `model_type` of the dense models that this is a variant of."""
    return str(config_class.model_type).removeprefix("s2_")
