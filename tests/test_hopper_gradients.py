"""The Hopper kernels for gradients, emulated on the CPU, against autograd of the plain specification."""

from __future__ import annotations

import pytest
import torch

from s2_kernels import hopper
from s2_kernels.contiguous.dispatch import run_backward
from s2_kernels.contiguous.sequences import Span
from s2_kernels.hopper import gradients
from s2_kernels.hopper.key_items import NO_BLOCK, key_items
from s2_kernels.launch.call_cache import CallCache
from s2_kernels.launch.configs import trial
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import masked_attention, masked_log_sum_exp, token_mask
from tests.gluon_emulator import emulated_gradients

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs tensors on the CPU")

_build = S2Pattern.build
PATTERNS = {
    "kv": (_build(2, 1, local_blocks=2, vert_stride=3), 64),
    "query": (_build(4, 1, local_blocks=2, vert_stride=4, head_sliding_offset=1, pattern_heads="query"), 64),
    "each-head": (_build(2, 2, local_blocks=1, vert_stride=2), 128),
    "window": (_build(1, 1, local_blocks=9, vert_stride=4), 64),
}
# (queries, keys) of each sequence.
LENGTHS = {
    "whole": [(300, 300), (64, 64), (1, 1)],
    "past": [(100, 420), (128, 256), (3, 200)],
    "empty": [(70, 130), (0, 90), (65, 65)],
}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is taken for a Hopper GPU with three multiprocessors."""
    keys, queries = emulated_gradients()
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(gradients, "key_gradients_bwd_kernel", keys)
    monkeypatch.setattr(gradients, "query_gradients_bwd_kernel", queries)
    monkeypatch.setattr(gradients, "num_multiprocessors", lambda device: 3)


def packed(lengths: list[tuple[int, int]]) -> tuple[Span, ...]:
    spans, query, key = [], 0, 0
    for queries, keys in lengths:
        spans.append(Span(0, query, queries, key, keys))
        query, key = query + queries, key + keys
    return tuple(spans)


def random_inputs(
    pattern: S2Pattern, head_size: int, spans: tuple[Span, ...], dtype: torch.dtype, seed: int = 0
) -> tuple[torch.Tensor, ...]:
    """q, k, v, d_out [1, tokens, heads, head_size] and d_lse [1, heads, queries]; q, k and v are fused."""
    generator = torch.Generator().manual_seed(seed)
    queries = spans[-1].query_start + spans[-1].num_queries
    keys = spans[-1].key_start + spans[-1].num_keys

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(1, *shape, generator=generator)

    q = randn(queries, pattern.num_heads + 2, head_size).to(dtype)[:, :, 1:-1]
    kv = randn(keys, 2 * pattern.num_kv_heads, head_size).to(dtype)
    k, v = kv.split(pattern.num_kv_heads, dim=2)
    d_out = randn(queries, pattern.num_heads, head_size).to(dtype)
    return q, k, v, d_out, randn(pattern.num_heads, queries)


def expected_gradients(
    inputs: tuple[torch.Tensor, ...], pattern: S2Pattern, spans: tuple[Span, ...], scale: float
) -> tuple[torch.Tensor, ...]:
    """(out, lse, dq, dk, dv) in float32, by autograd."""
    q, k, v, d_out, d_lse = inputs
    leaves = [x.detach()[0].float().requires_grad_() for x in (q, k, v)]
    outs, lses = [], []
    for span in spans:
        if not span.num_queries:
            continue
        rows = slice(span.query_start, span.query_start + span.num_queries)
        keys = slice(span.key_start, span.key_start + span.num_keys)
        mask = token_mask(
            pattern, torch.arange(span.num_keys - span.num_queries, span.num_keys), span.num_keys
        )
        of_span = (leaves[0][rows], leaves[1][keys])
        outs.append(masked_attention(*of_span, leaves[2][keys], mask, scale))
        lses.append(masked_log_sum_exp(*of_span, mask, scale))
    out, lse = torch.cat(outs), torch.cat(lses, dim=1)
    ((out * d_out[0].float()).sum() + (lse * d_lse[0]).sum()).backward()
    return (out.detach()[None], lse.detach()[None], *(leaf.grad[None] for leaf in leaves))


def gradients_by_hopper(
    inputs: tuple[torch.Tensor, ...],
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
) -> list[torch.Tensor]:
    """(dq, dk, dv), NaN where nothing was written."""
    q, k, v, d_out, d_lse = inputs
    found = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    run_backward(q, k, v, pattern, spans, scale, out.to(q.dtype), lse, d_out, d_lse, *found, impl="hopper")
    return found


@pytest.mark.parametrize("lengths", LENGTHS)
@pytest.mark.parametrize("name", PATTERNS)
def test_gradients(name: str, lengths: str) -> None:
    pattern, head_size = PATTERNS[name]
    dtype = torch.float16 if lengths == "past" else torch.bfloat16
    spans = packed(LENGTHS[lengths])
    inputs = random_inputs(pattern, head_size, spans, dtype)
    scale = head_size**-0.5
    out, lse, *expected = expected_gradients(inputs, pattern, spans, scale)
    found = gradients_by_hopper(inputs, pattern, spans, scale, out, lse)
    for which, one, other in zip(("dq", "dk", "dv"), found, expected, strict=True):
        tolerance = 4e-3 if dtype == torch.float16 else 3e-2
        torch.testing.assert_close(
            one.float(), other, atol=tolerance, rtol=tolerance, msg=lambda m, which=which: f"{which}: {m}"
        )


def test_a_call_is_prepared_once_for_a_layout(monkeypatch: pytest.MonkeyPatch) -> None:
    """And repeated with other tensors; another scale, layout or configuration is another call."""
    pattern, head_size = PATTERNS["kv"]
    spans = packed([(70, 137)])
    prepared = []

    def prepare(*args: object) -> object:
        prepared.append(args)
        return original(*args)

    original = gradients._prepare
    monkeypatch.setattr(gradients, "_prepare", prepare)
    monkeypatch.setattr(gradients, "_CALLS", CallCache())
    for seed, scale, count in ((1, 0.125, 1), (2, 0.125, 1), (3, 0.2, 2), (4, 0.125, 2)):
        inputs = random_inputs(pattern, head_size, spans, torch.float16, seed)
        out, lse, *expected = expected_gradients(inputs, pattern, spans, scale)
        found = gradients_by_hopper(inputs, pattern, spans, scale, out, lse)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one.float(), other, atol=4e-3, rtol=4e-3)
        assert len(prepared) == count
    q, k, v, d_out, d_lse = inputs
    with trial("hopper_query_gradients", {"STAGES": 2, "section_mib": 1}):
        gradients_by_hopper(inputs, pattern, spans, 0.125, out, lse)
    assert len(prepared) == 3
    gradients_by_hopper((q.clone(), k, v, d_out, d_lse), pattern, spans, 0.125, out, lse)
    assert len(prepared) == 4


def test_heads_of_several_kinds_are_refused_by_name() -> None:
    """Their gradients come from the portable kernels; the forward pass may be Hopper's."""
    pattern = S2Pattern.build(4, 2, sink_blocks=1)
    spans = packed([(70, 70)])
    inputs = random_inputs(pattern, 64, spans, torch.float16)
    q, _, _, _, d_lse = inputs
    with pytest.raises(ValueError, match=r"^pattern: sink_blocks: 1, expected a strided set of every head"):
        gradients_by_hopper(inputs, pattern, spans, 0.125, q, d_lse)


