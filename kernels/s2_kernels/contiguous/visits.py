"""Which key blocks the query tiles of a block mask visit, as a table that the kernel reads.

A tile that covers several rows of a mask (merge-Q) visits the union of their key blocks. Where a run of the
mask's lists is common to all its rows, the table has the ends of that run and no more. The other visits are
listed for each tile, with the rows that each is for. So the table of an S2 pattern grows with the number of
blocks, and that of an arbitrary mask with the number of block pairs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple
from weakref import WeakKeyDictionary

import torch

from s2_kernels.masks import BlockMask

GROUP_FIELDS = 7
_CHUNK = 1 << 22
"""Block pairs that are merged together, about: bounds the memory of intermediate results."""


class Visits(NamedTuple):
    """The key blocks that each group of mask rows visits.

    Group g of mask m covers `rows` consecutive rows of it. Its visits are, in this order: those of the first
    and of the second run that its rows share, and its own. Its own come with those first that need no mask in
    causal attention, as none of a shared run does: every row attends, and the block is older than the group.

    Attributes:
        groups: int64 [masks * num_groups, GROUP_FIELDS], of group g of mask m at m * num_groups + g: where
            its first shared run starts in `starts`, and its length; the same of the second; where its own
            visits start in `starts`, how many of them need no mask, and how many there are.
        starts: int32 [entries], the first tokens of key blocks: all groups' own visits, the mask's lists.
        row_bits: int32 [own visits of all groups], bit r is set when row r of the group attends.
        mask_of_head: int32 [heads of the mask], the mask of each.
        num_groups: groups of a mask.
    """

    groups: torch.Tensor
    starts: torch.Tensor
    row_bits: torch.Tensor
    mask_of_head: torch.Tensor
    num_groups: int


_VISITS: WeakKeyDictionary[BlockMask, dict[tuple[int, int, torch.device], Visits]] = WeakKeyDictionary()


def merge_rows(mask: BlockMask, rows: int, visits_per_step: int, device: torch.device) -> Visits:
    """The visits of groups of rows of a mask; made once.

    Args:
        mask: the block mask.
        rows: rows of a group, at most 31.
        visits_per_step: what the lengths of shared runs are to be multiples of, so that no step of the kernel
            has visits of two runs.
        device: where the tables are to be.
    """
    made = _VISITS.setdefault(mask, {})
    key = (rows, visits_per_step, device)
    if key not in made:
        made[key] = _merge_rows(mask, *key)
    return made[key]


def _merge_rows(mask: BlockMask, rows: int, visits_per_step: int, device: torch.device) -> Visits:
    lists = mask.lists.to(device)
    num_groups = -(-mask.num_query_blocks // rows)
    groups = torch.zeros(len(mask.runs), num_groups, GROUP_FIELDS, dtype=torch.int64, device=device)
    starts, row_bits = [], []
    num_own = 0
    for fields, runs in zip(groups, mask.runs, strict=True):
        runs = torch.nn.functional.pad(runs, (0, 0, 0, 0, 0, num_groups * rows - len(runs)))
        runs = runs.view(num_groups, rows, 2, 2).to(device)
        shared = _shared_runs(runs, lists, visits_per_step, mask.is_causal)
        fields[:, 0:4:2] = shared[..., 0]
        fields[:, 1:4:2] = shared[..., 1] - shared[..., 0]
        for group, block, bits, is_unmasked in _own_visits(runs, shared, lists):
            fields[:, 5] += group[is_unmasked].bincount(minlength=num_groups)
            fields[:, 6] += group.bincount(minlength=num_groups)
            starts.append((block * mask.block_size).int())
            row_bits.append(bits.int())
        ends = num_own + fields[:, 6].cumsum(0)
        fields[:, 4] = ends - fields[:, 6]
        num_own = int(ends[-1]) if num_groups else num_own
    groups[..., 0:4:2] += num_own
    return Visits(
        groups.flatten(0, 1),
        torch.cat([*starts, lists * mask.block_size]),
        torch.cat([*row_bits, lists[:0]]),
        torch.tensor(mask.mask_of_head, dtype=torch.int32, device=device),
        num_groups,
    )


def _shared_runs(
    runs: torch.Tensor, lists: torch.Tensor, visits_per_step: int, is_causal: bool
) -> torch.Tensor:
    """int64 [groups, 2, 2]: what runs [groups, rows, 2, 2] of all rows have in common, in whole steps.

    If causal, without the blocks of the group itself. Only the last block of a run can be one: a run ascends,
    and no row attends to a later block than its own, so that the first row's own is the last one in common.
    """
    first = runs[..., 0].amax(dim=1)
    end = runs[..., 1].amin(dim=1).maximum(first)
    if is_causal and len(lists):
        own_block = torch.arange(len(runs), device=runs.device)[:, None] * runs.shape[1]
        end -= ((end > first) & (lists[(end - 1).clamp(min=0)] == own_block)).long()
    return torch.stack([first, end - (end - first) % visits_per_step], dim=-1)


def _own_visits(
    runs: torch.Tensor, shared: torch.Tensor, lists: torch.Tensor
) -> Iterator[tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Yield (group, key block, row bits, whether it needs no mask) of the visits that are not shared.

    In the order of the table, some groups at a time.

    Args:
        runs: int64 [groups, rows, 2, 2].
        shared: int64 [groups, 2, 2].
        lists: int32, what the runs are of.
    """
    rows = runs.shape[1]
    first, end = runs.unbind(dim=-1)
    shared_first, shared_end = shared[:, None].unbind(dim=-1)
    # What a row has of each of its two runs before the shared part, and after it: [groups, rows, 2, 2].
    starts = torch.stack([first, first.maximum(shared_end)], dim=-1)
    lengths = (torch.stack([end.minimum(shared_first), end], dim=-1) - starts).clamp(min=0)
    of_group = lengths.flatten(1).sum(dim=1)
    sizes = ((of_group.cumsum(0) - of_group) // _CHUNK).bincount().tolist()
    first_group = 0
    for start, length in zip(starts.split(sizes), lengths.split(sizes), strict=True):
        yield _merge_pieces(start.flatten(), length.flatten(), first_group, rows, lists)
        first_group += len(start)


def _merge_pieces(
    start: torch.Tensor, length: torch.Tensor, first_group: int, rows: int, lists: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The visits of `_own_visits`, of runs in `lists` that start at `start` [4 * rows of some groups]."""
    piece = torch.arange(len(start), device=start.device).repeat_interleave(length)
    entry = torch.arange(len(piece), device=start.device) + (start - length.cumsum(0) + length)[piece]
    block = lists[entry].long()
    row = first_group * rows + piece // 4
    num_blocks = int(block.max()) + 1 if len(block) else 1
    visits, visit = torch.unique(row // rows * num_blocks + block, return_inverse=True)
    bits = torch.zeros_like(visits).index_add_(0, visit, 1 << row % rows)
    group, block = visits // num_blocks, visits % num_blocks
    is_unmasked = (bits == (1 << rows) - 1) & (block < group * rows)
    order = (2 * group + (~is_unmasked).long()).argsort(stable=True)
    return group[order], block[order], bits[order], is_unmasked[order]
