"""The Hopper kernels' order of work, run as plain Python: every row meets each key of its set once.

The functions of `s2_kernels.hopper.schedule` are compiled for a GPU, but what they compute is integer
arithmetic; here it runs on Python's own integers.
"""

from __future__ import annotations

from heapq import heapreplace
from types import SimpleNamespace
from typing import Any, Literal, get_args

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from s2_kernels.hopper import prefill, schedule
from s2_kernels.launch.limits import VARYING
from s2_kernels.layout import ALL_RESIDUES, head_tables
from s2_kernels.pattern import NO_RESIDUE, S2Pattern
from s2_kernels.tiles import first_tile
from tests.gluon_emulator import EmulatedKernel, Pointer

UNIT, TILE_M = schedule.UNIT.value, schedule.TILE_M.value
NO_UNIT = schedule.NO_UNIT.value


# Scalars stay Python's own integers: the functions are called thousands of times.
INTEGERS = SimpleNamespace(
    where=lambda condition, yes, no: yes if condition else no,
    maximum=max,
    minimum=min,
    load=lambda pointer: pointer.memory[pointer.offset],
)
locate_tile, strided_blocks, order_units, unit_at, is_sink = (
    EmulatedKernel(function, (schedule,)).function(INTEGERS)
    for function in (
        schedule.locate_tile,
        schedule.strided_blocks,
        schedule.order_units,
        schedule.unit_at,
        schedule.is_sink,
    )
)
Kind = Literal["strided", "full", "streaming"]


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
    kind=st.sampled_from(get_args(Kind)),
    sinks=st.integers(0, 5),
    half_start=st.booleans(),
)
@example(20 * UNIT, TILE_M, 4, 3, 1, "strided", 0, True)
@example(21 * UNIT, TILE_M, 1, 2, 0, "strided", 0, True)
@example(0, 1, 16, 8, 0, "strided", 0, True)
@example(0, 1, 16, 8, 0, "strided", 0, False)
@example(3 * UNIT, TILE_M, 2, 2, 0, "streaming", 5, True)
def test_every_row_meets_each_block_of_its_set_once(
    first_position: int,
    rows: int,
    local_blocks: int,
    vert_stride: int,
    residue: int,
    kind: Kind,
    sinks: int,
    half_start: bool,
) -> None:
    residue %= vert_stride
    last_position = first_position + rows - 1
    rank = {"strided": 3, "full": ALL_RESIDUES, "streaming": NO_RESIDUE}[kind]
    if kind != "strided":
        residue = NO_RESIDUE
    if (kind, sinks) == ("strided", 0):
        first_strided, stride = residue, vert_stride
    else:
        first_strided, stride, skipped = strided_blocks(residue, rank, vert_stride, sinks)
        assert skipped == len([b for b in range(sinks) if kind == "full" or b % vert_stride == residue])
    num_units, masked_end, order = order_units(
        first_position, last_position, first_strided, stride, local_blocks, sinks, half_start
    )
    assert num_units % 2 == 0
    assert num_units >= (4 if half_start else 2)
    units = [unit_at(n, order, sinks, half_start) for n in range(num_units)]
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
            block = index if is_window else index * stride + first_strided
            of_window = is_window and not is_sink(n, order)
            sees = (block * UNIT >= window_start) == of_window and block * UNIT <= position
            if n >= masked_end:
                assert sees
                assert (block + 1) * UNIT - 1 <= position
            if sees:
                met.append(block)
        expected = [
            block
            for block in range(query_block + 1)
            if query_block - block < local_blocks
            or block < sinks
            or kind == "full"
            or block % vert_stride == residue
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
            item, (num_tiles, None, len(lengths), heads_per_section), Pointer(starts), False
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
    order = [locate_tile(item, (4, 16, 1, 2), starts, False) for item in reversed(range(16))]
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
            *_, first_row = locate_tile(item, (num_tiles, None, 1, heads), Pointer([0, tokens]), False)
            num_units, *_ = order_units(first_row, first_row + TILE_M - 1, 0, 8, tokens // UNIT, 0, False)
            steps += num_units // 2
        steps_of_programs.append(steps)
    assert max(steps_of_programs) == sum(steps_of_programs) // programs + 1


def work_by_kind(pattern: S2Pattern, num_tiles: int, num_requests: int, max_seq_len: int) -> tuple[Any, ...]:
    """What the kernel is told of its work items, with sections that have 8 MiB of keys and values."""
    sections = prefill._sections(pattern, VARYING, max_seq_len, 128, 8 * prefill.MIB)
    by_work = Pointer(head_tables(pattern, torch.device("cpu")).by_work.tolist())
    of_kinds = [sections[name] for name in prefill.OF_KINDS]
    return (num_tiles, None, num_requests, (sections["heads_per_section"], by_work, *of_kinds))


KINDS = {
    "full-and-streaming": {"vert_stride": None, "full_heads": [0, 3, 4]},
    "full-and-strided": {"full_heads": [5]},
    "streaming": {"vert_stride": None, "sink_blocks": 1},
    "strided": {"sink_blocks": 1},
    "full-but-one": {"vert_stride": None, "full_heads": [0, 1, 2, 3, 4, 6, 7]},
}


@pytest.mark.parametrize("max_seq_len", [500, 2**17])
@pytest.mark.parametrize("kinds", KINDS)
def test_every_tile_of_heads_of_any_kind_is_one_work_item(kinds: str, max_seq_len: int) -> None:
    """Full heads come first, streaming ones last; the query heads of a KV head are at work together."""
    pattern = S2Pattern.build(32, 8, **KINDS[kinds])
    starts, num_tiles = [0, 300, 300, 740], first_tile(740, 3, TILE_M)
    work = work_by_kind(pattern, num_tiles, 3, max_seq_len)
    items = reversed(range(num_tiles * 32))
    found = [locate_tile(item, work, Pointer(starts), True) for item in items]
    tiles = [
        (head, request, first_row) for head, request, _, length, first_row in found if first_row < length
    ]
    of_requests = [(request, row) for request in (0, 2) for row in range(0, (300, 0, 440)[request], TILE_M)]
    assert sorted(tiles) == [(head, *tile) for head in range(32) for tile in of_requests]
    weights = [2 if head // 4 in pattern.full_heads else pattern.residues[head] >= 0 for head, *_ in tiles]
    assert weights == sorted(weights, reverse=True)
    assert all(len({head // 4 for head, *_ in tiles[n : n + 4]}) == 1 for n in range(0, len(tiles), 4))


@pytest.mark.parametrize(("context", "tokens"), [(0, 2048), (2**15, 8192), (2**17, 2048)])
@pytest.mark.parametrize("kinds", ["full-and-streaming", "full-but-one"])
def test_programs_share_the_work_of_heads_of_several_kinds(kinds: str, context: int, tokens: int) -> None:
    """On 132 multiprocessors, hardly less evenly than if each item went to the first that is done."""
    pattern = S2Pattern.build(32, 8, local_blocks=5, **KINDS[kinds])
    programs, num_tiles = 132, first_tile(tokens, 1, TILE_M)
    work = work_by_kind(pattern, num_tiles, 1, context + tokens)
    tables = head_tables(pattern, torch.device("cpu"))

    def steps(item: int) -> int:
        head, *_, row = locate_tile(item, work, Pointer([0, tokens]), True)
        first, stride, _ = strided_blocks(
            int(tables.residue[head]), int(tables.rank[head]), pattern.vert_stride, pattern.sink_blocks
        )
        positions = (context + row, context + row + TILE_M - 1)
        num_units, *_ = order_units(*positions, first, stride, 5, pattern.sink_blocks, True)
        return 1 + num_units // 2

    num_items = 32 * num_tiles
    busiest = max(
        sum(map(steps, items_of_program(program, programs, num_items))) for program in range(programs)
    )
    done = [0] * programs
    for item in reversed(range(num_items)):
        heapreplace(done, done[0] + steps(item))
    assert busiest <= 1.05 * max(done)


def test_pattern_agrees_with_the_specification() -> None:
    """The set that the tests above expect is the one of `S2Pattern`."""
    pattern = S2Pattern.build(3, 3, local_blocks=2, vert_stride=3, full_heads=[1], sink_blocks=4)
    mask = pattern.block_mask(12)
    for head, residue in enumerate(pattern.residues):
        for query_block in range(12):
            expected = [
                b
                for b in range(query_block + 1)
                if query_block - b < 2 or b < 4 or head == 1 or b % 3 == residue
            ]
            assert mask[head, query_block].nonzero().flatten().tolist() == expected
