"""The producer warp: TMA loads of queries, keys and values, in the order the consumers want them."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier

from s2_kernels.hopper.gluon_api import tma_load
from s2_kernels.hopper.schedule import (
    ALL_RESIDUES,
    NO_UNIT,
    TILE_M,
    UNIT,
    item_of_wave,
    locate_tile,
    num_waves,
    order_units,
    strided_blocks,
    unit_at,
)

PANEL = gl.constexpr(64)
"""Columns of a swizzled row of 128 bytes, the widest box of a TMA load."""
NO_ROW = gl.constexpr(2**31 - 2**16)
"""Past the end of every array, where TMA loads zeros."""


@gluon.jit
def strided_run(kv_head, rank, num_sinks, first_kept, RESIDUE_SLOTS: gl.constexpr):
    """Where the strided tier has a head's blocks, if KV heads keep different numbers of residues.

    Returns (the KV head's first virtual head, its slots in a page, the place of the query head's first block
    among the KV head's, the distance of such blocks). A full head's are all that its KV head keeps.
    """
    first_row = gl.load(first_kept + kv_head)
    num_kept = gl.load(first_kept + kv_head + 1) - first_row
    page_slots = gl.maximum(num_kept, 1) * RESIDUE_SLOTS
    distance = gl.where(rank == ALL_RESIDUES, 1, num_kept)
    return first_row, page_slots, gl.maximum(rank, 0) + num_sinks * distance, distance


@gluon.jit
def row_of_unit(
    n,
    order,
    window,
    strided,
    first_strided,
    stride,
    first_place,
    distance,
    strided_page_slots,
    PAGE_SLOTS: gl.constexpr,
    KINDS: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
):
    """(whether unit n is of the window tier, row of its first token in the tier's array).

    Of each tier: the request's row of its block table, rows in a page, and the head's first row.
    PAGE_SLOTS 0 stands for keys that are not paged: both tiers are the same array, a row for each token.

    Args:
        first_strided, stride: the head's strided blocks are first_strided, first_strided + stride, ...
        first_place, distance: and among the blocks that its KV head keeps, likewise.
        strided_page_slots: the KV head's slots in a page of the strided tier.
    """
    window_pages, window_page_rows, window_start = window
    strided_pages, strided_page_rows, strided_start = strided
    is_window, index = unit_at(n, order, SINK_BLOCKS, HALF_START)
    if PAGE_SLOTS == 0:
        row = window_start + gl.where(is_window, index, index * stride + first_strided) * UNIT
    else:
        token = gl.where(is_window, index, index * distance + first_place) * UNIT
        pages = gl.where(is_window, window_pages, strided_pages)
        page_slots = PAGE_SLOTS
        if KINDS:
            page_slots = gl.where(is_window, PAGE_SLOTS, strided_page_slots)
        page = gl.load(pages + token // page_slots, mask=index != NO_UNIT, other=0)
        row = page * gl.where(is_window, window_page_rows, strided_page_rows) + token % page_slots
        row += gl.where(is_window, window_start, strided_start)
    return is_window, gl.where(index == NO_UNIT, NO_ROW, row)


@gluon.jit
def load_unit(window, strided, unit, column, ready, pieces, stage, HALF: gl.constexpr, PANELS: gl.constexpr):
    """Start the loads of a unit's keys or values into its half of a stage; `ready` will report them."""
    is_window, row = unit
    for panel in gl.static_range(PANELS):
        piece = pieces.index((stage * PANELS + panel) * 2 + HALF)
        at = [row, column + panel * PANEL]
        tma_load(window, at, ready.index(stage), piece, pred=is_window)
        tma_load(strided, at, ready.index(stage), piece, pred=is_window == 0)


@gluon.jit
def fill_stage(
    step,
    window,
    strided,
    unit_0,
    unit_1,
    column,
    ready,
    empty,
    pieces,
    HEAD_SIZE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the keys, or the values, of a step's two units, once both consumers have emptied the stage."""
    PANELS: gl.constexpr = HEAD_SIZE // PANEL
    stage = step % STAGES
    mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
    mbarrier.expect(ready.index(stage), 2 * UNIT * HEAD_SIZE * 2)
    load_unit(window, strided, unit_0, column, ready, pieces, stage, 0, PANELS)
    load_unit(window, strided, unit_1, column, ready, pieces, stage, 1, PANELS)


@gluon.jit
def produce(
    queries,
    window,
    strided,
    q_smem,
    k_pieces,
    v_pieces,
    barriers,
    work,
    lengths,
    heads,
    first_kept,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    PAGE_SLOTS: gl.constexpr,
    RESIDUE_SLOTS: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    NUM_KEPT: gl.constexpr,
    KINDS: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Load the queries and units of every tile of this program."""
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    num_items = work[1]
    query_start_loc, key_start_loc, seq_lens = lengths
    residues, ranks = heads
    (window_keys, window_values, window_table, window_table_stride, window_page_rows, window_head_rows) = (
        window
    )
    (
        strided_keys,
        strided_values,
        strided_table,
        strided_table_stride,
        strided_page_rows,
        strided_head_rows,
    ) = strided
    num_filled = 0
    tiles_done = 0
    for wave in range(0, num_waves(num_items)):
        head, request, query_start, query_len, first_row = locate_tile(
            item_of_wave(wave, num_items), work, query_start_loc, KINDS
        )
        if first_row < query_len:
            context_len = gl.load(seq_lens + request) - query_len
            last_position = context_len + gl.minimum(first_row + TILE_M, query_len) - 1
            first_strided = gl.load(residues + head)
            rank = gl.load(ranks + head)
            stride = VERT_STRIDE
            if KINDS:
                first_strided, stride, num_sinks = strided_blocks(
                    first_strided, rank, VERT_STRIDE, SINK_BLOCKS
                )
            num_units, _, order = order_units(
                context_len + first_row,
                last_position,
                first_strided,
                stride,
                LOCAL_BLOCKS,
                SINK_BLOCKS,
                HALF_START,
            )
            kv_head = head // GROUP_SIZE
            if KINDS and PAGE_SLOTS != 0:
                strided_head, strided_page_slots, first_place, distance = strided_run(
                    kv_head, rank, num_sinks, first_kept, RESIDUE_SLOTS
                )
            else:
                strided_head = kv_head
                strided_page_slots = PAGE_SLOTS
                first_place = rank
                distance = NUM_KEPT
            window_pages = window_table + request.to(gl.int64) * window_table_stride
            strided_pages = strided_table + request.to(gl.int64) * strided_table_stride
            if PAGE_SLOTS == 0:
                window_start = gl.load(key_start_loc + request)
                strided_start = window_start
                key_column = kv_head * HEAD_SIZE
                value_column = key_column
            else:
                window_start = kv_head * window_head_rows
                strided_start = strided_head * strided_head_rows
                key_column = 0
                value_column = HEAD_SIZE

            window_rows = (window_pages, window_page_rows, window_start)
            strided_rows = (strided_pages, strided_page_rows, strided_start)

            mbarrier.wait(q_empty, (tiles_done & 1) ^ 1)
            mbarrier.expect(q_ready, TILE_M * HEAD_SIZE * 2)
            for half in gl.static_range(2):
                at = [query_start + first_row + half * (TILE_M // 2), head * HEAD_SIZE]
                tma_load(queries, at, q_ready, q_smem.index(half))
            tiles_done += 1

            # The keys of a step are wanted before the values of the one before it.
            unit_0, unit_1 = (head < 0, 0), (head < 0, 0)
            for n in range(0, num_units + 2, 2):
                last_0, last_1 = unit_0, unit_1
                if n < num_units:
                    unit_0 = row_of_unit(
                        n,
                        order,
                        window_rows,
                        strided_rows,
                        first_strided,
                        stride,
                        first_place,
                        distance,
                        strided_page_slots,
                        PAGE_SLOTS,
                        KINDS,
                        SINK_BLOCKS,
                        HALF_START,
                    )
                    unit_1 = row_of_unit(
                        n + 1,
                        order,
                        window_rows,
                        strided_rows,
                        first_strided,
                        stride,
                        first_place,
                        distance,
                        strided_page_slots,
                        PAGE_SLOTS,
                        KINDS,
                        SINK_BLOCKS,
                        HALF_START,
                    )
                    fill_stage(
                        num_filled + n // 2,
                        window_keys,
                        strided_keys,
                        unit_0,
                        unit_1,
                        key_column,
                        k_ready,
                        k_empty,
                        k_pieces,
                        HEAD_SIZE,
                        STAGES,
                    )
                if n > 0:
                    fill_stage(
                        num_filled + n // 2 - 1,
                        window_values,
                        strided_values,
                        last_0,
                        last_1,
                        value_column,
                        v_ready,
                        v_empty,
                        v_pieces,
                        HEAD_SIZE,
                        STAGES,
                    )
            num_filled += num_units // 2
