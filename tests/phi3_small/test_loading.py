"""Checkpoints that do not fit the architecture are refused, by the name of the tensor or the config key."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from s2_vllm.models.phi3_small_config import Phi3SmallConfig
from tests.engine.engines import engine
from tests.phi3_small.checkpoints import CONFIG, LONG_ROPE, random_weights, save_weights, write_config

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SHAPE = {"num_hidden_layers": 2}

Weights = dict[str, torch.Tensor]


def _without(name: str) -> Callable[[Weights], None]:
    return lambda weights: weights.__delitem__(name)


def _with(name: str, *shape: int) -> Callable[[Weights], None]:
    return lambda weights: weights.update({name: torch.full(shape, 0.5)})


TENSORS: dict[str, tuple[str, Callable[[Weights], None]]] = {
    "missing_qkv_weight": (name := "model.layers.1.self_attn.query_key_value.weight", _without(name)),
    "missing_qkv_bias": (name := "model.layers.0.self_attn.query_key_value.bias", _without(name)),
    "missing_mlp_bias": (name := "model.layers.1.mlp.up_proj.bias", _without(name)),
    "missing_norm_bias": (name := "model.final_layernorm.bias", _without(name)),
    "missing_embeddings": (name := "model.embed_tokens.weight", _without(name)),
    "extra_layer": (name := "model.layers.2.self_attn.dense.weight", _with(name, 256, 256)),
    "extra_projection": (name := "model.layers.0.self_attn.q_proj.weight", _with(name, 256, 256)),
    "too_many_qkv_rows": (name := "model.layers.0.self_attn.query_key_value.weight", _with(name, 768, 256)),
    "too_few_qkv_rows": (name := "model.layers.0.self_attn.query_key_value.weight", _with(name, 256, 256)),
    "long_qkv_bias": (name := "model.layers.0.self_attn.query_key_value.bias", _with(name, 385)),
    "long_mlp": (name := "model.layers.1.mlp.up_proj.weight", _with(name, 512, 256)),
    "short_mlp": (name := "model.layers.1.mlp.down_proj.weight", _with(name, 256, 128)),
    "short_norm": (name := "model.layers.1.input_layernorm.weight", _with(name, 128)),
    "large_vocabulary": (name := "model.embed_tokens.weight", _with(name, 640, 256)),
}
"""The tensor to be named, and what is wrong with it."""

_SCALING = LONG_ROPE["rope_scaling"]

VALUES: dict[str, tuple[dict[str, Any], str]] = {
    "hidden_act": ({"hidden_act": "gelu"}, "hidden_act: 'gelu'"),
    "gegelu_limit": ({"gegelu_limit": 0}, "gegelu_limit: 0"),
    "both_ff_sizes": ({"ff_dim_multiplier": 4}, "ff_intermediate_size: 192"),
    "no_ff_size": ({"ff_intermediate_size": None}, "ff_intermediate_size: None"),
    "kv_heads": ({"num_key_value_heads": 3}, "num_key_value_heads: 3"),
    "hidden_size": ({"hidden_size": 100}, "hidden_size: 100"),
    "vert_stride": ({"blocksparse_vert_stride": 0}, "blocksparse_vert_stride: 0"),
    "stride_below_group": ({"blocksparse_vert_stride": 2}, "vert_stride: 2"),
    "block_size": ({"blocksparse_block_size": 24}, "blocksparse_block_size: 24"),
    "local_blocks": ({"blocksparse_num_local_blocks": "16"}, "blocksparse_num_local_blocks: '16'"),
    "every_n_layers": ({"dense_attention_every_n_layers": -1}, "dense_attention_every_n_layers: -1"),
    "position_scale": ({"rope_position_scale": 0}, "rope_position_scale: 0"),
    "width_multiplier": ({"mup_width_multiplier": "8"}, "mup_width_multiplier: '8'"),
    "rope_scaling": ({"rope_scaling": "su"}, "rope_scaling: 'su', expected an object"),
    "dummy_token_indices": ({"dummy_token_indices": 5}, "dummy_token_indices: 5, expected a list"),
    "rope_type": ({"rope_scaling": {**_SCALING, "type": "yarn"}}, "rope_scaling.type: 'yarn'"),
    "short_factors": (
        {"rope_scaling": {**_SCALING, "short_factor": [1.0] * 8}},
        "rope_scaling.short_factor:",
    ),
    "no_long_factors": (
        {"rope_scaling": {k: v for k, v in _SCALING.items() if k != "long_factor"}},
        "rope_scaling.long_factor: None",
    ),
}
"""Changes of the config, and the beginning of the message."""


@pytest.mark.parametrize("case", TENSORS)
def test_wrong_tensor_is_named(tmp_path: Path, case: str) -> None:
    name, change = TENSORS[case]
    config = CONFIG | SHAPE
    weights = random_weights(config)
    change(weights)
    write_config(tmp_path, config)
    save_weights(tmp_path, weights)
    with pytest.raises(ValueError, match=re.escape(name)), engine(tmp_path, max_model_len=256):
        pass


def test_masking_no_token_is_an_override_like_any() -> None:
    config = Phi3SmallConfig()
    assert config.dummy_token_indices
    config.update({"dummy_token_indices": None})
    config.check()


@pytest.mark.parametrize("case", VALUES)
def test_wrong_config_value_is_named(tmp_path: Path, case: str) -> None:
    """Before weights load: there are none."""
    changes, message = VALUES[case]
    write_config(tmp_path, CONFIG | SHAPE | changes)
    with pytest.raises(ValueError, match=re.escape(message)), engine(tmp_path, max_model_len=256):
        pass
