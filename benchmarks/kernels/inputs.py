"""Random inputs of a case, and the caches that hold them: two-tier for S2, dense paged for the others.

Pages are spread over their pool in random order, as a serving engine leaves them. What is not needed any more
is on page 0, vLLM's null block, and page 0 is NaN: reading it shows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch

from benchmarks.kernels.cases import Case
from s2_kernels import paged
from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern

# FlashAttention-3 loads pages by TMA when they hold whole tiles of keys, 128 for this head size.
DENSE_PAGE_TOKENS = 128
MIXED_PAGE_BLOCKS = 3
"""Of a virtual head in a page of the strided tier, as in llama-3.1-8b-half's plan."""


@dataclass(frozen=True)
class TwoTierCache:
    """Both tiers, in one pool where their pages have the same shape.

    Attributes:
        window_cache, strided_cache: as `s2_kernels.layout` says.
        window_table, strided_table: int32 [batch, pages].
        window_slots, strided_slots: int64 [batch * total_len], of all tokens.
    """

    layout: TierLayout
    window_cache: torch.Tensor
    strided_cache: torch.Tensor
    window_table: torch.Tensor
    strided_table: torch.Tensor
    window_slots: torch.Tensor
    strided_slots: torch.Tensor


@dataclass(frozen=True)
class DensePagedCache:
    """vLLM's layout for dense layers.

    Attributes:
        k_cache, v_cache: [pages, DENSE_PAGE_TOKENS, num_kv_heads, head_size], views of one pool.
        block_table: int32 [batch, pages].
    """

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor


@dataclass(frozen=True)
class Inputs:
    """One set of inputs; the caches are made when first asked for.

    Attributes:
        q: [batch * new_tokens, num_heads, head_size].
        k, v: [batch * total_len, num_kv_heads, head_size], of all requests, packed.
    """

    case: Case
    q: torch.Tensor
    k: torch.Tensor
    v: torch.Tensor

    @property
    def scale(self) -> float:
        return float(self.case.shape.head_size**-0.5)

    @cached_property
    def d_out(self) -> torch.Tensor:
        """Standard normal, of q's shape."""
        return torch.randn_like(self.q)

    @cached_property
    def query_start_loc(self) -> torch.Tensor:
        return _starts(self.case.batch, self.case.new_tokens, self.q.device)

    @cached_property
    def key_start_loc(self) -> torch.Tensor:
        return _starts(self.case.batch, self.case.total_len, self.q.device)

    @cached_property
    def seq_lens(self) -> torch.Tensor:
        return torch.full((self.case.batch,), self.case.total_len, dtype=torch.int32, device=self.q.device)

    @cached_property
    def two_tier(self) -> TwoTierCache:
        """Both tiers, holding k and v."""
        cache = empty_two_tier_cache(self.case, self.q.dtype, self.q.device)
        pattern = self.case.pattern
        slots = cache.window_slots, cache.strided_slots
        paged.write(self.k, self.v, cache.window_cache, cache.strided_cache, *slots, pattern)
        cache.window_cache[0] = torch.nan
        return cache

    @cached_property
    def dense_paged(self) -> DensePagedCache:
        """A dense paged cache that holds k and v."""
        case, device = self.case, self.q.device
        pages = -(-case.total_len // DENSE_PAGE_TOKENS)
        table = _page_numbers(case.batch * pages, device).view(case.batch, pages)
        kv_heads, head_size = self.k.shape[1:]
        pool = self.k.new_full((1 + table.numel(), kv_heads, DENSE_PAGE_TOKENS, 2 * head_size), torch.nan)
        positions = torch.arange(case.total_len, device=device)
        page = table[:, positions // DENSE_PAGE_TOKENS].flatten()
        slot = (positions % DENSE_PAGE_TOKENS).repeat(case.batch)
        pool[page, :, slot] = torch.cat([self.k, self.v], dim=-1)
        k_cache, v_cache = pool.transpose(1, 2).split(head_size, dim=-1)
        return DensePagedCache(k_cache, v_cache, table.int())

    def poisoned_output(self) -> torch.Tensor:
        """NaN of q's shape."""
        return torch.full_like(self.q, torch.nan)


def random_inputs(case: Case, dtype: torch.dtype, device: torch.device) -> Inputs:
    """Standard normal queries, keys and values: logits of variance 1 after scaling."""
    shape = case.shape

    def randn(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(case.batch * tokens, heads, shape.head_size, dtype=dtype, device=device)

    q = randn(case.new_tokens, shape.num_heads)
    return Inputs(
        case, q, randn(case.total_len, shape.num_kv_heads), randn(case.total_len, shape.num_kv_heads)
    )


def empty_two_tier_cache(case: Case, dtype: torch.dtype, device: torch.device) -> TwoTierCache:
    """Both tiers full of NaN, with pages for what the case's queries see."""
    pattern, layout = case.pattern, _layout(case.pattern)
    window_span, strided_span = layout.window_page_tokens, layout.strided_page_tokens
    first_window_block = max(0, case.context_len // pattern.block_size - pattern.local_blocks + 1)
    evicted = first_window_block * pattern.block_size // window_span
    sinks = -(-pattern.sink_blocks * pattern.block_size // window_span)
    window_pages = -(-case.total_len // window_span)
    strided_pages = -(-case.total_len // strided_span)
    live = [page for page in range(window_pages) if page < sinks or page >= evicted]

    in_window, in_strided = case.batch * len(live), case.batch * strided_pages
    pages = _page_numbers(in_window + (in_strided if layout.is_even else 0), device)
    window_table = torch.zeros(case.batch, window_pages, dtype=torch.int64, device=device)
    window_table[:, live] = pages[:in_window].view(case.batch, -1)
    window_cache = _empty_pool(len(pages), (pattern.num_kv_heads, layout.page_slots), case, dtype, device)
    strided_cache = window_cache
    if layout.is_even:
        pages = pages[in_window:]
    else:
        pages = _page_numbers(in_strided, device)
        strided_cache = _empty_pool(in_strided, layout.strided_shape, case, dtype, device)
    strided_table = pages.view(case.batch, strided_pages)
    return TwoTierCache(
        layout,
        window_cache,
        strided_cache,
        window_table.int(),
        strided_table.int(),
        _slots(window_table, window_span, case.total_len),
        _slots(strided_table, strided_span, case.total_len),
    )


def _layout(pattern: S2Pattern) -> TierLayout:
    """The smallest pages that fill each other's; for heads of several kinds, some like those of the plans."""
    if pattern.kinds is None:
        return TierLayout(pattern, pattern.num_kept * pattern.block_size)
    return TierLayout(pattern, pattern.block_size, MIXED_PAGE_BLOCKS * pattern.block_size)


def _empty_pool(
    pages: int, shape: tuple[int, int], case: Case, dtype: torch.dtype, device: torch.device
) -> torch.Tensor:
    """So many pages, and page 0, of NaN."""
    size = (1 + pages, *shape, 2 * case.shape.head_size)
    return torch.full(size, torch.nan, dtype=dtype, device=device)


def _slots(table: torch.Tensor, span: int, tokens: int) -> torch.Tensor:
    """vLLM's slot mapping of the tokens 0 ... tokens - 1 of every request, packed."""
    positions = torch.arange(tokens, device=table.device)
    return (table[:, positions // span] * span + positions % span).flatten()


def _page_numbers(count: int, device: torch.device) -> torch.Tensor:
    return 1 + torch.randperm(count, device=device)


def _starts(batch: int, tokens: int, device: torch.device) -> torch.Tensor:
    return torch.arange(batch + 1, dtype=torch.int32, device=device) * tokens
