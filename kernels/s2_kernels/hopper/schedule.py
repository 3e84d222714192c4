"""Which query tile a program works on, and the key units it visits.

A tile is TILE_M consecutive queries of one query head and request. A unit is one block of keys, of the
window tier or of the strided tier. The units of a tile come in an order that puts those first which some
row of the tile must not see, or not all of; the others need no mask. Their number is even, since a step
takes two: units without keys even it out.

Programs are persistent. The work items, a tile of a head each, are taken in waves: in each wave every program
takes one.

Where heads are of several kinds (KINDS), an item of a full head may cost a hundred times one of a streaming
head. Heads are sorted by kind then, so that the items of a wave still cost about the same.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from s2_kernels import layout, pattern
from s2_kernels.tiles import first_tile

TILE_M = gl.constexpr(128)
UNIT = gl.constexpr(64)
NO_UNIT = gl.constexpr(-1)
ALL_RESIDUES = gl.constexpr(layout.ALL_RESIDUES)
NO_RESIDUE = gl.constexpr(pattern.NO_RESIDUE)
NO_BLOCK = gl.constexpr(2**30)
"""A block that no sequence comes to: the first strided one of a head that has none."""


first_tile_of = gluon.jit(first_tile)


@gluon.jit
def rank_in_wave(wave):
    """The rank of this program among those that take an item in a wave: they reverse from wave to wave.

    An item's cost changes slowly along their order: who had the heaviest of one wave has the lightest of the
    next.
    """
    program = gl.program_id(0)
    return gl.where(wave % 2 == 0, program, gl.num_programs(0) - 1 - program)


@gluon.jit
def num_waves(num_items):
    """The waves in which there is an item for this program."""
    full_waves = num_items // gl.num_programs(0)
    return full_waves + (rank_in_wave(full_waves) < num_items % gl.num_programs(0))


@gluon.jit
def item_of_wave(wave, num_items):
    """The work item that this program takes in a wave; they count down to 0."""
    return num_items - 1 - wave * gl.num_programs(0) - rank_in_wave(wave)


@gluon.jit
def kind_at(place, strided_per_section, num_streaming, first_full, full_per_section):
    """(where heads of the same kind begin, those of a section), of the head at this place of `by_work`.

    Streaming heads are one section: the keys of their windows are few.

    Args:
        num_streaming: how many heads are streaming ones, which are the first.
        first_full: where the full ones begin, which are the last.
        strided_per_section, full_per_section: heads of a section of either kind.
    """
    is_streaming = place < num_streaming
    is_full = place >= first_full
    first = gl.where(is_streaming, 0, gl.where(is_full, first_full, num_streaming))
    per_section = gl.where(is_full, full_per_section, strided_per_section)
    return first, gl.where(is_streaming, num_streaming, per_section)


@gluon.jit
def locate_tile(item, work, query_start_loc, KINDS: gl.constexpr):
    """Of a work item: (head, request, start of its queries, their number, the tile's first row among them).

    Heads come in sections, so that the keys of those at work fit the L2 cache. In the last section late
    tiles, which have more keys, come first, and the order turns from one section to the next. A first row at
    or past the number of queries says that there is nothing to do.

    Args:
        work: (tiles of a head, items, requests, sections). Sections are the heads of one; with KINDS (strided
            heads of one, the heads sorted by kind, and the other arguments of `kind_at`).
    """
    num_tiles, _num_items, num_requests, sections = work
    heads_per_section = sections
    if KINDS:
        strided_per_section, by_work, num_streaming, first_full, full_per_section = sections
        first, heads_per_section = kind_at(
            item // num_tiles, strided_per_section, num_streaming, first_full, full_per_section
        )
        item -= first * num_tiles
    section = item // (num_tiles * heads_per_section)
    within = item % (num_tiles * heads_per_section)
    head = section * heads_per_section + within % heads_per_section
    if KINDS:
        head = gl.load(by_work + first + head)
    tile = within // heads_per_section
    tile = gl.where(section % 2 == 0, tile, num_tiles - 1 - tile)
    low = item * 0
    high = low + num_requests
    while high - low > 1:
        middle = (low + high) // 2
        starts_before = first_tile_of(gl.load(query_start_loc + middle), middle, TILE_M) <= tile
        low = gl.where(starts_before, middle, low)
        high = gl.where(starts_before, high, middle)
    query_start = gl.load(query_start_loc + low)
    query_len = gl.load(query_start_loc + low + 1) - query_start
    first_row = (tile - first_tile_of(query_start, low, TILE_M)) * TILE_M
    return head, low, query_start, query_len, first_row


@gluon.jit
def strided_blocks(residue, rank, VERT_STRIDE: gl.constexpr, SINK_BLOCKS: gl.constexpr):
    """(first, stride, those before it that are sinks) of a head's strided blocks, first, first + stride, ...

    A full head is one of stride 1; a streaming head's first one is NO_BLOCK. Sinks are kept in the window
    tier, and seen there.

    Args:
        residue, rank: of the head, as in `s2_kernels.layout.HeadTables`.
    """
    is_full = rank == ALL_RESIDUES
    stride = gl.where(is_full, 1, VERT_STRIDE)
    first = gl.where(is_full, 0, gl.where(rank == NO_RESIDUE, NO_BLOCK, residue))
    num_sinks = gl.maximum(SINK_BLOCKS - first + stride - 1, 0) // stride
    return first + num_sinks * stride, stride, num_sinks


@gluon.jit
def order_units(
    first_position,
    last_position,
    first_strided,
    stride,
    LOCAL_BLOCKS: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
):
    """(number of units, end of those that need a mask, their order) for queries at these positions.

    In the order of the visits: the blocks with the causal edge, from the last, those with the window's old
    edge, the strided blocks that only the later rows are past, the sinks that some row's window is past, and
    then all that every row sees. The head's strided blocks are first_strided, first_strided + stride, ...

    HALF_START: in the first step each half of the tile attends to one unit only: its own block where the tile
    is two whole blocks and the rest then needs no padding, the last block otherwise. That saves half a step
    for most tiles, and costs half a step for those whose window starts with the sequence.
    """
    first_block = first_position // UNIT
    last_block = last_position // UNIT
    window_first = gl.maximum(first_block - LOCAL_BLOCKS + 1, 0)
    shared_first = gl.maximum(last_block - LOCAL_BLOCKS + 1, 0)
    num_all = gl.maximum(first_block - LOCAL_BLOCKS - first_strided + stride, 0) // stride
    num_any = gl.maximum(last_block - LOCAL_BLOCKS - first_strided + stride, 0) // stride
    num_causal = last_block - gl.maximum(first_block, shared_first)
    num_old = shared_first - window_first
    num_shared = gl.maximum(first_block - shared_first, 0)
    num_sinks = 0
    if SINK_BLOCKS > 0:
        num_sinks = gl.minimum(shared_first, SINK_BLOCKS)
    num_others = num_causal + num_old + num_any + num_sinks + num_shared
    if HALF_START:
        is_paired = (first_position % UNIT == 0) & (last_block == first_block + 1) & (num_old == 1)
        is_paired = is_paired & (num_others % 2 == 1)
        own_old = gl.where(is_paired, 1, 0)
        causal_end = 2 + num_causal
    else:
        own_old = 0
        causal_end = 1 + num_causal
    old_end = causal_end + num_old - own_old
    edge_end = old_end + num_any - num_all
    sinks_end = edge_end + num_sinks
    num_others -= own_old
    if HALF_START:
        # A whole step follows in any case, if only of units without keys.
        masked_end = sinks_end + gl.where(num_others == 0, 2, num_others % 2)
        unit_1 = gl.where(is_paired, window_first, last_block)
    else:
        masked_end = sinks_end + (1 + num_others) % 2
        unit_1 = last_block - 1
    order = (
        causal_end,
        old_end,
        edge_end,
        sinks_end,
        masked_end,
        num_shared,
        last_block,
        unit_1,
        window_first + own_old,
        shared_first,
        num_all,
    )
    return masked_end + num_shared + num_all, masked_end, order


@gluon.jit
def is_sink(n, order):
    """Whether unit n is there as a sink: seen by the rows whose window is past it."""
    edge_end, sinks_end = order[2], order[3]
    return (n >= edge_end) & (n < sinks_end)


@gluon.jit
def unit_at(n, order, SINK_BLOCKS: gl.constexpr, HALF_START: gl.constexpr):
    """(whether unit n is of the window tier, its index there).

    The index counts blocks in the window tier, and the head's own blocks in the strided tier. It is NO_UNIT
    for a unit without keys.
    """
    (
        causal_end,
        old_end,
        edge_end,
        _sinks_end,
        masked_end,
        num_shared,
        last_block,
        unit_1,
        old_first,
        shared_first,
        num_all,
    ) = order
    after = n - masked_end
    is_window = (n < old_end) | ((after >= 0) & (after < num_shared))
    index = gl.where(after < num_shared, shared_first + after, after - num_shared)
    index = gl.where(after < 0, NO_UNIT, index)
    if SINK_BLOCKS > 0:
        is_window = is_window | is_sink(n, order)
        index = gl.where(is_sink(n, order), n - edge_end, index)
    index = gl.where(n < edge_end, num_all + n - old_end, index)
    index = gl.where(n < old_end, old_first + n - causal_end, index)
    if HALF_START:
        index = gl.where(n < causal_end, last_block + 1 - n, index)
        index = gl.where(n == 1, unit_1, index)
        index = gl.where(n == 0, last_block, index)
    else:
        index = gl.where(n < causal_end, last_block - n, index)
    return is_window, index
