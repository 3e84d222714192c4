"""Random batches on the two-tier paged KV cache, hostile wherever a kernel must not look.

Requests are (context, queries) lengths. Pages are spread at random over the pools. What was never
written is NaN, and so is the page that stands in for any block-table entry that no query of the request
may follow: evicted window pages, strided pages still inside the window, entries past the sequence.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import Literal

import torch

from s2_kernels.layout import TierLayout
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import attention_reference, cache_write_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton's interpreter multiplies bfloat16 wrongly.
DTYPES = [torch.float32, torch.float16] + ([torch.bfloat16] if DEVICE == "cuda" else [])
DTYPE_NAMES = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
TOLERANCES = {torch.float32: 2e-5, torch.float16: 2e-3, torch.bfloat16: 1.6e-2}

PoolKind = Literal["shared", "token-major"]
POISON_PAGE = 0


@dataclass(frozen=True)
class Geometry:
    """A pattern and the shape of its caches; page_slots None is the fewest slots.

    Heads of several kinds have `residue_slots` of their own, one block by default; so may other heads, whose
    pages then differ between the tiers.
    """

    pattern: S2Pattern
    head_size: int = 64
    page_slots: int | None = None
    residue_slots: int = 0

    @property
    def layout(self) -> TierLayout:
        p = self.pattern
        if p.kinds is None and not self.residue_slots:
            return TierLayout(p, self.page_slots or p.num_kept * p.block_size)
        return TierLayout(p, self.page_slots or p.block_size, self.residue_slots or p.block_size)

    def __str__(self) -> str:
        p = self.pattern
        kept = ",".join(str(len(kept)) for kept in p.kept_residues) if p.kinds else p.num_kept
        sinks = f"-sinks{p.sink_blocks}" if p.sink_blocks else ""
        return (
            f"heads{p.num_heads}of{p.num_kv_heads}x{self.head_size}-block{p.block_size}-local{p.local_blocks}"
            f"-stride{p.vert_stride}-kept{kept}{sinks}-page{self.layout.page_slots}"
            + (f"-residue{self.residue_slots}" if self.residue_slots else "")
        )


_build = S2Pattern.build
GEOMETRIES = [
    Geometry(_build(2, 2, block_size=16, local_blocks=2, vert_stride=4)),
    Geometry(_build(3, 1, block_size=16, local_blocks=1, vert_stride=3), 80, 48),
    Geometry(
        _build(
            4, 1, block_size=16, local_blocks=3, vert_stride=8, head_sliding_offset=1, pattern_heads="query"
        ),
        page_slots=192,
    ),
    Geometry(_build(2, 1, block_size=32, local_blocks=2, vert_stride=2, homo_head=True), 96, 64),
]
if DEVICE == "cuda":
    GEOMETRIES += [
        Geometry(_build(8, 2, local_blocks=4), 128),
        Geometry(_build(8, 2, local_blocks=4, head_sliding_offset=1, pattern_heads="query"), 128),
        Geometry(_build(3, 3, local_blocks=1, vert_stride=5), 64, 192),
        Geometry(_build(2, 2, block_size=128, local_blocks=2, vert_stride=3), 256, 384),
    ]

MIXED_GEOMETRIES = [
    Geometry(_build(6, 3, block_size=16, local_blocks=2, vert_stride=None, full_heads=[1], sink_blocks=1)),
    Geometry(
        _build(4, 4, block_size=16, local_blocks=3, vert_stride=None, full_heads=[0, 3], sink_blocks=2),
        96,
        32,
        64,
    ),
    Geometry(_build(3, 3, block_size=16, local_blocks=1, vert_stride=None, sink_blocks=1), 32),
    Geometry(_build(8, 4, block_size=16, local_blocks=2, vert_stride=4, full_heads=[2, 3]), 64, 48, 32),
    Geometry(
        _build(
            8,
            2,
            block_size=16,
            local_blocks=2,
            vert_stride=5,
            head_sliding_offset=1,
            full_heads=[0],
            sink_blocks=3,
            pattern_heads="query",
        ),
        32,
    ),
    Geometry(_build(2, 2, block_size=32, local_blocks=3, vert_stride=3, sink_blocks=2), 16, 96, 64),
    Geometry(_build(3, 3, block_size=16, local_blocks=2, vert_stride=4), 32, 16, 48),
    Geometry(
        _build(
            4, 2, block_size=16, local_blocks=1, vert_stride=5, head_sliding_offset=1, pattern_heads="query"
        ),
        32,
        64,
        16,
    ),
]
"""Full, streaming and strided heads, and sinks; the last two have plain heads that share pages with such."""


def _with_blocks_of_64(geometry: Geometry, head_size: int) -> Geometry:
    scale = 64 // geometry.pattern.block_size
    pattern, layout = replace(geometry.pattern, block_size=64), geometry.layout
    return Geometry(pattern, head_size, scale * layout.page_slots, scale * layout.residue_slots)


LONG_MIXED_GEOMETRIES = [_with_blocks_of_64(x, (64, 128)[n % 2]) for n, x in enumerate(MIXED_GEOMETRIES)]
"""The same in blocks that Hopper's kernel takes."""
if DEVICE == "cuda":
    MIXED_GEOMETRIES += LONG_MIXED_GEOMETRIES


