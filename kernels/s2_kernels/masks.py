"""Block masks beyond the S2 pattern: who attends to what, per head, as a matrix of blocks.

A mask is a boolean tensor [heads, query blocks, key blocks], lower triangular (block causality; inside the
diagonal block token causality applies). Masks compose with `|`, and a mask with one head goes with any:

    pattern.block_mask(n) | sink_blocks(n, 1) | dense_heads(32, n, 1, num_kv_heads=8)

`BlockMask` is what attention takes: such a mask, of any origin, in sparse form with its block size. It may
also be of attention that is not causal, and of fewer query blocks than key blocks.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field, fields, replace
from functools import lru_cache
from itertools import count
from weakref import WeakValueDictionary

import torch

from s2_kernels.pattern import S2Pattern

_CHUNK = 1 << 20
"""Block pairs that are looked at together: bounds the memory of intermediate results."""


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Per-head block masks. A row of one is given by two runs of lists that rows and heads share.

    The rows of an S2 pattern are parts of one list for the window and of one for each residue: the mask of a
    million tokens takes a few megabytes. An arbitrary mask has a run of its own for every row (CSR).

    Attributes:
        block_size: tokens per block, a power of two.
        num_blocks: key blocks.
        lists: int32 [entries], key blocks.
        runs: int64 [masks, query blocks, 2, 2], for each row two runs, of which either may be empty: the
            first entry in `lists`, and the one after the last. Key blocks ascend from run to run as well.
            From row to row neither end of a run moves back.
        mask_of_head: for each head, its index in `runs`.
        is_causal: whether a token attends to no later one. Query block i is then as old as key block i.
        first_row: the first query block that the mask knows; rows before it are empty. 0 if not causal.
        handle: a name of this mask in this process, for operators that take no Python objects; see
            `from_handle`.
    """

    block_size: int
    num_blocks: int
    lists: torch.Tensor
    runs: torch.Tensor
    mask_of_head: tuple[int, ...]
    is_causal: bool
    first_row: int
    handle: str = field(init=False, repr=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "handle", f"{_HANDLE}{next(_NUMBERS)}")
        _BY_HANDLE[self.handle] = self

    def __reduce__(self) -> tuple[type[BlockMask], tuple[object, ...]]:
        """A copy, in this process or another, has a handle of its own."""
        return BlockMask, tuple(getattr(self, of.name) for of in fields(self) if of.init)

    @classmethod
    def from_handle(cls, handle: str) -> BlockMask:
        """The mask with this `handle`.

        Raises:
            ValueError: it is of no mask of this process, or the mask is no more.
        """
        mask = _BY_HANDLE.get(handle)
        if mask is None:
            raise ValueError(f"handle: {handle!r}, expected that of a block mask which is still in use")
        return mask

    @staticmethod
    def is_handle(handle: str) -> bool:
        """Whether this is the handle of a block mask, and not of a pattern."""
        return handle.startswith(_HANDLE)

    @classmethod
    def from_dense(cls, mask: torch.Tensor, block_size: int, *, causal: bool = True) -> BlockMask:
        """A mask given block pair by block pair.

        A causal mask that is not KV-efficient (arXiv 2407.17678, section 3.2) is fine for attention over
        contiguous keys, but could not be served from a cache that evicts: it gets a warning.

        Args:
            mask: bool [heads, query blocks, key blocks].
            block_size: tokens per block, a power of two.
            causal: whether a token attends to no later one. If so the mask is lower triangular; with fewer
                query blocks than key blocks its rows are the last ones of such a mask. If not, its rows start
                with that of the first query.

        Raises:
            ValueError: an argument has a wrong shape, dtype or value, or the mask is not causal.
        """
        if mask.dtype != torch.bool or mask.dim() != 3 or (causal and mask.shape[1] > mask.shape[2]):
            expected = "torch.bool [heads, query blocks, at least as many key blocks]"
            if not causal:
                expected = "torch.bool [heads, query blocks, key blocks]"
            raise ValueError(f"mask: {mask.dtype} {tuple(mask.shape)}, expected {expected}")
        return cls._from_rows(*_key_blocks_of_rows(mask.cpu()), mask.shape[2], block_size, causal)

    @classmethod
    def from_csr(
        cls,
        crow: torch.Tensor,
        col: torch.Tensor,
        block_size: int,
        *,
        num_blocks: int | None = None,
        causal: bool = True,
    ) -> BlockMask:
        """A mask given as compressed sparse rows, which need memory for the attended block pairs only.

        Args:
            crow: integers [heads, query blocks + 1], where each query block's key blocks start in `col`.
            col: integers [heads, at least as many as a head's key blocks], ascending in each row.
            block_size, causal: as in `from_dense`; the same warning.
            num_blocks: key blocks; None for as many as query blocks.

        Raises:
            ValueError: an argument has a wrong shape or value, or the mask is not causal.
        """
        if crow.dim() != 2 or col.dim() != 2 or len(crow) != len(col) or crow.shape[1] < 1:
            raise ValueError(
                f"crow: shape {tuple(crow.shape)}, expected [heads, query blocks + 1] for col's shape "
                f"{tuple(col.shape)}"
            )
        crow, col = crow.cpu().long(), col.cpu()
        counts = crow.diff()
        if (crow[:, 0] != 0).any() or (counts < 0).any() or (crow[:, -1] > col.shape[1]).any():
            raise ValueError(f"crow: {crow.tolist()}, expected ascending values from 0 to {col.shape[1]}")
        num_blocks = counts.shape[1] if num_blocks is None else num_blocks
        if causal and counts.shape[1] > num_blocks:
            raise ValueError(
                f"crow: {counts.shape[1]} query blocks, expected at most as many as key blocks ({num_blocks})"
            )
        lists = torch.cat([row[: int(end)].int() for row, end in zip(col, crow[:, -1], strict=True)])
        _check_ascending(lists, counts, num_blocks)
        return cls._from_rows(lists, counts, num_blocks, block_size, causal)

    @classmethod
    def _from_rows(
        cls, lists: torch.Tensor, counts: torch.Tensor, num_blocks: int, block_size: int, causal: bool
    ) -> BlockMask:
        """The mask whose rows have `counts` [heads, query blocks] key blocks each, one after the other."""
        if block_size < 1 or block_size & (block_size - 1):
            raise ValueError(f"block_size: {block_size}, expected a power of two")
        heads, query_blocks = counts.shape
        first_row = num_blocks - query_blocks if causal else 0
        ends = counts.flatten().cumsum(0).view_as(counts)
        runs = torch.zeros(heads, first_row + query_blocks, 2, 2, dtype=torch.int64, device="cpu")
        runs[:, first_row:, 1] = torch.stack([ends - counts, ends], dim=-1)
        if causal:
            _check_causal(lists, runs[:, :, 1])
            _warn_unless_kv_efficient(lists, runs[:, first_row:, 1], num_blocks)
        return cls(block_size, num_blocks, lists, runs, tuple(range(heads)), causal, first_row)

    @classmethod
    def from_pattern(cls, pattern: S2Pattern, num_blocks: int) -> BlockMask:
        """The S2 pattern of `num_blocks` blocks, one mask per query head."""
        query = _range(num_blocks)
        # The blocks that each kind of head keeps however old they are: (first, step), after the sinks.
        sets = [
            (0, 1) if head // pattern.group_size in pattern.full_heads else (residue, pattern.vert_stride)
            for head, residue in enumerate(pattern.residues)
        ]
        distinct = sorted(set(sets))
        window_starts = (query - pattern.local_blocks + 1).clamp(min=0)
        runs = torch.empty(len(distinct), num_blocks, 2, 2, dtype=torch.int64, device="cpu")
        runs[:, :, 1] = torch.stack([window_starts, query + 1], dim=-1)
        lists = [query]
        first_entry = num_blocks
        for of_set, (first, step) in zip(runs[:, :, 0], distinct, strict=True):
            # Without a strided set `first` is no residue of any block.
            lists.append(query[(query < pattern.sink_blocks) | (query % step == first)])
            of_set[:, 0] = first_entry
            # How many of them are older than the window.
            of_set[:, 1] = first_entry + torch.searchsorted(lists[-1], window_starts)
            first_entry += len(lists[-1])
        mask_of_head = tuple(map(distinct.index, sets))
        return cls(pattern.block_size, num_blocks, torch.cat(lists).int(), runs, mask_of_head, True, 0)

    @classmethod
    def of_heads(cls, masks: Sequence[BlockMask]) -> BlockMask:
        """The heads of several causal masks of as many blocks of the same size, one after the other.

        Raises:
            ValueError: the masks do not go together.
        """
        facts = {(mask.block_size, mask.num_blocks, mask.is_causal, mask.first_row) for mask in masks}
        if len(facts) != 1:
            raise ValueError(
                f"masks: (block size, blocks, causal, first row) {sorted(facts)}, expected the same of all"
            )
        runs, mask_of_head = [], []
        num_entries = num_masks = 0
        for mask in masks:
            runs.append(mask.runs + num_entries)
            mask_of_head += [num_masks + index for index in mask.mask_of_head]
            num_entries += len(mask.lists)
            num_masks += len(mask.runs)
        lists = torch.cat([mask.lists for mask in masks])
        return replace(masks[0], lists=lists, runs=torch.cat(runs), mask_of_head=tuple(mask_of_head))

    @property
    def num_heads(self) -> int:
        """Heads that have a mask."""
        return len(self.mask_of_head)

    @property
    def num_query_blocks(self) -> int:
        """Query blocks, known or not."""
        return self.runs.shape[1]

    @property
    def max_tokens(self) -> int:
        """The longest sequence of keys that the mask covers."""
        return self.num_blocks * self.block_size

    @property
    def crow(self) -> torch.Tensor:
        """int32 [heads, known query blocks + 1], where each query block's key blocks start in `col`.

        Made when asked for, like `col`: both are as large as the number of block pairs, which the mask itself
        need not be. int64 where there are too many for int32.
        """
        counts = self._runs_of_heads().diff(dim=-1).sum(dim=(2, 3))
        crow = torch.nn.functional.pad(counts.cumsum(dim=1), (1, 0))
        return crow if (crow >= 2**31).any() else crow.int()

    @property
    def col(self) -> torch.Tensor:
        """int32 [heads, most key blocks of a head], key blocks in ascending order; -1 after the last."""
        rows = [self.lists[_entries(runs.flatten(0, 1))] for runs in self._runs_of_heads()]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)

    def _runs_of_heads(self) -> torch.Tensor:
        return self.runs[list(self.mask_of_head), self.first_row :]

    def select(self, heads: Sequence[int]) -> BlockMask:
        """The masks of `heads`, in that order; a head may be repeated."""
        chosen = [self.mask_of_head[head] for head in heads]
        distinct = sorted(set(chosen))
        mask_of_head = tuple(distinct.index(index) for index in chosen)
        return replace(self, runs=self.runs[distinct], mask_of_head=mask_of_head)

    def to_dense(self, num_blocks: int | None = None) -> torch.Tensor:
        """bool [heads, known query blocks, key blocks], of the first `num_blocks` blocks."""
        if num_blocks is None:
            return self.dense_rows(self.first_row, self.num_query_blocks)
        if num_blocks > self.num_blocks:
            raise ValueError(f"num_blocks: {num_blocks}, expected at most {self.num_blocks}")
        end = min(num_blocks, self.num_query_blocks)
        return self.dense_rows(min(self.first_row, end), end)[..., :num_blocks]

    def dense_rows(self, first: int, end: int) -> torch.Tensor:
        """bool [heads, end - first, key blocks]: the rows of query blocks `first` to `end` - 1."""
        dense = torch.zeros(len(self.runs), end - first, self.num_blocks, dtype=torch.bool, device="cpu")
        for rows, runs in zip(dense, self.runs[:, first:end], strict=True):
            counts = runs.diff(dim=-1).sum(dim=(1, 2))
            query = _range(end - first).repeat_interleave(counts)
            rows[query, self.lists[_entries(runs.flatten(0, 1))].long()] = True
        return dense[list(self.mask_of_head)]

    def token_mask(self, first: int, num_queries: int, num_keys: int) -> torch.Tensor:
        """What some queries attend to, token by token.

        Args:
            first: position of the first query.
            num_queries: consecutive queries.
            num_keys: keys, from the first one on.

        Returns:
            bool [heads, num_queries, num_keys].
        """
        positions = first + _range(num_queries)[:, None]
        keys = _range(num_keys)
        first_block = first // self.block_size
        blocks = self.dense_rows(first_block, -(-(first + num_queries) // self.block_size))
        visible = blocks[:, positions // self.block_size - first_block, keys // self.block_size]
        return visible & (keys <= positions) if self.is_causal else visible


_HANDLE = "block mask "
_NUMBERS = count()
_BY_HANDLE: WeakValueDictionary[str, BlockMask] = WeakValueDictionary()


def pattern_block_mask(pattern: S2Pattern, max_tokens: int) -> BlockMask:
    """The mask of a pattern for sequences of up to `max_tokens` tokens, made once.

    The number of blocks is a power of two, so that growing sequences seldom need a new one.
    """
    num_blocks = -(-max(1, max_tokens) // pattern.block_size)
    return _pattern_block_mask(pattern, 1 << (num_blocks - 1).bit_length())


@lru_cache(maxsize=16)
def _pattern_block_mask(pattern: S2Pattern, num_blocks: int) -> BlockMask:
    return BlockMask.from_pattern(pattern, num_blocks)


def local_window(num_blocks: int, local_blocks: int) -> torch.Tensor:
    """The `local_blocks` newest blocks, the query's own included: bool [1, num_blocks, num_blocks]."""
    query, key = _query_and_key(num_blocks)
    return ((key <= query) & (key > query - local_blocks))[None]


def sink_blocks(num_blocks: int, num_sinks: int) -> torch.Tensor:
    """The first `num_sinks` blocks, always (arXiv 2309.17453): bool [1, num_blocks, num_blocks]."""
    query, key = _query_and_key(num_blocks)
    return ((key <= query) & (key < num_sinks))[None]


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
    query, key = _query_and_key(num_blocks)
    return is_dense[:, None, None] & (key <= query)


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
    query, key = _query_and_key(num_blocks)
    mask = torch.zeros(num_heads, num_blocks, num_blocks, dtype=torch.bool, device="cpu")
    nearest = 0
    for blocks, stride in ranges:
        end = num_blocks if blocks is None else nearest + blocks
        mask |= (key <= query - nearest) & (key > query - end) & ((key + shift) % stride == 0)
        nearest = end
    return mask


def _query_and_key(num_blocks: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Query blocks [num_blocks, 1] and key blocks [num_blocks]. To compare them needs no third matrix."""
    return _range(num_blocks)[:, None], _range(num_blocks)


def _range(size: int) -> torch.Tensor:
    """Masks are made on the CPU, whatever PyTorch's default device is."""
    return torch.arange(size, device="cpu")


def _entries(runs: torch.Tensor) -> torch.Tensor:
    """int64: the entries of [runs, 2] (first, end), one run after the other."""
    lengths = runs[:, 1] - runs[:, 0]
    before = lengths.cumsum(0) - lengths
    return _range(int(lengths.sum())) + (runs[:, 0] - before).repeat_interleave(lengths)


def _key_blocks_of_rows(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The key blocks of all rows of all heads, int32, and their numbers: int64 [heads, query blocks]."""
    rows = mask.flatten(0, 1)
    lists = torch.empty(int(mask.count_nonzero()), dtype=torch.int32, device="cpu")
    counts = []
    start = 0
    for some_rows in rows.split(max(1, _CHUNK // max(1, rows.shape[1]))):
        query, key = some_rows.nonzero(as_tuple=True)
        lists[start : start + len(key)] = key
        counts.append(query.bincount(minlength=len(some_rows)))
        start += len(key)
    return lists, torch.cat(counts).view(mask.shape[:2])


def _check_ascending(lists: torch.Tensor, counts: torch.Tensor, num_blocks: int) -> None:
    """Raise ValueError unless rows, of `counts` [heads, query blocks] entries, list key blocks in order."""
    starts_row = torch.zeros(len(lists) + 1, dtype=torch.bool, device="cpu")
    starts_row[counts.flatten().cumsum(0) - counts.flatten()] = True
    is_wrong = (lists < 0) | (lists >= num_blocks)
    is_wrong[1:] |= (lists[1:] <= lists[:-1]) & ~starts_row[1:-1]
    if is_wrong.any():
        entry = int(is_wrong.nonzero()[0])
        row = int(torch.searchsorted(counts.flatten().cumsum(0), entry, right=True))
        head, query = divmod(row, counts.shape[1])
        raise ValueError(
            f"col: {int(lists[entry])} for query block {query} of head {head}, expected ascending values in "
            f"[0, {num_blocks})"
        )


def _check_causal(lists: torch.Tensor, runs: torch.Tensor) -> None:
    """Raise ValueError when a row, of entries `runs` [heads, query blocks, 2], has a later key block."""
    first, end = runs.unbind(dim=-1)
    last = torch.cat([lists, lists.new_zeros(1)])[end - 1]
    future = ((end > first) & (last > _range(runs.shape[1]))).nonzero()
    if len(future):
        head, query = future[0].tolist()
        keys = lists[slice(*runs[head, query].tolist())]
        raise ValueError(
            f"mask: query block {query} of head {head} attends to the later key block "
            f"{int(keys[keys > query][0])}, expected a causal (lower triangular) mask"
        )


def _warn_unless_kv_efficient(lists: torch.Tensor, runs: torch.Tensor, num_blocks: int) -> None:
    """Warn of the first key block that leaves the set of a head and returns.

    Args:
        lists: int32, key blocks.
        runs: int64 [heads, query blocks, 2], the entries of each row; the last rows of a causal mask.
        num_blocks: key blocks.
    """
    first_row = num_blocks - runs.shape[1]
    # A key block that does not return is attended to from here on, until it is dropped.
    since = _range(num_blocks).clamp(min=first_row)
    for head, row_ends in enumerate(runs[..., 1].contiguous()):
        times, last = torch.zeros(2, num_blocks, dtype=torch.int64, device="cpu")
        end = int(row_ends[-1]) if len(row_ends) else 0
        for first in range(int(runs[head, 0, 0]) if end else 0, end, _CHUNK):
            entries = torch.arange(first, min(first + _CHUNK, end), device="cpu")
            key = lists[entries].long()
            times += key.bincount(minlength=num_blocks)
            query = first_row + torch.searchsorted(row_ends, entries, right=True)
            last.scatter_reduce_(0, key, query, "amax")
        returning = ((times > 0) & (times != last - since + 1)).nonzero()
        if len(returning):
            warnings.warn(
                f"this mask is not KV-efficient: key block {int(returning[0])} leaves the set of head {head} "
                "and returns, so no cache may free what a head has dropped",
                stacklevel=4,
            )
            return
