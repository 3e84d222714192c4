"""What happens at engine start: the plan of a configuration, and vLLM's KV cache compared with it."""

from __future__ import annotations

import re
from dataclasses import fields, replace
from typing import TYPE_CHECKING, Any

import pytest
from transformers import LlamaConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.v1.attention.backends.registry import AttentionBackendEnum
from vllm.v1.kv_cache_interface import ChunkedLocalAttentionSpec, SlidingWindowSpec

from benchmarks.geometries import PRETRAINED, SERVED
from s2_kernels.config import S2Config, S2ConfigError
from s2_kernels.pattern import S2Pattern
from s2_vllm import compat, managers, startup
from s2_vllm.plan import ModelGeometry, attach_plan, plan_of, uniform_plan
from s2_vllm.planning import make_plan, plan_for
from s2_vllm.specs import SinkWindowSpec
from s2_vllm.startup import prepare, settle_kv_cache
from tests.plans import DTYPE, cache_config, cache_groups, cache_specs, engine_config, reference_plan

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path
    from types import ModuleType

    from vllm.config import VllmConfig
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from s2_vllm.plan import CachePlan

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}


@pytest.fixture
def unprepared(tmp_path: Path) -> Callable[..., VllmConfig]:
    """Makes the configuration of a Llama whose pattern is not there yet."""

    def make(**options: Any) -> VllmConfig:
        config = LlamaConfig(
            hidden_size=128,
            num_attention_heads=4,
            num_key_value_heads=2,
            num_hidden_layers=3,
            vocab_size=256,
            architectures=["LlamaForCausalLM"],
        )
        config.save_pretrained(tmp_path)
        options = {"dtype": "float16", "max_model_len": 256, **options}
        return EngineArgs(str(tmp_path), skip_tokenizer_init=True, **options).create_engine_config()

    return make


@pytest.mark.parametrize("place", ["hf_config", "hf_text_config"])
def test_pattern_of_a_model(unprepared: Callable[..., VllmConfig], place: str) -> None:
    config = unprepared()
    setattr(config.model_config, place, LlamaConfig(s2_attention=S2))
    config.cache_config.user_specified_block_size = False
    assert prepare(config)
    expected = make_plan(S2Config(**{**S2, "dense_layers": (1,)}), ModelGeometry(3, 4, 2, 32, 2))
    assert plan_of(config) == expected
    assert config.cache_config.block_size == expected.dense_block_size == 64
    assert config.cache_config.user_specified_block_size


def test_a_plan_that_has_been_carried_out_is_kept(unprepared: Callable[..., VllmConfig]) -> None:
    """vLLM then calls the smallest page the block size, and makes new configurations of that one."""
    config = unprepared()
    config.model_config.hf_config.s2_attention = S2
    assert prepare(config)
    plan = plan_of(config)
    smallest = min(tier.block_size for tier in plan.tiers)
    assert smallest < plan.dense_block_size
    config.cache_config.block_size = smallest
    remade = replace(config)
    assert prepare(remade)
    assert plan_of(remade) is plan_of(config) is plan
    assert remade.cache_config.block_size == smallest


def test_block_size_and_ranks_of_the_user(unprepared: Callable[..., VllmConfig]) -> None:
    config = unprepared(block_size=96)
    config.model_config.hf_config.s2_attention = S2
    config.parallel_config.tensor_parallel_size = 2
    assert prepare(config)
    pattern, geometry = S2Config(**{**S2, "dense_layers": (1,)}), ModelGeometry(3, 4, 2, 32, 2)
    assert plan_of(config) == make_plan(pattern, geometry, 2, 96)
    assert config.cache_config.block_size == 96


def test_no_pattern(unprepared: Callable[..., VllmConfig]) -> None:
    config = unprepared()
    before = config.cache_config.block_size, config.cache_config.user_specified_block_size
    assert not prepare(config)
    assert plan_of(config) is None
    assert (config.cache_config.block_size, config.cache_config.user_specified_block_size) == before
    config.model_config = None
    assert not prepare(config)


