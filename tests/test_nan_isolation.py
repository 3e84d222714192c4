"""NaN and infinities reach the queries that attend to them, and no others.

They are put into the queries, keys and values of some tokens. Of the rows of a tile some attend to such a
token and others do not: later rows have dropped its block, it is later than the earlier rows, or its block is
of another head. What is expected is computed row by row, from the keys that the row attends to and no others.
"""

from __future__ import annotations

import warnings

import pytest
import torch

from s2_kernels import hopper, paged
from s2_kernels.attention import s2_attention
from s2_kernels.hopper import prefill as hopper_prefill
from s2_kernels.launch.choice import Impl
from s2_kernels.layout import TierLayout
from s2_kernels.masks import BlockMask, local_window, sink_blocks
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import cache_write_reference
from tests.contiguous import expected_attention, random_causal_mask
from tests.gluon_emulator import emulated_prefill
from tests.paged import DEVICE, TOLERANCES, Geometry, PagedBatch, build_batch

NAN, INF = float("nan"), float("inf")
HOPPER_SPREADS_VALUES = "a value that is NaN or infinite reaches all queries of a tile that share its block"
HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 24
TOKENS = 150


def block_mask(dense: torch.Tensor, block_size: int, *, causal: bool = True) -> BlockMask:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BlockMask.from_dense(dense, block_size, causal=causal)


def assert_isolated(out: torch.Tensor, expected: torch.Tensor) -> None:
    """The same, NaN and infinities included, of which there are some, but not everywhere."""
    assert expected.isnan().any()
    assert expected.isfinite().any()
    torch.testing.assert_close(
        out, expected, atol=TOLERANCES[out.dtype], rtol=TOLERANCES[out.dtype], equal_nan=True
    )


LIBRARY_MASKS = {
    "s2-16": S2Pattern.build(HEADS, KV_HEADS, block_size=16, local_blocks=2, vert_stride=3).block_mask(10),
    "s2-32": S2Pattern.build(HEADS, KV_HEADS, block_size=32, local_blocks=1, vert_stride=4).block_mask(5),
    "s2-128": S2Pattern.build(HEADS, KV_HEADS, block_size=128, local_blocks=1, vert_stride=2).block_mask(2),
    "window-and-sinks-16": local_window(10, 3) | sink_blocks(10, 1),
    "arbitrary-16": random_causal_mask(HEADS, 10, 0.5),
}


