"""Who attends to what: the sparsity pattern of S2-Attention (arXiv 2407.17678, section 3).

A pattern is a statement about blocks of `block_size` tokens. Query block i of head h attends to key
block j <= i when

    i - j < local_blocks                    the local window, the same for every head, or
    j < sink_blocks                         the sinks, likewise, or
    j mod vert_stride == residues[h]        the strided set, a shard of its own for each head.

A full head attends to every block. A streaming head has no strided set: the window and the sinks are all
that it has (DuoAttention, arXiv 2410.10819, section 2).

Sinks and strided sets are defined on absolute block numbers, so a block that a head has dropped never comes
back to it: what leaves the window and is in no head's set can be freed for good.

This module is the only place that knows this. It needs torch for `block_mask` alone.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    import torch

PatternHeads = Literal["kv", "query"]

MAX_VERT_STRIDE = 2**16
"""A super-block counts its tokens in 32 bits, and each head has a table of the stride's length."""

NO_RESIDUE = -1
"""Of a query head without a strided set."""

_HANDLE = "s2:"
_NUMBERS = r"-?\d+(?:,-?\d+)*"
_HANDLE_FORM = re.compile(rf"{_HANDLE}({_NUMBERS})(?:/(\d+)/({_NUMBERS})?)?")

_CHUNK = 1 << 20
"""Block pairs that are looked at together: bounds the memory of intermediate results."""


