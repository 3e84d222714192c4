"""Layers that need different numbers of rows in entries that have equally many."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from s2_vllm.packing import Packing, Place, share_evenly, share_tightly


@st.composite
def packings(draw: st.DrawFn) -> Packing:
    ranks, rows = draw(st.integers(1, 3)), draw(st.integers(1, 20))
    of_ranks = st.tuples(*[st.integers(0, rows)] * ranks)
    sizes = tuple(draw(st.lists(of_ranks, min_size=1, max_size=40)))
    return Packing(rows, 64, sizes, share_tightly(sizes, rows))


@given(packing=packings())
def test_no_row_is_two_layers(packing: Packing) -> None:
    for rank in range(len(packing.sizes[0])):
        used = set()
        for index, size in enumerate(packing.sizes):
            place = packing.place(index, rank)
            assert (place is None) == (not any(size))
            if place is not None:
                rows = {(place.leader, place.first + row) for row in range(size[rank])}
                assert not rows & used
                assert all(row < packing.rows for _, row in rows)
                used |= rows
        assert len(used) == packing.used_rows[rank]


@given(packing=packings())
def test_the_first_layer_of_an_entry_leads(packing: Packing) -> None:
    """It is made before the others."""
    for index, leader in enumerate(packing.leaders):
        if leader is not None:
            assert leader <= index
            assert packing.leaders[leader] == leader
    assert packing.num_entries == len({leader for leader in packing.leaders if leader is not None})
    assert packing.num_layers == sum(leader is not None for leader in packing.leaders)


@given(packing=packings())
def test_entries_are_few(packing: Packing) -> None:
    """On one rank no two are half empty, and so there are fewer than twice as many as needed."""
    if len(packing.sizes[0]) == 1:
        assert packing.num_entries <= max(1, 2 * math.ceil(packing.used_rows[0] / packing.rows) - 1)


def test_the_largest_first_each_where_it_fits_best() -> None:
    """5 and 3, 4 and 4: in the order of the layers 3 and 4 would leave no room for 5."""
    assert share_tightly(((3,), (4,), (5,), (4,), (0,)), 8) == (0, 1, 0, 1, None)


def test_the_fullest_entry_that_has_room() -> None:
    """Those of 6 and of 7 both have room for 2 of 9."""
    assert share_tightly(((6,), (7,), (2,)), 9) == (0, 1, 1)


def test_a_fuller_entry_that_was_begun_later() -> None:
    """7, and 5 with 4: of 10, they leave 3 and 1."""
    assert share_tightly(((7,), (5,), (4,), (1,)), 10) == (0, 1, 1, 1)


def test_one_layer() -> None:
    packing = Packing(4, 64, ((3, 2),), (0,))
    assert (packing.used_rows, packing.fullest_rows, packing.num_entries) == ([3, 2], 3, 1)


def test_ranks_make_up_for_each_other() -> None:
    packing = Packing(4, 64, ((3, 1), (1, 3)), share_tightly(((3, 1), (1, 3)), 4))
    assert packing.leaders == (0, 0)
    assert [packing.place(1, rank) for rank in range(2)] == [Place(0, 3), Place(0, 1)]
    assert (packing.used_rows, packing.fullest_rows) == ([4, 4], 4)


def test_rows_of_the_fullest_rank() -> None:
    packing = Packing(4, 64, ((3, 1), (2, 4), (0, 0)), (0, 1, None))
    assert packing.fullest_rows == 3 + 4


def test_a_layer_that_no_entry_has_room_for() -> None:
    with pytest.raises(AssertionError, match="layer 1 needs"):
        share_tightly(((3,), (5,)), 4)


def test_consecutive_layers_share_evenly() -> None:
    assert share_evenly(5, 2) == (0, 0, 2, 2, 4)
