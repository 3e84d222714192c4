"""Block masks beyond the S2 pattern: who attends to what, per head, as a matrix of blocks.

A mask is a boolean tensor [heads, query blocks, key blocks], lower triangular (block causality; inside the
diagonal block token causality applies). Masks compose with `|`, and a mask with one head goes with any:

    pattern.block_mask(n) | sink_blocks(n, 1) | dense_heads(32, n, 1, num_kv_heads=8)

`BlockMask` is what attention takes: such a mask, of any origin, in CSR form with its block size.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import torch

from s2_kernels.pattern import S2Pattern, first_returning_block


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Per-head block masks as compressed sparse rows.

    Attributes:
        block_size: tokens per block, a power of two.
        crow: int32 [heads, blocks + 1], where each query block's key blocks start in `col`.
        col: int32 [heads, most key blocks of a head], key blocks in ascending order; -1 after the last.
    """

    block_size: int
    crow: torch.Tensor
    col: torch.Tensor

    @classmethod
    def from_dense(cls, mask: torch.Tensor, block_size: int) -> BlockMask:
        """The CSR form of a mask.

        A mask that is not KV-efficient (arXiv 2407.17678, section 3.2) is fine for attention over contiguous
        keys, but could not be served from a cache that evicts: it gets a warning.

        Args:
            mask: bool [heads, blocks, blocks] (query, key), lower triangular.
            block_size: tokens per block, a power of two.

        Raises:
            ValueError: an argument has a wrong shape, dtype or value, or the mask is not causal.
        """
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"block_size: {block_size}, expected a power of two")
        if mask.dtype != torch.bool or mask.dim() != 3 or mask.shape[1] != mask.shape[2]:
            raise ValueError(
                f"mask: {mask.dtype} {tuple(mask.shape)}, expected torch.bool [heads, blocks, blocks]"
            )
        mask = mask.cpu()
        for head, blocks in enumerate(mask):
            future = blocks.triu(1).nonzero()
            if len(future):
                query, key = future[0].tolist()
                raise ValueError(
                    f"mask: query block {query} of head {head} attends to the later key block {key}, "
                    "expected a causal (lower triangular) mask"
                )
        _warn_unless_kv_efficient(mask)
        return cls(block_size, *_to_csr(mask))

    @classmethod
    def from_pattern(cls, pattern: S2Pattern, num_blocks: int) -> BlockMask:
        """The S2 pattern of `num_blocks` blocks, one mask per query head."""
        distinct = sorted(set(pattern.residues))
        shared = S2Pattern(
            pattern.block_size, pattern.local_blocks, pattern.vert_stride, tuple(distinct), len(distinct)
        )
        rows = cls(pattern.block_size, *_to_csr(shared.block_mask(num_blocks)))
        return rows.select([distinct.index(residue) for residue in pattern.residues])

    @property
    def num_heads(self) -> int:
        """Heads that have a mask of their own."""
        return self.crow.shape[0]

    @property
    def num_blocks(self) -> int:
        """Query blocks, and key blocks."""
        return self.crow.shape[1] - 1

    @property
    def max_tokens(self) -> int:
        """The longest sequence that the mask covers."""
        return self.num_blocks * self.block_size

    def select(self, heads: Sequence[int]) -> BlockMask:
        """The masks of `heads`, in that order; a head may be repeated."""
        index = torch.tensor(heads, dtype=torch.int64, device=self.crow.device)
        return BlockMask(self.block_size, self.crow[index], self.col[index])

    def to_dense(self, num_blocks: int | None = None) -> torch.Tensor:
        """bool [heads, blocks, blocks] (query, key), of the first `num_blocks` blocks."""
        size = self.num_blocks if num_blocks is None else num_blocks
        if size > self.num_blocks:
            raise ValueError(f"num_blocks: {num_blocks}, expected at most {self.num_blocks}")
        dense = torch.zeros(self.num_heads, size, size, dtype=torch.bool, device=self.col.device)
        for head in range(self.num_heads):
            counts = self.crow[head].diff()[:size]
            query = torch.arange(size, device=counts.device).repeat_interleave(counts)
            dense[head, query, self.col[head, : len(query)].long()] = True
        return dense


