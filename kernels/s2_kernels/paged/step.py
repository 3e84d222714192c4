"""One step of an engine: what its sparse layers have in common is checked and prepared once.

They all write and attend for the same requests, to tensors of the same shapes; only the addresses differ.
Outside CUDA graphs the host pays for every layer, and short prompts would wait for it.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch

from s2_kernels.launch.choice import Impl
from s2_kernels.layout import HeadTables
from s2_kernels.paged.calls import AttendCall, WriteCall
from s2_kernels.paged.dispatch import prepare_attend, prepare_write
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import NO_RESIDUE, S2Pattern


@dataclass(frozen=True, eq=False)
class LayerHeads:
    """What a layer of its own brings to each of its steps, and what layers of one kind share.

    One is equal to itself only: finding a step's calls by it takes no time.

    Attributes:
        pattern: the pattern of its heads.
        scale: factor on the logits.
        impl: the kernels to run; None for the fastest that take a call.
    """

    pattern: S2Pattern
    scale: float
    impl: Impl | None

    @cached_property
    def launch_kind(self) -> tuple[object, ...] | None:
        """What the kernels are launched by, on a GPU or where the portable ones are asked for.

        All else about heads of several kinds is in their tables. So layers with as many full heads, though
        others, share a step's calls. None for heads of one kind, which one object stands for.
        """
        if self.table_kind is None:
            return None
        pattern = self.pattern
        return (
            *self.table_kind,
            len(pattern.full_heads),
            pattern.residues.count(NO_RESIDUE),
            pattern.most_strided,
        )

    @cached_property
    def table_kind(self) -> tuple[object, ...] | None:
        """What writes and decodes are launched by, likewise: how many heads are of a kind is not in it."""
        pattern = self.pattern
        if pattern.kinds is None or self.impl not in (None, "triton"):
            return None
        return (
            self.scale,
            pattern.block_size,
            pattern.local_blocks,
            pattern.vert_stride,
            pattern.sink_blocks,
            pattern.num_heads,
            pattern.num_kv_heads,
            max(1, *map(len, pattern.kept_residues)),
        )


class _WriteAndDecodes(NamedTuple):
    write: WriteCall
    decodes: AttendCall | None


class _Prepared(NamedTuple):
    first: _WriteAndDecodes
    others: AttendCall | None


class PagedStep:
    """The requests of a step, those with one query (decodes) first.

    Args:
        window_table, strided_table: int32 [requests, pages].
        window_slots, strided_slots: int64 [tokens], -1 for padding.
        query_start_loc: int32 [requests + 1].
        seq_lens: int32 [requests].
        num_tokens: tokens of the batch, padding included.
        num_decodes: leading requests with at most one query.
        num_decode_tokens: their tokens.
        max_seq_len: the longest of the sequences, or a bound.
    """

    def __init__(
        self,
        window_table: torch.Tensor,
        strided_table: torch.Tensor,
        window_slots: torch.Tensor,
        strided_slots: torch.Tensor,
        query_start_loc: torch.Tensor,
        seq_lens: torch.Tensor,
        *,
        num_tokens: int,
        num_decodes: int,
        num_decode_tokens: int,
        max_seq_len: int,
    ) -> None:
        self._tables = (window_table, strided_table)
        self._slots = (window_slots, strided_slots)
        self._lengths = (query_start_loc, seq_lens)
        self._tokens = num_tokens
        self._decodes = num_decodes
        self._decode_tokens = num_decode_tokens
        self._max_seq_len = max_seq_len
        self._prepared: dict[tuple[object, ...], _Prepared] = {}
        self._first: dict[tuple[object, ...], _WriteAndDecodes] = {}

    def run_layer(
        self,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        heads: LayerHeads,
        tables: HeadTables,
    ) -> None:
        """Store a layer's new keys and values in both tiers, then attend.

        Args:
            q: [tokens, num_heads, head_size]; this, `key`, `value` and `out` may have more tokens than the
                step.
            key, value: [tokens, num_kv_heads, head_size].
            window_cache, strided_cache: [pages, num_kv_heads, page_slots, 2 * head_size], or the latter as
                `TierLayout.strided_shape`.
            out: as q; rows of padding are left as they are.
            heads: of the layer. One object for all layers with the same: it is what they are told by.
            tables: of the layer's pattern.

        Raises:
            ValueError: as `s2_kernels.paged.write` and `attend`.
        """
        tensors = (q, key, value, window_cache, strided_cache, out)
        is_launched = q.is_cuda or heads.impl == "triton"
        by_launch = heads.launch_kind if is_launched else None
        kind = (heads if by_launch is None else by_launch, *map(_likeness, tensors))
        prepared = self._prepared.get(kind)
        if prepared is None:
            by_tables = heads.table_kind if is_launched else None
            of_tensors = *map(_likeness, (q, key, value, window_cache, out)), _row_likeness(strided_cache)
            first = kind if by_tables is None else (by_tables, *of_tensors)
            if first not in self._first:
                self._first[first] = self._prepare_first(*tensors, heads, tables)
            others = self._prepare_others(q, window_cache, strided_cache, out, heads, tables)
            prepared = self._prepared[kind] = _Prepared(self._first[first], others)
        write, decodes = prepared.first
        write(key, value, window_cache, strided_cache, tables)
        if decodes is not None:
            decodes(q, window_cache, strided_cache, out, tables)
        if prepared.others is not None:
            rows = slice(self._decode_tokens, self._tokens)
            prepared.others(q[rows], window_cache, strided_cache, out[rows], tables)

    def _prepare_first(
        self,
        q: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        heads: LayerHeads,
        tables: HeadTables,
    ) -> _WriteAndDecodes:
        write = prepare_write(
            key[: self._tokens],
            value[: self._tokens],
            window_cache,
            strided_cache,
            *self._slots,
            heads.pattern,
            tables=tables,
            impl=heads.impl,
        )
        if not self._decodes:
            return _WriteAndDecodes(write, None)
        requests = PagedRequests(window_cache, strided_cache, *self._tables, *self._lengths)
        decodes = prepare_attend(
            q[: self._decode_tokens],
            requests.first(self._decodes),
            heads.pattern,
            heads.scale,
            out[: self._decode_tokens],
            max_query_len=1,
            tables=tables,
            impl=heads.impl,
        )
        return _WriteAndDecodes(write, decodes)

    def _prepare_others(
        self,
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        heads: LayerHeads,
        tables: HeadTables,
    ) -> AttendCall | None:
        if self._decodes == len(self._lengths[1]):
            return None
        requests = PagedRequests(window_cache, strided_cache, *self._tables, *self._lengths)
        rows = slice(self._decode_tokens, self._tokens)
        query_start_loc = requests.query_start_loc[self._decodes :] - self._decode_tokens
        return prepare_attend(
            q[rows],
            requests.after(self._decodes, query_start_loc),
            heads.pattern,
            heads.scale,
            out[rows],
            max_seq_len=self._max_seq_len,
            tables=tables,
            impl=heads.impl,
        )


def _likeness(tensor: torch.Tensor) -> tuple[object, ...]:
    """What tensors of prepared calls must have in common; Triton compiles for an alignment to 16 bytes."""
    return tensor.shape, tensor.stride(), tensor.dtype, tensor.data_ptr() % 16


def _row_likeness(cache: torch.Tensor) -> tuple[object, ...]:
    """The same of caches with any number of rows in a page."""
    pages, _, slots, columns = cache.shape
    return pages, slots, columns, cache.stride(), cache.dtype, cache.data_ptr() % 16
