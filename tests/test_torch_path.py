"""The PyTorch path against the specification, on pages that hold NaN wherever nothing was written."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from s2_kernels import paged
from s2_kernels.paged import torch_path
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import cache_write_reference
from tests.paged import MIXED_GEOMETRIES, POISON_PAGE, Geometry, PoolKind, build_batch

DTYPES = [torch.float32, torch.float16, torch.bfloat16]
_build = S2Pattern.build
GEOMETRIES = [
    Geometry(_build(2, 2, block_size=16, local_blocks=2, vert_stride=4), 64),
    Geometry(_build(6, 2, block_size=8, local_blocks=1, vert_stride=3, homo_head=True), 5, 24),
    Geometry(_build(8, 2, block_size=4, head_sliding_offset=1, local_blocks=3, pattern_heads="query"), 24),
    Geometry(_build(4, 1, block_size=4, local_blocks=2, vert_stride=7, pattern_heads="query"), 33, 48),
    # The two KV heads' query heads share residues unevenly: three of one, one of the other.
    Geometry(S2Pattern(8, 2, 4, (1, 1, 3, 1, 0, 2, 2, 2), 2), 16, 32),
    # No head keeps residue 0, and local blocks cover less than the stride.
    Geometry(S2Pattern(4, 1, 6, (4, 5), 2), 7, 12),
    Geometry(_build(2, 1, block_size=1, local_blocks=3, vert_stride=1), 8, 5),
]
GEOMETRIES += MIXED_GEOMETRIES
BATCHES = {
    "prompts": [(0, 77), (0, 1), (0, 201)],
    "chunks": [(100, 70), (37, 45), (96, 16)],
    "decode": [(0, 1), (130, 1), (47, 1), (48, 1), (255, 1)],
    "mixed": [(0, 33), (150, 1), (0, 0), (131, 40), (500, 0)],
}


def run_and_check(geometry: Geometry, requests: str, dtype: torch.dtype, pool: PoolKind = "shared") -> None:
    batch = build_batch(geometry, BATCHES[requests], dtype=dtype, padding_tokens=3, pool=pool)
    out = batch.poisoned_output()
    paged.attend(batch.q, batch.requests, batch.pattern, batch.scale, out, impl="torch")
    batch.check(out)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_matches_attention_over_contiguous_keys(
    geometry: Geometry, requests: str, dtype: torch.dtype
) -> None:
    run_and_check(geometry, requests, dtype)


@pytest.mark.parametrize("geometry", GEOMETRIES[:3], ids=str)
def test_caches_may_have_any_strides(geometry: Geometry) -> None:
    run_and_check(geometry, "mixed", torch.float16, "token-major")


@pytest.mark.parametrize("rows", [1, 7])
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_tiles_of_any_size(geometry: Geometry, rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Few queries at a time, and few pages at a time, as long contexts have it."""
    monkeypatch.setattr(torch_path, "_MAX_QUERY_ROWS", rows)
    monkeypatch.setattr(torch_path, "_GATHER_BYTES", 1)
    run_and_check(geometry, "mixed", torch.float32)


def test_memory_for_logits_bounds_the_queries_of_a_tile() -> None:
    pattern = S2Pattern.build(32, 8)
    short, long, longest = (torch_path._query_rows(pattern, n) for n in (1_000, 100_000, 100_000_000))
    assert short > long > longest == 1


@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_follows_no_stale_entry(geometry: Geometry, requests: str) -> None:
    """Entries outside the queries' sets name pages that do not exist: reading one is an error."""
    batch = build_batch(geometry, BATCHES[requests])
    assert (batch.window_table == POISON_PAGE).any()
    for table in (batch.window_table, batch.strided_table):
        table[table == POISON_PAGE] = 1 << 30
    out = batch.poisoned_output()
    paged.attend(batch.q, batch.requests, batch.pattern, batch.scale, out, impl="torch")
    batch.check(out)


def test_accumulates_double_precision_in_double_precision() -> None:
    """Attention to values shifted by a constant is shifted by it, unless the digits were rounded away."""
    batch = build_batch(GEOMETRIES[0], BATCHES["chunks"], dtype=torch.float64)
    requests = batch.requests
    shifted_requests = requests._replace(
        window_cache=requests.window_cache.clone(), strided_cache=requests.strided_cache.clone()
    )
    for cache in shifted_requests[:2]:
        cache[..., batch.q.shape[-1] :] += 1e9
    out, shifted = batch.poisoned_output(), batch.poisoned_output()
    paged.attend(batch.q, requests, batch.pattern, batch.scale, out, impl="torch")
    paged.attend(batch.q, shifted_requests, batch.pattern, batch.scale, shifted, impl="torch")
    torch.testing.assert_close(shifted - 1e9, out, atol=1e-5, rtol=0)


@pytest.mark.parametrize("pool", ["shared", "token-major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("geometry", GEOMETRIES, ids=str)
def test_writes_what_the_reference_writes(geometry: Geometry, dtype: torch.dtype, pool: PoolKind) -> None:
    batch = build_batch(geometry, BATCHES["mixed"], dtype=dtype, padding_tokens=3, pool=pool)
    written = []
    for write in (partial(paged.write, impl="torch"), cache_write_reference):
        caches = [torch.full_like(cache, torch.nan) for cache in (batch.window_cache, batch.strided_cache)]
        write(batch.key, batch.value, *caches, batch.window_slots, batch.strided_slots, batch.pattern)
        written.append(caches)
    for ours, reference in zip(*written, strict=True):
        assert reference.numel() == 0 or not reference.isnan().all()
        torch.testing.assert_close(ours, reference, rtol=0, atol=0, equal_nan=True)