def pattern_block_mask(pattern: S2Pattern, max_tokens: int) -> BlockMask:
    """The CSR form of a pattern for sequences of up to `max_tokens` tokens, made once.

    The number of blocks is a power of two, so that growing sequences seldom need a new one.
    """
    num_blocks = -(-max(1, max_tokens) // pattern.block_size)
    return _pattern_block_mask(pattern, 1 << (num_blocks - 1).bit_length())


@lru_cache(maxsize=16)
def _pattern_block_mask(pattern: S2Pattern, num_blocks: int) -> BlockMask:
    return BlockMask.from_pattern(pattern, num_blocks)


def local_window(num_blocks: int, local_blocks: int) -> torch.Tensor:
    """The `local_blocks` newest blocks, the query's own included: bool [1, num_blocks, num_blocks]."""
    distance = _distance(num_blocks)
    return ((distance >= 0) & (distance < local_blocks))[None]


def sink_blocks(num_blocks: int, num_sinks: int) -> torch.Tensor:
    """The first `num_sinks` blocks, always (arXiv 2309.17453): bool [1, num_blocks, num_blocks]."""
    return ((_distance(num_blocks) >= 0) & (_range(num_blocks) < num_sinks))[None]


def dense_heads(
    num_heads: int, num_blocks: int, num_dense: int, *, num_kv_heads: int | None = None
) -> torch.Tensor:
    """Everything for the query heads of the last `num_dense` KV heads, nothing for the others.

    Args:
        num_heads: query heads.
        num_blocks: query blocks, and key blocks.
        num_dense: KV heads that are dense, as DKernel counts `num_dense_heads`.
        num_kv_heads: KV heads; None for as many as query heads.

    Returns:
        bool [num_heads, num_blocks, num_blocks].
    """
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads}, expected a divisor of num_heads ({num_heads})")
    if not 0 <= num_dense <= num_kv_heads:
        raise ValueError(f"num_dense: {num_dense}, expected a value in [0, {num_kv_heads}]")
    kv_head = _range(num_heads) // (num_heads // num_kv_heads)
    is_dense = kv_head >= num_kv_heads - num_dense
    return is_dense[:, None, None] & (_distance(num_blocks) >= 0)


def range_strides(
    num_heads: int,
    num_blocks: int,
    ranges: Sequence[tuple[int | None, int]],
    *,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
) -> torch.Tensor:
    """A stride for each range of the context: ((8, 2), (None, 4)) keeps every second of the 8 nearest blocks
    (the query's own is the first of them) and every fourth of the rest.

    At stride v head h keeps the blocks j with (j + h * step + offset) mod v == 0, as in the S2 pattern. With
    one step for all ranges, and every stride a multiple of the nearer ones, nothing that a head has dropped
    returns. A query's own block is not always kept: add a `local_window`.

    Args:
        num_heads: heads of the mask: KV heads, or query heads.
        num_blocks: query blocks, and key blocks.
        ranges: (blocks, stride) of each range, from the nearest; blocks is None for all that is left.
        head_sliding_step: step; None for max(1, largest stride // num_heads).
        head_sliding_offset: offset.

    Returns:
        bool [num_heads, num_blocks, num_blocks].

    Raises:
        ValueError: there are no heads or no ranges, or one of them has no blocks, no stride or no place.
    """
    if num_heads < 1:
        raise ValueError(f"num_heads: {num_heads}, expected a positive integer")
    if not ranges or any(stride < 1 or (blocks is not None and blocks < 1) for blocks, stride in ranges):
        raise ValueError(f"ranges: {ranges}, expected (blocks, stride) pairs of positive integers")
    if any(blocks is None for blocks, _ in ranges[:-1]):
        raise ValueError(f"ranges: {ranges}, expected None for the blocks of the last range only")
    step = head_sliding_step
    if step is None:
        step = max(1, max(stride for _, stride in ranges) // num_heads)
    shift = _range(num_heads)[:, None, None] * step + head_sliding_offset
    distance = _distance(num_blocks)
    mask = torch.zeros(num_heads, num_blocks, num_blocks, dtype=torch.bool, device=distance.device)
    nearest = 0
    for blocks, stride in ranges:
        end = num_blocks if blocks is None else nearest + blocks
        mask |= (distance >= nearest) & (distance < end) & ((_range(num_blocks) + shift) % stride == 0)
        nearest = end
    return mask


def _distance(num_blocks: int) -> torch.Tensor:
    """int64 [num_blocks, num_blocks], query block - key block."""
    blocks = _range(num_blocks)
    return blocks[:, None] - blocks


def _range(size: int) -> torch.Tensor:
    """Masks are made on the CPU, whatever PyTorch's default device is."""
    return torch.arange(size, device="cpu")


def _to_csr(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    crow = torch.zeros(mask.shape[0], mask.shape[1] + 1, dtype=torch.int32, device=mask.device)
    crow[:, 1:] = mask.sum(dim=2).cumsum(dim=1)
    most = int(crow[:, -1].max()) if crow.numel() else 0
    col = torch.full((mask.shape[0], most), -1, dtype=torch.int32, device=mask.device)
    for row, blocks in zip(col, mask, strict=True):
        keys = blocks.nonzero()[:, 1]
        row[: len(keys)] = keys
    return crow, col


def _warn_unless_kv_efficient(mask: torch.Tensor) -> None:
    for head in range(mask.shape[0]):
        returning = first_returning_block(mask[head : head + 1])
        if returning is not None:
            warnings.warn(
                f"this mask is not KV-efficient: key block {returning[1]} leaves the set of head {head} and "
                "returns, so no cache may free what a head has dropped",
                stacklevel=3,
            )
            return
