"""Which layer a model gets where it constructs vLLM's `Attention`, however it passes the arguments."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import LlamaConfig
from vllm.config import set_current_vllm_config
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.layers.attention import Attention, ChunkedLocalAttention

from benchmarks.engine_cache import cache_specs
from s2_kernels.config import S2ConfigError
from s2_vllm import attention, compat
from s2_vllm.attention import BareEntry, S2Attention, StridedTier
from s2_vllm.backend import S2AttentionBackend
from s2_vllm.plan import attach_plan, plan_of
from s2_vllm.specs import strided_spec, window_spec

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm.config import VllmConfig

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 32

GEOMETRY = (HEADS, HEAD_SIZE, 0.5, KV_HEADS)
"""The first arguments: heads, head size, scale, KV heads."""

SPARSE, DENSE = "model.layers.0.self_attn.attn", "model.layers.1.self_attn.attn"


def configure(folder: Path, num_hidden_layers: int = 2, **keys: Any) -> VllmConfig:
    """An engine's configuration for a Llama."""
    config = LlamaConfig(
        hidden_size=HEADS * HEAD_SIZE,
        num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS,
        num_hidden_layers=num_hidden_layers,
        vocab_size=256,
        architectures=["LlamaForCausalLM"],
        dtype="float32",
        **keys,
    )
    config.save_pretrained(folder)
    return EngineArgs(str(folder), dtype="float32", max_model_len=256).create_engine_config()


@pytest.fixture
def engine_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[VllmConfig]:
    """The configuration while a model with one sparse and one dense layer is made."""
    compat.install_layers()
    monkeypatch.setattr(attention, "get_tensor_model_parallel_rank", lambda: 0)
    pattern = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}
    config = configure(tmp_path, s2_attention=pattern)
    with set_current_vllm_config(config):
        yield config


NONE = 5 * [None]
"""ALiBi's slopes and its square root, the cache's and the quantization's configuration, a soft cap."""

CALLS: dict[str, tuple[tuple[Any, ...], dict[str, Any]]] = {
    "by name": (GEOMETRY, {"prefix": SPARSE}),
    "all by name": (
        (),
        {
            "num_heads": HEADS,
            "head_size": HEAD_SIZE,
            "scale": 0.5,
            "num_kv_heads": KV_HEADS,
            "prefix": SPARSE,
        },
    ),
    "prefix by position": ((*GEOMETRY, *NONE, None, SPARSE), {}),
    "all by position": ((*GEOMETRY, *NONE, None, SPARSE, "decoder", None, False, None, HEAD_SIZE), {}),
    "what says nothing": (GEOMETRY, {"prefix": SPARSE, "sinks": None, "other": None, "logits_soft_cap": 0.0}),
}


@pytest.mark.parametrize("call", CALLS)
def test_sparse_layer(engine_config: VllmConfig, call: str) -> None:
    args, kwargs = CALLS[call]
    layer = Attention(*args, **kwargs)
    assert type(layer) is S2Attention
    assert layer.layer_name == SPARSE
    assert (layer.num_heads, layer.head_size, layer.num_kv_heads) == (HEADS, HEAD_SIZE, KV_HEADS)
    assert layer.get_attn_backend() is S2AttentionBackend
    assert layer.plan == plan_of(engine_config)
    entries = engine_config.compilation_config.static_forward_context
    assert {name: type(entry) for name, entry in entries.items()} == {
        SPARSE: S2Attention,
        f"{SPARSE}.strided": StridedTier,
    }


@pytest.mark.parametrize("has_gpu", [True, False])
def test_on_a_gpu_compiled_kernels_are_kept(
    engine_config: VllmConfig, monkeypatch: pytest.MonkeyPatch, has_gpu: bool
) -> None:
    kept = []
    monkeypatch.setattr(attention, "keep_compiled_kernels", lambda: kept.append(True))
    monkeypatch.setattr(type(attention.current_platform), "is_cuda_alike", lambda _: has_gpu)
    Attention(*GEOMETRY, prefix=DENSE)
    assert not kept
    Attention(*GEOMETRY, prefix=SPARSE)
    assert bool(kept) == has_gpu


