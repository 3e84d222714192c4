"""FlexAttention's block mask for a pattern, made from the pattern's blocks and not token by token."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch.nn.attention.flex_attention import BlockMask

from s2_kernels.pattern import S2Pattern

QUERY_BLOCK = 128
"""Rows of a query tile. Keys are in blocks of the pattern's size where Flex takes them: it skips most so."""


def gradient_key_block(head_size: int) -> int:
    """The smallest blocks of keys that Flex takes for gradients on a Hopper GPU, as it comes (torch 2.11)."""
    return 128 if head_size <= 128 else 64


@lru_cache(maxsize=1)
def flex_block_mask(
    pattern: S2Pattern, seq_len: int, device: torch.device, smallest_key_block: int = 1
) -> BlockMask:
    """The block mask of a prefill of `seq_len` tokens: one mask per query head, full blocks told apart.

    The mask function of the other blocks, on the diagonal and where the rows of a tile or the keys of a block
    differ, is the pattern token by token. `pattern.block_size` must divide QUERY_BLOCK.
    """
    block_size, ratio = pattern.block_size, QUERY_BLOCK // pattern.block_size
    key_block = max(block_size, smallest_key_block)
    per_block = key_block // block_size
    tiles, num_blocks = -(-seq_len // QUERY_BLOCK), -(-seq_len // key_block)
    with torch.device(device):
        blocks = pattern.block_mask(tiles * ratio)[:, :, : num_blocks * per_block].to(device)
        blocks = blocks.view(pattern.num_heads, tiles, ratio, num_blocks, per_block)
        ends = torch.arange(1, num_blocks + 1) * key_block
        before_tile = ends <= torch.arange(0, tiles * QUERY_BLOCK, QUERY_BLOCK)[:, None]
        is_full = blocks.all(dim=4).all(dim=2) & before_tile
        is_partial = blocks.any(dim=4).any(dim=2) & ~is_full
        residues = torch.tensor(pattern.residues, dtype=torch.int32)
        is_full_head = torch.tensor(
            [head // pattern.group_size in pattern.full_heads for head in range(pattern.num_heads)]
        )

    def attends(
        batch: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        query_block, key_block = query // block_size, key // block_size
        in_window = query_block - key_block < pattern.local_blocks
        in_shard = key_block % pattern.vert_stride == residues[head]
        is_sink = key_block < pattern.sink_blocks
        return (key <= query) & (in_window | in_shard | is_sink | is_full_head[head])

    return BlockMask.from_kv_blocks(
        *_indices(is_partial),
        *_indices(is_full),
        BLOCK_SIZE=(QUERY_BLOCK, key_block),
        mask_mod=attends,
        seq_lengths=(seq_len, seq_len),
    )


def _indices(blocks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Of bool [heads, tiles, blocks]: int32 [1, heads, tiles] counts, and the indices, those set first."""
    counts = blocks.sum(dim=-1, dtype=torch.int32)
    indices = blocks.to(torch.int8).argsort(dim=-1, descending=True, stable=True).int()
    return counts[None], indices[None]
