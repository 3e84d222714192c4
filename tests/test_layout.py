"""Where tokens live: slots are distinct, dense, and agree with vLLM's slot mapping arithmetic."""

from __future__ import annotations

import re
from dataclasses import replace
from itertools import product

import pytest
import torch

from s2_kernels.layout import TierLayout, head_tables
from s2_kernels.pattern import S2Pattern

LAYOUTS = [
    TierLayout(S2Pattern.build(2, 2, block_size=4, local_blocks=2, vert_stride=4), 4),
    TierLayout(S2Pattern.build(2, 2, block_size=4, local_blocks=2, vert_stride=3), 12),
    TierLayout(S2Pattern.build(8, 2, block_size=4, head_sliding_offset=1, pattern_heads="query"), 16),
    TierLayout(S2Pattern.build(6, 2, block_size=2, vert_stride=5, pattern_heads="query"), 18),
]


def layout_id(layout: TierLayout) -> str:
    p = layout.pattern
    return f"block{p.block_size}-stride{p.vert_stride}-kept{p.num_kept}-page{layout.page_slots}"


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_kept_tokens_fill_the_strided_pages(layout: TierLayout) -> None:
    num_pages = 3
    every_slot = {(page, slot) for page in range(num_pages) for slot in range(layout.page_slots)}
    for head in range(layout.pattern.num_kv_heads):
        places = [layout.strided_slot(head, p) for p in range(num_pages * layout.strided_page_tokens)]
        kept = [place for place in places if place is not None]
        assert len(kept) == len(set(kept))
        assert set(kept) == every_slot


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_strided_tier_keeps_what_a_query_head_attends_to(layout: TierLayout) -> None:
    pattern = layout.pattern
    now = 10_000
    for head in range(pattern.num_kv_heads):
        query_heads = range(head * pattern.group_size, (head + 1) * pattern.group_size)
        for position in range(2 * layout.strided_page_tokens):
            block = position // pattern.block_size
            needed = any(pattern.attends(h, now, block) for h in query_heads)
            assert (layout.strided_slot(head, position) is not None) == needed


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_strided_slot_follows_from_the_slot_mapping(layout: TierLayout) -> None:
    """vLLM maps position p to page * B + p mod B, B tokens being the span of a page."""
    span = layout.strided_page_tokens
    block_table = torch.randperm(3).tolist()
    for head in range(layout.pattern.num_kv_heads):
        for position in range(3 * span):
            mapped = block_table[position // span] * span + position % span
            page, local_position = divmod(mapped, span)
            place = layout.strided_slot(head, position)
            local_place = layout.strided_slot(head, local_position)
            assert (place is None) == (local_place is None)
            if place is not None and local_place is not None:
                assert (block_table[place[0]], place[1]) == (page, local_place[1])


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_window_pages_hold_consecutive_tokens(layout: TierLayout) -> None:
    span = layout.window_page_tokens
    places = [layout.window_slot(position) for position in range(3 * span)]
    assert places == [(page, slot) for page in range(3) for slot in range(span)]


def test_phi3_small_page() -> None:
    pattern = S2Pattern.build(32, 8, head_sliding_offset=1, pattern_heads="query")
    layout = TierLayout(pattern, 256)
    assert layout.super_blocks_per_page == 1
    assert layout.strided_page_tokens == 512
    # KV head 0 keeps residues 4 to 7: of super-block 2, block 21 has residue 5, the second of them.
    assert layout.strided_slot(0, 21 * 64 + 3) == (2, 64 + 3)
    assert layout.strided_slot(1, 21 * 64 + 3) is None


@pytest.mark.parametrize("layout", LAYOUTS, ids=layout_id)
def test_head_tables_say_what_the_pattern_says(layout: TierLayout) -> None:
    pattern = layout.pattern
    tables = head_tables(pattern, torch.device("cpu"))
    assert tuple(tables.residue.tolist()) == pattern.residues
    assert tuple(tables.rank.tolist()) == pattern.residue_ranks
    assert tables.kept.tolist() == [residue for kept in pattern.kept_residues for residue in kept]
    assert tables.rank_of_residue.shape == (pattern.num_kv_heads, pattern.vert_stride)
    for ranks, kept in zip(tables.rank_of_residue.tolist(), pattern.kept_residues, strict=True):
        assert [residue for residue, rank in enumerate(ranks) if rank >= 0] == list(kept)
        assert [rank for rank in ranks if rank >= 0] == list(range(pattern.num_kept))
    assert tables.by_work.tolist() == list(range(pattern.num_heads))
    assert all(table.dtype == torch.int32 for table in tables)


@pytest.mark.parametrize(
    ("pattern", "residue_slots", "shape", "is_even"),
    [
        (S2Pattern.build(4, 4, vert_stride=8), 64, (4, 64), True),
        (S2Pattern.build(4, 4, vert_stride=8), 192, (4, 192), False),
        (S2Pattern.build(4, 2, vert_stride=8, pattern_heads="query"), 64, (4, 64), False),
        (S2Pattern.build(4, 4, vert_stride=8, sink_blocks=1), 64, (4, 64), False),
        (S2Pattern.build(4, 4, vert_stride=8, full_heads=[1, 3]), 128, (18, 128), False),
        (S2Pattern.build(4, 4, vert_stride=None, full_heads=[2]), 64, (1, 64), False),
        (S2Pattern.build(4, 4, vert_stride=None), 128, (0, 128), False),
    ],
    ids=["plain", "other-pages", "query-heads", "sinks", "full", "streaming", "streaming-alone"],
)
def test_caches_tell_their_layout(
    pattern: S2Pattern, residue_slots: int, shape: tuple[int, int], is_even: bool
) -> None:
    layout = TierLayout(pattern, 64, residue_slots)
    assert layout.strided_shape == shape
    assert layout.is_even == is_even
    window, strided = torch.ones(3, pattern.num_kv_heads, 64, 2), torch.ones(3, *shape, 2)
    found = TierLayout.of_caches(pattern, window, strided)
    assert found == layout
    assert isinstance(found.residue_slots, int)


def test_query_heads_tell_their_even_layout() -> None:
    """Of a KV head two residues share the page, or have rows of their own."""
    pattern = S2Pattern.build(4, 2, vert_stride=8, pattern_heads="query")
    layout = TierLayout(pattern, 128)
    assert (layout.residue_slots, layout.strided_shape, layout.is_even) == (64, (2, 128), True)
    for shape in ((2, 128), (4, 64)):
        assert TierLayout.of_caches(pattern, torch.ones(3, 2, 128, 2), torch.ones(3, *shape, 2)) == layout


MIXED = S2Pattern(4, 2, 3, (2, 2, -1, -1, 1, 1, -1, -1), 4, 1, (1,))
"""One residue of KV head 0, all three of head 1, one of head 2 and none of head 3."""


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS, TierLayout(LAYOUTS[0].pattern, 4, 12), TierLayout(LAYOUTS[2].pattern, 16, 8)],
    ids=layout_id,
)
def test_kept_tokens_fill_the_cache(layout: TierLayout) -> None:
    check_cache_is_filled(layout)


