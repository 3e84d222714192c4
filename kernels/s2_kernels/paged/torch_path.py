"""S2-Attention on the two paged tiers in vectorised PyTorch, for devices without Triton.

Pages are gathered a few megabytes at a time into one reused buffer, so that the copy is still in the
CPU's cache when the matrix product reads it. Both tiers share one softmax: a first sweep, over the keys,
fills the logits, and a second one, over the values, applies the weights.

Query heads are ordered by KV head and rank of residue, because those that agree in both read the same
strided blocks: one matrix product per such group, and one per KV head for the window.

Neighbouring KV heads of one kind (full, streaming, strided) are taken together. A full head is one of stride
1, and a streaming head one that has no strided blocks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import groupby
from typing import NamedTuple

import torch

from s2_kernels.layout import HeadTables, TierLayout
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.weighted_sum import weighted_sum

_GATHER_BYTES = 4 << 20
_LOGITS_BYTES = 32 << 20
_MAX_QUERY_ROWS = 128


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_slots: torch.Tensor,
    strided_slots: torch.Tensor,
    pattern: S2Pattern,
    tables: HeadTables,
) -> None:
    """Store new tokens in both tiers, in place.

    Args:
        key, value: [tokens, num_kv_heads, head_size].
        window_cache, strided_cache: the two tiers, see `s2_kernels.layout`; any strides.
        window_slots: int64 [tokens], page * page_slots + slot.
        strided_slots: int64 [tokens], page * strided_page_tokens + position mod
            strided_page_tokens, as vLLM computes it. A token with -1 in either is padding and skipped.
        pattern: the pattern of these heads.
        tables: its tables.
    """
    layout = TierLayout.of_caches(pattern, window_cache, strided_cache)
    states = torch.cat([key, value], dim=-1).to(window_cache.dtype)

    tokens = ((window_slots >= 0) & (strided_slots >= 0)).nonzero().flatten()
    slots = window_slots[tokens]
    window_cache[slots // layout.page_slots, :, slots % layout.page_slots] = states[tokens]

    slots = strided_slots[tokens]
    local_position = slots % layout.strided_page_tokens
    block = local_position // pattern.block_size
    rank = tables.rank_of_residue[:, block % pattern.vert_stride]
    head, kept = (rank >= 0).nonzero(as_tuple=True)
    sub_block = block[kept] // pattern.vert_stride * tables.first_kept.diff()[head] + rank[head, kept]
    slot = sub_block * pattern.block_size + local_position[kept] % pattern.block_size
    page = slots[kept] // layout.strided_page_tokens
    first_row = head if layout.is_even else tables.first_kept[head]
    row_slots = layout.strided_shape[1]
    strided_cache[page, first_row + slot // row_slots, slot % row_slots] = states[tokens[kept], head]


def paged_attention(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
) -> None:
    """S2-Attention of a batch of requests whose keys and values are in the two paged tiers.

    Reads no page outside the queries' sets, and ignores whatever else such a page holds.
    Accumulates in float32, or in float64 for float64 queries.

    Args:
        q: [tokens, num_heads, head_size].
        requests: whose queries these are.
        pattern: the pattern of these heads.
        scale: factor on the logits.
        out: [tokens, num_heads, head_size], written for the tokens that belong to requests.
    """
    layout = TierLayout.of_caches(pattern, requests.window_cache, requests.strided_cache)
    scratch = _Scratch.allocate(requests, torch.promote_types(q.dtype, torch.float32))
    starts, lens = requests.query_start_loc.tolist(), requests.seq_lens.tolist()
    for part in _parts(layout, q.device):
        these = part.of(requests)
        _attend_part(q[:, part.heads], these, starts, lens, part, scale, out[:, part.heads], scratch)


class _Part(NamedTuple):
    """Neighbouring KV heads of one kind.

    Attributes:
        layout: of these KV heads, with a residue of each query head; 0 of 1 for full heads.
        kept: int64 [num_kv_heads, num_kept, 1], the kept residues.
        has_strided: whether they have strided blocks.
        heads, kv_heads, rows: of the query heads, the window tier and the strided tier.
    """

    layout: TierLayout
    kept: torch.Tensor
    has_strided: bool
    heads: slice
    kv_heads: slice
    rows: slice

    def of(self, requests: PagedRequests) -> PagedRequests:
        """The requests with the part's heads of the caches."""
        strided = requests.strided_cache[:, self.rows]
        if self.has_strided:
            heads, num_kept, _ = self.kept.shape
            slots = self.layout.residue_slots * num_kept
            strided = strided.view(len(strided), heads, slots, strided.shape[-1])
        return requests._replace(window_cache=requests.window_cache[:, self.kv_heads], strided_cache=strided)


