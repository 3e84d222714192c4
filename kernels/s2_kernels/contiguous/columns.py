"""Which query blocks attend to each key block of a block mask: the mask, column by column.

A column is given by intervals of query blocks. Those of an S2 pattern have one each, from the key block on to
the end of the window, or of the sequence where a head keeps the block: they take as much memory as the mask
has blocks. An arbitrary mask has up to an interval for every block pair that attends.
"""

from __future__ import annotations

from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from s2_kernels.masks import BlockMask


class Columns(NamedTuple):
    """The columns of each mask, and of each its key blocks in order.

    Attributes:
        first, end: int64 [intervals], the first query block of each interval, and the one after its last.
            Those of a column ascend, and do not touch.
        offsets: int64 [masks * key blocks + 1], where the intervals of key block j of mask m start, at
            m * num_blocks + j.
        longest: int64 [masks * key blocks, 2], the longest interval of each column, empty where it has none.
        num_blocks: key blocks of a mask.
    """

    first: torch.Tensor
    end: torch.Tensor
    offsets: torch.Tensor
    longest: torch.Tensor
    num_blocks: int


_COLUMNS: WeakKeyDictionary[BlockMask, dict[torch.device, Columns]] = WeakKeyDictionary()


def columns_of(mask: BlockMask, device: torch.device) -> Columns:
    """The columns of a mask; made once for each device."""
    made = _COLUMNS.setdefault(mask, {})
    if device not in made:
        made[device] = _make_columns(mask, device)
    return made[device]


def _make_columns(mask: BlockMask, device: torch.device) -> Columns:
    lists = mask.lists.to(device).long()
    firsts, ends, counts = [], [], []
    for runs in mask.runs:
        key, first, end = _intervals(runs, lists, device)
        firsts.append(first)
        ends.append(end)
        counts.append(key.bincount(minlength=mask.num_blocks))
    first, end, count = (torch.cat([*parts, lists[:0]]) for parts in (firsts, ends, counts))
    column = torch.arange(len(count), device=device).repeat_interleave(count)
    return Columns(
        first,
        end,
        torch.nn.functional.pad(count.cumsum(0), (1, 0)),
        _longest(column, first, end, len(count)),
        mask.num_blocks,
    )


def _intervals(
    runs: torch.Tensor, lists: torch.Tensor, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(key block, first query block, query block after the last) of a mask's intervals, column by column.

    Since neither end of a run moves back from row to row, the rows whose run has a given entry are
    consecutive: from the first whose run ends after the entry to the last whose run starts before it.

    Args:
        runs: int64 [query blocks, 2, 2], of one mask.
        lists: int64, what the runs are of, on `device`.
    """
    pieces = []
    for start, end in runs.permute(1, 2, 0):
        has_entries = (end > start).nonzero()
        if len(has_entries) == 0:
            continue
        entry = torch.arange(int(start[has_entries[0]]), int(end[has_entries[-1]]), device=device)
        bounds = (x.to(device).contiguous() for x in (end, start))
        row, row_after = (torch.searchsorted(bound, entry, right=True) for bound in bounds)
        pieces.append(torch.stack([lists[entry], row, row_after])[:, row < row_after])
    key, row, row_after = torch.cat([*pieces, lists.new_empty(3, 0)], dim=1)
    order = (key * (len(runs) + 1) + row).argsort()
    key, row, row_after = key[order], row[order], row_after[order]
    starts = torch.ones_like(key, dtype=torch.bool)
    starts[1:] = (key[1:] != key[:-1]) | (row[1:] != row_after[:-1])
    return key[starts], row[starts], row_after[starts.roll(-1)]


def _longest(column: torch.Tensor, first: torch.Tensor, end: torch.Tensor, num_columns: int) -> torch.Tensor:
    """int64 [num_columns, 2]: the longest interval of each column, the last of several."""
    rank = (end - first) * len(first) + torch.arange(len(first), device=first.device)
    best = rank.new_full((num_columns,), -1).scatter_reduce_(0, column, rank, "amax")
    longest = torch.zeros(num_columns, 2, dtype=torch.int64, device=first.device)
    has_any = best >= 0
    chosen = best[has_any] % max(1, len(first))
    longest[has_any] = torch.stack([first[chosen], end[chosen]], dim=-1)
    return longest
