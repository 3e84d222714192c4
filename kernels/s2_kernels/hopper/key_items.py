"""The work items of the gradients of keys and values: two key blocks each, one for either warpgroup.

Two blocks share the queries that attend to both. Blocks that some query head of their KV head keeps are
paired with the next one of the same residue, which all later queries of that head attend to as well; the
others, which only the window sees, with their neighbour among the others.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from s2_kernels.contiguous.sequences import Span
from s2_kernels.pattern import S2Pattern

ITEM_FIELDS = 10
NO_BLOCK = -1


@lru_cache(maxsize=16)
def key_items(
    spans: tuple[Span, ...], num_queries: int, num_keys: int, pattern: S2Pattern, device: torch.device
) -> torch.Tensor:
    """int32 [items, ITEM_FIELDS], those with the most steps last.

    The fields: KV head, the two key blocks (NO_BLOCK for none); the first and the last block of the
    sequence's queries, and the number of query blocks of the sequences before it (as in `query_blocks`); the
    rows of flattened q of its position 0, which may be before it, and of its first query; the row of
    flattened k of its first key; and its number of keys.

    Args:
        spans: the sequences.
        num_queries, num_keys: tokens of q's and of k's second dimension.
        pattern: of the heads.
        device: where the table is to be.
    """
    items, steps = [], []
    blocks_before = 0
    for span in spans:
        first_row = span.batch * num_queries + span.query_start
        past = span.num_keys - span.num_queries
        first, last = past // pattern.block_size, (span.num_keys - 1) // pattern.block_size
        last = last if span.num_queries else first - 1
        key_row = span.batch * num_keys + span.key_start
        facts = (first, last, blocks_before, first_row - past, first_row, key_row, span.num_keys)
        blocks_before += last - first + 1
        for kv_head, kept in enumerate(pattern.kept_residues):
            pairs = _pairs(-(-span.num_keys // pattern.block_size), kept, pattern.vert_stride)
            fields = torch.tensor([kv_head, 0, 0, *facts], dtype=torch.int32).repeat(len(pairs), 1)
            fields[:, 1:3] = pairs
            items.append(fields)
            steps.append(_num_steps(pairs, first, last, kv_head, pattern))
    if not items:
        return torch.empty(0, ITEM_FIELDS, dtype=torch.int32, device=device)
    return torch.cat(items)[torch.cat(steps).argsort(stable=True)].to(device)


def _pairs(num_blocks: int, kept: tuple[int, ...], stride: int) -> torch.Tensor:
    """int64 [pairs, 2]: all blocks of a sequence, each once, for a KV head with these kept residues."""
    blocks = torch.arange(num_blocks, device="cpu")
    is_other = torch.ones(stride, dtype=torch.bool, device="cpu")
    is_other[list(kept)] = False
    lists = [blocks[residue::stride] for residue in kept] + [blocks[is_other[blocks % stride]]]
    padded = [torch.nn.functional.pad(x, (0, len(x) % 2), value=NO_BLOCK) for x in lists]
    return torch.cat(padded).view(-1, 2)


def _num_steps(pairs: torch.Tensor, first: int, last: int, kv_head: int, pattern: S2Pattern) -> torch.Tensor:
    """int64 [pairs]: query blocks, of all query heads, that attend to either block."""
    total = torch.zeros(len(pairs), dtype=torch.int64, device="cpu")
    group = pattern.group_size
    for residue in pattern.residues[kv_head * group : (kv_head + 1) * group]:
        is_kept = pairs % pattern.vert_stride == residue
        end = torch.where(is_kept, last, (pairs + pattern.local_blocks - 1).clamp(max=last)) + 1
        end = end.masked_fill(pairs == NO_BLOCK, 0)
        start = pairs.clamp(min=first)
        start[:, 1] = start[:, 1].maximum(end[:, 0])
        total += (end - start).clamp(min=0).sum(dim=1)
    return total
