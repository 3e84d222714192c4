"""Paged decode against S2-Attention over contiguous keys and values."""

from __future__ import annotations

from itertools import permutations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2_kernels import paged
from s2_kernels.layout import head_tables
from s2_kernels.paged.decode import prepare_decode
from s2_kernels.paged.decode_combine import MAX_CHUNK, MIN_CHUNK, chunk_size
from s2_kernels.pattern import S2Pattern
from tests.paged import (
    DEVICE,
    DTYPE_NAMES,
    DTYPES,
    GEOMETRIES,
    MIXED_GEOMETRIES,
    Geometry,
    PagedBatch,
    build_batch,
    move_to_far_pages,
)

# (context, queries) of each request, for blocks of 16 tokens; longer blocks get contexts in proportion.
# First and last token of a block, of the window, of a super-block; an empty context; padding requests.
REQUESTS = [(0, 1), (15, 1), (0, 0), (32, 1), (63, 1), (64, 1), (90, 0), (301, 1)]
SMALL = Geometry(S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4))


def scaled(pattern: S2Pattern) -> list[tuple[int, int]]:
    factor = pattern.block_size // 16
    return [(context * factor, queries) for context, queries in REQUESTS]


def run(batch: PagedBatch, num_programs: int | None = None) -> torch.Tensor:
    out = batch.poisoned_output()
    if num_programs is None:
        paged.attend(batch.q, batch.requests, batch.pattern, batch.scale, out, max_query_len=1, impl="triton")
    else:
        tables = head_tables(batch.pattern, batch.q.device)
        call = prepare_decode(batch.q, batch.requests, batch.pattern, batch.scale, out, tables, num_programs)
        call(batch.q, batch.window_cache, batch.strided_cache, out, tables)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("num_programs", [1, 5, 40], ids=lambda n: f"programs{n}")
@pytest.mark.parametrize("geometry", GEOMETRIES + MIXED_GEOMETRIES, ids=str)
def test_matches_attention_over_contiguous_keys(
    geometry: Geometry, num_programs: int, dtype: torch.dtype
) -> None:
    batch = build_batch(geometry, scaled(geometry.pattern), dtype=dtype, padding_tokens=3)
    batch.check(run(batch, num_programs))


@pytest.mark.parametrize("position", range(3, 16 * 13, 15))
def test_every_place_of_the_query_in_its_super_block(position: int) -> None:
    pattern = S2Pattern.build(
        4, 1, block_size=16, local_blocks=2, vert_stride=5, head_sliding_step=2, pattern_heads="query"
    )
    batch = build_batch(Geometry(pattern), [(position, 1)], seed=position)
    batch.check(run(batch, 2))


def test_caches_with_any_strides() -> None:
    batch = build_batch(GEOMETRIES[2], REQUESTS, pool="token-major")
    assert batch.window_cache.stride() != batch.strided_cache.stride()
    batch.check(run(batch, 3))


def test_group_larger_than_the_smallest_tile() -> None:
    geometry = Geometry(S2Pattern.build(17, 1, block_size=16, local_blocks=2, vert_stride=2), head_size=32)
    batch = build_batch(geometry, [(130, 1)])
    batch.check(run(batch))


@pytest.mark.parametrize("local_blocks", [7, 2**27, 2**40])
def test_window_over_everything_is_dense_causal_attention(local_blocks: int) -> None:
    pattern = S2Pattern.build(2, 1, block_size=16, local_blocks=local_blocks, vert_stride=4)
    batch = build_batch(Geometry(pattern), [(99, 1)])
    k, v = (x.repeat_interleave(2, dim=1).transpose(0, 1) for x in (batch.k, batch.v))
    dense = torch.nn.functional.scaled_dot_product_attention(batch.q.transpose(0, 1), k, v, scale=batch.scale)
    torch.testing.assert_close(run(batch, 2), dense.transpose(0, 1), atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("requests", [[], [(0, 0)], [(40, 0), (0, 0)]], ids=str)
def test_batch_without_queries(requests: list[tuple[int, int]]) -> None:
    batch = build_batch(SMALL, requests, padding_tokens=5)
    batch.check(run(batch))


@pytest.mark.parametrize("num_programs", range(2, 12))
def test_splits_of_every_length(num_programs: int) -> None:
    """Splits that end inside a KV head, at its end, and, with a tile to spare, inside many in a row."""
    requests = [(0, 1), (203, 1), (0, 0), (16, 1), (77, 1)]
    batch = build_batch(SMALL, requests, padding_tokens=1)
    batch.check(run(batch, num_programs))


def test_more_partial_results_than_are_read_at_once() -> None:
    batch = build_batch(SMALL, [(16 * 4 * 90, 1), (0, 1)])
    num_programs = 5 * MIN_CHUNK
    assert chunk_size(num_programs, 2 * SMALL.pattern.num_kv_heads) < 91 // 2
    batch.check(run(batch, num_programs))


def test_stale_length_of_a_padding_request_combines_nothing() -> None:
    """By its length it would be split; the row at its place is the next request's, which is not."""
    batch = build_batch(SMALL, [(300, 0), (10, 1), (900, 1)])
    batch.check(run(batch, 12))


def test_more_programs_than_tiles_of_keys() -> None:
    batch = build_batch(SMALL, [(20, 1), (70, 1)])
    batch.check(run(batch, 200))


@settings(max_examples=25, deadline=None)
@given(
    contexts=st.lists(st.integers(0, 400), min_size=1, max_size=5),
    queries=st.lists(st.integers(0, 1), min_size=5, max_size=5),
    num_programs=st.integers(1, 30),
)
def test_any_batch_on_any_number_of_programs(
    contexts: list[int], queries: list[int], num_programs: int
) -> None:
    batch = build_batch(GEOMETRIES[2], list(zip(contexts, queries, strict=False)), padding_tokens=1)
    batch.check(run(batch, num_programs))


def test_chunk_holds_all_results_of_equal_contexts() -> None:
    assert chunk_size(264, 512) == MIN_CHUNK
    assert chunk_size(264, 8) == 64
    assert chunk_size(10_000, 1) == MAX_CHUNK


def test_wrong_number_of_programs_is_named() -> None:
    batch = build_batch(SMALL, [(20, 1)])
    with pytest.raises(ValueError, match=r"^num_programs: 0"):
        run(batch, 0)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: captures a CUDA graph")
def test_cuda_graph_replays_with_other_lengths() -> None:
    lengths = [(300, 1), (0, 0), (40, 1)]
    captured = build_batch(SMALL, lengths, dtype=torch.bfloat16)
    requests, out = captured.requests, captured.poisoned_output()

    def decode() -> None:
        paged.attend(captured.q, requests, captured.pattern, captured.scale, out, max_query_len=1)

    decode()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        decode()
    for order in permutations(lengths):
        batch = build_batch(SMALL, list(order), dtype=torch.bfloat16, seed=1)
        for static, new in zip((captured.q, *requests), (batch.q, *batch.requests), strict=True):
            static.copy_(new)
        out.fill_(torch.nan)
        graph.replay()
        batch.check(out)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: a cache of more than 2**31 elements")
def test_pages_past_32_bit_offsets() -> None:
    batch = build_batch(SMALL, [(160, 1)], dtype=torch.bfloat16)
    move_to_far_pages(batch)
    batch.check(run(batch))
