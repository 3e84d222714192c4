"""What is refused by config.json alone: every model type, against vLLM's registry, and key by key."""

from __future__ import annotations

import re
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import vllm
from transformers import CONFIG_MAPPING
from transformers.configuration_utils import ALLOWED_LAYER_TYPES
from vllm.config.model import iter_architecture_defaults, try_match_architecture_defaults
from vllm.model_executor.models import registry
from vllm.transformers_utils.model_arch_config_convertor import ModelArchConfigConvertorBase

from s2_kernels.config import S2ConfigError
from s2_vllm.config_refusals import check_hf_config
from s2_vllm.hf_config import HFConfig, read_config
from tests.hf_configs import REFUSED, refusal, served_types


@pytest.mark.parametrize(("model_type", "architecture"), served_types().items())
def test_every_model_type(model_type: str, architecture: str, tmp_path: Path) -> None:
    CONFIG_MAPPING[model_type](architectures=[architecture]).save_pretrained(tmp_path)
    expected = [fact for fact, types in REFUSED.items() if model_type in types.split()]
    assert [refusal(read_config(tmp_path, {}))] == (expected or [None])


def vllm_classes() -> dict[str, set[str]]:
    """The names of all ancestors of every class among vLLM's models, without importing them."""
    bases: dict[str, set[str]] = {}
    root = Path(vllm.__file__).parent
    for folder in ("model_executor/models", "models"):
        for file in (root / folder).rglob("*.py"):
            for name, parents in re.findall(r"^class (\w+)\(([^)]*)\):", file.read_text(), re.MULTILINE):
                bases.setdefault(name, set()).update(re.findall(r"\w+", parents))

    def ancestors(name: str, found: set[str]) -> set[str]:
        for base in bases.get(name, set()) - found:
            found.add(base)
            ancestors(base, found)
        return found

    return {name: ancestors(name, set()) for name in bases}


def test_architectures_are_what_vllm_takes_them_for() -> None:
    """By their names alone: recurrent ones, pooling ones, and all others that generate."""
    ancestors = vllm_classes()
    generating = {**registry._TEXT_GENERATION_MODELS, **registry._MULTIMODAL_MODELS}
    assert len(generating) > 200
    for name, (_, class_name) in {**registry._VLLM_MODELS, "S2LlamaForCausalLM": ("", "")}.items():
        match = try_match_architecture_defaults(name)
        expected = None
        if not ancestors.get(class_name, set()).isdisjoint({"IsHybrid", "IsAttentionFree"}):
            expected = "has layers with a recurrent state"
        if name not in generating and match is not None and match[1][0] == "pooling":
            expected = "runs as a pooling model"
        if name in generating or name == "S2LlamaForCausalLM" or expected == "runs as a pooling model":
            config = SimpleNamespace(architectures=[name])
            assert refusal(HFConfig(config, config)) == expected, name


def test_ends_of_names_are_what_vllm_takes_them_for() -> None:
    for suffix, (runner_type, _) in iter_architecture_defaults():
        config = SimpleNamespace(architectures=[f"Some{suffix}"])
        expected = "runs as a pooling model" if runner_type == "pooling" else None
        assert refusal(HFConfig(config, config)) == expected


RECURRENT = "has layers with a recurrent state"
LAYER_TYPES = {
    "full_attention": None,
    "attention": None,
    "sliding_attention": None,
    "dense": None,
    "sparse": None,
    "moe": None,
    "conv": RECURRENT,
    "hybrid": RECURRENT,
    "hybrid_sliding": RECURRENT,
    "linear_attention": RECURRENT,
    "mamba": RECURRENT,
    "mamba2": RECURRENT,
    "recurrent": RECURRENT,
    "chunked_attention": "has layers of type chunked_attention (layer_types)",
    "indexed_attention": "has layers of type indexed_attention (layer_types)",
    "minimax_m3_sparse": "has layers of type minimax_m3_sparse (layer_types)",
    "window_attention": "has layers of type window_attention (layer_types)",
    "deepseek_sparse_attention": "has layers of type deepseek_sparse_attention (layer_types)",
    "qwen_sparse_attention": "has layers of type qwen_sparse_attention (layer_types)",
    "reference_sliding_attention": "has layers of type reference_sliding_attention (layer_types)",
    "compressed_sparse_attention": "has layers of type compressed_sparse_attention (layer_types)",
    "heavily_compressed_attention": "has layers of type heavily_compressed_attention (layer_types)",
}


def test_every_layer_type_of_transformers_is_known() -> None:
    assert LAYER_TYPES.keys() >= set(ALLOWED_LAYER_TYPES)


@pytest.mark.parametrize(("layer_type", "fact"), LAYER_TYPES.items())
def test_layer_types(layer_type: str, fact: str | None) -> None:
    config = SimpleNamespace(architectures=["LlamaForCausalLM"], layer_types=["full_attention", layer_type])
    assert refusal(HFConfig(config, config)) == fact


@pytest.mark.parametrize("model_type", ["bagel", "gemma3", "molmo2", "moondream3", "paligemma", "llava"])
def test_types_whose_images_see_one_another(model_type: str) -> None:
    config = SimpleNamespace(architectures=["SomeForConditionalGeneration"], model_type=model_type)
    expected = ModelArchConfigConvertorBase(config, config).is_mm_prefix_lm()
    assert expected == (model_type != "llava")
    fact = "attends to images in both directions (is_mm_prefix_lm)"
    assert refusal(HFConfig(config, config)) == (fact if expected else None)


