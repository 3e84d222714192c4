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
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention, EncoderOnlyAttention
from vllm.platforms import current_platform
from vllm.platforms.interface import DeviceCapability
from vllm.v1.attention.backend import AttentionType
from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend

from s2_kernels.config import S2ConfigError
from s2_vllm import refusals
from s2_vllm.backend import S2AttentionBackend
from s2_vllm.compat import BACKEND
from tests.plans import reference_plan

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm.config import VllmConfig

PLAN = reference_plan("hhst-8b")
"""Layers 0 and 1 are dense; 32 query and 8 KV heads of size 128 in bfloat16."""

NAME = "model.layers.5.self_attn.attn"


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
    "use_mla": (True, r"uses multi-head latent attention \(MLA\)"),
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
    with pytest.raises(S2ConfigError, match=rf"^s2_attention: LlamaForCausalLM {message}, expected"):
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


def test_backends_of_no_model(served: VllmConfig) -> None:
    refusals.check_backend_names(changed(served, "model_config", None), has_pattern=False)


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


def test_layer_index() -> None:
    assert refusals.layer_index(NAME, PLAN) == 5
    assert refusals.layer_index("0", PLAN) == 0
    assert refusals.layer_index("model.layers.31", PLAN) == 31


@pytest.mark.parametrize(
    ("name", "numbers"),
    [("", r"\[\]"), ("model.attn", r"\[\]"), ("a.1.b.2", r"\[1, 2\]"), ("a.32", r"\[32\]")],
)
def test_layer_without_a_place(name: str, numbers: str) -> None:
    message = rf"^s2_attention: layer '{name}' has the indices {numbers} in its name \(prefix\), expected one"
    with pytest.raises(S2ConfigError, match=rf"{message}, below 32$"):
        refusals.layer_index(name, PLAN)


def arguments(**given: Any) -> dict[str, Any]:
    """All arguments of a plain layer, with some changed or added."""
    return {
        "num_heads": 32,
        "head_size": 128,
        "scale": 0.1,
        "num_kv_heads": 8,
        "alibi_slopes": None,
        "use_alibi_sqrt": None,
        "cache_config": SimpleNamespace(sliding_window=None),
        "quant_config": None,
        "logits_soft_cap": None,
        "per_layer_sliding_window": None,
        "prefix": NAME,
        "attn_type": AttentionType.DECODER,
        "kv_sharing_target_layer_name": None,
        "mm_prefix_clamp_sliding_window": False,
        "attn_backend": None,
        "head_size_v": None,
        **given,
    }


@pytest.mark.parametrize(
    "given",
    [
        {},
        {"head_size_v": 128},
        {"sinks": None},
        {"logits_soft_cap": 0.0},
        {"attn_type": "decoder"},
        {"attn_type": None},
        {"quant_config": object()},
        {"extra": None},
    ],
    ids=lambda given: next(iter(given), "nothing"),
)
def test_plain_layer(given: dict[str, Any]) -> None:
    """What says no more than a default does is served, in a sparse layer and in a dense one."""
    refusals.check_sparse_layer(Attention, arguments(**given))
    refusals.check_dense_layer(Attention, arguments(**given))


def test_windows_of_sparse_layers_are_seen_when_they_are_made() -> None:
    """vLLM may still turn off the window that a model passes."""
    refusals.check_sparse_layer(Attention, arguments(per_layer_sliding_window=64))


SPARSE: list[tuple[dict[str, Any], str]] = [
    ({"alibi_slopes": [0.5]}, "uses ALiBi"),
    ({"alibi_slopes": torch.zeros(4)}, "uses ALiBi"),
    ({"use_alibi_sqrt": True}, "uses ALiBi"),
    ({"logits_soft_cap": 50.0}, "soft-caps its logits"),
    ({"kv_sharing_target_layer_name": "model.layers.4"}, "shares another layer's KV cache"),
    ({"attn_backend": S2AttentionBackend}, "brings an attention backend of its own"),
    ({"sinks": torch.zeros(4)}, "has attention sinks"),
    ({"layer_idx": 0}, "passes layer_idx"),
    ({"dual_chunk_attention_config": {}}, "passes dual_chunk_attention_config"),
    ({"attn_type": AttentionType.ENCODER_ONLY}, "is encoder_only attention"),
    ({"attn_type": "encoder_decoder"}, "is encoder_decoder attention"),
    ({"head_size_v": 64}, r"has values of another size \(64\)"),
]


