"""Which query tile a program works on, and the key units it visits.

A tile is TILE_M consecutive queries of one query head and request. A unit is one block of keys, of the
window tier or of the strided tier. The units of a tile come in an order that puts those first which some
row of the tile must not see, or not all of; the others need no mask. Their number is even, since a step
takes two: units without keys even it out.

Programs are persistent. The work items, a tile of a head each, are taken in waves: in each wave every program
takes one.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from s2_kernels.tiles import first_tile

TILE_M = gl.constexpr(128)
UNIT = gl.constexpr(64)
NO_UNIT = gl.constexpr(-1)


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
def locate_tile(item, num_tiles, num_requests, heads_per_section, query_start_loc):
    """Of a work item: (head, request, start of its queries, their number, the tile's first row among them).

    Heads come in sections, so that the keys of those at work fit the L2 cache. In the last section late
    tiles, which have more keys, come first, and the order turns from one section to the next. A first row at
    or past the number of queries says that there is nothing to do.
    """
    section = item // (num_tiles * heads_per_section)
    within = item % (num_tiles * heads_per_section)
    head = section * heads_per_section + within % heads_per_section
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
def order_units(
    first_position,
    last_position,
    residue,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    HALF_START: gl.constexpr,
):
    """(number of units, end of those that need a mask, their order) for queries at these positions.

    In the order of the visits: the blocks with the causal edge, from the last, those with the window's old
    edge, the strided blocks that only the later rows are past, and then all that every row sees.

    HALF_START: in the first step each half of the tile attends to one unit only: its own block where the tile
    is two whole blocks and the rest then needs no padding, the last block otherwise. That saves half a step
    for most tiles, and costs half a step for those whose window starts with the sequence.
    """
    first_block = first_position // UNIT
    last_block = last_position // UNIT
    window_first = gl.maximum(first_block - LOCAL_BLOCKS + 1, 0)
    shared_first = gl.maximum(last_block - LOCAL_BLOCKS + 1, 0)
    num_all = gl.maximum(first_block - LOCAL_BLOCKS - residue + VERT_STRIDE, 0) // VERT_STRIDE
    num_any = gl.maximum(last_block - LOCAL_BLOCKS - residue + VERT_STRIDE, 0) // VERT_STRIDE
    num_causal = last_block - gl.maximum(first_block, shared_first)
    num_old = shared_first - window_first
    num_shared = gl.maximum(first_block - shared_first, 0)
    num_others = num_causal + num_old + num_any + num_shared
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
    num_others -= own_old
    if HALF_START:
        # A whole step follows in any case, if only of units without keys.
        masked_end = edge_end + gl.where(num_others == 0, 2, num_others % 2)
        unit_1 = gl.where(is_paired, window_first, last_block)
    else:
        masked_end = edge_end + (1 + num_others) % 2
        unit_1 = last_block - 1
    order = (
        causal_end,
        old_end,
        edge_end,
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
def unit_at(n, order, HALF_START: gl.constexpr):
    """(whether unit n is of the window tier, its index there).

    The index counts blocks in the window tier, and the head's own blocks in the strided tier. It is NO_UNIT
    for a unit without keys.
    """
    (
        causal_end,
        old_end,
        edge_end,
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
    index = gl.where(n < edge_end, num_all + n - old_end, index)
    index = gl.where(n < old_end, old_first + n - causal_end, index)
    if HALF_START:
        index = gl.where(n < causal_end, last_block + 1 - n, index)
        index = gl.where(n == 1, unit_1, index)
        index = gl.where(n == 0, last_block, index)
    else:
        index = gl.where(n < causal_end, last_block - n, index)
    return is_window, index
