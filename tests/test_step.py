"""One step prepared for several layers: each gets its own tensors, whatever it was prepared with."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from s2_kernels.launch.choice import Impl
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.layout import head_tables
from s2_kernels.paged import LayerHeads, PagedStep
from s2_kernels.pattern import S2Pattern
from tests.paged import DEVICE, Geometry, PagedBatch, build_batch

PATTERN = S2Pattern.build(4, 2, block_size=16, local_blocks=2, vert_stride=4)
REQUESTS = [(70, 1), (200, 1), (0, 90), (150, 20)]
DECODES, NEW = 2, 2
"""The number of decodes, and the request whose tokens are all new."""


def layer_like(batch: PagedBatch) -> PagedBatch:
    """Another layer for the same requests: keys turned round, values doubled, in tensors of its own."""

    def transformed(cache: torch.Tensor) -> torch.Tensor:
        keys, values = cache.chunk(2, dim=-1)
        # Of the same strides, gaps included.
        other = torch.empty_strided(cache.shape, cache.stride(), dtype=cache.dtype, device=cache.device)
        return other.copy_(torch.cat([-keys, 2 * values], dim=-1))

    window = transformed(batch.window_cache)
    shared = batch.strided_cache is batch.window_cache
    q, key, value = torch.cat([batch.q, -batch.key, 2 * batch.value], dim=1).split(
        [batch.q.shape[1], batch.key.shape[1], batch.key.shape[1]], dim=1
    )
    return replace(
        batch,
        q=q,
        key=key,
        value=value,
        k=-batch.k,
        v=2 * batch.v,
        window_cache=window,
        strided_cache=window if shared else transformed(batch.strided_cache),
    )


def contiguous(batch: PagedBatch) -> PagedBatch:
    """The same layer with queries, keys and values in memory of their own."""
    return replace(batch, q=batch.q.contiguous(), key=batch.key.contiguous(), value=batch.value.contiguous())


def misaligned(batch: PagedBatch) -> PagedBatch:
    """The same layer with queries that start 4 bytes past a multiple of 16, at the same strides."""
    q = batch.q
    memory = q.new_empty(q.untyped_storage().nbytes() // q.itemsize + 1)
    shifted = torch.as_strided(memory, q.shape, q.stride(), 1)
    return replace(batch, q=shifted.copy_(q))


def step_of(batch: PagedBatch) -> PagedStep:
    requests = batch.requests
    return PagedStep(
        requests.window_table,
        requests.strided_table,
        batch.window_slots,
        batch.strided_slots,
        requests.query_start_loc,
        requests.seq_lens,
        num_tokens=len(batch.q),
        num_decodes=DECODES,
        num_decode_tokens=DECODES,
        max_seq_len=max(batch.seq_lens),
    )


def run(step: PagedStep, batch: PagedBatch, heads: LayerHeads) -> torch.Tensor:
    """A layer's part of the step, whose new tokens are in no cache before."""
    slots = batch.window_slots[batch.window_slots >= 0]
    page_slots = batch.window_cache.shape[2]
    batch.window_cache[slots // page_slots, :, slots % page_slots] = torch.nan
    new_pages = batch.strided_table[NEW]
    batch.strided_cache[new_pages[new_pages > 0].long()] = torch.nan
    out = batch.poisoned_output()
    tables = head_tables(heads.pattern, batch.q.device)
    step.run_layer(
        batch.q, batch.key, batch.value, batch.window_cache, batch.strided_cache, out, heads, tables
    )
    return out


@pytest.mark.parametrize("other", [layer_like, contiguous, misaligned])
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_layers_of_a_step(impl: Impl, other: Callable[[PagedBatch], PagedBatch]) -> None:
    first = build_batch(Geometry(PATTERN), REQUESTS, pool="token-major", padding_tokens=3)
    layers = [first, other(layer_like(first)), layer_like(layer_like(first)), first]
    step = step_of(first)
    heads = LayerHeads(PATTERN, first.scale, impl)
    for layer in layers:
        layer.check(run(step, layer, heads))


def test_layers_with_other_heads() -> None:
    """The second kind's pattern and scale are its own, at the same shapes."""
    patterns = [
        PATTERN,
        S2Pattern.build(4, 2, block_size=16, local_blocks=2, vert_stride=4, head_sliding_step=3),
    ]
    layers = [build_batch(Geometry(pattern), REQUESTS) for pattern in patterns]
    for name in ("window_table", "strided_table", "window_slots", "strided_slots"):
        assert torch.equal(getattr(layers[0], name), getattr(layers[1], name)), "not one step"
    layers[1] = replace(layers[1], scale=0.3)
    step = step_of(layers[0])
    for layer in layers:
        layer.check(run(step, layer, LayerHeads(layer.pattern, layer.scale, "triton")))


def test_the_calls_are_prepared_once_for_layers_of_a_kind() -> None:
    first = build_batch(Geometry(PATTERN), REQUESTS)
    step = step_of(first)
    heads = LayerHeads(PATTERN, first.scale, "triton")
    run(step, first, heads)
    prepared = dict(step._prepared)
    run(step, layer_like(first), heads)
    assert step._prepared == prepared
    run(step, contiguous(first), heads)
    assert len(step._prepared) == 2


@pytest.mark.parametrize(("impl", "prepared"), [("triton", 1), ("torch", 2), ("reference", 2)])
def test_layers_with_as_many_full_heads(impl: Impl, prepared: int) -> None:
    """Where only tables tell them apart, they share their calls."""
    layers = [
        build_batch(
            Geometry(
                S2Pattern.build(
                    6, 3, block_size=16, local_blocks=2, vert_stride=4, full_heads=[head], sink_blocks=1
                )
            ),
            REQUESTS,
        )
        for head in (0, 2)
    ]
    step = step_of(layers[0])
    for layer in layers:
        layer.check(run(step, layer, LayerHeads(layer.pattern, layer.scale, impl)))
    assert len(step._prepared) == prepared


@pytest.mark.parametrize(("impl", "prepared"), [("triton", 1), ("torch", 3), ("reference", 3)])
def test_layers_with_other_numbers_of_full_heads(impl: Impl, prepared: int) -> None:
    """They share what writes and decodes, and have prefills of their own."""
    patterns = [
        S2Pattern.build(6, 3, block_size=16, local_blocks=2, vert_stride=4, full_heads=full_heads)
        for full_heads in ([1], [0, 2], [0, 1])
    ]
    # The window tier's rows fill a page, as in a server all tiers' do.
    layers = [build_batch(Geometry(p, page_slots=64, residue_slots=16), REQUESTS) for p in patterns]
    step = step_of(layers[0])
    for layer in layers:
        layer.check(run(step, layer, LayerHeads(layer.pattern, layer.scale, impl)))
    assert len(step._first) == prepared
    assert len(step._prepared) == (2 if impl == "triton" else 3)


LAUNCHED_BY: list[tuple[dict[str, Any], float]] = [
    ({}, 0.5),
    ({}, 0.25),
    ({"block_size": 32}, 0.5),
    ({"local_blocks": 3}, 0.5),
    ({"vert_stride": 5}, 0.5),
    ({"sink_blocks": 2}, 0.5),
    ({"num_heads": 12}, 0.5),
    ({"full_heads": [0, 1]}, 0.5),
    ({"vert_stride": None}, 0.5),
    ({"pattern_heads": "query"}, 0.5),
]


def test_what_layers_must_have_in_common_to_share_their_calls() -> None:
    kinds = []
    for change, scale in LAUNCHED_BY:
        arguments = {"num_heads": 6, "num_kv_heads": 3, "block_size": 16, "vert_stride": 4, "local_blocks": 2}
        heads = {"full_heads": [0], "sink_blocks": 1}
        kinds.append(LayerHeads(S2Pattern.build(**{**arguments, **heads, **change}), scale, None).launch_kind)
    assert len(set(kinds)) == len(LAUNCHED_BY)
    assert None not in kinds
    assert LayerHeads(PATTERN, 0.5, None).launch_kind is None


def test_what_writes_and_decodes_are_launched_by() -> None:
    def kind(scale: float = 0.5, **change: Any) -> tuple[object, ...] | None:
        arguments = {"num_heads": 6, "num_kv_heads": 3, "block_size": 16, "vert_stride": 4, "local_blocks": 2}
        pattern = S2Pattern.build(**{**arguments, "full_heads": [0], **change})
        return LayerHeads(pattern, scale, None).table_kind

    assert kind() == kind(full_heads=[1, 2])
    others = [
        {"vert_stride": None},
        {"vert_stride": 5},
        {"sink_blocks": 1, "full_heads": []},
        {"sink_blocks": 1},
        {"block_size": 32},
        {"local_blocks": 3},
        {"num_heads": 12},
        {"num_heads": 12, "num_kv_heads": 6},
        {"scale": 0.25},
    ]
    assert len({kind(), *(kind(**other) for other in others)}) == 1 + len(others)
    assert LayerHeads(PATTERN, 0.5, None).table_kind is None


def test_layers_share_their_calls_by_how_many_heads_of_a_kind_they_have() -> None:
    """Of three heads, none full or streaming, one, the other, or two of them: whichever they are."""
    kinds = [
        {
            LayerHeads(S2Pattern(16, 2, 4, residues, 3, 1, full_heads), 0.5, None).launch_kind
            for residues, full_heads in layers
        }
        for layers in (
            [((0, 1, 2), ()), ((3, 3, 3), ())],
            [((-1, 1, 2), (0,)), ((0, 3, -1), (2,))],
            [((-1, 1, 2), ()), ((0, -1, 2), ())],
            [((-1, 1, -1), (0, 2)), ((-1, -1, 2), (0, 1))],
            [((-1, 1, -1), (0,)), ((-1, 1, -1), (2,))],
            [((-1, 1, -1), ()), ((-1, -1, 2), ())],
        )
    ]
    assert [len(kind) for kind in kinds] == [1] * len(kinds)
    assert len(set.union(*kinds)) == len(kinds)


@triton.jit
def scale_kernel(x, out, length, FACTOR: tl.constexpr, BLOCK: tl.constexpr):
    offsets = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    within = offsets < length
    tl.store(out + offsets, tl.load(x + offsets, within) * FACTOR, within)


def test_a_launch_is_repeated_with_other_tensors() -> None:
    tensors = torch.randn(3, 100, device=DEVICE)
    outs = torch.full((3, 104), torch.nan, device=DEVICE)[:, :100]
    arguments = {"x": tensors[0], "out": outs[0], "length": 100, "FACTOR": 3, "BLOCK": 16}
    launch = KernelLaunch(scale_kernel, (7,), arguments, ("out", "x"), num_warps=1)
    assert outs.isnan().all(), "making a launch must start nothing"
    for x, out in zip(tensors, outs, strict=True):
        launch(out, x)
    torch.testing.assert_close(outs, 3 * tensors)


def test_a_launch_wants_everything_that_varies() -> None:
    x = torch.randn(16, device=DEVICE)
    launch = KernelLaunch(
        scale_kernel, (1,), {"x": x, "out": x, "length": 16, "FACTOR": 3, "BLOCK": 16}, ("out", "x")
    )
    with pytest.raises(ValueError, match="argument"):
        launch(x)
