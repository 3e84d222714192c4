"""The Hopper prefill kernel's source, emulated on the CPU, against attention over contiguous keys.

On a Hopper GPU `test_prefill` and `test_attention` run the compiled kernel.
"""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from s2_kernels import hopper, paged
from s2_kernels.attention import s2_attention
from s2_kernels.hopper import prefill
from s2_kernels.launch.configs import trial
from s2_kernels.layout import head_tables
from s2_kernels.paged.dispatch import prepare_attend
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import attention_reference
from tests.contiguous import expected_attention
from tests.gluon_emulator import emulated_prefill
from tests.paged import LONG_MIXED_GEOMETRIES, Geometry, PagedBatch, build_batch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="needs tensors on the CPU")

_build = S2Pattern.build
GEOMETRIES = [
    Geometry(_build(2, 1, local_blocks=2, vert_stride=3), 64),
    Geometry(_build(4, 1, local_blocks=3, vert_stride=8, head_sliding_offset=1, pattern_heads="query"), 128),
    Geometry(_build(2, 2, local_blocks=1, vert_stride=2), 64, 192),
    Geometry(_build(1, 1, local_blocks=8, vert_stride=4), 128),
]


# (context, queries) of each request: starts and ends within blocks and at their edges, and none at all.
BATCHES = {
    "prompts": [(0, 300), (0, 1), (0, 64), (0, 449)],
    "chunks": [(680, 280), (148, 100), (384, 128), (1000, 24)],
    "mixed": [(0, 130), (0, 0), (600, 1), (1325, 80), (500, 0)],
}


@pytest.fixture(autouse=True)
def _emulated(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that is taken for a Hopper GPU with three multiprocessors."""
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(prefill, "prefill_fwd_kernel", emulated_prefill())
    monkeypatch.setattr(prefill, "num_multiprocessors", lambda device: 3)


def attend(batch: PagedBatch, out: torch.Tensor, max_seq_len: int | None = None) -> None:
    paged.attend(
        batch.q, batch.requests, batch.pattern, batch.scale, out, max_seq_len=max_seq_len, impl="hopper"
    )


@pytest.mark.parametrize("max_seq_len", [1, None], ids=["short", "long"])
@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("geometry", GEOMETRIES + LONG_MIXED_GEOMETRIES, ids=str)
def test_paged(geometry: Geometry, requests: str, max_seq_len: int | None) -> None:
    """Both ways to start a tile are right for every length."""
    dtype = torch.float16 if geometry.head_size == 64 else torch.bfloat16
    batch = build_batch(geometry, BATCHES[requests], dtype=dtype, padding_tokens=3)
    out = batch.poisoned_output()
    attend(batch, out, max_seq_len)
    batch.check(out)


def test_any_configuration() -> None:
    batch = build_batch(GEOMETRIES[0], BATCHES["mixed"], dtype=torch.float16, padding_tokens=3)
    out = batch.poisoned_output()
    with trial("hopper_prefill", {"STAGES": 3, "section_mib": 1}) as shapes:
        attend(batch, out)
    assert shapes == {"head64-16bit"}
    batch.check(out)


@pytest.mark.parametrize("geometry", LONG_MIXED_GEOMETRIES[1:3], ids=["full-and-streaming", "streaming"])
def test_a_strided_tier_in_memory_of_its_own(geometry: Geometry) -> None:
    """Streaming heads alone have none at all."""
    batch = build_batch(geometry, BATCHES["mixed"], dtype=torch.float16, padding_tokens=3)
    batch = replace(batch, strided_cache=batch.strided_cache.clone())
    assert (batch.strided_cache.numel() == 0) == (geometry is LONG_MIXED_GEOMETRIES[2])
    out = batch.poisoned_output()
    attend(batch, out)
    batch.check(out)


def test_token_major_pages_are_refused_by_name() -> None:
    batch = build_batch(LONG_MIXED_GEOMETRIES[0], BATCHES["mixed"], dtype=torch.float16, pool="token-major")
    with pytest.raises(ValueError, match=r"^window_cache: shape .* expected rows as TMA loads them"):
        attend(batch, batch.poisoned_output())


def test_layers_with_as_many_full_heads_share_a_call() -> None:
    """What is prepared for one layer of a step reads which heads are full from the tables of each."""
    kinds = {"local_blocks": 2, "vert_stride": 4, "sink_blocks": 1}
    geometries = [Geometry(_build(6, 3, full_heads=[head], **kinds)) for head in (0, 2)]
    layers = [build_batch(geometry, BATCHES["chunks"], dtype=torch.float16) for geometry in geometries]
    first = layers[0]
    assert torch.equal(first.strided_table, layers[1].strided_table), "not one step"
    arguments = (first.requests, first.pattern, first.scale, first.poisoned_output())
    call = prepare_attend(first.q, *arguments, max_seq_len=2000, impl="hopper")
    for layer in layers:
        out = layer.poisoned_output()
        tables = head_tables(layer.pattern, layer.q.device)
        call(layer.q, layer.window_cache, layer.strided_cache, out, tables)
        layer.check(out)


CONTIGUOUS = {
    "plain": _build(4, 2, local_blocks=2, vert_stride=4),
    "full-and-strided": _build(4, 2, local_blocks=2, vert_stride=4, full_heads=[1]),
    "full-and-streaming": _build(4, 2, local_blocks=2, vert_stride=None, full_heads=[0], sink_blocks=2),
    "strided-with-sinks": _build(4, 2, local_blocks=1, vert_stride=3, sink_blocks=1, pattern_heads="query"),
    # Of the query heads of one KV head, only some have a strided set: no pages are for that.
    "all-three": S2Pattern(64, 2, 4, (-1, -1, -1, 3), 2, 1, (0,)),
}


@pytest.mark.parametrize("head_size", hopper.HEAD_SIZES)
@pytest.mark.parametrize("kinds", CONTIGUOUS)
def test_contiguous_with_log_sum_exp(kinds: str, head_size: int) -> None:
    pattern = CONTIGUOUS[kinds]
    generator = torch.Generator().manual_seed(0)
    starts, key_starts = [0, 200, 329], [0, 333, 962]
    q = torch.randn(329, 4, head_size, generator=generator).half()
    k, v = torch.randn(2, 962, 2, head_size, generator=generator).half()
    scale = head_size**-0.5
    out, lse = s2_attention(
        q,
        k,
        v,
        pattern,
        cu_seqlens_q=torch.tensor(starts),
        cu_seqlens_k=torch.tensor(key_starts),
        return_lse=True,
        impl="hopper",
    )
    expected = attention_reference(q, k, v, pattern, scale, starts, key_starts)
    torch.testing.assert_close(out, expected, atol=2e-3, rtol=2e-3)
    _, expected_lse = expected_attention(q[200:], k[333:], v[333:], pattern.block_mask(10), 64, scale)
    torch.testing.assert_close(lse[:, 200:], expected_lse, atol=2e-3, rtol=2e-3)