@lru_cache(maxsize=64)
def _parts(layout: TierLayout, device: torch.device) -> tuple[_Part, ...]:
    pattern = layout.pattern
    kinds = [
        "full" if h in pattern.full_heads else "strided" if kept else "streaming"
        for h, kept in enumerate(pattern.kept_residues)
    ]
    parts, first = [], 0
    for kind, run in groupby(kinds):
        end = first + len(list(run))
        parts.append(_part(layout, device, kind, first, end))
        first = end
    return tuple(parts)


def _part(layout: TierLayout, device: torch.device, kind: str, first: int, end: int) -> _Part:
    """The part of the KV heads `first` to `end` - 1, which are of one kind."""
    pattern = layout.pattern
    heads = slice(first * pattern.group_size, end * pattern.group_size)
    stride, residues, residue_slots = 1, (0,) * (heads.stop - heads.start), layout.residue_slots
    if kind == "strided":
        stride, residues = pattern.vert_stride, pattern.residues[heads]
    elif kind == "full":
        residue_slots *= pattern.vert_stride
    part = S2Pattern(
        pattern.block_size, pattern.local_blocks, stride, residues, end - first, pattern.sink_blocks
    )
    row_ends = (*pattern.first_virtual_heads, pattern.num_virtual_heads)
    rows = slice(first, end) if layout.is_even else slice(row_ends[first], row_ends[end])
    return _Part(
        TierLayout(part, layout.page_slots, residue_slots),
        torch.tensor(part.kept_residues, device=device)[..., None],
        kind != "streaming",
        heads,
        slice(first, end),
        rows,
    )


def _attend_part(
    q: torch.Tensor,
    requests: PagedRequests,
    starts: list[int],
    lens: list[int],
    part: _Part,
    scale: float,
    out: torch.Tensor,
    scratch: _Scratch,
) -> None:
    """`paged_attention` of the heads of a part; `starts` and `lens` are the requests' own, on the host."""
    window_cache, strided_cache, window_table, strided_table, _, _ = requests
    pattern = part.layout.pattern
    for n, seq_len in enumerate(lens):
        rows = _query_rows(pattern, seq_len)
        for row in range(starts[n], starts[n + 1], rows):
            end = min(row + rows, starts[n + 1])
            position = seq_len - starts[n + 1] + row
            positions = torch.arange(position, position + end - row, device=q.device)
            spans = []
            if part.has_strided:
                spans.append(_strided_span(strided_cache, strided_table[n], part, positions))
            spans.append(_window_span(window_cache, window_table[n], part.layout, positions))
            if pattern.sink_blocks:
                spans.append(_sink_span(window_cache, window_table[n], part.layout, positions))
            out[row:end] = _attend(q[row:end], spans, pattern, scale, scratch)


