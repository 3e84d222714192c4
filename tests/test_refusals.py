"""What is refused, row by row: vLLM's own configurations and layers, with one thing changed."""

from __future__ import annotations

from copy import copy
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.config import DiffusionConfig, KVTransferConfig, ModelConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from s2_vllm import refusals
from s2_vllm.compat import BACKEND
from s2_vllm.config import S2ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm.config import VllmConfig


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Llama that consists of its config alone."""
    folder = tmp_path_factory.mktemp("llama")
    shape = {"hidden_size": 128, "num_attention_heads": 4, "num_hidden_layers": 2, "vocab_size": 256}
    LlamaConfig(**shape, architectures=["LlamaForCausalLM"], dtype="bfloat16").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def served(folder: Path) -> VllmConfig:
    """An engine's configuration in which nothing is refused."""
    return EngineArgs(str(folder), skip_tokenizer_init=True, max_model_len=256).create_engine_config()


@pytest.fixture
def custom() -> Iterator[AttentionBackendEnum]:
    """The name CUSTOM as it is after the plugin has registered it."""
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)
    yield AttentionBackendEnum.CUSTOM
    register_backend(AttentionBackendEnum.CUSTOM, BACKEND)


def changed(config: VllmConfig, path: str, value: Any) -> VllmConfig:
    """A copy of `config` with another value at `path`, which must exist."""
    config = copy(config)
    part, *names = path.split(".")
    assert hasattr(config, part)
    setattr(config, part, changed(getattr(config, part), ".".join(names), value) if names else value)
    return config


def test_nothing_is_refused_without_a_reason(served: VllmConfig) -> None:
    """The other tests fail for the one thing that they change."""
    refusals.check_model(served.model_config)
    refusals.check_options(served)
    refusals.check_backend_names(served, has_pattern=True)
    refusals.check_backend_names(served, has_pattern=False)
    refusals.check_no_pattern(served, "obstacle: it, expected none")


MODELS = {
    "use_mla": (True, "uses multi-head latent attention"),
    "is_encoder_decoder": (True, "is an encoder-decoder model"),
    "is_hybrid": (True, "has layers with a recurrent state"),
    "is_attention_free": (True, "has layers with a recurrent state"),
    "runner_type": ("pooling", "runs as a pooling model"),
    "is_mm_prefix_lm": (True, r"attends to images in both directions \(is_mm_prefix_lm\)"),
    "is_diffusion": (True, r"is a diffusion model \(canvas_length\)"),
}


@pytest.mark.parametrize("fact", MODELS)
def test_model(served: VllmConfig, fact: str, monkeypatch: pytest.MonkeyPatch) -> None:
    value, message = MODELS[fact]
    model_config = copy(served.model_config)
    assert hasattr(model_config, fact)
    # Most of them are properties.
    monkeypatch.setattr(ModelConfig, fact, value, raising=False)
    vars(model_config).pop(fact, None)
    expected = "expected a causal decoder-only model whose layers are vLLM's Attention"
    with pytest.raises(S2ConfigError, match=rf"^s2_attention: LlamaForCausalLM {message}.*, {expected}$"):
        refusals.check_model(model_config)


@pytest.mark.parametrize("place", ["hf_config", "hf_text_config"])
@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("is_causal", False, r"attends in both directions \(is_causal: false\)"),
        ("is_causal", None, r"attends in both directions \(is_causal: false\)"),
        ("use_bidirectional_attention", True, r"attends in both directions \(use_bidirectional_attention\)"),
        ("use_bidirectional_attention", "all", r"attends in both directions \(use_bidirectional_attention\)"),
    ],
)
def test_model_that_is_not_causal(served: VllmConfig, place: str, key: str, value: Any, message: str) -> None:
    model_config = copy(served.model_config)
    model_config.hf_config, model_config.hf_text_config = copy(model_config.hf_config), LlamaConfig()
    setattr(getattr(model_config, place), key, value)
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_model(model_config)


