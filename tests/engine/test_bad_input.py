"""What cannot be served is refused at engine start, by field, value and expectation, before weights load.

None of these checkpoints has weights: an engine that went on to load them would fail otherwise.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    BloomConfig,
    DeepseekV2Config,
    Gemma2Config,
    GptOssConfig,
    LlamaConfig,
    MambaConfig,
    MistralConfig,
    PaliGemmaConfig,
    PreTrainedConfig,
    Qwen3Config,
    WhisperConfig,
)

from tests.engine.engines import engine

if TYPE_CHECKING:
    from pathlib import Path

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4}

SHAPE = {
    "vocab_size": 256,
    "hidden_size": 128,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 2048,
}

KEYS = "block_size|local_blocks|vert_stride|homo_head|head_sliding_step|head_sliding_offset|dense_layers"


def start(folder: Path, config: PreTrainedConfig, architecture: str, s2: Any, **options: Any) -> None:
    """Start and stop an engine on a checkpoint that consists of its config alone."""
    config.architectures = [architecture]
    if s2 is not None:
        config.s2_attention = s2
    config.save_pretrained(folder)
    with engine(folder, **{"max_model_len": 256, **options}):
        pass


def start_llama(folder: Path, s2: Any, shape: dict[str, Any] | None = None, **options: Any) -> None:
    """`start` a Llama with SHAPE, changed by `shape`."""
    start(folder, LlamaConfig(**{**SHAPE, **(shape or {})}), "LlamaForCausalLM", s2, **options)


def test_accepted_values_reach_the_weights(tmp_path: Path) -> None:
    """The other tests fail for their bad value: the same checkpoint without it gets further."""
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        start_llama(tmp_path, S2)


def test_not_an_object(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"s2_attention: \[64, 16, 8\], expected an object .*({KEYS})"):
        start_llama(tmp_path, [64, 16, 8])


def test_unknown_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=rf"s2_attention\.window: unknown key, expected one of .*({KEYS})"):
        start_llama(tmp_path, {**S2, "window": 3})


def test_missing_key(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s2_attention\.vert_stride: missing, expected a positive integer"):
        start_llama(tmp_path, {"block_size": 16, "local_blocks": 2})


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("block_size", "64", "an integer"),
        ("local_blocks", 2.0, "an integer"),
        ("vert_stride", True, "an integer"),
        ("homo_head", 1, "true or false"),
        ("head_sliding_step", 1.5, "an integer"),
        ("head_sliding_offset", None, "an integer"),
        ("pattern_heads", 4, "'kv' or 'query'"),
        ("dense_layers", 0, "a list of layer indices"),
        ("dense_layers", ["0"], "layer indices from 0 to 1"),
    ],
    ids=lambda value: repr(value).replace("'", ""),
)
def test_wrong_type(tmp_path: Path, key: str, value: Any, expected: str) -> None:
    shown = value[0] if isinstance(value, list) else value
    with pytest.raises(ValueError, match=rf"s2_attention\.{key}: {shown!r}, expected {expected}"):
        start_llama(tmp_path, {**S2, key: value})


def test_vert_stride_0(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s2_attention\.vert_stride: 0, expected an integer of at least 1"):
        start_llama(tmp_path, {**S2, "vert_stride": 0})


def test_local_blocks_0(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s2_attention\.local_blocks: 0, expected an integer of at least 1"):
        start_llama(tmp_path, {**S2, "local_blocks": 0})


@pytest.mark.parametrize("block_size", [48, 8, 256])
def test_block_size_not_a_power_of_two_in_range(tmp_path: Path, block_size: int) -> None:
    message = rf"s2_attention\.block_size: {block_size}, expected a power of two from 16 to 128"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, {**S2, "block_size": block_size})


@pytest.mark.parametrize("layer", [2, -1])
def test_layer_index_out_of_range(tmp_path: Path, layer: int) -> None:
    message = rf"s2_attention\.dense_layers: {layer}, expected layer indices from 0 to 1"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, {**S2, "dense_layers": [0, layer]})


def test_no_sparse_layer(tmp_path: Path) -> None:
    message = r"s2_attention\.dense_layers: all 2 layers, expected at least one sparse layer"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, {**S2, "dense_layers": [0, 1]})


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"full_heads": [2]}, r"full_heads: \(2,\), expected KV heads from 0 to 1"),
        ({"full_heads": {"2": [0]}}, r"full_heads: '2', expected layers from 0 to 1"),
        ({"full_heads": [1, 1]}, r"full_heads: \[1, 1\], expected each KV head once"),
        (
            {"full_heads": [0, 1]},
            r"full_heads: all 2 KV heads of every sparse layer, expected one that is not",
        ),
        ({"sink_blocks": 3}, r"sink_blocks: 3, expected at most the 2 blocks of the local window"),
        ({"num_dense_heads": 3}, r"num_dense_heads: 3, expected at most 2, the KV heads"),
        ({"num_dense_heads": 1, "homo_head": True}, r"num_dense_heads: 1, expected 0 with homo_head"),
        ({"layers": {"1": {"sinks": 1}}}, r"layers\.1\.sinks: unknown key, expected one of"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_heads_that_the_model_cannot_have(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"s2_attention\.{message}"):
        start_llama(tmp_path, {**S2, **change})


def test_more_residues_than_the_stride_has(tmp_path: Path) -> None:
    message = r"s2_attention\.vert_stride: 4, expected at least 8 with pattern_heads 'query'"
    with pytest.raises(ValueError, match=message):
        start_llama(
            tmp_path,
            {**S2, "pattern_heads": "query"},
            {"num_attention_heads": 8, "num_key_value_heads": 1},
        )


def test_as_many_residues_as_the_stride_has(tmp_path: Path) -> None:
    message = r"s2_attention\.vert_stride: 4, expected more than the 4 residues that each KV head keeps"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, {**S2, "pattern_heads": "query"}, {"num_attention_heads": 8})


def test_hf_overrides_are_checked_too(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"s2_attention\.local_blocks: 0, expected"):
        start_llama(tmp_path, None, hf_overrides={"s2_attention": {**S2, "local_blocks": 0}})


def test_block_size_option_that_the_plan_cannot_honour(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"block_size: 48, expected a multiple of 32"):
        start_llama(tmp_path, S2, block_size=48)


def test_block_size_option_smaller_than_the_kept_residues(tmp_path: Path) -> None:
    s2 = {**S2, "vert_stride": 8, "pattern_heads": "query"}
    message = r"block_size: 32, expected a multiple of 64 \(4 kept residues x blocks of 16\)"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, s2, {"num_attention_heads": 8}, block_size=32)


def test_fp8_kv_cache(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"kv_cache_dtype: fp8, expected auto"):
        start_llama(tmp_path, S2, kv_cache_dtype="fp8")


FP8_KV_CACHE = {
    "quant_method": "compressed-tensors",
    "format": "dense",
    "config_groups": {},
    "kv_cache_scheme": {"num_bits": 8, "type": "float", "strategy": "tensor", "symmetric": True},
}


def test_fp8_kv_cache_that_the_checkpoint_declares(tmp_path: Path) -> None:
    message = r"kv_cache_dtype: auto \(the checkpoint declares a quantized one\), expected bfloat16"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, S2, {"quantization_config": FP8_KV_CACHE}, dtype="bfloat16")


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_type_that_overrules_the_declared_one(tmp_path: Path, dtype: str) -> None:
    """What the message asks for is enough: the layers are made, and want their weights."""
    with pytest.raises(RuntimeError, match="Cannot find any model weights"):
        start_llama(tmp_path, S2, {"quantization_config": FP8_KV_CACHE}, dtype=dtype, kv_cache_dtype=dtype)


@pytest.mark.parametrize(
    ("option", "value"), [("kv_offloading_size", 1.0), ("ubatch_size", 2), ("enable_dbo", True)]
)
def test_options_that_bring_what_is_not_served(tmp_path: Path, option: str, value: Any) -> None:
    with pytest.raises(ValueError, match=rf"{option}: {value}, expected"):
        start_llama(tmp_path, S2, **{option: value}, all2all_backend="deepep_low_latency")


def test_heads_that_are_too_large(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"head_size: 264, expected at most 256"):
        start_llama(tmp_path, S2, {"head_dim": 264})


@pytest.mark.skipif(torch.cuda.device_count() == 1, reason="vLLM itself refuses it first on a single GPU")
def test_pipeline_parallelism(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"pipeline_parallel_size: 2, expected 1"):
        start_llama(tmp_path, S2, pipeline_parallel_size=2)


def test_speculative_decoding(tmp_path: Path) -> None:
    speculation = {"method": "ngram", "num_speculative_tokens": 2, "prompt_lookup_max": 2}
    with pytest.raises(ValueError, match=r"speculative_config: ngram, expected None"):
        start_llama(tmp_path, S2, speculative_config=speculation)


def test_custom_backend_without_a_pattern(tmp_path: Path) -> None:
    message = r"attention_backend: CUSTOM .*expected a model with a pattern.*'s2_attention'.*--hf-overrides"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, None, attention_backend="CUSTOM")


@pytest.mark.parametrize("s2", [S2, None], ids=["pattern", "no-pattern"])
def test_custom_backend_for_a_kind_of_layers(tmp_path: Path, s2: dict[str, Any] | None) -> None:
    message = r"attention_config\.backend_per_kind\.full_attention: CUSTOM \(S2-Attention\), expected another"
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, s2, attention_config={"backend_per_kind": {"full_attention": "CUSTOM"}})


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])
def test_batch_invariance(tmp_path: Path, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    with pytest.raises(ValueError, match="VLLM_BATCH_INVARIANT: 1, expected 0"):
        start_llama(tmp_path, S2)


def test_attention_that_is_not_causal(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"attention_config\.use_non_causal: True, expected False"):
        start_llama(tmp_path, S2, attention_config={"use_non_causal": True})


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"is_causal": False}, r"LlamaForCausalLM attends in both directions \(is_causal: false\)"),
        ({"use_bidirectional_attention": True}, "LlamaForCausalLM attends in both directions"),
        ({"canvas_length": 32}, "LlamaForCausalLM is a diffusion model"),
        ({"is_mm_prefix_lm": True}, "LlamaForCausalLM attends to images in both directions"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_model_that_is_not_causal(tmp_path: Path, keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        start_llama(tmp_path, S2, keys)


def test_model_with_an_image_prefix(tmp_path: Path) -> None:
    text = {**SHAPE, "model_type": "gemma"}
    vision = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = PaliGemmaConfig(
        text_config=text, vision_config=vision, image_token_index=5, projection_dim=128, hidden_size=128
    )
    message = "PaliGemmaForConditionalGeneration attends to images in both directions"
    with pytest.raises(ValueError, match=message):
        start(tmp_path, config, "PaliGemmaForConditionalGeneration", S2)


def test_sliding_window_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\..* has a sliding window \(64 tokens\), expected plain"):
        start(tmp_path, MistralConfig(**SHAPE, sliding_window=64), "MistralForCausalLM", S2)


def test_sliding_window_in_a_dense_layer(tmp_path: Path) -> None:
    message = (
        r"s2_attention\.dense_layers: layer .*layers\.0\..* has a sliding window \(64 tokens\), expected"
    )
    with pytest.raises(ValueError, match=message):
        start(
            tmp_path,
            MistralConfig(**SHAPE, sliding_window=64),
            "MistralForCausalLM",
            {**S2, "dense_layers": [0]},
        )


def test_soft_capped_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"layers\.0\..* soft-caps its logits, expected plain"):
        start(tmp_path, Gemma2Config(**SHAPE, sliding_window=64), "Gemma2ForCausalLM", S2)


def test_alibi_model(tmp_path: Path) -> None:
    config = BloomConfig(vocab_size=256, hidden_size=128, n_layer=2, n_head=4)
    with pytest.raises(ValueError, match=r"h\.0\..* uses ALiBi, expected plain"):
        start(tmp_path, config, "BloomForCausalLM", S2)


def test_model_with_sinks(tmp_path: Path) -> None:
    """No layer has a sliding window here."""
    layers = 2 * ["full_attention"]
    config = GptOssConfig(**SHAPE, num_local_experts=4, num_experts_per_tok=2, layer_types=layers)
    with pytest.raises(ValueError, match=r"layers\.0\..* has attention sinks, expected plain"):
        start(tmp_path, config, "GptOssForCausalLM", S2)


def test_mla_model(tmp_path: Path) -> None:
    config = DeepseekV2Config(
        vocab_size=256,
        hidden_size=128,
        intermediate_size=192,
        moe_intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        kv_lora_rank=64,
        q_lora_rank=None,
        qk_rope_head_dim=32,
        qk_nope_head_dim=32,
        v_head_dim=32,
        n_routed_experts=4,
        num_experts_per_tok=2,
        first_k_dense_replace=1,
    )
    with pytest.raises(ValueError, match=r"DeepseekV2ForCausalLM uses multi-head latent attention"):
        start(tmp_path, config, "DeepseekV2ForCausalLM", S2)


def test_encoder_decoder_model(tmp_path: Path) -> None:
    config = WhisperConfig(
        vocab_size=256,
        d_model=64,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=2,
        decoder_attention_heads=2,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    with pytest.raises(ValueError, match=r"WhisperForConditionalGeneration is an encoder-decoder model"):
        start(tmp_path, config, "WhisperForConditionalGeneration", S2)


def test_recurrent_model(tmp_path: Path) -> None:
    config = MambaConfig(vocab_size=256, hidden_size=64, num_hidden_layers=2)
    with pytest.raises(ValueError, match=r"MambaForCausalLM has layers with a recurrent state"):
        start(tmp_path, config, "MambaForCausalLM", S2)


def test_pooling_model(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"Qwen3ForCausalLM runs as a pooling model"):
        start(tmp_path, Qwen3Config(**SHAPE), "Qwen3ForCausalLM", S2, runner="pooling")