@pytest.mark.parametrize("backend", ["CUSTOM", "FLASH_ATTN", None])
def test_backend_of_the_dense_layers(unprepared: Callable[..., VllmConfig], backend: str | None) -> None:
    """CUSTOM asks for the sparse layers' backend by name: the dense ones get vLLM's choice."""
    compat._register_backend()
    config = unprepared()
    config.model_config.hf_config.s2_attention = S2
    config.attention_config.backend = backend and AttentionBackendEnum[backend]
    assert prepare(config)
    left = config.attention_config.backend
    assert left is (None if backend == "CUSTOM" else backend and AttentionBackendEnum[backend])


REFUSED: dict[str, Callable[[VllmConfig], None]] = {
    "attends in both directions": lambda c: setattr(c.model_config.hf_config, "is_causal", False),
    "pipeline_parallel_size: 2": lambda c: setattr(c.parallel_config, "pipeline_parallel_size", 2),
    "backend_per_kind.*CUSTOM": lambda c: c.attention_config.backend_per_kind.update(
        full_attention=AttentionBackendEnum.CUSTOM
    ),
    "s2_attention.local_blocks: 0": lambda c: setattr(
        c.model_config.hf_config, "s2_attention", {**S2, "local_blocks": 0}
    ),
}


@pytest.mark.parametrize("message", REFUSED)
def test_refusals_are_asked(unprepared: Callable[..., VllmConfig], message: str) -> None:
    compat._register_backend()
    config = unprepared()
    config.model_config.hf_config.s2_attention = S2
    REFUSED[message](config)
    with pytest.raises(S2ConfigError, match=message):
        prepare(config)


def test_custom_backend_without_a_pattern(unprepared: Callable[..., VllmConfig]) -> None:
    compat._register_backend()
    config = unprepared()
    config.attention_config.backend = AttentionBackendEnum.CUSTOM
    with pytest.raises(S2ConfigError, match="attention_backend: CUSTOM"):
        prepare(config)