@pytest.mark.parametrize("value", [None, False, "vision"])
def test_model_whose_text_is_causal(served: VllmConfig, value: Any) -> None:
    """Of images, whose attention "vision" is about, the model's own configuration tells."""
    model_config = copy(served.model_config)
    model_config.hf_config = LlamaConfig(is_causal=True, use_bidirectional_attention=value)
    refusals.check_model(model_config)


OPTIONS: dict[str, tuple[str, Any, str]] = {
    "pipeline_parallel_size": ("parallel_config.pipeline_parallel_size", 2, "2, expected 1"),
    "decode_context_parallel_size": ("parallel_config.decode_context_parallel_size", 2, "2, expected 1"),
    "prefill_context_parallel_size": ("parallel_config.prefill_context_parallel_size", 2, "2, expected 1"),
    "enable_dbo": ("parallel_config.enable_dbo", True, "True, expected False"),
    "ubatch_size": ("parallel_config.ubatch_size", 2, "2, expected 1"),
    "kv_offloading_size": ("cache_config.kv_offloading_size", 1.0, r"1\.0, expected None"),
    "kv_sharing_fast_prefill": ("cache_config.kv_sharing_fast_prefill", True, "True, expected False"),
    "disable_hybrid_kv_cache_manager": (
        "scheduler_config.disable_hybrid_kv_cache_manager",
        True,
        "True, expected False",
    ),
    "speculative_config": ("speculative_config", SimpleNamespace(method="ngram"), "ngram, expected None"),
    "kv_transfer_config": (
        "kv_transfer_config",
        KVTransferConfig(kv_connector="OffloadingConnector", kv_role="kv_both"),
        "OffloadingConnector, expected None",
    ),
    "diffusion_config": (
        "diffusion_config",
        DiffusionConfig(canvas_length=32),
        r"DiffusionConfig\(.*canvas_length=32.*\), expected None",
    ),
    "attention_config.use_non_causal": ("attention_config.use_non_causal", True, "True, expected False"),
}


@pytest.mark.parametrize("option", OPTIONS)
def test_option(served: VllmConfig, option: str) -> None:
    path, value, message = OPTIONS[option]
    with pytest.raises(S2ConfigError, match=rf"^{option}: {message} for a model with 's2_attention'$"):
        refusals.check_options(changed(served, path, value))


def test_no_micro_batches_are_one(served: VllmConfig) -> None:
    """vLLM writes 0 as well as 1 for a step that is not divided."""
    refusals.check_options(changed(served, "parallel_config.ubatch_size", 0))
    refusals.check_options(changed(served, "scheduler_config.disable_hybrid_kv_cache_manager", None))


@pytest.mark.parametrize("runner", ["0", "1"], ids=["V1", "V2"])
def test_batch_invariance(served: VllmConfig, runner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", runner)
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    message = "^VLLM_BATCH_INVARIANT: 1, expected 0 for a model with 's2_attention'$"
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_options(served)


COMPRESSED = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}
MODELOPT = {"quant_method": "modelopt", "quantization": {"kv_cache_quant_algo": "FP8"}}


@pytest.mark.parametrize(
    ("quantization", "model_dtype", "dtype", "message"),
    [
        (None, torch.bfloat16, "fp8", "fp8, expected auto or bfloat16"),
        (None, torch.bfloat16, "float16", "float16, expected auto or bfloat16"),
        (None, torch.float16, "bfloat16", "bfloat16, expected auto or float16"),
        (None, torch.float32, "bfloat16", "bfloat16, expected auto"),
        (
            COMPRESSED,
            torch.bfloat16,
            "auto",
            r"auto \(the checkpoint declares a quantized one\), expected bfloat16",
        ),
        (COMPRESSED, torch.float16, "fp8", "fp8, expected float16"),
        (
            COMPRESSED,
            torch.float32,
            "auto",
            r"auto \(the checkpoint .*\), expected bfloat16 or float16 together with the same dtype",
        ),
        (MODELOPT, torch.bfloat16, "fp8", "fp8, expected bfloat16"),
    ],
    ids=lambda value: value["quant_method"] if isinstance(value, dict) else str(value),
)
def test_kv_cache_dtype(
    served: VllmConfig,
    quantization: dict[str, Any] | None,
    model_dtype: torch.dtype,
    dtype: str,
    message: str,
) -> None:
    config = with_kv_cache(served, quantization, model_dtype, dtype)
    message = f"^kv_cache_dtype: {message} for a model with 's2_attention'$"
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_options(config)


