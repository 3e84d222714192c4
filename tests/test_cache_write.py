"""The cache-write kernel against the reference, element for element."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from s2_kernels import paged
from s2_kernels.launch.choice import Impl
from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import cache_write_reference
from tests.paged import (
    DEVICE,
    DTYPE_NAMES,
    DTYPES,
    GEOMETRIES,
    MIXED_GEOMETRIES,
    Geometry,
    PagedBatch,
    PoolKind,
    build_batch,
    make_pools,
    move_to_far_pages,
)

write_cache = partial(paged.write, impl="triton")

REQUESTS = [(0, 75), (37, 1), (0, 0), (230, 70)]
SMALL = Geometry(S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4))


def empty_pools(batch: PagedBatch, kind: PoolKind) -> tuple[torch.Tensor, torch.Tensor]:
    pages, *_, width = batch.window_cache.shape
    layout = TierLayout.of_caches(batch.pattern, batch.window_cache, batch.strided_cache)
    return make_pools(kind, pages, layout, width // 2, batch.key.dtype)


@pytest.mark.parametrize("pool", ["shared", "token-major"])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("geometry", GEOMETRIES + MIXED_GEOMETRIES, ids=str)
def test_matches_the_reference(geometry: Geometry, dtype: torch.dtype, pool: PoolKind) -> None:
    batch = build_batch(geometry, REQUESTS, dtype=dtype, padding_tokens=3)
    new = (batch.key, batch.value)
    slots = (batch.window_slots, batch.strided_slots, batch.pattern)
    assert not batch.key.is_contiguous()
    expected, written = empty_pools(batch, pool), empty_pools(batch, pool)
    cache_write_reference(*new, *expected, *slots)
    write_cache(*new, *written, *slots)
    for actual, wanted in zip(written, expected, strict=True):
        assert wanted.numel() == 0 or not wanted.isnan().all()
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_many_kv_heads() -> None:
    geometry = Geometry(S2Pattern.build(24, 24, block_size=16, local_blocks=2, vert_stride=8), head_size=32)
    batch = build_batch(geometry, [(0, 150)])
    written = empty_pools(batch, "token-major")
    expected = empty_pools(batch, "token-major")
    arguments = (batch.window_slots, batch.strided_slots, batch.pattern)
    cache_write_reference(batch.key, batch.value, *expected, *arguments)
    write_cache(batch.key, batch.value, *written, *arguments)
    for actual, wanted in zip(written, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize(("keys", "slots"), [(9, 5), (5, 9), (0, 4), (4, 0)])
def test_surplus_keys_or_slots_are_ignored(keys: int, slots: int) -> None:
    batch = build_batch(SMALL, [(0, 9)])
    n = min(keys, slots)
    written, expected = empty_pools(batch, "token-major"), empty_pools(batch, "token-major")
    write_cache(
        batch.key[:keys],
        batch.value[:keys],
        *written,
        batch.window_slots[:slots],
        batch.strided_slots[:slots],
        batch.pattern,
    )
    cache_write_reference(
        batch.key[:n],
        batch.value[:n],
        *expected,
        batch.window_slots[:n],
        batch.strided_slots[:n],
        batch.pattern,
    )
    for actual, wanted in zip(written, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def check_what_attention_reads(batch: PagedBatch) -> None:
    """Store the batch's tokens in empty caches, and attend to them there."""
    batch.window_cache.fill_(torch.nan)
    write_cache(
        batch.key,
        batch.value,
        batch.window_cache,
        batch.strided_cache,
        batch.window_slots,
        batch.strided_slots,
        batch.pattern,
    )
    out = batch.poisoned_output()
    paged.attend(batch.q, batch.requests, batch.pattern, batch.scale, out, impl="triton")
    batch.check(out)


@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
def test_a_token_without_a_slot_in_one_tier_is_skipped(impl: Impl) -> None:
    batch = build_batch(SMALL, [(0, 80)])
    window_slots, strided_slots = batch.window_slots.clone(), batch.strided_slots.clone()
    window_slots[3], strided_slots[20] = -1, -1
    written, expected = empty_pools(batch, "token-major"), empty_pools(batch, "token-major")
    paged.write(batch.key, batch.value, *written, window_slots, strided_slots, batch.pattern, impl=impl)
    keep = torch.ones(80, dtype=torch.bool)
    keep[[3, 20]] = False
    new = (x[keep].to(DEVICE) for x in (batch.key, batch.value, batch.window_slots, batch.strided_slots))
    key, value, *slots = new
    cache_write_reference(key, value, *expected, *slots, batch.pattern)
    for actual, wanted in zip(written, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=0, atol=0, equal_nan=True)


def test_what_was_written_is_what_attention_reads() -> None:
    batch = build_batch(GEOMETRIES[2], [(0, 130), (0, 20)], padding_tokens=2)
    check_what_attention_reads(batch)


def test_wrong_arguments_are_named() -> None:
    batch = build_batch(SMALL, [(0, 20)])
    key, value = batch.key, batch.value
    caches = (batch.window_cache, batch.strided_cache)
    window_slots, strided_slots, pattern = batch.window_slots, batch.strided_slots, batch.pattern
    with pytest.raises(ValueError, match=r"^key: shape"):
        write_cache(key[:, :1], value, *caches, window_slots, strided_slots, pattern)
    with pytest.raises(ValueError, match=r"^value: "):
        write_cache(key, value.double(), *caches, window_slots, strided_slots, pattern)
    with pytest.raises(ValueError, match=r"^strided_slots: shape"):
        write_cache(key, value, *caches, window_slots, strided_slots[1:], pattern)
    with pytest.raises(ValueError, match=r"^key: strides"):
        write_cache(key.mT.contiguous().mT, value, *caches, window_slots, strided_slots, pattern)
    with pytest.raises(ValueError, match=r"^window_cache: dtype"):
        write_cache(key.half(), value.half(), *caches, window_slots, strided_slots, pattern)


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a CUDA GPU: a cache of more than 2**31 elements")
def test_pages_past_32_bit_offsets() -> None:
    batch = build_batch(SMALL, [(0, 160)], dtype=torch.bfloat16)
    move_to_far_pages(batch)
    check_what_attention_reads(batch)
