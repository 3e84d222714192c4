"""Tiny seeded checkpoints, large enough in their weights that attention decides what is generated."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    AutoModelForCausalLM,
    LlamaConfig,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    Qwen2Config,
    Qwen3Config,
)

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path

VOCABULARY = 256
"""Token ids of every tiny model, all of them ordinary."""

FAMILIES: dict[str, tuple[type[PreTrainedConfig], dict[str, Any]]] = {
    "llama": (LlamaConfig, {}),
    "qwen2": (Qwen2Config, {}),
    "qwen3": (Qwen3Config, {}),
    "mistral": (MistralConfig, {"sliding_window": None}),
    "mixtral": (MixtralConfig, {"num_local_experts": 4, "num_experts_per_tok": 2}),
}

S2_NAMES: dict[str, dict[str, Any]] = {
    "llama": {"architectures": ["S2LlamaForCausalLM"], "model_type": "s2_llama"},
    "qwen2": {"architectures": ["S2Qwen2ForCausalLM"], "model_type": "s2_qwen2"},
    "qwen3": {"architectures": ["S2Qwen3ForCausalLM"], "model_type": "s2_qwen3"},
    "mistral": {"architectures": ["S2MistralForCausalLM"], "model_type": "s2_mistral"},
    "mixtral": {"architectures": ["S2MixtralForCausalLM"], "model_type": "s2_mixtral"},
}
"""By which a checkpoint of a family says itself that it needs S2-Attention."""

_SHAPE: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}


def tiny_config(family: str, **shape: Any) -> PreTrainedConfig:
    """The config of a tiny model of `family`, with values that differ from the default shape."""
    config_class, own = FAMILIES[family]
    return config_class(**{**_SHAPE, **own, **shape})


def save_checkpoint(
    folder: Path,
    family: str = "llama",
    s2: Mapping[str, Any] | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    weight_std: float = 0.13,
    names: Mapping[str, Any] | None = None,
    **shape: Any,
) -> Path:
    """Save a random model of `family` in `folder`, and return `folder`.

    Args:
        folder: made if missing.
        family: a key of `FAMILIES`.
        s2: the config's `s2_attention` key; None leaves it out.
        dtype: of the saved weights.
        weight_std: standard deviation of the weights. With the default, attention logits have one of 2 to
            3, and a dense model soon says something else; such a model magnifies rounding too, so a
            comparison in bfloat16 wants a smaller one.
        names: `architectures` and `model_type` that config.json gets instead of the family's own.
        shape: config values that differ from the tiny default shape.
    """
    config = tiny_config(family, **shape)
    if s2 is not None:
        config.s2_attention = dict(s2)
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(config)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(1.0, 2.0, generator=generator)
        else:
            parameter.data.normal_(0.0, weight_std, generator=generator)
    model.to(dtype).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **(names or {})}, indent=2))
    return folder


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """A prompt of random token ids for each length; no two share a prefix by more than chance."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in lengths]