@pytest.mark.parametrize(("given", "message"), SPARSE, ids=[message for _, message in SPARSE])
def test_sparse_layer(given: dict[str, Any], message: str) -> None:
    expected = r"expected plain causal attention \(or the layer's index in dense_layers\)$"
    with pytest.raises(S2ConfigError, match=rf"^s2_attention: layer {NAME} {message}, {expected}"):
        refusals.check_sparse_layer(Attention, arguments(**given))


@pytest.mark.parametrize("cls", [ChunkedLocalAttention, EncoderOnlyAttention])
def test_layer_of_another_class(cls: type[Attention]) -> None:
    with pytest.raises(
        S2ConfigError, match=rf"^s2_attention: layer {NAME} is a {cls.__name__}, expected plain"
    ):
        refusals.check_sparse_layer(cls, arguments())
    message = rf"^s2_attention\.dense_layers: layer {NAME} is a {cls.__name__}, expected layers with full"
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_dense_layer(cls, arguments())


DENSE: list[tuple[dict[str, Any], str]] = [
    ({"per_layer_sliding_window": 64}, r"has a sliding window \(64 tokens\)"),
    ({"per_layer_sliding_window": 0}, r"has a sliding window \(0 tokens\)"),
    ({"cache_config": SimpleNamespace(sliding_window=32)}, r"has a sliding window \(32 tokens\)"),
    ({"attn_type": AttentionType.ENCODER_ONLY}, "is encoder_only attention"),
    ({"kv_sharing_target_layer_name": "model.layers.4"}, "shares another layer's KV cache"),
]


@pytest.mark.parametrize(("given", "message"), DENSE, ids=[message for _, message in DENSE])
def test_dense_layer(given: dict[str, Any], message: str) -> None:
    message = rf"^s2_attention\.dense_layers: layer {NAME} {message}, expected layers with full attention$"
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_dense_layer(Attention, arguments(**given))


def test_dense_layer_without_a_cache_config() -> None:
    refusals.check_dense_layer(Attention, arguments(cache_config=None))


def made_layer(**changes: Any) -> Any:
    """What `check_made_layer` asks about a layer of the plan, with some of it changed."""
    layer = {
        "layer_name": NAME,
        "num_heads": 32,
        "num_kv_heads": 8,
        "head_size": 128,
        "sliding_window": None,
        "kv_cache_dtype": "auto",
        "kv_cache_torch_dtype": torch.bfloat16,
        "dtype": torch.bfloat16,
        "has_sink": False,
        "use_mm_prefix": False,
        "attn_type": AttentionType.DECODER,
        "attn_backend": S2AttentionBackend,
    }
    assert changes.keys() <= layer.keys()
    return SimpleNamespace(**{**layer, **changes})


def test_layer_as_planned(served: VllmConfig) -> None:
    refusals.check_made_layer(made_layer(), PLAN, served)


PLAIN = r"expected plain causal attention \(or the layer's index in dense_layers\)"
HEADS = rf"s2_attention: layer {NAME} has {{}} KV heads instead of the model's 32 and 8, {PLAIN}"
MADE: list[tuple[dict[str, Any], str]] = [
    ({"num_heads": 16}, HEADS.format("16 query and 8")),
    ({"num_kv_heads": 4}, HEADS.format("32 query and 4")),
    ({"head_size": 64}, rf"s2_attention: layer {NAME} has a head size of its own \(64\), {PLAIN}"),
    (
        {"sliding_window": 64},
        rf"s2_attention: layer {NAME} has a sliding window \(64 tokens\), expected plain causal attention",
    ),
    (
        {"kv_cache_dtype": "fp8", "kv_cache_torch_dtype": torch.uint8},
        rf"kv_cache_dtype: fp8 in layer {NAME}, expected auto or bfloat16 for a model with 's2_attention'",
    ),
]