@pytest.mark.parametrize("residue_slots", [4, 8])
def test_kept_tokens_of_heads_of_several_kinds_fill_the_cache(residue_slots: int) -> None:
    layout = TierLayout(MIXED, 4, residue_slots)
    check_cache_is_filled(layout)
    assert layout.strided_index(3, 0) is None
    # Block 5, of super-block 1, is the one of residue 2: of head 0, and the last of three of head 1.
    assert layout.strided_slot(1, 5 * 4 + 3) == ((0, 5 * 4 + 3) if residue_slots == 8 else (1, 2 * 4 + 3))
    assert layout.strided_index(1, 5 * 4 + 3) == ((0, 3, 4 + 3) if residue_slots == 8 else (1, 3, 3))


def check_cache_is_filled(layout: TierLayout) -> None:
    """What is kept of two pages' tokens is at every place of two pages of the cache, once."""
    rows, slots = layout.strided_shape
    places = [
        layout.strided_index(head, position)
        for head in range(layout.pattern.num_kv_heads)
        for position in range(2 * layout.strided_page_tokens)
    ]
    kept = [place for place in places if place is not None]
    assert len(kept) == len(set(kept))
    assert set(kept) == set(product(range(2), range(rows), range(slots)))


def test_head_tables_of_heads_of_several_kinds() -> None:
    tables = head_tables(MIXED, torch.device("cpu"))
    assert tables.residue.tolist() == [2, 2, -1, -1, 1, 1, -1, -1]
    assert tables.rank.tolist() == [0, 0, -2, -2, 0, 0, -1, -1]
    assert tables.kept.tolist() == [2, 0, 1, 2, 1]
    assert tables.first_kept.tolist() == [0, 1, 4, 5, 5]
    assert tables.rank_of_residue.tolist() == [[-1, -1, 0], [0, 1, 2], [-1, 0, -1], [-1, -1, -1]]