@dataclass
class PagedBatch:
    """A batch as the kernels get it, and what it was made of.

    Attributes:
        q: [tokens, num_heads, head_size]; rows after the requests' queries are padding.
        key, value: [tokens, num_kv_heads, head_size] of the same tokens; views, like q, of fused rows.
        k, v: [keys, num_kv_heads, head_size], every request's context and new tokens, packed.
        window_cache, strided_cache: the tiers, holding what is still needed of k and v.
        window_table, strided_table: int32 [requests, pages].
        window_slots, strided_slots: int64 [tokens], of the new tokens; -1 for padding.
        query_start_loc, key_start_loc: where each request's queries and keys start, and the totals.
        seq_lens: context and queries of each request.
    """

    pattern: S2Pattern
    scale: float
    q: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor
    window_cache: torch.Tensor
    strided_cache: torch.Tensor
    window_table: torch.Tensor
    strided_table: torch.Tensor
    window_slots: torch.Tensor
    strided_slots: torch.Tensor
    query_start_loc: list[int]
    key_start_loc: list[int]
    seq_lens: list[int]

    @property
    def requests(self) -> PagedRequests:
        return PagedRequests(
            self.window_cache,
            self.strided_cache,
            self.window_table,
            self.strided_table,
            torch.tensor(self.query_start_loc, dtype=torch.int32, device=DEVICE),
            torch.tensor(self.seq_lens, dtype=torch.int32, device=DEVICE),
        )

    def poisoned_output(self) -> torch.Tensor:
        """NaN of q's shape, with a gap between the rows."""
        tokens, heads, head_size = self.q.shape
        return self.q.new_full((tokens, heads + 1, head_size), torch.nan)[:, :heads]

    def check(self, out: torch.Tensor) -> None:
        """Compare with attention over the contiguous keys; rows of padding must still be poisoned."""
        queries = self.query_start_loc[-1]
        expected = attention_reference(
            self.q[:queries],
            self.k,
            self.v,
            self.pattern,
            self.scale,
            self.query_start_loc,
            self.key_start_loc,
        )
        tolerance = TOLERANCES[out.dtype]
        torch.testing.assert_close(out[:queries], expected, atol=tolerance, rtol=tolerance)
        assert out[queries:].isnan().all(), "rows of padding tokens were written"