def _query_rows(pattern: S2Pattern, seq_len: int) -> int:
    """Queries to take at a time, so that their logits stay within `_LOGITS_BYTES`."""
    keys = seq_len // pattern.vert_stride + min(seq_len, pattern.window_tokens + _MAX_QUERY_ROWS)
    return max(1, min(_MAX_QUERY_ROWS, _LOGITS_BYTES // (4 * pattern.num_heads * max(1, keys))))


class _Members(NamedTuple):
    """Query heads, ordered by the strided blocks that they read.

    Attributes:
        heads: int64 [num_kv_heads * num_kept * width], heads by (KV head, rank of residue); where
            fewer than `width` heads share a residue, one of them fills the rest.
        place: int64 [num_heads], where each query head is in `heads`.
    """

    heads: torch.Tensor
    place: torch.Tensor


@lru_cache(maxsize=64)
def _members(pattern: S2Pattern, device: torch.device) -> _Members:
    groups: list[list[int]] = [[] for _ in range(pattern.num_kv_heads * pattern.num_kept)]
    for head, rank in enumerate(pattern.residue_ranks):
        groups[head // pattern.group_size * pattern.num_kept + rank].append(head)
    width = max(len(group) for group in groups)
    heads = [head for group in groups for head in group + group[:1] * (width - len(group))]
    place = [heads.index(head) for head in range(pattern.num_heads)]
    return _Members(torch.tensor(heads, device=device), torch.tensor(place, device=device))


class _Span(NamedTuple):
    """The pages of one tier that a tile of queries reads.

    Attributes:
        pool: [pages, num_kv_heads, super-blocks, residues, tokens, 2 * head_size], a view of the cache.
        pages: int64 [n], the pages to read, in the order of their positions.
        num_shared: how many of the first keys every query attends to.
        mask: bool [num_kv_heads or 1, residues, queries, keys], which of the keys after those a
            query attends to.
    """

    pool: torch.Tensor
    pages: torch.Tensor
    num_shared: int
    mask: torch.Tensor

    @property
    def num_keys(self) -> int:
        """Tokens per head in these pages, attended to or not."""
        return self.num_shared + self.mask.shape[-1]

    @property
    def num_groups(self) -> int:
        """Groups of query heads that read the same keys."""
        return self.pool.shape[1] * self.pool.shape[3]

    def visible(self, first: int, end: int) -> torch.Tensor:
        """bool [groups or 1, queries, end - first]: which of these keys a query attends to."""
        mask = self.mask.flatten(0, 1)
        shared = mask.new_ones(*mask.shape[:2], max(0, min(end, self.num_shared) - first))
        masked = mask[..., max(0, first - self.num_shared) : max(0, end - self.num_shared)]
        return torch.cat([shared, masked], dim=-1)


def _strided_span(cache: torch.Tensor, table: torch.Tensor, part: _Part, positions: torch.Tensor) -> _Span:
    pattern, per_page = part.layout.pattern, part.layout.super_blocks_per_page
    b, s, sinks = pattern.block_size, pattern.vert_stride, pattern.sink_blocks
    newest = positions // b - pattern.local_blocks
    first_kept = min(sinks + (residue - sinks) % s for residue in pattern.residues)
    num_super_blocks = 0
    if newest[-1] >= first_kept:
        num_super_blocks = (int(newest[-1]) - min(pattern.residues)) // s + 1
    end_page = -(-num_super_blocks // per_page)
    first_page = min(first_kept // (s * per_page), end_page)
    # Without sinks all queries share the first super-blocks.
    num_shared = 0 if sinks else max(0, (int(newest[0]) + 1) // s)

    super_block = torch.arange(first_page * per_page + num_shared, end_page * per_page, device=cache.device)
    block = super_block * s + part.kept
    mask = (block[:, :, None] <= newest[:, None]) & (block[:, :, None] >= sinks)
    pool = cache.unflatten(2, (per_page, pattern.num_kept, b))
    return _Span(pool, table[first_page:end_page], num_shared * b, mask.repeat_interleave(b, dim=-1))


def _window_span(
    cache: torch.Tensor, table: torch.Tensor, layout: TierLayout, positions: torch.Tensor
) -> _Span:
    page_tokens = layout.window_page_tokens
    oldest = _oldest_of_window(layout.pattern, positions)
    first_page = max(0, int(oldest[0])) // page_tokens
    end_page = int(positions[-1]) // page_tokens + 1

    keys = torch.arange(first_page * page_tokens, end_page * page_tokens, device=cache.device)
    mask = (keys >= oldest[:, None]) & (keys <= positions[:, None])
    return _Span(cache[:, :, None, None], table[first_page:end_page], 0, mask[None, None])


def _sink_span(
    cache: torch.Tensor, table: torch.Tensor, layout: TierLayout, positions: torch.Tensor
) -> _Span:
    """The sinks that are older than the window."""
    pattern, page_tokens = layout.pattern, layout.window_page_tokens
    oldest = _oldest_of_window(pattern, positions).clamp(max=pattern.sink_blocks * pattern.block_size)
    num_pages = -(-max(0, int(oldest[-1])) // page_tokens)
    keys = torch.arange(num_pages * page_tokens, device=cache.device)
    return _Span(cache[:, :, None, None], table[:num_pages], 0, (keys < oldest[:, None])[None, None])


def _oldest_of_window(pattern: S2Pattern, positions: torch.Tensor) -> torch.Tensor:
    """The first token of the window of each query; negative where it would begin before all tokens."""
    return (positions // pattern.block_size - pattern.local_blocks + 1) * pattern.block_size


class _Scratch(NamedTuple):
    """Flat buffers that hold the gathered half, K or V, of a few pages.

    Attributes:
        stored: in the caches' dtype.
        computed: the same values in the dtype of the arithmetic; `stored` itself where they agree.
    """

    stored: torch.Tensor
    computed: torch.Tensor

    @classmethod
    def allocate(cls, requests: PagedRequests, dtype: torch.dtype) -> _Scratch:
        """Buffers for `_GATHER_BYTES` of the arithmetic's dtype, or one page where that is more."""
        caches = (requests.window_cache, requests.strided_cache)
        size = max(_GATHER_BYTES // dtype.itemsize, *(cache[0].numel() // 2 for cache in caches))
        stored = torch.empty(size, dtype=caches[0].dtype, device=caches[0].device)
        return cls(stored, stored if stored.dtype == dtype else stored.to(dtype))

    def gather(self, pool: torch.Tensor, pages: torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield (first key, [groups, keys, head_size]) for a few pages at a time.

        Args:
            pool: [pages, num_kv_heads, super-blocks, residues, tokens, head_size].
            pages: [n], the pages to gather.
        """
        _, kv_heads, super_blocks, residues, tokens, head_size = pool.shape
        page_size = pool[0].numel()
        first_key = 0
        for part in pages.split(self.stored.numel() // page_size):
            size = len(part) * page_size
            shape = (kv_heads, residues, len(part), super_blocks, tokens, head_size)
            by_head = self.stored[:size].view(shape)
            torch.index_select(pool, 0, part, out=by_head.permute(2, 0, 3, 1, 4, 5))
            if self.computed is not self.stored:
                self.computed[:size] = self.stored[:size]
            states = self.computed[:size].view(kv_heads * residues, -1, head_size)
            yield first_key, states
            first_key += states.shape[1]


def _attend(
    q: torch.Tensor,
    spans: Sequence[_Span],
    pattern: S2Pattern,
    scale: float,
    scratch: _Scratch,
) -> torch.Tensor:
    """Attention of one tile of queries, [queries, num_heads, head_size], over both tiers."""
    head_size = q.shape[-1]
    members = _members(pattern, q.device)
    q = (q.to(scratch.computed.dtype) * scale).transpose(0, 1)[members.heads]
    weights = _logits(q, spans, pattern, scratch).softmax(dim=-1)

    out = _weighted_values(weights, spans, head_size, scratch, isolate=False)
    if out.isnan().any():
        out = _weighted_values(weights, spans, head_size, scratch, isolate=True)
    return out[members.place].transpose(0, 1)


def _weighted_values(
    weights: torch.Tensor, spans: Sequence[_Span], head_size: int, scratch: _Scratch, *, isolate: bool
) -> torch.Tensor:
    """The weighted sums of the values of all spans: [members, queries, head_size].

    Args:
        weights: [members, queries, keys], 0 where masked.
        spans: of the two tiers.
        head_size: elements of a value.
        scratch: buffers.
        isolate: whether NaN and infinities are to reach only the queries that attend to them. Slower.
    """
    out = weights.new_zeros(*weights.shape[:2], head_size)
    start = 0
    for span in spans:
        by_group = weights.view(span.num_groups, -1, weights.shape[-1])
        accumulator = out.view(span.num_groups, -1, head_size)
        unread = ~span.mask.any(dim=2).flatten(0, 1)
        for first, values in scratch.gather(span.pool[..., head_size:], span.pages):
            end = first + values.shape[1]
            _clear_unread(values, unread, first - span.num_shared)
            of_values = by_group[..., start + first : start + end]
            if isolate:
                visible = span.visible(first, end).repeat(1, of_values.shape[1] // weights.shape[1], 1)
                accumulator += weighted_sum(of_values, visible, values)
            else:
                accumulator.baddbmm_(of_values, values)
        start += span.num_keys
    return out


def _logits(q: torch.Tensor, spans: Sequence[_Span], pattern: S2Pattern, scratch: _Scratch) -> torch.Tensor:
    """Logits of [members, queries, head_size] over the keys of all spans, -inf where masked."""
    members, num_queries, head_size = q.shape
    num_keys = sum(span.num_keys for span in spans)
    logits = q.new_empty(members, num_queries, num_keys)
    by_residue = logits.view(pattern.num_kv_heads, pattern.num_kept, -1, num_queries, num_keys)
    start = 0
    for span in spans:
        by_group = logits.view(span.num_groups, -1, num_keys)
        queries = q.view(span.num_groups, -1, head_size)
        for first, keys in scratch.gather(span.pool[..., :head_size], span.pages):
            end = first + keys.shape[1]
            by_group[..., start + first : start + end] = torch.bmm(queries, keys.transpose(1, 2))
        masked = by_residue[..., start + span.num_shared : start + span.num_keys]
        masked.masked_fill_(~span.mask[:, :, None], float("-inf"))
        start += span.num_keys
    return logits


def _clear_unread(values: torch.Tensor, unread: torch.Tensor, first: int) -> None:
    """Zero the gathered values that no query attends to: a weight of 0 would not hide a NaN.

    Args:
        values: [groups, keys, head_size], changed in place.
        unread: bool [groups or 1, masked keys].
        first: index of the first of `values` among the masked keys, negative when it precedes them.
    """
    end = first + values.shape[1]
    part = unread[:, max(0, first) : max(0, end)]
    if part.any():
        values[:, max(0, -first) :].masked_fill_(part[..., None], 0)