@pytest.mark.parametrize(
    ("slots", "message"),
    [
        ((64,), "pattern: sink_blocks: 1, expected a strided set of every head and no more"),
        ((0, 64), "page_slots: 0, expected a positive integer"),
        ((64, -64), "residue_slots: -64, expected a multiple of block_size (64)"),
        ((64, 96), "residue_slots: 96, expected a multiple of block_size (64)"),
    ],
    ids=["none", "no-page", "negative", "no-blocks"],
)
def test_slots_of_heads_of_several_kinds(slots: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^{re.escape(message)}$"):
        TierLayout(S2Pattern.build(2, 2, sink_blocks=1), *slots)


@pytest.mark.parametrize("page_slots", [0, -64, 64, 200])
def test_a_page_holds_whole_super_blocks(page_slots: int) -> None:
    pattern = S2Pattern.build(32, 8, head_sliding_offset=1, pattern_heads="query")
    message = rf"page_slots: {page_slots}, expected a multiple of 256 \(4 kept residues x block_size 64\)"
    with pytest.raises(ValueError, match=message):
        TierLayout(pattern, page_slots)


def test_the_smallest_page() -> None:
    layout = TierLayout(S2Pattern.build(2, 2, block_size=1, local_blocks=1, vert_stride=2), 1)
    assert layout.strided_page_tokens == 2
    # Of two tokens each head keeps one: head 0 those at even positions, head 1 the others.
    assert [layout.strided_slot(0, position) for position in range(4)] == [(0, 0), None, (1, 0), None]
    assert [layout.strided_slot(1, position) for position in range(4)] == [None, (0, 0), None, (1, 0)]


def test_head_tables_of_a_pattern_written_out() -> None:
    pattern = S2Pattern(16, 2, 5, (3, 1, 4, 3), num_kv_heads=2)
    tables = head_tables(pattern, torch.device("cpu"))
    assert tables.residue.tolist() == [3, 1, 4, 3]
    assert tables.rank.tolist() == [1, 0, 1, 0]
    assert tables.kept.tolist() == [1, 3, 3, 4]
    assert tables.first_kept.tolist() == [0, 2, 4]
    assert tables.rank_of_residue.tolist() == [[-1, 0, -1, 1, -1], [-1, -1, -1, 0, 1]]


def test_query_heads_are_sorted_by_their_work() -> None:
    pattern = S2Pattern.build(10, 5, vert_stride=4, head_sliding_step=1, full_heads=[1])
    pattern = replace(pattern, residues=(*pattern.residues[:6], -1, -1, *pattern.residues[8:]))
    tables = head_tables(pattern, torch.device("cpu"))
    assert tables.rank.tolist() == [0, 0, -2, -2, 0, 0, -1, -1, 0, 0]
    assert tables.first_kept.tolist() == [0, 1, 5, 6, 6, 7]
    assert tables.by_work.tolist() == [6, 7, 0, 1, 4, 5, 8, 9, 2, 3]


def test_head_tables_are_on_the_device_that_was_asked_for() -> None:
    with torch.device("meta"):
        tables = head_tables(S2Pattern(16, 2, 7, (6, 2), num_kv_heads=1), torch.device("cpu"))
    assert {table.device.type for table in tables} == {"cpu"}


def test_query_heads_of_one_kv_head_with_and_without_a_strided_set() -> None:
    pattern = S2Pattern(16, 1, 2, (1, -1, -1, -1), 2, 1, (1,))
    with pytest.raises(ValueError, match=r"^residues: \(1, -1\) of KV head 0, expected one of each"):
        TierLayout(pattern, 16, 16)
