"""The two tiers' pages as vLLM's KV cache manager sees them: the specs that do the work of eviction."""

from __future__ import annotations

from dataclasses import dataclass, fields
from fractions import Fraction
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

if TYPE_CHECKING:
    from collections.abc import Iterator

    import torch
    from vllm.v1.kv_cache_interface import KVCacheSpec

    from s2_vllm.plan import CachePlan

STRIDED_SUFFIX = ".strided"
"""A layer's name, and this, is the name of its strided tier's entry."""

PADDING_SUFFIX = ".padding"
"""A layer's name, this and a number is the name of a window tier's entry that no layer uses."""


@dataclass(frozen=True)
class QuickFullAttentionSpec(FullAttentionSpec):
    """vLLM's, under a name of its own: the scheduler gets `managers.QuickFullAttentionManager` for it."""


@dataclass(frozen=True)
class QuickSlidingWindowSpec(SlidingWindowSpec):
    """vLLM's, under a name of its own: the scheduler gets `managers.QuickSlidingWindowManager` for it."""


@dataclass(frozen=True, kw_only=True)
class SinkWindowSpec(SlidingWindowSpec):
    """A sliding window beside the first pages of a sequence, which `managers.SinkWindowManager` never frees.

    Attributes:
        sink_pages: how many these are.
    """

    sink_pages: int

    @property
    def num_retained_tokens(self) -> int:
        """0: no limit. vLLM's worker, from 0.33 on, blanks older pages in the block tables of a step."""
        return 0

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Pages that a request holds at most: a sliding window's, and the first."""
        window = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return window + self.sink_pages


def window_spec(plan: CachePlan, dtype: torch.dtype) -> SlidingWindowSpec:
    """The window tier's pages: all heads, the newest blocks of the longest window, and the sinks."""
    rows, slots = plan.window_shape
    spec = SlidingWindowSpec(
        block_size=slots,
        num_kv_heads=rows,
        head_size=plan.model.head_size,
        dtype=dtype,
        sliding_window=plan.window_tokens,
    )
    if plan.sink_pages == 0:
        return spec
    return SinkWindowSpec(**{f.name: getattr(spec, f.name) for f in fields(spec)}, sink_pages=plan.sink_pages)


def strided_spec(plan: CachePlan, dtype: torch.dtype) -> FullAttentionSpec:
    """The strided tier's pages: of each super-block, the blocks of each head's kept residues."""
    assert plan.strided is not None, "a model without a strided tier"
    rows, slots = plan.strided_shape
    per_state = Fraction(plan.strided.page_tokens, slots)
    return FullAttentionSpec(
        block_size=plan.strided.page_tokens,
        num_kv_heads=rows,
        head_size=plan.model.head_size,
        dtype=dtype,
        tokens_per_state=int(per_state) if per_state.denominator == 1 else per_state,
    )


def padding_entries(plan: CachePlan, name: str, dtype: torch.dtype) -> Iterator[tuple[str, KVCacheSpec]]:
    """Names and specs of the entries that no layer uses, which the first sparse layer, `name`, brings."""
    for number in range(max(plan.window_padding, plan.strided_padding)):
        entry = f"{name}{PADDING_SUFFIX}{number}"
        if number < plan.window_padding:
            yield entry, window_spec(plan, dtype)
        if number < plan.strided_padding:
            yield entry + STRIDED_SUFFIX, strided_spec(plan, dtype)
