"""Which query blocks the key tiles of some sequences are visited by, as tables that a kernel reads.

A key tile is for one KV head and all query heads that read it, so that their gradients of its keys are summed
in one place. Where a tile is larger than a block it covers several key blocks: for an S2 pattern blocks that
the same heads keep, which the same later query blocks attend to. As in `visits`, the part of an interval of
query blocks that all blocks of a tile share takes no more than its ends in the table, and the other visits
are listed with the blocks that each is for. So the tables of an S2 pattern grow with the number of blocks,
and those of an arbitrary mask with the number of block pairs.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from s2_kernels.contiguous.columns import Columns, columns_of
from s2_kernels.contiguous.key_visits import Tiles, list_visits
from s2_kernels.contiguous.sequences import Span, first_position
from s2_kernels.masks import BlockMask

KEY_TILE_FIELDS = 6
_MOST_TABLES = 16
"""Tables kept for a mask."""
_MOST_SIGNS = 60
"""Heads that are told apart when blocks are put together."""


class KeyTiles(NamedTuple):
    """The key tiles of some sequences, and their visits.

    KV heads whose query heads have the same masks are of one class, and have the same tiles. A class and one
    of its masks are a pair. Tile t of a class c is at c * num_tiles + t, its visits for a pair p at p *
    num_tiles + t. They are, in this order: those that its blocks share, and its own. Its own come with those
    first that need no mask, as none of the shared ones does: they are for all blocks, of queries later than
    the tile's keys in causal attention, and of the sequence with all their tokens.

    Attributes:
        tiles: int32 [classes * num_tiles, KEY_TILE_FIELDS], longest first: batch, query start, key start,
            positions of the sequence's first query and of the one after the last, keys.
        key_starts: int32 [classes * num_tiles, blocks of a tile], the first tokens of its key blocks; tokens
            after any sequence's last where it has fewer.
        visits: int64 [pairs * num_tiles, VISIT_FIELDS]: where the shared visits start in `starts`, how many
            there are, where its own start, how many of them need no mask, and how many there are.
        starts: int32 [entries], the first tokens of query blocks: all tiles' own visits, then all blocks.
        row_bits: int32 [own visits of all tiles], bit r is set when the visit is for block r of the tile.
        class_of_kv_head: int32 [KV heads].
        pair_of_head: int32 [query heads].
        num_tiles: tiles of a class.
    """

    tiles: torch.Tensor
    key_starts: torch.Tensor
    visits: torch.Tensor
    starts: torch.Tensor
    row_bits: torch.Tensor
    class_of_kv_head: torch.Tensor
    pair_of_head: torch.Tensor
    num_tiles: int


_TABLES: WeakKeyDictionary[BlockMask, dict[tuple[object, ...], KeyTiles]] = WeakKeyDictionary()


def key_tiles(
    mask: BlockMask,
    spans: tuple[Span, ...],
    num_heads: int,
    num_kv_heads: int,
    blocks: int,
    visits_per_step: int,
    device: torch.device,
) -> KeyTiles:
    """The key tiles of the sequences at `spans`; made once for the lengths of late.

    Args:
        mask: the block mask, of 1, num_kv_heads or num_heads heads.
        spans: the sequences.
        num_heads, num_kv_heads: query heads, and KV heads.
        blocks: key blocks of a tile, at most 31.
        visits_per_step: what the numbers of shared visits are to be multiples of, so that no step of the
            kernel has shared visits and others.
        device: where the tables are to be.
    """
    made = _TABLES.setdefault(mask, {})
    key = (spans, num_heads, num_kv_heads, blocks, visits_per_step, device)
    if key not in made:
        if len(made) == _MOST_TABLES:
            del made[next(iter(made))]
        made[key] = _make_key_tiles(mask, *key)
    return made[key]


def _make_key_tiles(
    mask: BlockMask,
    spans: tuple[Span, ...],
    num_heads: int,
    num_kv_heads: int,
    blocks: int,
    visits_per_step: int,
    device: torch.device,
) -> KeyTiles:
    columns = columns_of(mask, device)
    mask_of_head = [mask.mask_of_head[head * mask.num_heads // num_heads] for head in range(num_heads)]
    group = num_heads // num_kv_heads
    masks_of_kv_head = [
        tuple(sorted(set(mask_of_head[head : head + group]))) for head in range(0, num_heads, group)
    ]
    classes = sorted(set(masks_of_kv_head))
    pairs = [(n, index) for n, of_class in enumerate(classes) for index in of_class]
    class_of_kv_head = [classes.index(of_head) for of_head in masks_of_kv_head]
    pair_of_head = [
        pairs.index((class_of_kv_head[h // group], index)) for h, index in enumerate(mask_of_head)
    ]

    positions = [first_position(span, mask) for span in spans]
    rows = [
        (span.batch, span.query_start, span.key_start, first, first + span.num_queries, span.num_keys)
        for span, first in zip(spans, positions, strict=True)
    ]
    sequences = torch.tensor(rows, dtype=torch.int64, device=device).view(-1, KEY_TILE_FIELDS)
    span_of_tile, key_blocks = _tile_blocks(columns, classes, sequences[:, 5], mask, blocks)
    class_of_pair, mask_of_pair = torch.tensor(pairs, device=device).unbind(dim=1)
    tiles = Tiles(
        columns,
        key_blocks[class_of_pair],
        mask_of_pair[:, None] * mask.num_blocks,
        sequences[span_of_tile, 3],
        sequences[span_of_tile, 4],
        mask.block_size,
        mask.is_causal,
    )
    visits, starts, row_bits = list_visits(tiles, visits_per_step)
    visits[..., 0] += len(starts)
    work = visits.new_zeros(len(classes), len(span_of_tile))
    work.index_add_(0, class_of_pair, visits[..., 1] + visits[..., 4])
    order = work.argsort(dim=1, descending=True, stable=True)
    no_block = 2**31 - mask.block_size
    key_starts = torch.where(key_blocks < 0, no_block, key_blocks * mask.block_size)
    every_start = torch.arange(mask.num_query_blocks, device=device) * mask.block_size
    return KeyTiles(
        sequences[span_of_tile[order.flatten()]].int(),
        key_starts.take_along_dim(order[..., None], dim=1).flatten(0, 1).int(),
        visits.take_along_dim(order[class_of_pair][..., None], dim=1).flatten(0, 1),
        torch.cat([starts * mask.block_size, every_start]).int(),
        row_bits.int(),
        torch.tensor(class_of_kv_head, dtype=torch.int32, device=device),
        torch.tensor(pair_of_head, dtype=torch.int32, device=device),
        len(span_of_tile),
    )


def _tile_blocks(
    columns: Columns,
    classes: list[tuple[int, ...]],
    num_keys: torch.Tensor,
    mask: BlockMask,
    blocks: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The sequence of each tile, int64 [tiles], and its key blocks, int64 [classes, tiles, blocks].

    -1 stands for no block, in the last tile of a sequence. Blocks that the last query block of the mask
    attends to come first, by the masks in which it does: of the heads of an S2 pattern those that keep them.

    Args:
        num_keys: int64 [sequences].
        others: as above.
    """
    device = num_keys.device
    every_block = torch.arange(columns.num_blocks, device=device)
    num_blocks = -(-num_keys // mask.block_size)
    num_tiles = -(-num_blocks // blocks)
    first_place = (num_tiles.cumsum(0) - num_tiles) * blocks
    result = torch.full((len(classes), int(num_tiles.sum()) * blocks), -1, device=device)
    for of_class, places in zip(classes, result, strict=True):
        order = every_block
        if blocks > 1:
            order = _signs(columns, of_class, mask.num_query_blocks).argsort(descending=True, stable=True)
        sequence, place = (order < num_blocks[:, None]).nonzero(as_tuple=True)
        before = num_blocks.cumsum(0) - num_blocks
        rank = torch.arange(len(place), device=device) - before[sequence]
        places[first_place[sequence] + rank] = order[place]
    span_of_tile = torch.arange(len(num_keys), device=device).repeat_interleave(num_tiles)
    return span_of_tile, result.view(len(classes), -1, blocks)


def _signs(columns: Columns, masks: tuple[int, ...], num_query_blocks: int) -> torch.Tensor:
    """int64 [key blocks]: a bit for each of `masks` in which the last query block attends."""
    signs = torch.zeros(columns.num_blocks, dtype=torch.int64, device=columns.end.device)
    for n, index in enumerate(masks):
        first, end = (columns.offsets[(index + k) * columns.num_blocks] for k in (0, 1))
        last = columns.end[first:end] == num_query_blocks
        offsets = columns.offsets[index * columns.num_blocks : (index + 1) * columns.num_blocks]
        column = torch.searchsorted(offsets - first, last.nonzero().flatten(), right=True) - 1
        signs[column] |= 1 << n % _MOST_SIGNS
    return signs
