"""The specs of both tiers, written out for plans whose numbers are known."""

from __future__ import annotations

from fractions import Fraction

import pytest
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

from s2_kernels.config import S2Config
from s2_vllm.plan import CachePlan, ModelGeometry, make_plan
from s2_vllm.specs import STRIDED_SUFFIX, strided_spec, window_spec
from tests.plans import DTYPE, reference_plan

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


def test_the_strided_tier_is_the_layers_sibling() -> None:
    """vLLM reads the index of the layer in the name."""
    assert "model.layers.3.self_attn.attn" + STRIDED_SUFFIX == "model.layers.3.self_attn.attn.strided"