def build_batch(
    geometry: Geometry,
    requests: list[tuple[int, int]],
    *,
    dtype: torch.dtype = torch.float32,
    pool: PoolKind = "shared",
    padding_tokens: int = 0,
    seed: int = 0,
) -> PagedBatch:
    """A random batch whose caches hold all keys, the new tokens' included.

    Args:
        geometry: of the heads and the caches.
        requests: (context, queries) of each. One without queries is a padding request: it may have a
            stale context length, and owns no page.
        dtype: of everything.
        pool: see `make_pools`.
        padding_tokens: rows of q after the requests' own.
        seed: of all random numbers.
    """
    pattern, head_size = geometry.pattern, geometry.head_size
    layout = geometry.layout
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(DEVICE, dtype)

    heads, kv_heads = pattern.num_heads, pattern.num_kv_heads
    key_lens = [context + queries if queries else 0 for context, queries in requests]
    query_start_loc = _starts([queries for _, queries in requests])
    key_start_loc = _starts(key_lens)

    fused = randn(query_start_loc[-1] + padding_tokens, heads + 2 * kv_heads, head_size)
    q, key, value = fused.split([heads, kv_heads, kv_heads], dim=1)
    k, v = randn(2, key_start_loc[-1], kv_heads, head_size)
    for n, (_, queries) in enumerate(requests):
        new_keys = slice(key_start_loc[n + 1] - queries, key_start_loc[n + 1])
        new_tokens = slice(query_start_loc[n], query_start_loc[n + 1])
        k[new_keys], v[new_keys] = key[new_tokens], value[new_tokens]

    page_tokens = (layout.window_page_tokens, layout.strided_page_tokens)
    window_table, strided_table, num_pages = _page_tables(key_lens, page_tokens, generator)
    window_cache, strided_cache = make_pools(pool, num_pages, layout, head_size, dtype)
    new_slots = []
    for n, (context, _) in enumerate(requests):
        if not key_lens[n]:
            continue
        positions = torch.arange(key_lens[n])
        slots = [
            table[n, positions // tokens] * tokens + positions % tokens
            for table, tokens in zip((window_table, strided_table), page_tokens, strict=True)
        ]
        rows = slice(key_start_loc[n], key_start_loc[n + 1])
        cache_write_reference(k[rows], v[rows], window_cache, strided_cache, *slots, pattern)
        new_slots.append(torch.stack(slots)[:, context:])
        _poison_unattended(window_table[n], strided_table[n], context, key_lens[n], layout)
    new_slots.append(torch.full((2, padding_tokens), -1))
    window_slots, strided_slots = torch.cat(new_slots, dim=1).to(DEVICE, torch.int64)
    return PagedBatch(
        pattern=pattern,
        scale=head_size**-0.5,
        q=q,
        key=key,
        value=value,
        k=k,
        v=v,
        window_cache=window_cache,
        strided_cache=strided_cache,
        window_table=window_table.to(DEVICE, torch.int32),
        strided_table=strided_table.to(DEVICE, torch.int32),
        window_slots=window_slots,
        strided_slots=strided_slots,
        query_start_loc=query_start_loc,
        key_start_loc=key_start_loc,
        seq_lens=[context + queries for context, queries in requests],
    )


def make_pools(
    kind: PoolKind, num_pages: int, layout: TierLayout, head_size: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Two tiers full of NaN: [num_pages, heads, slots, 2 * head_size] each.

    "shared": the same memory twice, as the pages of a serving engine are. "token-major": a pool each,
    one with the slots outside the heads, the other with a gap after every slot.
    """
    heads, slots = layout.pattern.num_kv_heads, layout.page_slots
    strided_heads, strided_slots = layout.strided_shape

    def nan(*shape: int) -> torch.Tensor:
        return torch.full(shape, torch.nan, dtype=dtype, device=DEVICE)

    if kind == "shared":
        page = max(heads * slots, strided_heads * strided_slots)
        pool = nan(num_pages, page, 2 * head_size)
        window = pool[:, : heads * slots].unflatten(1, (heads, slots))
        return window, pool[:, : strided_heads * strided_slots].view(
            num_pages, strided_heads, strided_slots, 2 * head_size
        )
    window = nan(num_pages, slots, heads, 2 * head_size).transpose(1, 2)
    strided = nan(num_pages, strided_heads, strided_slots, 2 * head_size + 8)[..., : 2 * head_size]
    return window, strided


def move_to_far_pages(batch: PagedBatch) -> None:
    """Move the pages of a batch on a shared pool past 2**31 elements: more than 4 GiB at two bytes each."""
    pool = batch.window_cache
    assert pool.data_ptr() == batch.strided_cache.data_ptr()
    assert pool.shape == batch.strided_cache.shape
    far = 2**31 // pool[0].numel() + 1
    moved = pool.new_empty(far + len(pool), *pool.shape[1:])
    moved[far:] = pool
    layout = TierLayout(batch.pattern, pool.shape[2])
    batch.window_cache = batch.strided_cache = moved
    batch.window_table, batch.strided_table = batch.window_table + far, batch.strided_table + far
    batch.window_slots = batch.window_slots + far * layout.window_page_tokens
    batch.strided_slots = batch.strided_slots + far * layout.strided_page_tokens


def _starts(lengths: list[int]) -> list[int]:
    return [0, *accumulate(lengths)]


def _page_tables(
    key_lens: list[int], page_tokens: tuple[int, int], generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor, int]:
    """Both tiers' block tables, of random pages that no two entries share, and the number of pages."""
    counts = [[-(-length // tokens) for length in key_lens] for tokens in page_tokens]
    num_pages = 1 + sum(map(sum, counts))
    free = 1 + torch.randperm(num_pages - 1, generator=generator)
    tables = []
    for tier in counts:
        table = torch.full((len(key_lens), max(tier, default=0) + 2), POISON_PAGE)
        for row, count in zip(table, tier, strict=True):
            row[:count], free = free[:count], free[count:]
        tables.append(table)
    return tables[0], tables[1], num_pages


def _poison_unattended(
    window_row: torch.Tensor, strided_row: torch.Tensor, context: int, length: int, layout: TierLayout
) -> None:
    """Point the entries that no query at positions context ... length - 1 may follow to the poison page."""
    pattern = layout.pattern
    b = pattern.block_size
    queries = range(context // b, (length - 1) // b + 1)
    for page in range(len(window_row)):
        blocks = range(page * layout.window_page_tokens // b, -(-(page + 1) * layout.window_page_tokens // b))
        if not any(_is_in_window_tier(pattern, queries, block) for block in blocks):
            window_row[page] = POISON_PAGE
    page_blocks = layout.super_blocks_per_page * pattern.vert_stride
    for page in range(len(strided_row)):
        blocks = range(page * page_blocks, (page + 1) * page_blocks)
        if not any(_is_in_strided_tier(pattern, queries, block) for block in blocks):
            strided_row[page] = POISON_PAGE


def _is_in_window_tier(pattern: S2Pattern, queries: range, block: int) -> bool:
    """Whether a query block reads `block` from the window tier."""
    newest = block < pattern.sink_blocks or block > queries[0] - pattern.local_blocks
    return newest and block <= queries[-1]


def _is_in_strided_tier(pattern: S2Pattern, queries: range, block: int) -> bool:
    """Whether a query block reads `block` from the strided tier."""
    is_older = pattern.sink_blocks <= block <= queries[-1] - pattern.local_blocks
    return is_older and any(block % pattern.vert_stride in kept for kept in pattern.kept_residues)
