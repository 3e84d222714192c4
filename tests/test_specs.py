"""The specs of both tiers, written out for plans whose numbers are known."""

from __future__ import annotations

import pickle
from dataclasses import fields, replace
from fractions import Fraction

import pytest
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from benchmarks import engine_cache
from s2_kernels.config import S2Config
from s2_kernels.pattern import S2Pattern
from s2_vllm.plan import CachePlan, ModelGeometry
from s2_vllm.planning import make_plan, plan_for
from s2_vllm.specs import STRIDED_SUFFIX, SinkWindowSpec, padding_entries, strided_spec, window_spec
from tests.plans import DTYPE, cache_config, cache_groups, cache_specs, reference_plan

THREE_OF_EIGHT = make_plan(S2Config(2, 8, pattern_heads="query"), ModelGeometry(4, 6, 2, 128, DTYPE.itemsize))
"""Three query heads to a KV head, each with a residue of its own: 64 slots for 512 / 3 tokens."""


@pytest.mark.parametrize(
    ("plan", "slots", "heads", "window", "strided_tokens", "tokens_per_state"),
    [
        pytest.param(reference_plan("phi3-small"), 256, 8, 1024, 512, 2, id="four-residues"),
        pytest.param(reference_plan("hhst-8b"), 64, 128, 1024, 512, 8, id="sixteen-layers-an-entry"),
        pytest.param(THREE_OF_EIGHT, 192, 2, 128, 512, Fraction(8, 3), id="three-residues-of-eight"),
    ],
)
def test_specs(
    plan: CachePlan,
    slots: int,
    heads: int,
    window: int,
    strided_tokens: int,
    tokens_per_state: int | Fraction,
) -> None:
    assert window_spec(plan, DTYPE) == SlidingWindowSpec(
        block_size=slots, num_kv_heads=heads, head_size=128, dtype=DTYPE, sliding_window=window
    )
    strided = strided_spec(plan, DTYPE)
    assert strided == FullAttentionSpec(
        block_size=strided_tokens,
        num_kv_heads=heads,
        head_size=128,
        dtype=DTYPE,
        tokens_per_state=tokens_per_state,
    )
    # vLLM asks for an int in places, and a Fraction of denominator 1 is none.
    assert type(strided.tokens_per_state) is type(tokens_per_state)
    assert strided.num_states == slots


def sink_plan(sink_blocks: int) -> CachePlan:
    pattern = S2Pattern.build(4, 2, block_size=16, vert_stride=None, sink_blocks=sink_blocks, full_heads=[1])
    return plan_for({0: pattern, 1: pattern}, ModelGeometry(2, 4, 2, 64, DTYPE.itemsize))


@pytest.mark.parametrize(("sink_blocks", "pages"), [(1, 1), (2, 1), (3, 2)])
def test_sinks_keep_the_first_pages(sink_blocks: int, pages: int) -> None:
    """Of 32 tokens, two blocks."""
    plan = sink_plan(sink_blocks)
    assert plan.page_slots == 32
    spec = window_spec(plan, DTYPE)
    without = window_spec(sink_plan(0), DTYPE)
    assert type(spec) is SinkWindowSpec
    assert type(without) is SlidingWindowSpec
    assert spec.sink_pages == pages
    shared = {f.name: getattr(spec, f.name) for f in fields(without)}
    assert SlidingWindowSpec(**shared) == without
    most = without.max_admission_blocks_per_request(100, 1000)
    assert spec.max_admission_blocks_per_request(100, 1000) == most + pages
    # vLLM's worker, from 0.33 on, is to blank no page in a block table.
    assert spec.num_retained_tokens == 0


def test_what_vllm_does_with_a_spec_leaves_its_sinks() -> None:
    spec = window_spec(sink_plan(3), DTYPE)
    for made in (
        replace(spec, extra_retained_tokens=0),
        spec.copy_with_new_block_size(spec.block_size),
        type(spec).merge([spec, spec]),
        pickle.loads(pickle.dumps(spec)),
    ):
        assert made == spec
        assert type(made) is SinkWindowSpec
    assert spec != replace(spec, sink_pages=1)
    with pytest.raises(AssertionError):
        type(spec).merge([spec, replace(spec, sink_pages=1)])


def test_a_model_of_windows_alone_is_one_group() -> None:
    """vLLM takes another way where all specs are alike."""
    pattern = S2Pattern.build(4, 2, block_size=16, vert_stride=None, sink_blocks=1)
    plan = plan_for({0: pattern, 1: pattern}, ModelGeometry(2, 4, 2, 64, DTYPE.itemsize))
    (group,) = cache_groups(cache_specs(plan))
    assert group.kv_cache_spec == window_spec(plan, DTYPE)
    config = engine_cache.generate_scheduler_kv_cache_config([cache_config([group], 1 << 24)])
    assert config.kv_cache_groups[0].kv_cache_spec == window_spec(plan, DTYPE)


def test_the_strided_tier_is_the_layers_sibling() -> None:
    """vLLM reads the index of the layer in the name."""
    assert "model.layers.3.self_attn.attn" + STRIDED_SUFFIX == "model.layers.3.self_attn.attn.strided"


@pytest.mark.parametrize(("window", "strided"), [(0, 0), (2, 1), (1, 2), (0, 1)])
def test_padding_entries(window: int, strided: int) -> None:
    plan = replace(sink_plan(1), window_padding=window, strided_padding=strided)
    names = [f"layer.padding{n}" for n in range(2)]
    expected = {name: window_spec(plan, DTYPE) for name in names[:window]}
    expected |= {f"{name}.strided": strided_spec(plan, DTYPE) for name in names[:strided]}
    assert dict(padding_entries(plan, "layer", DTYPE)) == expected


def test_a_model_of_windows_alone_has_no_strided_spec() -> None:
    pattern = S2Pattern.build(4, 2, block_size=16, vert_stride=None)
    plan = plan_for({0: pattern}, ModelGeometry(1, 4, 2, 64, DTYPE.itemsize))
    with pytest.raises(AssertionError, match="a model without a strided tier"):
        strided_spec(plan, DTYPE)