@pytest.mark.parametrize(
    ("keys", "fact"),
    [
        ({"kv_lora_rank": 64}, "uses multi-head latent attention (MLA)"),
        ({"compress_ratios": [4]}, "uses multi-head latent attention (MLA)"),
        ({"is_encoder_decoder": True}, "is an encoder-decoder model"),
        ({"layer_types": ["full_attention", "linear_attention"]}, "has layers with a recurrent state"),
        ({"layer_types": ["conv", "attention"]}, "has layers with a recurrent state"),
        ({"architectures": ["Lfm2ForCausalLM"]}, "has layers with a recurrent state"),
        ({"architectures": ["LlamaForSequenceClassification"]}, "runs as a pooling model"),
        ({"is_mm_prefix_lm": True}, "attends to images in both directions (is_mm_prefix_lm)"),
        ({"model_type": "paligemma"}, "attends to images in both directions (is_mm_prefix_lm)"),
        ({"canvas_length": 32}, "is a diffusion model (canvas_length)"),
        ({"is_causal": False}, "attends in both directions (is_causal: false)"),
        ({"is_causal": None}, "attends in both directions (is_causal: false)"),
        (
            {"use_bidirectional_attention": "vision"},
            "attends to images in both directions (is_mm_prefix_lm)",
        ),
        ({"use_bidirectional_attention": True}, "attends in both directions (use_bidirectional_attention)"),
        ({"block_configs": [{}]}, "has layers of several shapes"),
        ({"is_heterogeneous": True}, "has layers of several shapes"),
        ({"num_kv_shared_layers": 2}, "shares a layer's KV cache with others (num_kv_shared_layers)"),
        ({"attention_chunk_size": 64}, "attends in chunks (attention_chunk_size)"),
        ({"dual_chunk_attention_config": {"a": 1}}, "attends in chunks (dual_chunk_attention_config)"),
        ({"layer_types": ["window_attention"]}, "has layers of type window_attention (layer_types)"),
        ({"alibi": True}, "uses ALiBi"),
        ({"model_type": "step1"}, "uses ALiBi"),
        ({"attn_logit_softcapping": 50.0}, "soft-caps its logits (attn_logit_softcapping)"),
        ({"attention_sinks": True}, "has attention sinks"),
        ({"sliding_window": 64}, "has a sliding window (64 tokens)"),
        (
            {"sliding_window": 64, "layer_types": ["full_attention", "sliding_attention"]},
            "has a sliding window (64 tokens)",
        ),
    ],
    ids=str,
)
def test_a_key_that_no_engine_serves(keys: dict[str, Any], fact: str) -> None:
    config = SimpleNamespace(**{"architectures": ["LlamaForCausalLM"], "model_type": "llama", **keys})
    assert refusal(HFConfig(config, config)) == fact
    # A multi-modal model's text part says it too, but for what is said of the whole.
    if not keys.keys() & {"architectures", "is_mm_prefix_lm", "canvas_length"} and "paligemma" not in str(
        keys
    ):
        whole = SimpleNamespace(architectures=["LlamaForCausalLM"], model_type="llava", text_config=config)
        assert refusal(HFConfig(whole, config)) == fact


@pytest.mark.parametrize(
    "keys",
    [
        {"kv_lora_rank": None},
        {"is_encoder_decoder": False},
        {"is_causal": True},
        {"is_mm_prefix_lm": False, "model_type": "paligemma"},
        {"layer_types": ["full_attention", "attention"], "architectures": ["GraniteMoeHybridForCausalLM"]},
        {"layer_types": ["full_attention"], "sliding_window": 64},
        {"layer_types": ["sliding_attention"], "sliding_window": None},
        {"layer_types": ["dense", "sparse", "moe"]},
        {"sliding_window": 0},
        {"sliding_window": None},
        {"attention_chunk_size": None, "attn_logit_softcapping": None, "num_kv_shared_layers": 0},
        {"use_bidirectional_attention": False, "attention_sinks": False, "alibi": False},
        {"architectures": ["ChatGLMModel"]},
        {"architectures": ["GPT2LMHeadModel"]},
        {"architectures": ["Phi3SmallForCausalLM"]},
        {"architectures": None},
        {},
    ],
    ids=str,
)
def test_keys_that_are_served(keys: dict[str, Any]) -> None:
    config = SimpleNamespace(**{"architectures": ["LlamaForCausalLM"], "model_type": "llama", **keys})
    assert refusal(HFConfig(config, config)) is None


def test_a_hybrid_that_has_recurrent_layers_in_its_text_part() -> None:
    """vLLM looks for the layers of a hybrid in the whole config alone."""
    text = SimpleNamespace(layer_types=["full_attention"])
    whole = SimpleNamespace(architectures=["Qwen3_5ForConditionalGeneration"], text_config=text)
    assert refusal(HFConfig(whole, text)) == "has layers with a recurrent state"


def test_a_refusal_names_the_type_where_no_architecture_is_named() -> None:
    config = SimpleNamespace(model_type="bloom")
    with pytest.raises(S2ConfigError, match=r"^s2_attention: bloom uses ALiBi, expected a causal"):
        check_hf_config(HFConfig(config, config))
