"""Configurations of models: small ones, the command's reading of them, and every type that vLLM serves."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from vllm.model_executor.models import registry

from s2_kernels.config import S2ConfigError
from s2_vllm.config_refusals import check_hf_config
from s2_vllm.hf_config import HFConfig, read_config

if TYPE_CHECKING:
    from pathlib import Path

S2 = {"local_blocks": 4, "vert_stride": 8}

LLAMA: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 4096,
}


def read(folder: Path, config: dict[str, Any], overrides: dict[str, Any] | None = None) -> HFConfig:
    """`config`, saved and read."""
    (folder / "config.json").write_text(json.dumps(config))
    return read_config(folder, overrides or {})


def refusal(config: HFConfig) -> str | None:
    """What is said against a model with this config, None if nothing is."""
    try:
        check_hf_config(config)
    except S2ConfigError as error:
        name, fact = str(error).removeprefix("s2_attention: ").split(" ", 1)
        assert name == config.architecture
        fact, expected = fact.rsplit(", expected ", 1)
        assert expected == "a causal decoder-only model whose layers are vLLM's Attention"
        return fact
    return None


REFUSED = {
    "uses multi-head latent attention (MLA)": (
        "axk1 deepseek_v2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa hy_v4 kimi_linear "
        "longcat_flash minicpm3"
    ),
    "has layers with a recurrent state": (
        "falcon_h1 falcon_mamba granitemoehybrid inkling_text jamba lfm2_moe mamba mamba2 nemotron_h "
        "olmo_hybrid qwen3_5 qwen3_5_moe qwen3_5_moe_text qwen3_5_text qwen3_next qwen4_exp qwen4_exp_text "
        "zamba2"
    ),
    "attends to images in both directions (is_mm_prefix_lm)": "gemma3 gemma4_unified",
    "has layers of several shapes": "gemma4 gemma4_text",
    "has layers of type chunked_attention (layer_types)": "llama4 llama4_text",
    "has layers of type compressed_sparse_attention (layer_types)": "deepseek_v4",
    "shares a layer's KV cache with others (num_kv_shared_layers)": "gemma3n gemma3n_text",
    "uses ALiBi": "bloom",
    "soft-caps its logits (attn_logit_softcapping)": "gemma2 vaultgemma",
    "has attention sinks": "gpt_oss",
    "has a sliding window (128 tokens)": "granite_swa granitemoe_swa mimo_v2_flash",
    "has a sliding window (1024 tokens)": "afmoe",
    "has a sliding window (4096 tokens)": (
        "cohere2 cohere2_moe exaone4 exaone_moe gemma3_text mistral olmo3"
    ),
    "has a sliding window (8192 tokens)": "cwm",
}
"""What the default configuration of a type is refused for."""


def served_types() -> dict[str, str]:
    """The architecture of every model type that transformers and vLLM know as a language model."""
    names = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.items()
    architectures = {kind: name if isinstance(name, str) else name[0] for kind, name in names}
    return {kind: name for kind, name in architectures.items() if name in registry._VLLM_MODELS}
