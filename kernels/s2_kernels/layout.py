"""Where the two tiers of a sparse layer's KV cache keep a token.

Both tiers are pools of equal pages, [pages, KV heads, page_slots, 2 * head_size] with K before V in the
last dimension, addressed by a block table per tier.

    window tier     a page holds page_slots consecutive tokens, of every head
    strided tier    a page holds page_slots / (m * block_size) super-blocks; of each, every head keeps
                    only the m blocks of its kept residues: slot (super-block, rank of residue, offset)
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import TYPE_CHECKING, NamedTuple

from s2_kernels.pattern import S2Pattern

if TYPE_CHECKING:
    import torch

MAX_HEAD_SIZE = 256
"""The largest that the kernels take."""


@dataclass(frozen=True)
class TierLayout:
    """The geometry of both tiers' pages.

    Attributes:
        pattern: the pattern of the heads whose KV the pages hold.
        page_slots: slots per KV head and page (P), a multiple of num_kept * block_size.

    Raises:
        ValueError: a page does not hold whole super-blocks, or heads are of different kinds.
    """

    pattern: S2Pattern
    page_slots: int

    def __post_init__(self) -> None:
        if self.pattern.kinds is not None:
            raise ValueError(self.pattern.kinds)
        unit = self.pattern.num_kept * self.pattern.block_size
        if self.page_slots < 1 or self.page_slots % unit:
            raise ValueError(
                f"page_slots: {self.page_slots}, expected a multiple of {unit} "
                f"({self.pattern.num_kept} kept residues x block_size {self.pattern.block_size})"
            )

    @property
    def window_page_tokens(self) -> int:
        """Tokens that one page of the window tier spans."""
        return self.page_slots

    @property
    def super_blocks_per_page(self) -> int:
        """Super-blocks that one page of the strided tier spans."""
        return self.page_slots // (self.pattern.num_kept * self.pattern.block_size)

    @property
    def strided_page_tokens(self) -> int:
        """Tokens that one page of the strided tier spans, kept or not."""
        return self.super_blocks_per_page * self.pattern.super_block_tokens

    def window_slot(self, position: int) -> tuple[int, int]:
        """(page index in the block table, slot) of the token at `position`."""
        return divmod(position, self.page_slots)

    def strided_slot(self, kv_head: int, position: int) -> tuple[int, int] | None:
        """(page index in the block table, slot) of the token at `position`, None if not kept."""
        b, s, m = self.pattern.block_size, self.pattern.vert_stride, self.pattern.num_kept
        block, offset = divmod(position, b)
        super_block, residue = divmod(block, s)
        kept = self.pattern.kept_residues[kv_head]
        if residue not in kept:
            return None
        page, local_super_block = divmod(super_block, self.super_blocks_per_page)
        return page, (local_super_block * m + kept.index(residue)) * b + offset


class HeadTables(NamedTuple):
    """A pattern's per-head facts as int32 tensors on one device, as the kernels read them.

    Attributes:
        residue: [num_heads], the residue of each query head.
        rank: [num_heads], the rank of that residue among its KV head's kept residues.
        kept: [num_kv_heads, num_kept], the kept residues.
        rank_of_residue: [num_kv_heads, vert_stride], the rank of a residue, -1 when it is not kept.
    """

    residue: torch.Tensor
    rank: torch.Tensor
    kept: torch.Tensor
    rank_of_residue: torch.Tensor


@cache
def head_tables(pattern: S2Pattern, device: torch.device) -> HeadTables:
    """The tables of `pattern` on `device`, made once and kept: CUDA graphs read them at every replay.

    For callers that own none. An engine's layers own theirs, because an engine may put to sleep what it makes
    while it loads.
    """
    return make_head_tables(pattern, device)


def make_head_tables(pattern: S2Pattern, device: torch.device) -> HeadTables:
    """New tables of `pattern` on `device`, for the caller to keep."""
    import torch

    rank_of_residue = [
        [kept.index(r) if r in kept else -1 for r in range(pattern.vert_stride)]
        for kept in pattern.kept_residues
    ]

    def table(values: object) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return HeadTables(
        table(pattern.residues),
        table(pattern.residue_ranks),
        table(pattern.kept_residues),
        table(rank_of_residue),
    )