def test_a_sequence_of_nan_does_not_reach_its_neighbours() -> None:
    """They share blocks of rows, as TMA loads them."""
    pattern, head_size = PATTERNS["kv"]
    spans = packed([(70, 200), (90, 90), (100, 150)])
    inputs = random_inputs(pattern, head_size, spans, torch.float16)
    out, lse, *expected = expected_gradients(inputs, pattern, spans, 0.1)
    middle = spans[1]
    rows = slice(middle.query_start, middle.query_start + middle.num_queries)
    keys = slice(middle.key_start, middle.key_start + middle.num_keys)
    q, k, v, d_out, _ = inputs
    for x, part in ((q, rows), (k, keys), (v, keys), (d_out, rows)):
        x[:, part] = torch.nan
    found = gradients_by_hopper(inputs, pattern, spans, 0.1, out, lse)
    for one, other, part in zip(found, expected, (rows, keys, keys), strict=True):
        assert one[:, part].isnan().all()
        one[:, part] = 0
        other[:, part] = 0
        torch.testing.assert_close(one.float(), other, atol=4e-3, rtol=4e-3)


@pytest.mark.parametrize("name", PATTERNS)
def test_items_have_every_key_block_once_and_the_longest_come_last(name: str) -> None:
    pattern, _ = PATTERNS[name]
    spans = packed([(300, 1000), (0, 90), (700, 700)])
    items = key_items(spans, 1000, 1790, pattern, torch.device("cpu")).tolist()
    found = sorted((item[0], item[8], block) for item in items for block in item[1:3] if block != NO_BLOCK)
    assert found == [
        (head, span.key_start, block)
        for head in range(pattern.num_kv_heads)
        for span in spans
        for block in range(-(-span.num_keys // 64))
    ]
    steps = []
    for kv_head, *blocks, first, last, _, _, _, _, num_keys in items:
        attends = pattern.block_mask(-(-num_keys // 64))[kv_head * pattern.group_size :][: pattern.group_size]
        pair = [block for block in blocks if block != NO_BLOCK]
        steps.append(int(attends[:, first : last + 1, pair].any(dim=2).sum()))
    assert steps == sorted(steps)
    assert steps[-1] > 2 * steps[0]
