"""Where the two tiers of a sparse layer's KV cache keep a token.

Both tiers are pools of pages, addressed by a block table per tier, with K before V in the last dimension.

    window tier     [pages, KV heads, page_slots, 2 * head_size]: a page holds page_slots consecutive tokens,
                    of every head
    strided tier    a page spans some super-blocks; of each, every KV head keeps only the blocks of its kept
                    residues, and has a run of slots for them: slot (super-block, rank of residue, offset)

Where all heads keep equally many residues (m), the strided tier's pages may have the window tier's shape, and
span page_slots / (m * block_size) super-blocks. Where they do not (full and streaming heads, or layers of
other kinds in the same pages), a page is [virtual heads, residue_slots, 2 * head_size]: a virtual head is a
(KV head, kept residue) pair, and the slots of a KV head's virtual heads are one run.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, lru_cache
from typing import TYPE_CHECKING, NamedTuple

from s2_kernels.pattern import NO_RESIDUE, S2Pattern

if TYPE_CHECKING:
    import torch

MAX_HEAD_SIZE = 256
"""The largest that the kernels take."""

ALL_RESIDUES = -2
"""Instead of the rank of a residue: that of a query head that attends to whatever its KV head keeps."""


@dataclass(frozen=True)
class TierLayout:
    """The geometry of both tiers' pages.

    Attributes:
        pattern: the pattern of the heads whose KV the pages hold.
        page_slots: slots per KV head in a page of the window tier (P).
        residue_slots: slots per virtual head in a page of the strided tier; by default as many as make its
            pages as large as the window tier's.

    Raises:
        ValueError: a page does not hold whole blocks, heads of several kinds come without `residue_slots`, or
            only some of a KV head's query heads have a strided set.
    """

    pattern: S2Pattern
    page_slots: int
    residue_slots: int = 0

    def __post_init__(self) -> None:
        if not self.residue_slots:
            self._share_evenly()
        self._check_query_heads()
        if self.page_slots < 1:
            raise ValueError(f"page_slots: {self.page_slots}, expected a positive integer")
        if self.residue_slots < 1 or self.residue_slots % self.pattern.block_size:
            raise ValueError(
                f"residue_slots: {self.residue_slots}, expected a multiple of block_size "
                f"({self.pattern.block_size})"
            )

    def _check_query_heads(self) -> None:
        group, residues = self.pattern.group_size, self.pattern.residues
        for head in range(self.pattern.num_kv_heads):
            of_head = residues[head * group : (head + 1) * group]
            if NO_RESIDUE in of_head and set(of_head) != {NO_RESIDUE}:
                raise ValueError(
                    f"residues: {of_head} of KV head {head}, expected one of each query head or of none"
                )

    def _share_evenly(self) -> None:
        if self.pattern.kinds is not None:
            raise ValueError(self.pattern.kinds)
        unit = self.pattern.num_kept * self.pattern.block_size
        if self.page_slots < 1 or self.page_slots % unit:
            raise ValueError(
                f"page_slots: {self.page_slots}, expected a multiple of {unit} "
                f"({self.pattern.num_kept} kept residues x block_size {self.pattern.block_size})"
            )
        object.__setattr__(self, "residue_slots", self.page_slots // self.pattern.num_kept)

    @staticmethod
    def of_caches(pattern: S2Pattern, window_cache: torch.Tensor, strided_cache: torch.Tensor) -> TierLayout:
        """The layout of caches with pages of these shapes."""
        _, rows, slots = strided_cache.shape[:3]
        virtual_heads = pattern.num_virtual_heads
        residue_slots = rows * slots // virtual_heads if virtual_heads else slots
        return _layout(pattern, window_cache.shape[2], residue_slots)

    @property
    def is_even(self) -> bool:
        """Whether the strided tier's pages have the window tier's shape."""
        pattern = self.pattern
        return pattern.kinds is None and self.residue_slots * pattern.num_kept == self.page_slots

    @property
    def window_page_tokens(self) -> int:
        """Tokens that one page of the window tier spans."""
        return self.page_slots

    @property
    def super_blocks_per_page(self) -> int:
        """Super-blocks that one page of the strided tier spans."""
        return self.residue_slots // self.pattern.block_size

    @property
    def strided_page_tokens(self) -> int:
        """Tokens that one page of the strided tier spans, kept or not."""
        return self.super_blocks_per_page * self.pattern.super_block_tokens

    @property
    def strided_shape(self) -> tuple[int, int]:
        """The second and third dimension of the strided tier's cache."""
        if self.is_even:
            return self.pattern.num_kv_heads, self.page_slots
        return self.pattern.num_virtual_heads, self.residue_slots

    def window_slot(self, position: int) -> tuple[int, int]:
        """(page index in the block table, slot) of the token at `position`."""
        return divmod(position, self.page_slots)

    def strided_slot(self, kv_head: int, position: int) -> tuple[int, int] | None:
        """(page index in the block table, slot) of the token at `position`, None if not kept.

        The slot counts from the head's first one in the page.
        """
        b, s = self.pattern.block_size, self.pattern.vert_stride
        block, offset = divmod(position, b)
        super_block, residue = divmod(block, s)
        kept = self.pattern.kept_residues[kv_head]
        if residue not in kept:
            return None
        page, local_super_block = divmod(super_block, self.super_blocks_per_page)
        return page, (local_super_block * len(kept) + kept.index(residue)) * b + offset

    def strided_index(self, kv_head: int, position: int) -> tuple[int, int, int] | None:
        """(page index in the block table, and the second and third index in the cache), None if not kept."""
        place = self.strided_slot(kv_head, position)
        if place is None:
            return None
        page, slot = place
        row, slot = divmod(slot, self.strided_shape[1])
        first = kv_head if self.is_even else self.pattern.first_virtual_heads[kv_head]
        return page, first + row, slot


@lru_cache(maxsize=256)
def _layout(pattern: S2Pattern, page_slots: int, residue_slots: int) -> TierLayout:
    """Checked once: an engine asks for its layers' in every step."""
    return TierLayout(pattern, page_slots, residue_slots)


class HeadTables(NamedTuple):
    """A pattern's per-head facts as int32 tensors on one device, as the kernels read them.

    Attributes:
        residue: [num_heads], the residue of each query head; NO_RESIDUE without one.
        rank: [num_heads], the rank of that residue among its KV head's kept residues; NO_RESIDUE for query
            heads without a strided set, ALL_RESIDUES for those of full heads.
        kept: [virtual heads], the kept residues of KV head 0, of KV head 1, ...
        first_kept: [num_kv_heads + 1], where in `kept` each KV head's begin, and the total.
        rank_of_residue: [num_kv_heads, vert_stride], the rank of a residue, -1 when it is not kept.
        by_work: [num_heads], the query heads by what they attend to: streaming ones, strided ones, full ones.
    """

    residue: torch.Tensor
    rank: torch.Tensor
    kept: torch.Tensor
    first_kept: torch.Tensor
    rank_of_residue: torch.Tensor
    by_work: torch.Tensor


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

    ranks = [
        ALL_RESIDUES if h // pattern.group_size in pattern.full_heads else rank
        for h, rank in enumerate(pattern.residue_ranks)
    ]
    weights = {NO_RESIDUE: 0, ALL_RESIDUES: 2}
    return HeadTables(
        table(pattern.residues),
        table(ranks),
        table([residue for kept in pattern.kept_residues for residue in kept]),
        table([*pattern.first_virtual_heads, pattern.num_virtual_heads]),
        table(rank_of_residue),
        table(sorted(range(pattern.num_heads), key=lambda head: weights.get(ranks[head], 1))),
    )
