"""Models that vLLM does not have."""

from __future__ import annotations


def register_models() -> None:
    """Make vLLM and transformers know these models; the model's own module loads when one is served.

    A checkpoint may bring its own code for its config and tokenizer. The classes registered here take
    precedence over it, with or without `--trust-remote-code`.
    """
    from transformers import AutoConfig
    from transformers.models.auto.tokenization_auto import REGISTERED_TOKENIZER_CLASSES
    from vllm.model_executor.models import ModelRegistry
    from vllm.model_executor.models.config import MODELS_CONFIG_MAP

    from s2_vllm.models.families import ARCHITECTURES, register_configs
    from s2_vllm.models.pattern_required import PatternRequired
    from s2_vllm.models.phi3_small_config import Phi3SmallConfig
    from s2_vllm.models.phi3_small_tokenizer import Phi3SmallTokenizer

    register_configs()
    for architecture, model_class in ARCHITECTURES.items():
        ModelRegistry.register_model(architecture, model_class)
        MODELS_CONFIG_MAP[architecture] = PatternRequired

    ModelRegistry.register_model("Phi3SmallForCausalLM", "s2_vllm.models.phi3_small:Phi3SmallForCausalLM")
    AutoConfig.register(Phi3SmallConfig.model_type, Phi3SmallConfig, exist_ok=True)
    # By the class name in tokenizer_config.json. AutoTokenizer.register would tie it to the config class,
    # and with --trust-remote-code transformers then prefers the checkpoint's code.
    REGISTERED_TOKENIZER_CLASSES[Phi3SmallTokenizer.__name__] = Phi3SmallTokenizer
