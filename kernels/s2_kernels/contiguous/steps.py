"""Device functions that block-sparse kernels share: the steps of a tile through the blocks that it visits.

A step has BLOCK_N tokens of the other side: of one block or of a part of it, or of several blocks. Which
blocks a tile visits is in tables of `visits`, for a tile of queries, or of `key_tiles`, for one of keys.
"""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def visits_of_step(step, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first visit of a step, and the visit of each token: [BLOCK_N], or one that is of all of them."""
    first = step * BLOCK_N // BLOCK_SIZE
    visits = first
    if BLOCK_N > BLOCK_SIZE:
        visits += tl.arange(0, BLOCK_N) // BLOCK_SIZE
    return first, visits


@triton.jit
def load_starts(starts, step, table, other, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The first tokens of the blocks that a step visits, `other` after the last visit.

    table: of the first shared run, the second and the tile's own visits, (the visit after the last, where
    visit 0 would be in `starts`). All visits of a step are in one of the three.
    """
    end_0, start_0, end_1, start_1, end, start = table
    first, visits = visits_of_step(step, BLOCK_SIZE, BLOCK_N)
    start = tl.where(first < end_0, start_0, tl.where(first < end_1, start_1, start))
    return tl.load(starts + start + visits, mask=visits < end, other=other)


@triton.jit
def load_row_bits(row_bits, step, table, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """The rows that a step's visits are for, as bits: all rows, unless the visits are the tile's own."""
    _, _, end_1, _, end, start = table
    first, visits = visits_of_step(step, BLOCK_SIZE, BLOCK_N)
    end = tl.where(first < end_1, 0, end)
    return tl.load(row_bits + start + visits, mask=visits < end, other=-1)


@triton.jit
def positions_of_step(start, step, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Positions [BLOCK_N] of the tokens of a step whose visits start at `start`.

    The table holds first tokens, not block numbers to be multiplied here: Triton 3.6 takes every lane of
    loaded * BLOCK_SIZE + lane % BLOCK_SIZE for a multiple of BLOCK_SIZE, and then compares it with only one
    of BLOCK_SIZE consecutive positions.
    """
    return start + (step * BLOCK_N + tl.arange(0, BLOCK_N)) % BLOCK_SIZE