@pytest.mark.parametrize(
    ("quantization", "dtype"),
    [(None, "auto"), (None, "bfloat16"), (COMPRESSED, "bfloat16"), (MODELOPT, "bfloat16"), ({}, "auto")],
)
def test_kv_cache_dtype_of_the_model(
    served: VllmConfig, quantization: dict[str, Any] | None, dtype: str
) -> None:
    """A type that the user names overrules the checkpoint's."""
    refusals.check_options(with_kv_cache(served, quantization, torch.bfloat16, dtype))


def with_kv_cache(
    config: VllmConfig, quantization: dict[str, Any] | None, model_dtype: torch.dtype, dtype: str
) -> VllmConfig:
    """`config` of a checkpoint quantized so, in a type, with a KV cache of another."""
    config = changed(config, "model_config.model_arch_config.quantization_config", quantization)
    config = changed(config, "model_config.dtype", model_dtype)
    return changed(config, "cache_config.cache_dtype", dtype)


def test_custom_backend_without_a_pattern(served: VllmConfig, custom: AttentionBackendEnum) -> None:
    config = changed(served, "attention_config.backend", custom)
    message = r"^attention_backend: CUSTOM \(S2-Attention\), expected a model with a pattern.*'s2_attention'"
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_backend_names(config, has_pattern=False)
    refusals.check_backend_names(config, has_pattern=True)
    assert refusals.asks_for_our_backend(config)


PLACES: dict[str, tuple[str, Any]] = {
    "attention_config.backend_per_kind.full_attention": (
        "attention_config.backend_per_kind",
        {"full_attention": AttentionBackendEnum.CUSTOM},
    ),
    "attention_config.backend_per_kind.sliding_window": (
        "attention_config.backend_per_kind",
        {"full_attention": AttentionBackendEnum.FLASH_ATTN, "sliding_window": AttentionBackendEnum.CUSTOM},
    ),
    "speculative_config.attention_backend": (
        "speculative_config",
        SimpleNamespace(attention_backend=AttentionBackendEnum.CUSTOM),
    ),
    "mm_encoder_attn_backend": (
        "model_config.multimodal_config",
        SimpleNamespace(mm_encoder_attn_backend=AttentionBackendEnum.CUSTOM),
    ),
}


@pytest.mark.usefixtures("custom")
@pytest.mark.parametrize("has_pattern", [True, False], ids=["pattern", "no-pattern"])
@pytest.mark.parametrize("place", PLACES)
def test_custom_backend_in_any_other_place(served: VllmConfig, place: str, has_pattern: bool) -> None:
    config = changed(served, *PLACES[place])
    with pytest.raises(S2ConfigError, match=rf"^{place}: CUSTOM \(S2-Attention\), expected another backend"):
        refusals.check_backend_names(config, has_pattern=has_pattern)


@pytest.mark.parametrize("place", ["attention_config.backend", *PLACES])
def test_custom_backend_of_another_plugin(
    served: VllmConfig, place: str, custom: AttentionBackendEnum
) -> None:
    register_backend(custom, "another_plugin.Backend")
    config = changed(served, *PLACES.get(place, (place, custom)))
    refusals.check_backend_names(config, has_pattern=False)
    assert not refusals.asks_for_our_backend(config)


@pytest.mark.parametrize("place", ["hf_config", "hf_text_config"])
def test_pattern_where_the_plugin_stands_aside(served: VllmConfig, place: str) -> None:
    config = changed(served, f"model_config.{place}", SimpleNamespace(s2_attention={}))
    with pytest.raises(S2ConfigError, match=r"^obstacle: it, expected none for a model with 's2_attention'$"):
        refusals.check_no_pattern(config, "obstacle: it, expected none")


@pytest.mark.parametrize("config", [None, SimpleNamespace(model_config=None), SimpleNamespace()])
def test_configuration_of_an_unknown_vllm(config: Any) -> None:
    refusals.check_no_pattern(config, "obstacle: it, expected none")
