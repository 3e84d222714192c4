"""The Hopper kernels' order of work, run as plain Python: every row meets each key of its set once.

The functions of `s2_kernels.hopper.schedule` are compiled for a GPU, but what they compute is integer
arithmetic; here it runs on Python's own integers.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2_kernels.hopper import schedule
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import first_tile
from tests.gluon_emulator import EmulatedKernel, Pointer

UNIT, TILE_M = schedule.UNIT.value, schedule.TILE_M.value
NO_UNIT = schedule.NO_UNIT.value


# Scalars stay Python's own integers: the functions are called thousands of times.
INTEGERS = SimpleNamespace(
    where=lambda condition, yes, no: yes if condition else no,
    maximum=max,
    load=lambda pointer: pointer.memory[pointer.offset],
)
locate_tile, order_units, unit_at = (
    EmulatedKernel(function, (schedule,)).function(INTEGERS)
    for function in (schedule.locate_tile, schedule.order_units, schedule.unit_at)
)


def items_of_program(program: int, programs: int, num_items: int) -> list[int]:
    """The work items that a program takes, one after the other."""
    grid = {"program_id": lambda axis: program, "num_programs": lambda axis: programs}
    language = SimpleNamespace(**vars(INTEGERS), **grid)
    num_waves, item_of_wave = (
        EmulatedKernel(function, (schedule,)).function(language)
        for function in (schedule.num_waves, schedule.item_of_wave)
    )
    return [item_of_wave(wave, num_items) for wave in range(num_waves(num_items))]


@settings(max_examples=400, deadline=None)
@given(
    first_position=st.integers(0, 40 * UNIT),
    rows=st.integers(1, TILE_M),
    local_blocks=st.integers(1, 20),
    vert_stride=st.integers(2, 9),
    residue=st.integers(0, 8),
    half_start=st.booleans(),
)
@example(first_position=20 * UNIT, rows=TILE_M, local_blocks=4, vert_stride=3, residue=1, half_start=True)
@example(first_position=21 * UNIT, rows=TILE_M, local_blocks=1, vert_stride=2, residue=0, half_start=True)
@example(first_position=0, rows=1, local_blocks=16, vert_stride=8, residue=0, half_start=True)
@example(first_position=0, rows=1, local_blocks=16, vert_stride=8, residue=0, half_start=False)
def test_every_row_meets_each_block_of_its_set_once(
    first_position: int, rows: int, local_blocks: int, vert_stride: int, residue: int, half_start: bool
) -> None:
    residue %= vert_stride
    last_position = first_position + rows - 1
    num_units, masked_end, order = order_units(
        first_position, last_position, residue, local_blocks, vert_stride, half_start
    )
    assert num_units % 2 == 0
    assert num_units >= (4 if half_start else 2)
    units = [unit_at(n, order, half_start) for n in range(num_units)]
    for row in range(TILE_M):
        position = min(first_position + row, last_position)
        query_block = position // UNIT
        window_start = (query_block - local_blocks + 1) * UNIT
        met = []
        for n, (is_window, index) in enumerate(units):
            # A half step at the start has one unit for each half of the rows, the second one for the first.
            if half_start and n == row // (TILE_M // 2) and n < 2:
                continue
            if index == NO_UNIT:
                assert n < masked_end
                continue
            block = index if is_window else index * vert_stride + residue
            sees = (block * UNIT >= window_start) == is_window and block * UNIT <= position
            if n >= masked_end:
                assert sees
                assert (block + 1) * UNIT - 1 <= position
            if sees:
                met.append(block)
        expected = [
            block
            for block in range(query_block + 1)
            if query_block - block < local_blocks or block % vert_stride == residue
        ]
        assert sorted(met) == expected


@given(programs=st.integers(1, 40), num_items=st.integers(1, 200))
def test_every_work_item_is_taken_once(programs: int, num_items: int) -> None:
    taken = [items_of_program(program, programs, num_items) for program in range(programs)]
    assert sorted(index for indices in taken for index in indices) == list(range(num_items))
    assert all(indices == sorted(indices, reverse=True) for indices in taken)


@pytest.mark.parametrize("heads_per_section", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[300], [0, 128, 1, 0, 129, 500], [5, 5, 5], [0, 0]], ids=str)
def test_every_tile_of_every_head_is_one_work_item(lengths: list[int], heads_per_section: int) -> None:
    starts = [sum(lengths[:n]) for n in range(len(lengths) + 1)]
    num_heads, num_tiles = 4, first_tile(starts[-1], len(lengths), TILE_M)
    found = []
    for item in range(num_tiles * num_heads):
        head, request, query_start, query_len, first_row = locate_tile(
            item, num_tiles, len(lengths), heads_per_section, Pointer(starts)
        )
        assert (query_start, query_len) == (starts[request], lengths[request])
        if first_row < query_len:
            found.append((head, request, first_row))
    expected = [
        (head, request, first_row)
        for head in range(num_heads)
        for request, length in enumerate(lengths)
        for first_row in range(0, length, TILE_M)
    ]
    assert sorted(found) == expected


@pytest.mark.parametrize("length", [1, TILE_M - 1, TILE_M, TILE_M + 1, 5 * TILE_M])
def test_a_batch_of_one_request_has_no_empty_tile(length: int) -> None:
    assert first_tile(length, 1, TILE_M) == -(-length // TILE_M)


def test_long_tiles_come_first_at_last_and_heads_in_sections() -> None:
    starts = Pointer([0, 4 * TILE_M - 1])
    order = [locate_tile(item, 4, 1, 2, starts) for item in reversed(range(16))]
    assert [head for head, *_ in order] == [3, 2] * 4 + [1, 0] * 4
    rows = [first_row for *_, first_row in order[::2]]
    assert rows == [0, TILE_M, 2 * TILE_M, 3 * TILE_M, 3 * TILE_M, 2 * TILE_M, TILE_M, 0]


def test_programs_share_a_prompt_within_the_window_evenly() -> None:
    """32 heads and 1024 tokens on 132 multiprocessors: the busiest has one step more than the mean."""
    heads, tokens, programs = 32, 1024, 132
    num_tiles = first_tile(tokens, 1, TILE_M)
    steps_of_programs = []
    for program in range(programs):
        steps = 0
        for item in items_of_program(program, programs, num_tiles * heads):
            *_, first_row = locate_tile(item, num_tiles, 1, heads, Pointer([0, tokens]))
            num_units, *_ = order_units(first_row, first_row + TILE_M - 1, 0, tokens // UNIT, 8, False)
            steps += num_units // 2
        steps_of_programs.append(steps)
    assert max(steps_of_programs) == sum(steps_of_programs) // programs + 1


def test_pattern_agrees_with_the_specification() -> None:
    """The set that the tests above expect is the one of `S2Pattern`."""
    pattern = S2Pattern.build(3, 3, local_blocks=2, vert_stride=3)
    mask = pattern.block_mask(12)
    for head, residue in enumerate(pattern.residues):
        for query_block in range(12):
            expected = [b for b in range(query_block + 1) if query_block - b < 2 or b % 3 == residue]
            assert mask[head, query_block].nonzero().flatten().tolist() == expected
