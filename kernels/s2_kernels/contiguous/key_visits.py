"""Which query blocks the key tiles of some sequences are visited by.

The columns of a tile's blocks are cut to the sequence's queries and put together: a stretch of query blocks
that all of them share, of which a table needs the ends, and others, which are listed.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch

from s2_kernels.contiguous.columns import Columns

VISIT_FIELDS = 5
_CHUNK = 1 << 22
"""Visits that are listed together, about: bounds the memory of intermediate results."""


class Tiles(NamedTuple):
    """Key tiles whose visits are to be found, for each pair of a class and a mask.

    Attributes:
        columns: of all masks.
        blocks: int64 [pairs, tiles, blocks], key blocks, -1 for none.
        first_column: int64 [pairs, 1], the column of key block 0.
        first_position, end_position: int64 [tiles], positions of the queries.
        block_size, is_causal: of the mask.
    """

    columns: Columns
    blocks: torch.Tensor
    first_column: torch.Tensor
    first_position: torch.Tensor
    end_position: torch.Tensor
    block_size: int
    is_causal: bool


def list_visits(tiles: Tiles, visits_per_step: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The visits of all tiles: int64 [pairs, tiles, VISIT_FIELDS], query blocks and row bits of their own.

    In the first field is the first query block of the shared ones.
    """
    shared = _shared_visits(tiles, visits_per_step)
    visits = shared.new_zeros(*shared.shape[:-1], VISIT_FIELDS)
    visits[..., 0] = shared[..., 0]
    visits[..., 1] = shared[..., 1] - shared[..., 0]
    flat = visits.flatten(0, 1)
    starts, row_bits = [flat[:0, 0]], [flat[:0, 0]]
    for tile, block, bits, is_unmasked in _own_visits(tiles, shared):
        flat[:, 3] += tile[is_unmasked].bincount(minlength=len(flat))
        flat[:, 4] += tile.bincount(minlength=len(flat))
        starts.append(block)
        row_bits.append(bits)
    flat[:, 2] = flat[:, 4].cumsum(0) - flat[:, 4]
    return visits, torch.cat(starts), torch.cat(row_bits)


def _shared_visits(tiles: Tiles, visits_per_step: int) -> torch.Tensor:
    """int64 [pairs, tiles, 2]: query blocks that need no mask for any block of a tile, in whole steps.

    They are what the longest intervals of its columns have in common.
    """
    has_block = tiles.blocks >= 0
    column = tiles.first_column[..., None] + tiles.blocks.clamp(min=0)
    first, end = tiles.columns.longest[column].unbind(dim=-1)
    first = first.where(has_block, 0).amax(dim=-1).maximum(_first_unmasked(tiles))
    end = end.where(has_block, 2**31).amin(dim=-1).minimum(tiles.end_position // tiles.block_size)
    end = end.maximum(first)
    return torch.stack([first, end - (end - first) % visits_per_step], dim=-1)


def _first_unmasked(tiles: Tiles) -> torch.Tensor:
    """int64 [pairs, tiles]: the first query block later than a tile's keys, with all its tokens."""
    last_block = tiles.blocks.amax(dim=-1) if tiles.is_causal else torch.full_like(tiles.blocks[..., 0], -1)
    return (last_block + 1).maximum(-(-tiles.first_position // tiles.block_size))


def _own_visits(
    tiles: Tiles, shared: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (tile of all pairs, query block, row bits, whether it needs no mask) of visits not shared.

    In the order of the table, some tiles at a time.
    """
    blocks = tiles.blocks.flatten(0, 1)
    column = (tiles.first_column[..., None] + tiles.blocks.clamp(min=0)).flatten(0, 1)
    low = tiles.first_position // tiles.block_size
    has_queries = tiles.end_position > tiles.first_position
    high = (-(-tiles.end_position // tiles.block_size)).where(has_queries, low)
    bounds = torch.stack([low, high], dim=-1).repeat(len(tiles.blocks), 1)
    offsets = tiles.columns.offsets
    num_intervals = (offsets[column + 1] - offsets[column]).where(blocks >= 0, 0)
    sizes = ((num_intervals.sum(dim=1).cumsum(0) - 1).clamp(min=0) // _CHUNK).bincount().tolist()
    full = (1 << blocks.shape[1]) - 1
    no_block = ((blocks < 0).long() << torch.arange(blocks.shape[1], device=blocks.device)).sum(dim=1)
    first_unmasked = _first_unmasked(tiles).flatten()
    end_unmasked = (tiles.end_position // tiles.block_size).repeat(len(tiles.blocks))
    first = 0
    for size in sizes:
        some = slice(first, first + size)
        tile, block, bits = _merge(
            offsets[column[some]],
            num_intervals[some],
            tiles.columns,
            bounds[some],
            shared.flatten(0, 1)[some],
        )
        tile += first
        bits |= no_block[tile]
        is_unmasked = (bits == full) & (block >= first_unmasked[tile]) & (block < end_unmasked[tile])
        order = (2 * tile + (~is_unmasked).long()).argsort(stable=True)
        yield tile[order], block[order], bits[order], is_unmasked[order]
        first += size


def _merge(
    first_interval: torch.Tensor,
    num_intervals: torch.Tensor,
    columns: Columns,
    bounds: torch.Tensor,
    shared: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(tile, query block, row bits) of the visits of some tiles that are within `bounds` and not shared.

    Args:
        first_interval, num_intervals: int64 [tiles, blocks], the columns of their blocks.
        columns: what these are in.
        bounds, shared: int64 [tiles, 2].
    """
    rows = first_interval.shape[1]
    device = first_interval.device
    count = num_intervals.flatten()
    row = torch.arange(len(count), device=device).repeat_interleave(count)
    before = count.cumsum(0) - count
    interval = torch.arange(len(row), device=device) + (first_interval.flatten() - before)[row]
    (low, high), (shared_first, shared_end) = (x[row // rows].unbind(dim=1) for x in (bounds, shared))
    first = columns.first[interval].maximum(low)
    end = columns.end[interval].minimum(high)
    # What is left of an interval before the shared part, and after it: [intervals, 2].
    starts = torch.stack([first, first.maximum(shared_end)], dim=1)
    lengths = (torch.stack([end.minimum(shared_first), end], dim=1) - starts).clamp(min=0).flatten()
    piece = torch.arange(len(lengths), device=device).repeat_interleave(lengths)
    skipped = lengths.cumsum(0) - lengths
    block = torch.arange(len(piece), device=device) + (starts.flatten() - skipped)[piece]
    row = row[piece // 2]
    num_blocks = int(block.max()) + 1 if len(block) else 1
    visits, visit = torch.unique(row // rows * num_blocks + block, return_inverse=True)
    bits = torch.zeros_like(visits).index_add_(0, visit, 1 << row % rows)
    return visits // num_blocks, visits % num_blocks, bits