def random_inputs(
    queries: int, keys: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one sequence, [tokens, heads, head_size]."""
    generator = torch.Generator().manual_seed(keys)
    q, k, v = (
        torch.randn(tokens, heads, HEAD_SIZE, generator=generator).to(DEVICE, dtype)
        for tokens, heads in ((queries, HEADS), (keys, KV_HEADS), (keys, KV_HEADS))
    )
    return q, k, v


def spoil(where: str, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> None:
    """Put NaN and infinities into some elements of some tokens: old ones, and the last but one."""
    if where == "values":
        v[17, 1, 3:5] = INF
        v[40, 0, 2] = NAN
        v[100, 0, 5], v[101, 0, 5:7] = -INF, INF
        v[-2, :, 7] = NAN
    elif where == "keys":
        k[30, 0, 1] = INF
        k[41, 0] = NAN
        k[-2, 0, 2] = -INF
        k[-3, 0, 2] = NAN
    else:
        q[-1, 0, 3] = NAN
        q[len(q) // 2, 1] = INF


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
@pytest.mark.parametrize("queries", [TOKENS, 1], ids=["prompt", "decode"])
@pytest.mark.parametrize("name", LIBRARY_MASKS)
def test_library(name: str, queries: int, where: str, impl: Impl) -> None:
    dense, block_size = LIBRARY_MASKS[name], int(name.split("-")[-1])
    q, k, v = random_inputs(queries, TOKENS, torch.float32 if name == "s2-32" else torch.float16)
    spoil(where, q, k, v)
    out, lse = s2_attention(
        q[None], k[None], v[None], block_mask(dense, block_size), return_lse=True, impl=impl
    )
    expected, expected_lse = expected_attention(q, k, v, dense, block_size, HEAD_SIZE**-0.5)
    assert_isolated(out[0], expected)
    is_finite = expected_lse.isfinite()
    torch.testing.assert_close(lse[0][is_finite], expected_lse[is_finite], atol=2e-5, rtol=2e-5)
    assert not lse[0][~is_finite].isfinite().any()


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
def test_library_not_causal(impl: Impl) -> None:
    generator = torch.Generator().manual_seed(0)
    dense = torch.rand(2, 5, 10, generator=generator) < 0.4
    q, k, v = random_inputs(80, TOKENS, torch.float16)
    spoil("values", q, k, v)
    mask = block_mask(dense, 16, causal=False)
    out = s2_attention(q[None], k[None], v[None], mask, impl=impl)
    expected, _ = expected_attention(q, k, v, dense, 16, HEAD_SIZE**-0.5, causal=False)
    assert_isolated(out[0], expected)


_build = S2Pattern.build
BY_KV_HEAD = Geometry(_build(4, 2, block_size=16, local_blocks=2, vert_stride=3), HEAD_SIZE)
BY_QUERY_HEAD = Geometry(
    _build(8, 2, block_size=16, local_blocks=2, vert_stride=5, pattern_heads="query"), HEAD_SIZE, 64
)
PAGED_GEOMETRIES = {"kv": BY_KV_HEAD, "query": BY_QUERY_HEAD}
PAGED_BATCHES = {
    "prompts": [(0, TOKENS), (0, 33)],
    "chunks": [(TOKENS - 70, 70), (100, 20)],
    "decode": [(TOKENS - 1, 1), (105, 1)],
}


def spoilt_batch(
    geometry: Geometry, requests: list[tuple[int, int]], where: str, dtype: torch.dtype
) -> PagedBatch:
    """A batch whose first request has NaN and infinities."""
    batch = build_batch(geometry, requests, dtype=dtype)
    length = batch.seq_lens[0]
    k, v = batch.k[:length], batch.v[:length]
    spoil(where, batch.q[: batch.query_start_loc[1]], k, v)
    tokens = (~(k.isfinite() & v.isfinite()).all(dim=(1, 2))).nonzero().flatten()
    layout = TierLayout(batch.pattern, batch.window_cache.shape[2])
    slots = []
    for table, page_tokens in (
        (batch.window_table[0], layout.window_page_tokens),
        (batch.strided_table[0], layout.strided_page_tokens),
    ):
        slots.append(table[tokens // page_tokens].long() * page_tokens + tokens % page_tokens)
    cache_write_reference(
        k[tokens], v[tokens], batch.window_cache, batch.strided_cache, *slots, batch.pattern
    )
    return batch


def check_batch(batch: PagedBatch, out: torch.Tensor) -> None:
    pattern = batch.pattern
    for n, length in enumerate(batch.seq_lens):
        rows = slice(*batch.query_start_loc[n : n + 2])
        keys = slice(*batch.key_start_loc[n : n + 2])
        dense = pattern.block_mask(-(-length // pattern.block_size))
        expected, _ = expected_attention(
            batch.q[rows], batch.k[keys], batch.v[keys], dense, pattern.block_size, batch.scale
        )
        if n == 0:
            assert_isolated(out[rows], expected)
        else:
            torch.testing.assert_close(out[rows], expected, atol=2e-3, rtol=2e-3)


@pytest.mark.parametrize("impl", ["reference", "torch", "triton"])
@pytest.mark.parametrize("where", ["queries", "keys", "values"])
@pytest.mark.parametrize("requests", PAGED_BATCHES)
@pytest.mark.parametrize("name", PAGED_GEOMETRIES)
def test_paged(name: str, requests: str, where: str, impl: Impl) -> None:
    """The decode kernel and the prefill kernel, and that for single queries as well."""
    dtype = torch.float32 if requests == "chunks" else torch.float16
    for max_query_len in (None, 1) if requests == "decode" else (None,):
        batch = spoilt_batch(PAGED_GEOMETRIES[name], PAGED_BATCHES[requests], where, dtype)
        out = batch.poisoned_output()
        paged.attend(
            batch.q,
            batch.requests,
            batch.pattern,
            batch.scale,
            out,
            max_query_len=max_query_len,
            impl=impl,
        )
        check_batch(batch, out)


@pytest.mark.skipif(
    torch.cuda.is_available(), reason="needs tensors on the CPU, where the kernel is emulated"
)
@pytest.mark.parametrize("requests", [[(0, 300)], [(300, 100)]], ids=["prompt", "chunk"])
@pytest.mark.parametrize(
    "where",
    [
        "queries",
        "keys",
        pytest.param("values", marks=pytest.mark.xfail(strict=True, reason=HOPPER_SPREADS_VALUES)),
    ],
)
def test_hopper_kernel(where: str, requests: list[tuple[int, int]], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    monkeypatch.setattr(hopper_prefill, "prefill_fwd_kernel", emulated_prefill())
    monkeypatch.setattr(hopper_prefill, "num_multiprocessors", lambda device: 3)
    geometry = Geometry(_build(4, 2, local_blocks=2, vert_stride=3), 64)
    batch = spoilt_batch(geometry, requests, where, torch.float16)
    out = batch.poisoned_output()
    paged.attend(batch.q, batch.requests, batch.pattern, batch.scale, out, impl="hopper")
    check_batch(batch, out)