def test_padding_entries(engine_config: VllmConfig) -> None:
    plan = plan_of(engine_config)
    assert plan is not None
    padded = replace(plan, window_padding=2, strided_padding=2)
    attach_plan(engine_config, padded)
    Attention(*GEOMETRY, prefix=SPARSE)
    entries = engine_config.compilation_config.static_forward_context
    assert list(entries) == [
        f"{SPARSE}{padding}{tier}" for padding in ("", ".padding0", ".padding1") for tier in ("", ".strided")
    ]
    for name, entry in entries.items():
        spec = strided_spec if name.endswith(".strided") else window_spec
        assert entry.get_kv_cache_spec(engine_config) == spec(padded, torch.float32)
        assert entry.get_attn_backend() is S2AttentionBackend
        assert entry.layer_name == name
    assert type(entries[f"{SPARSE}.padding1"]) is BareEntry


MIXED = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": 4,
    "sink_blocks": 1,
    "full_heads": {"1": [0], "3": [0, 1]},
    "layers": {"2": {"vert_stride": None}, "3": {"vert_stride": None}, "4": {"sink_blocks": 0}},
}
"""Of six layers: strided heads in 0, 4 and 5, one full head in 1, streaming heads in 2, full heads in 3."""


@pytest.fixture
def mixed_layers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[S2Attention]:
    """The layers of MIXED, in an engine of one rank."""
    compat.install_layers()
    monkeypatch.setattr(attention, "get_tensor_model_parallel_rank", lambda: 0)
    config = configure(tmp_path, s2_attention=MIXED, num_hidden_layers=6)
    with set_current_vllm_config(config):
        layers = [Attention(*GEOMETRY, prefix=f"model.layers.{i}.self_attn.attn") for i in range(6)]
    entries = config.compilation_config.static_forward_context
    owners = {name: entry for name, entry in entries.items() if not is_shared(entry)}
    specs = {name: entry.get_kv_cache_spec(config) for name, entry in owners.items()}
    plan = plan_of(config)
    assert plan is not None
    assert list(specs.items()) == list(cache_specs(plan, torch.float32).items())
    return layers


def is_shared(entry: Any) -> bool:
    return getattr(entry, "kv_sharing_target_layer_name", None) is not None


def test_layers_of_several_kinds_have_their_rows(mixed_layers: list[S2Attention]) -> None:
    """Every row of every entry is at most one layer's; a layer without strided heads has none."""
    plan = mixed_layers[0].plan
    assert plan.strided is not None
    assert mixed_layers[2].impl.strided == (None, (0, 0, (0, plan.layout_of(2, 0).residue_slots)))
    rows: dict[str, list[int]] = {}
    for layer in mixed_layers:
        window, strided = layer.impl.window, layer.impl.strided
        owner = layer.kv_sharing_target_layer_name or layer.layer_name
        rows.setdefault(owner, []).extend(range(window.first, window.first + window.size))
        if strided.entry is not None:
            of_entry = range(strided.rows.first, strided.rows.first + strided.rows.size)
            rows.setdefault(strided.entry, []).extend(of_entry)
    for name, taken in rows.items():
        available, _ = plan.strided_shape if name.endswith(".strided") else plan.window_shape
        assert len(set(taken)) == len(taken)
        assert set(taken) <= set(range(available))
    assert sum(map(len, rows.values())) == 6 * KV_HEADS + plan.strided.used_rows[0]