@pytest.fixture
def report(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The lines that start-up has logged."""
    lines: list[str] = []
    monkeypatch.setattr(startup._logger, "info", lambda text, *values: lines.append(text % values))
    return lines


def check(plan: CachePlan, specs: dict[str, KVCacheSpec], memory: int = 1 << 30) -> None:
    """Check what vLLM makes of `specs` in `memory` bytes against `plan`."""
    config = engine_config()
    attach_plan(config, plan)
    cache = cache_config(cache_groups(specs), memory)
    settle_kv_cache(config, cache)
    # The scheduler's managers go by them.
    assert {type(group.kv_cache_spec) for group in cache.kv_cache_groups} <= {
        *managers._SPECS.values(),
        SinkWindowSpec,
    }


@pytest.mark.parametrize("name", SERVED)
def test_what_vllm_makes_of_the_plan(name: str, report: list[str]) -> None:
    check(reference_plan(name), cache_specs(reference_plan(name)))
    (line,) = report
    # Layers of a pretrained model may have streaming heads alone.
    assert ("in no head's set" in line) == (name in PRETRAINED)


def test_what_vllm_makes_of_padding_entries(report: list[str]) -> None:
    """Those of 2 sparse layers among 28 dense ones: 8 in each tier, 4 times the entries in use."""
    config = S2Config(8, 8, dense_layers=tuple(range(28)))
    plan = make_plan(config, ModelGeometry(30, 32, 32, 128, DTYPE.itemsize))
    check(plan, cache_specs(plan), memory=10 << 30)
    (line,) = report
    assert "; 5 KV cache groups, padding 400.0%; " in line
    specs = cache_specs(plan)
    del specs["model.layers.28.self_attn.attn.padding7.strided"]
    with pytest.raises(RuntimeError, match=r"^KV cache groups \(tier"):
        check(plan, specs, memory=10 << 30)


def test_report(report: list[str]) -> None:
    """A request of 131,072 tokens holds 401 block ids of 8 MiB; while 2,048 of them are in flight, 433.

    The window group has pages of 64 tokens for its 1,024 and one more, 17, or for 1,023 + 2,048 and one more,
    49; the strided group 256 of 512 tokens, and the dense one 128 of 1,024. In 64 GiB are 8,192 block ids. If
    all layers were dense, a request would hold 32 layers of 4 KiB a token: 16 GiB.
    """
    plan = reference_plan("hhst-8b")
    check(plan, cache_specs(plan), memory=64 << 30)
    (line,) = report
    assert line == (
        "S2-Attention: 30 sparse and 2 dense layers; tiers: window (64-token pages), strided (512-token "
        "pages), dense (1024-token pages); 3 KV cache groups, padding 6.7%; a sparse layer stores 13.2% of a "
        "dense one at 131072 tokens; KV cache for 20.43 requests of that length while they decode, 18.92 by "
        "vLLM's count, which has window pages for 2048 tokens in flight of every request, 4.00 if all were "
        "dense."
    )


def test_nothing_to_report(report: list[str]) -> None:
    groups = cache_groups(cache_specs(reference_plan("hhst-8b")))
    before = [group.kv_cache_spec for group in groups]
    settle_kv_cache(engine_config(), cache_config(groups, 1 << 30))
    assert not report
    assert [group.kv_cache_spec for group in groups] == before


@pytest.mark.parametrize("module", [startup, compat], ids=lambda module: module.__name__)
def test_vllm_prints_what_is_logged(module: ModuleType) -> None:
    """It sets up its own loggers, and those below them."""
    assert module._logger.name == "vllm.s2_vllm"


def test_blocks_in_no_heads_set_are_reported(report: list[str]) -> None:
    """All heads keep the blocks of one residue, and none those of the seven others."""
    plan = make_plan(S2Config(16, 8, homo_head=True), ModelGeometry(32, 32, 8, 128, DTYPE.itemsize))
    check(plan, cache_specs(plan))
    (line,) = report
    assert line.startswith(
        "S2-Attention: 32 sparse and 0 dense layers; tiers: window (64-token pages), strided"
    )
    assert line.endswith("if all were dense. Some old blocks are in no head's set.")


def mixed_plan(ranks: int = 1) -> CachePlan:
    """Four layers of 4 KV heads, of which layer 0 has 3 full ones, layer 1 one, and the others none."""
    full = [(0, 1, 2), (3,), (), ()]
    patterns = {
        layer: S2Pattern.build(4, 4, local_blocks=4, vert_stride=None, sink_blocks=1, full_heads=full[layer])
        for layer in range(4)
    }
    return plan_for(patterns, ModelGeometry(4, 4, 4, 128, DTYPE.itemsize), ranks)


@pytest.mark.parametrize("ranks", [1, 2], ids="tp{}".format)
def test_heads_of_several_kinds_are_reported(report: list[str], ranks: int) -> None:
    plan = mixed_plan(ranks)
    check(plan, cache_specs(plan))
    (line,) = report
    assert line.startswith(
        "S2-Attention: 4 sparse and 0 dense layers; KV heads of the sparse layers: 4 full, 12 streaming, "
        "0 strided, 1 sink blocks; tiers: window (64-token pages), strided ("
    )
    padding = re.search(
        r"KV cache groups, padding window (.*?)%, strided (.*?)%(?: \(for .* (.*)%\))?;", line
    )
    assert padding is not None
    assert float(padding[2]) == pytest.approx(100 * plan.padding_of(plan.tiers[1]), abs=0.05)
    # Two full heads a rank: 0 and 1 on the first, 2 and that of layer 1 on the other.
    assert padding[3] is None
    assert line.endswith(" In 2 sparse layers some old blocks are in no head's set.")


def test_what_is_reported_of_other_ranks_and_of_a_single_layer(report: list[str]) -> None:
    """All of rank 0's heads of layer 0 are full, none of rank 1; without sinks."""
    patterns = {
        0: S2Pattern.build(4, 4, local_blocks=4, vert_stride=None, full_heads=[0, 1]),
        1: S2Pattern.build(4, 4, local_blocks=4, vert_stride=None),
    }
    plan = plan_for(patterns, ModelGeometry(2, 4, 4, 128, DTYPE.itemsize), 2)
    check(plan, cache_specs(plan))
    (line,) = report
    assert "; KV heads of the sparse layers: 2 full, 6 streaming, 0 strided; tiers: window (" in line
    shares = [f"{tier.name} {float(plan.padding_of(tier)):.1%}" for tier in plan.tiers]
    assert f" KV cache groups, padding {', '.join(shares)} (for less full ranks 100.0%); " in line
    assert line.endswith(" if all were dense. In 1 sparse layers some old blocks are in no head's set.")


def test_that_no_head_sees_old_blocks_is_reported(report: list[str]) -> None:
    pattern = S2Pattern.build(4, 4, local_blocks=4, vert_stride=None, sink_blocks=1)
    plan = plan_for({0: pattern, 1: pattern}, ModelGeometry(2, 4, 4, 128, DTYPE.itemsize))
    check(plan, cache_specs(plan))
    (line,) = report
    assert "; tiers: window (64-token pages); 1 KV cache groups, " in line
    assert line.endswith(" No head of a sparse layer sees more than its window and the sinks.")


def test_a_window_without_its_sinks() -> None:
    plan = mixed_plan()
    specs = {
        name: SlidingWindowSpec(
            **{f.name: getattr(spec, f.name) for f in fields(spec) if f.name != "sink_pages"}
        )
        if isinstance(spec, SlidingWindowSpec)
        else spec
        for name, spec in cache_specs(plan).items()
    }
    message = (
        "KV cache group of the window tier: vLLM made it a SlidingWindowSpec, expected one that keeps the "
        "first 1 pages of a sequence"
    )
    with pytest.raises(RuntimeError, match=f"^{message}$"):
        check(plan, specs)


def test_another_plan() -> None:
    message = (
        "KV cache groups (tier, block size, page bytes): vLLM set up "
        "{('dense', 768, 6291456): 1, ('window', 64, 6291456): 1, ('strided', 512, 6291456): 1}, expected "
        "{('window', 64, 4194304): 1, ('strided', 512, 4194304): 1, ('dense', 1024, 4194304): 1}"
    )
    with pytest.raises(RuntimeError, match=f"^{re.escape(message)}$"):
        check(reference_plan("hhst-8b"), cache_specs(reference_plan("s2-1.3b")))


OTHERS = "some layers of this model do not use vLLM's Attention layer"


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("model.layers.1.self_attn.attn", r"^KV cache groups .*\('window', 64, 2097152\): 4, .* expected"),
        ("model.layers.2.self_attn.attn", f"^KV cache entries of the window tier: 3, expected 4: {OTHERS}$"),
        (
            "model.layers.2.self_attn.attn.strided",
            f"^KV cache entries of the strided tier: 3, expected 4: {OTHERS}$",
        ),
    ],
    ids=["dense", "window", "strided"],
)
def test_a_layer_that_did_not_ask_for_pages(entry: str, message: str) -> None:
    plan = reference_plan("hhst-8b")
    plan = uniform_plan(
        plan.model, plan.patterns[0], plan.sparse_layers, plan.dense_layers, 1, plan.page_slots, 8
    )
    specs = cache_specs(plan)
    del specs[entry]
    with pytest.raises(RuntimeError, match=message):
        check(plan, specs)


def test_a_dense_layer_without_full_attention_is_named() -> None:
    plan = reference_plan("hhst-8b")
    specs = cache_specs(plan)
    dense = specs["model.layers.0.self_attn.attn"]
    specs["model.layers.0.self_attn.attn"] = ChunkedLocalAttentionSpec(
        block_size=dense.block_size,
        num_kv_heads=dense.num_kv_heads,
        head_size=dense.head_size,
        dtype=dense.dtype,
        attention_chunk_size=4096,
    )
    message = (
        r"^s2_attention\.dense_layers: layer model\.layers\.0\.self_attn\.attn has a KV cache of its own "
        r"kind \(ChunkedLocalAttentionSpec\), expected layers with full attention$"
    )
    with pytest.raises(S2ConfigError, match=message):
        check(plan, specs)
