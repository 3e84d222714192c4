"""The `s2_attention` key of a model's config.json: the plugin's name for `s2_kernels.config`."""

from s2_kernels.config import KEY, S2Config, S2ConfigError, find_config, find_model_config

__all__ = ["KEY", "S2Config", "S2ConfigError", "find_config", "find_model_config"]