def test_caches_of_several_kinds_are_warmed_up_once(
    mixed_layers: list[S2Attention],
) -> None:
    """Each kind of layer with caches as its own will be; layer 5 is of the kind of layer 0."""
    plan = mixed_layers[0].plan
    pages = torch.zeros(3, *plan.window_shape, 2 * HEAD_SIZE)
    shapes: dict[int, list[torch.Size]] = {}
    for index, layer in enumerate(mixed_layers):
        layer.kv_cache = layer.impl.window.of(pages)
        if layer._is_first_of_its_kind():
            caches = layer.kv_cache, layer._strided_cache_like(pages)
            layer.impl.warm_up(*caches)
            shapes[index] = [cache.shape[1:3] for cache in caches]
    assert list(shapes) == [0, 1, 2, 3, 4]
    for index, (window, strided) in shapes.items():
        assert window == (KV_HEADS, plan.page_slots)
        assert strided == plan.layout_of(index, 0).strided_shape


@pytest.mark.usefixtures("engine_config")
@pytest.mark.parametrize("args", [(), (*NONE, None, DENSE)], ids=["by name", "by position"])
def test_dense_layer(args: tuple[Any, ...]) -> None:
    layer = Attention(*GEOMETRY, *args, **({} if args else {"prefix": DENSE}))
    assert type(layer) is Attention
    assert layer.layer_name == DENSE


REFUSED: dict[str, tuple[tuple[Any, ...], str]] = {
    "no name": ((), r"layer '' has the indices \[\] in its name \(prefix\), expected one, below 2"),
    "no index": ((*NONE, None, "model.attn"), r"layer 'model\.attn' has the indices \[\]"),
    "no such index": ((*NONE, None, "layers.7.attn"), r"layer 'layers\.7\.attn' has the indices \[7\]"),
    "ALiBi": (([0.5] * HEADS, *NONE, SPARSE), f"layer {SPARSE} uses ALiBi, expected plain causal attention"),
    "soft cap": ((*NONE[:-1], 30.0, None, SPARSE), f"layer {SPARSE} soft-caps its logits, expected plain"),
    "window": ((*NONE, 64, SPARSE), rf"layer {SPARSE} has a sliding window \(64 tokens\), expected plain"),
    "window in a dense layer": (
        (*NONE, 64, DENSE),
        rf"layer {DENSE} has a sliding window \(64 tokens\), expected layers with full attention",
    ),
    "shared cache of a dense layer": (
        (*NONE, None, DENSE, "decoder", SPARSE),
        f"layer {DENSE} shares another layer's KV cache, expected layers with full attention",
    ),
}


@pytest.mark.usefixtures("engine_config")
@pytest.mark.parametrize("case", REFUSED)
def test_refusals_see_arguments_by_position(case: str) -> None:
    args, message = REFUSED[case]
    with pytest.raises(S2ConfigError, match=message):
        Attention(*GEOMETRY, *args)


@pytest.mark.usefixtures("engine_config")
@pytest.mark.parametrize("layer", [SPARSE, DENSE], ids=["sparse", "dense"])
def test_a_class_of_its_own(layer: str) -> None:
    """Its constructor passes most arguments on."""
    with pytest.raises(S2ConfigError, match=f"layer {layer} is a ChunkedLocalAttention, expected"):
        ChunkedLocalAttention(*GEOMETRY[:3], 128, KV_HEADS, None, None, None, None, layer)


@pytest.mark.usefixtures("engine_config")
def test_arguments_that_no_layer_takes() -> None:
    """The message is Python's own, as without the plugin."""
    with pytest.raises(TypeError, match=r"missing a required argument: 'head_size'"):
        Attention(HEADS, prefix=SPARSE)


def test_models_without_a_pattern(tmp_path: Path) -> None:
    compat.install_layers()
    with set_current_vllm_config(configure(tmp_path)):
        assert type(Attention(*GEOMETRY, prefix="no index")) is Attention


@pytest.mark.usefixtures("engine_config")
def test_vllm_is_asked_about_the_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    """A layer that brings its backend does not pass by vLLM's own check of it."""
    monkeypatch.setattr(S2AttentionBackend, "supported_dtypes", [torch.bfloat16])
    with pytest.raises(
        S2ConfigError, match=r"layer model\.layers\.0\..*: dtype not supported by the attention backend"
    ):
        Attention(*GEOMETRY, prefix=SPARSE)
