"""vLLM's hook for architectures that are S2-Attention models by name: without a pattern they are refused."""

from __future__ import annotations

from typing import TYPE_CHECKING

from vllm.model_executor.models.config import VerifyAndUpdateConfig

if TYPE_CHECKING:
    from vllm.config import ModelConfig


class PatternRequired(VerifyAndUpdateConfig):
    """An entry of vLLM's MODELS_CONFIG_MAP."""

    @staticmethod
    def verify_and_update_model_config(model_config: ModelConfig) -> None:
        """vLLM calls it when the model's config is complete, overrides included.

        Raises:
            S2ConfigError: the model has no pattern.
        """
        from s2_kernels.config import KEY, S2ConfigError, states_pattern

        configs = (model_config.hf_config, model_config.hf_text_config)
        if not any(map(states_pattern, configs)):
            raise S2ConfigError(
                f"{KEY}: missing, expected the pattern that this {model_config.architecture} was trained "
                f"with: the key in its config.json, or --hf-overrides '{{\"{KEY}\": {{...}}}}'"
            )