@pytest.mark.parametrize(("changes", "message"), MADE, ids=[",".join(changes) for changes, _ in MADE])
def test_layer_unlike_the_plan(served: VllmConfig, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(S2ConfigError, match=f"^{message}$"):
        refusals.check_made_layer(made_layer(**changes), PLAN, served)


def test_layer_whose_cache_the_checkpoint_quantizes(served: VllmConfig) -> None:
    config = with_kv_cache(served, COMPRESSED, torch.bfloat16, "auto")
    layer = made_layer(kv_cache_dtype="fp8", kv_cache_torch_dtype=torch.uint8)
    with pytest.raises(S2ConfigError, match=rf"^kv_cache_dtype: fp8 in layer {NAME}, expected bfloat16 for"):
        refusals.check_made_layer(layer, PLAN, config)


def test_heads_of_one_rank(served: VllmConfig) -> None:
    """A layer has the heads of its rank."""
    plan = reference_plan("hhst-8b", tensor_parallel_size=2)
    refusals.check_made_layer(made_layer(num_heads=16, num_kv_heads=4), plan, served)
    with pytest.raises(S2ConfigError, match="has 32 query and 8 KV heads instead of the model's 16 and 4"):
        refusals.check_made_layer(made_layer(), plan, served)


ASKED: list[tuple[dict[str, Any], tuple[str, Any] | None, str]] = [
    ({"has_sink": True}, None, "attention sinks not supported"),
    ({"use_mm_prefix": True}, None, "partial multimodal token full attention not supported"),
    ({"attn_type": "encoder_only"}, None, "attention type encoder_only not supported"),
    ({"dtype": torch.float64}, None, "dtype not supported"),
    ({"kv_cache_dtype": "fp8_inc"}, None, "kv_cache_dtype not supported"),
    ({}, ("attention_config.use_non_causal", True), "non-causal attention not supported"),
    ({}, ("parallel_config.prefill_context_parallel_size", 2), "PCP not supported"),
    ({}, ("parallel_config.decode_context_parallel_size", 2), "DCP not supported"),
    ({}, ("model_config.model_arch_config.rswa_window", 128), "R-SWA not supported"),
]


@pytest.mark.parametrize(("changes", "option", "reason"), ASKED, ids=[reason for *_, reason in ASKED])
def test_what_vllm_has_against_the_backend(
    served: VllmConfig, changes: dict[str, Any], option: tuple[str, Any] | None, reason: str
) -> None:
    config = served if option is None else changed(served, *option)
    expected = "by the attention backend of sparse layers, expected a model and options that do without"
    with pytest.raises(S2ConfigError, match=rf"^s2_attention: layer {NAME}: {reason} {expected}$"):
        refusals.check_made_layer(made_layer(**changes), PLAN, config)


def test_all_of_vllms_reasons_are_named(served: VllmConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VLLM_BATCH_INVARIANT", "1")
    message = "attention sinks not supported, batch invariance not supported by the attention backend"
    with pytest.raises(S2ConfigError, match=message):
        refusals.check_made_layer(made_layer(has_sink=True), PLAN, served)


@pytest.mark.parametrize(
    ("path", "value", "asked"),
    [
        ("kv_transfer_config", OPTIONS["kv_transfer_config"][1], "use_kv_connector"),
        (
            "speculative_config",
            SimpleNamespace(enable_adaptive_verification=True),
            "use_adaptive_verification",
        ),
    ],
)
def test_the_backend_is_asked_about_all_of_it(
    served: VllmConfig, path: str, value: Any, asked: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also about what a backend may do by vLLM's default."""
    capability = DeviceCapability(9, 0)
    monkeypatch.setattr(current_platform, "get_device_capability", lambda: capability)
    questions = []

    class Backend(S2AttentionBackend):
        @classmethod
        def validate_configuration(cls, **values: Any) -> list[str]:
            questions.append(values)
            return super().validate_configuration(**values)

    refusals.check_made_layer(made_layer(attn_backend=Backend), PLAN, served)
    refusals.check_made_layer(made_layer(attn_backend=Backend), PLAN, changed(served, path, value))
    before, after = questions
    assert before == {**after, asked: False}
    assert after[asked] is True
    assert before == {
        "head_size": 128,
        "dtype": torch.bfloat16,
        "kv_cache_dtype": "auto",
        "block_size": served.cache_config.block_size,
        "use_mla": False,
        "has_sink": False,
        "use_sparse": False,
        "use_mm_prefix": False,
        "use_per_head_quant_scales": False,
        "device_capability": capability,
        "attn_type": AttentionType.DECODER,
        "has_sliding_window": False,
        "use_non_causal": False,
        "use_batch_invariant": False,
        "use_kv_connector": False,
        "use_pcp": False,
        "use_adaptive_verification": False,
        "use_dcp": False,
        "use_rswa": False,
    }
