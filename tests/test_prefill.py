"""Paged prefill against S2-Attention over contiguous keys and values."""

from __future__ import annotations

import pytest
import torch

from s2_kernels import paged
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

IMPL = None if DEVICE == "cuda" else "triton"
# (context, queries) of each request, for blocks of 16 tokens; longer blocks get lengths in proportion.
BATCHES = {
    "prompts": [(0, 77), (0, 1), (0, 130)],
    "chunks": [(170, 70), (37, 25), (96, 16)],
    "mixed": [(0, 33), (150, 1), (0, 0), (331, 20), (500, 0)],
}
SMALL = Geometry(S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4))


def scaled(batch: str, pattern: S2Pattern) -> list[tuple[int, int]]:
    factor = pattern.block_size // 16
    return [(context * factor, queries * factor) for context, queries in BATCHES[batch]]


def run(batch: PagedBatch) -> torch.Tensor:
    out = batch.poisoned_output()
    paged.attend(batch.q, batch.requests, batch.pattern, batch.scale, out, impl=IMPL)
    return out


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("geometry", GEOMETRIES + MIXED_GEOMETRIES, ids=str)
def test_matches_attention_over_contiguous_keys(
    geometry: Geometry, requests: str, dtype: torch.dtype
) -> None:
    batch = build_batch(geometry, scaled(requests, geometry.pattern), dtype=dtype, padding_tokens=3)
    batch.check(run(batch))


def test_caches_with_any_strides() -> None:
    batch = build_batch(GEOMETRIES[2], BATCHES["mixed"], pool="token-major")
    assert batch.window_cache.stride() != batch.strided_cache.stride()
    batch.check(run(batch))


@pytest.mark.parametrize("local_blocks", [6, 100, 2**27, 2**40])
def test_window_over_everything_is_dense_causal_attention(local_blocks: int) -> None:
    length = 6 * 16 - 5
    pattern = S2Pattern.build(2, 1, block_size=16, local_blocks=local_blocks, vert_stride=4)
    batch = build_batch(Geometry(pattern), [(0, length)])
    k, v = (x.repeat_interleave(2, dim=1).transpose(0, 1) for x in (batch.k, batch.v))
    dense = torch.nn.functional.scaled_dot_product_attention(
        batch.q.transpose(0, 1), k, v, is_causal=True, scale=batch.scale
    )
    torch.testing.assert_close(run(batch), dense.transpose(0, 1), atol=2e-5, rtol=2e-5)


def test_chunks_equal_the_whole_prompt() -> None:
    whole = build_batch(SMALL, [(0, 150)])
    out = run(whole)
    for start, end in ((0, 41), (41, 112), (112, 150)):
        chunk = build_batch(SMALL, [(0, 150)])
        chunk.q, chunk.query_start_loc, chunk.seq_lens = whole.q[start:end], [0, end - start], [end]
        torch.testing.assert_close(run(chunk), out[start:end], atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("requests", [[], [(0, 0)], [(40, 0), (0, 0)]], ids=str)
def test_batch_without_queries(requests: list[tuple[int, int]]) -> None:
    batch = build_batch(SMALL, requests, padding_tokens=5)
    batch.check(run(batch))


def test_wrong_arguments_are_named() -> None:
    batch = build_batch(SMALL, [(0, 20)])
    q, requests, pattern, scale = batch.q, batch.requests, batch.pattern, batch.scale
    window, strided = requests.window_cache, requests.strided_cache
    out = batch.poisoned_output()
    tiny = S2Pattern.build(2, 2, block_size=8, local_blocks=2, vert_stride=4)
    with pytest.raises(ValueError, match=r"^q: shape"):
        paged.attend(q[:, :1], requests, pattern, scale, out)
    with pytest.raises(ValueError, match=r"^out: "):
        paged.attend(q, requests, pattern, scale, out[:3])
    with pytest.raises(ValueError, match=r"^scale: 0"):
        paged.attend(q, requests, pattern, 0.0, out)
    with pytest.raises(ValueError, match=r"^block_size: 8, expected at least 16"):
        paged.attend(q, requests, tiny, scale, out, impl="triton")
    for wrong, message in (
        ({"window_cache": window.half()}, r"^window_cache: dtype"),
        ({"strided_cache": strided[..., :-1]}, r"^strided_cache: shape"),
        ({"strided_cache": strided[:, :, :8]}, r"^strided_cache: 8 slots"),
        ({"strided_table": requests.strided_table[:0]}, r"^strided_table: 0 rows"),
        ({"query_start_loc": requests.seq_lens}, r"^query_start_loc: shape"),
        ({"seq_lens": requests.seq_lens.long()}, r"^seq_lens: torch.int64 \(1,\), expected torch.int32"),
        ({"seq_lens": requests.seq_lens[0]}, r"^seq_lens: torch.int32 \(\), .* 1 dimensions"),
        (
            {"query_start_loc": requests.query_start_loc.repeat_interleave(2)[::2]},
            r"^query_start_loc: strides",
        ),
        ({"window_table": requests.window_table.long()}, r"^window_table: torch.int64"),
    ):
        with pytest.raises(ValueError, match=message):
            paged.attend(q, requests._replace(**wrong), pattern, scale, out, impl=IMPL)


def test_every_request_of_many_has_its_tile() -> None:
    batch = build_batch(SMALL, [(n, 1) for n in range(40)])
    batch.check(run(batch))


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: a cache of more than 2**31 elements")
def test_pages_past_32_bit_offsets() -> None:
    batch = build_batch(SMALL, [(100, 60)], dtype=torch.bfloat16)
    move_to_far_pages(batch)
    batch.check(run(batch))