@dataclass(frozen=True)
class S2Pattern:
    """The pattern of one layer, or of one tensor-parallel rank's share of its heads.

    Attributes:
        block_size: tokens per block, a power of two; the unit of sparsity.
        local_blocks: blocks of the local window, the query's own block included.
        vert_stride: distance, in blocks, between the strided blocks of a head.
        residues: for each query head, the residue modulo `vert_stride` of its strided blocks; NO_RESIDUE for
            streaming and full heads.
        num_kv_heads: KV heads; query head h reads KV head h // (num_heads // num_kv_heads).
        sink_blocks: the first blocks, which every head attends to.
        full_heads: KV heads whose query heads attend to everything, ascending.
        handle: the pattern as text, for operators that take no Python objects; see `from_handle`.

    Raises:
        ValueError: a value is out of range, or KV heads with strided sets keep different numbers of residues.
    """

    block_size: int
    local_blocks: int
    vert_stride: int
    residues: tuple[int, ...]
    num_kv_heads: int
    sink_blocks: int = 0
    full_heads: tuple[int, ...] = ()
    handle: str = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        _check_power_of_two("block_size", self.block_size)
        _check_positive("local_blocks", self.local_blocks)
        _check_positive("vert_stride", self.vert_stride)
        if self.vert_stride > MAX_VERT_STRIDE:
            raise ValueError(f"vert_stride: {self.vert_stride}, expected at most {MAX_VERT_STRIDE}")
        _check_positive("num_kv_heads", self.num_kv_heads)
        if not self.residues or len(self.residues) % self.num_kv_heads:
            raise ValueError(
                f"residues: {len(self.residues)} query heads, expected a positive multiple of "
                f"num_kv_heads ({self.num_kv_heads})"
            )
        if not all(r == NO_RESIDUE or 0 <= r < self.vert_stride for r in self.residues):
            raise ValueError(f"residues: {self.residues}, expected values in [0, {self.vert_stride})")
        if self.sink_blocks < 0:
            raise ValueError(f"sink_blocks: {self.sink_blocks}, expected a number of at least 0")
        self._check_full_heads()
        num_strided = [len(residues) for residues in self._strided_residues]
        if self.vert_stride != 1 and not any(num_strided):
            raise ValueError(f"vert_stride: {self.vert_stride}, expected 1 where no head has a strided set")
        if len(set(num_strided) - {0}) > 1:
            raise ValueError(
                f"residues: KV heads keep {num_strided} residues, expected the same number for every KV head"
            )
        numbers = (self.block_size, self.local_blocks, self.vert_stride, self.num_kv_heads, *self.residues)
        handle = _HANDLE + ",".join(map(str, numbers))
        if self.sink_blocks or self.full_heads:
            handle += f"/{self.sink_blocks}/{','.join(map(str, self.full_heads))}"
        # An attribute, because torch.compile does not trace what makes one when it is asked for.
        object.__setattr__(self, "handle", handle)

    def _check_full_heads(self) -> None:
        if not all(0 <= head < self.num_kv_heads for head in self.full_heads):
            raise ValueError(
                f"full_heads: {self.full_heads}, expected KV heads from 0 to {self.num_kv_heads - 1}"
            )
        if list(self.full_heads) != sorted(set(self.full_heads)):
            raise ValueError(f"full_heads: {self.full_heads}, expected every head once, in ascending order")
        strided = [h for h in self.full_heads if self._strided_residues[h]]
        if strided:
            raise ValueError(f"residues: some of the full heads {strided}, expected {NO_RESIDUE} for them")

    @cached_property
    def _strided_residues(self) -> list[list[int]]:
        """For each KV head, the sorted residues that its query heads have."""
        g = self.group_size
        of_heads = (self.residues[h * g : (h + 1) * g] for h in range(self.num_kv_heads))
        return [sorted(set(residues) - {NO_RESIDUE}) for residues in of_heads]

    @classmethod
    def from_handle(cls, handle: str) -> S2Pattern:
        """The pattern with this `handle`.

        Raises:
            ValueError: it is of no pattern.
        """
        found = _HANDLE_FORM.fullmatch(handle)
        numbers = [] if found is None else [int(number) for number in found[1].split(",")]
        if found is None or len(numbers) < 5:
            raise ValueError(f"handle: {handle!r}, expected that of a pattern, {_HANDLE!r} and numbers")
        block_size, local_blocks, vert_stride, num_kv_heads, *residues = numbers
        full_heads = tuple(map(int, found[3].split(","))) if found[3] else ()
        sinks = int(found[2] or 0)
        return cls(block_size, local_blocks, vert_stride, tuple(residues), num_kv_heads, sinks, full_heads)

    @classmethod
    def build(
        cls,
        num_heads: int,
        num_kv_heads: int,
        *,
        block_size: int = 64,
        local_blocks: int = 16,
        vert_stride: int | None = 8,
        homo_head: bool = False,
        head_sliding_step: int | None = None,
        head_sliding_offset: int = 0,
        pattern_heads: PatternHeads = "kv",
        sink_blocks: int = 0,
        full_heads: Sequence[int] = (),
    ) -> S2Pattern:
        """The pattern that DKernel's parameters describe.

        Pattern head h (a KV head, or a query head when `pattern_heads` is "query") attends to every
        older block j with (j + h * step + head_sliding_offset) mod vert_stride == 0. `step` is
        `head_sliding_step`, by default max(1, vert_stride // num_heads), and 0 when `homo_head` gives all
        heads one pattern. The default counts query heads whatever h counts, as DKernel's does: another
        would give a model trained with DKernel a mask that it was not trained with.

        The query heads of the KV heads in `full_heads` attend to everything. With `vert_stride` None the
        others have no strided set.
        """
        _check_positive("num_heads", num_heads)
        _check_positive("num_kv_heads", num_kv_heads)
        if vert_stride is not None:
            _check_positive("vert_stride", vert_stride)
        if pattern_heads not in ("kv", "query"):
            raise ValueError(f"pattern_heads: {pattern_heads!r}, expected 'kv' or 'query'")
        if num_heads % num_kv_heads:
            raise ValueError(f"num_heads: {num_heads}, expected a multiple of num_kv_heads ({num_kv_heads})")
        group = num_heads // num_kv_heads
        full = tuple(sorted(full_heads))
        if vert_stride is None:
            none = (NO_RESIDUE,) * num_heads
            return cls(block_size, local_blocks, 1, none, num_kv_heads, sink_blocks, full)
        if pattern_heads == "query" and not homo_head and group > vert_stride:
            raise ValueError(
                f"vert_stride: {vert_stride}, expected at least {group} with pattern_heads 'query', for "
                f"the {group} query heads of a KV head to have a residue each"
            )
        step = head_sliding_step
        if step is None:
            step = max(1, vert_stride // num_heads)
        if homo_head:
            step = 0
        residues = tuple(
            -((h if pattern_heads == "query" else h // group) * step + head_sliding_offset) % vert_stride
            if h // group not in full
            else NO_RESIDUE
            for h in range(num_heads)
        )
        if all(residue == NO_RESIDUE for residue in residues):
            vert_stride = 1
        return cls(block_size, local_blocks, vert_stride, residues, num_kv_heads, sink_blocks, full)

    @property
    def num_heads(self) -> int:
        """Query heads."""
        return len(self.residues)

    @property
    def group_size(self) -> int:
        """Query heads per KV head."""
        return self.num_heads // self.num_kv_heads

    @cached_property
    def kept_residues(self) -> tuple[tuple[int, ...], ...]:
        """For each KV head, the sorted residues of its query heads: what its strided tier stores."""
        return tuple(
            tuple(range(self.vert_stride) if h in self.full_heads else residues)
            for h, residues in enumerate(self._strided_residues)
        )

    @property
    def kinds(self) -> str | None:
        """Why what wants one residue of every query head does not take the pattern, None where it does."""
        found = None
        if self.sink_blocks:
            found = f"sink_blocks: {self.sink_blocks}"
        elif self.full_heads:
            found = f"full_heads: {self.full_heads}"
        elif NO_RESIDUE in self.residues:
            found = "residues: none of some heads"
        return found and f"pattern: {found}, expected a strided set of every head and no more"

    @property
    def num_kept(self) -> int:
        """m: residues that each KV head keeps, where all have a strided set and nothing else."""
        return len(self.kept_residues[0])

    @property
    def most_strided(self) -> int:
        """Residues of a KV head that has a strided set, 0 where none has one."""
        return max(map(len, self._strided_residues))

    @cached_property
    def num_virtual_heads(self) -> int:
        """(KV head, kept residue) pairs: what a strided tier has slots for."""
        return sum(map(len, self.kept_residues))

    @cached_property
    def first_virtual_heads(self) -> tuple[int, ...]:
        """For each KV head, the virtual heads of those before it."""
        counts = [len(kept) for kept in self.kept_residues]
        return tuple(accumulate(counts, initial=0))[:-1]

    @cached_property
    def residue_ranks(self) -> tuple[int, ...]:
        """For each query head, the rank of its residue among its KV head's kept residues."""
        return tuple(
            NO_RESIDUE if r == NO_RESIDUE else self.kept_residues[h // self.group_size].index(r)
            for h, r in enumerate(self.residues)
        )

    @property
    def window_tokens(self) -> int:
        """Tokens of a full local window: local_blocks * block_size."""
        return self.local_blocks * self.block_size

    @property
    def super_block_tokens(self) -> int:
        """Tokens of a super-block: vert_stride * block_size."""
        return self.vert_stride * self.block_size

    @property
    def is_union_complete(self) -> bool:
        """Whether every block is in some head's set, however old it is."""
        return bool(self.full_heads) or set(self.residues) >= set(range(self.vert_stride))

    def attends(self, head: int, query_block: int, key_block: int) -> bool:
        """Whether `query_block` of query head `head` attends to `key_block` (block causality)."""
        if not 0 <= key_block <= query_block:
            return False
        return (
            query_block - key_block < self.local_blocks
            or key_block < self.sink_blocks
            or head // self.group_size in self.full_heads
            or key_block % self.vert_stride == self.residues[head]
        )

    def block_mask(self, num_blocks: int) -> torch.Tensor:
        """`attends` for all heads and blocks: bool [num_heads, num_blocks, num_blocks], on the CPU."""
        import torch

        query = torch.arange(num_blocks, device="cpu")[:, None]
        key = torch.arange(num_blocks, device="cpu")[None, :]
        always = (key > query - self.local_blocks) | (key < self.sink_blocks)
        strided = key % self.vert_stride == torch.tensor(self.residues, device="cpu")[:, None, None]
        full = [head // self.group_size in self.full_heads for head in range(self.num_heads)]
        return (always | strided | torch.tensor(full, device="cpu")[:, None, None]) & (key <= query)

    def stored_tokens(self, length: int) -> tuple[float, float]:
        """Tokens that the window tier and the strided tier store at a context of `length` tokens.

        Per KV head, averaged over KV heads. The window tier holds what the next token's query still
        sees, and the sinks; both tiers hold a recent token that is also in the strided set.
        """
        b, s = self.block_size, self.vert_stride
        first_window_block = max(0, length // b - self.local_blocks + 1)
        window = length - max(0, first_window_block - self.sink_blocks) * b
        strided = 0
        for kept in self.kept_residues:
            for residue in kept:
                full, rest = divmod(max(0, length - residue * b), s * b)
                strided += full * b + min(rest, b)
        return float(window), strided / self.num_kv_heads

    def stored_fraction(self, length: int) -> float:
        """Tokens stored at a context of `length` tokens, as a fraction of what a dense layer stores.

        Above 1 for contexts hardly longer than the window, where the strided tier is an extra.
        """
        return sum(self.stored_tokens(length)) / length

    def attended_fraction(self, length: int) -> float:
        """Block pairs attended in a prefill of `length` tokens, relative to dense causal attention.

        A diagonal block counts as half a block, in both.
        """
        blocks = -(-length // self.block_size)
        dense = blocks * blocks / 2
        attended = 0.0
        for head, residue in enumerate(self.residues):
            is_full = head // self.group_size in self.full_heads
            step = 1 if is_full else self.vert_stride
            first = self.sink_blocks + (residue - self.sink_blocks) % step
            for i in range(blocks):
                older = max(0, i - self.local_blocks + 1)
                attended += i + 0.5 - older + min(older, self.sink_blocks)
                if is_full or residue != NO_RESIDUE:
                    attended += len(range(first, older, step))
        return attended / (dense * self.num_heads)

    def shard(self, rank: int, size: int) -> S2Pattern:
        """The heads of tensor-parallel rank `rank` of `size`, with their own residues.

        As in vLLM, a rank holds num_heads / size query heads and their KV heads; a KV head is
        replicated when there are more ranks than KV heads.
        """
        if not 0 <= rank < size:
            raise ValueError(f"rank: {rank}, expected a value in [0, {size})")
        if self.num_heads % size:
            raise ValueError(
                f"tensor-parallel size: {size}, expected a divisor of the {self.num_heads} query heads"
            )
        if self.num_kv_heads % size and size % self.num_kv_heads:
            raise ValueError(
                f"tensor-parallel size: {size}, expected a divisor or a multiple of the "
                f"{self.num_kv_heads} KV heads"
            )
        per_rank = self.num_heads // size
        return self.of_heads(rank * per_rank, (rank + 1) * per_rank)

    def of_heads(self, first: int, end: int) -> S2Pattern:
        """The pattern of the query heads `first` to `end` - 1: those of whole KV heads, or some of one."""
        residues = self.residues[first:end]
        first_kv, num_kv_heads = first // self.group_size, max(1, (end - first) // self.group_size)
        full_heads = tuple(h - first_kv for h in self.full_heads if first_kv <= h < first_kv + num_kv_heads)
        return S2Pattern(
            self.block_size,
            self.local_blocks,
            self.vert_stride if set(residues) != {NO_RESIDUE} else 1,
            residues,
            num_kv_heads,
            self.sink_blocks,
            full_heads,
        )

    def draw(self, path: str | Path, num_blocks: int | None = None) -> None:
        """Save one panel per head as an image (PNG or SVG by the suffix). Needs matplotlib."""
        from s2_kernels.draw import draw_pattern

        draw_pattern(self, path, num_blocks)


def first_returning_block(block_mask: torch.Tensor) -> tuple[int, int] | None:
    """The first (head, key block) that leaves a head's set and returns, or None when none does.

    Freeing what a head has dropped is sound only when nothing returns; such a mask is called
    KV-efficient (arXiv 2407.17678, section 3.2).

    Args:
        block_mask: bool [num_heads, query blocks, key blocks], lower triangular.
    """
    if block_mask.dim() != 3 or block_mask.shape[1] != block_mask.shape[2]:
        raise ValueError(f"block_mask: shape {tuple(block_mask.shape)}, expected [heads, blocks, blocks]")
    heads, blocks, _ = block_mask.shape
    returning = block_mask.new_zeros(heads, blocks)
    chunk = max(1, _CHUNK // max(1, heads * blocks))
    for first in range(0, blocks - 1, chunk):
        end = min(first + chunk, blocks - 1)
        earlier, later = block_mask[:, first:end], block_mask[:, first + 1 : end + 1]
        # A block that returns does so from one query block to the next, of which the earlier could have it.
        returning |= (later & ~earlier).tril(first).any(dim=1)
    found = returning.nonzero()
    return None if len(found) == 0 else (int(found[0, 0]), int(found[0, 1]))


def _check_positive(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}: {value}, expected a positive integer")


def _check_power_of_two(name: str, value: int) -> None:
    if value < 1 or value & (value - 1):
        raise ValueError(f"{name}: {value}, expected a power of two")
