"""The two tiers' pages as vLLM's KV cache manager sees them: the specs that do the work of eviction."""

from __future__ import annotations

from dataclasses import dataclass
from fractions import Fraction
from typing import TYPE_CHECKING

from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec

if TYPE_CHECKING:
    import torch

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


def window_spec(plan: CachePlan, dtype: torch.dtype) -> SlidingWindowSpec:
    """The window tier's pages: all heads, the newest `local_blocks` blocks."""
    return SlidingWindowSpec(
        block_size=plan.page_slots,
        num_kv_heads=plan.num_kv_heads * plan.layers_per_entry,
        head_size=plan.model.head_size,
        dtype=dtype,
        sliding_window=plan.pattern.window_tokens,
    )


def strided_spec(plan: CachePlan, dtype: torch.dtype) -> FullAttentionSpec:
    """The strided tier's pages: of each super-block, the blocks of each head's kept residues."""
    per_state = Fraction(plan.layout.strided_page_tokens, plan.page_slots)
    return FullAttentionSpec(
        block_size=plan.layout.strided_page_tokens,
        num_kv_heads=plan.num_kv_heads * plan.layers_per_entry,
        head_size=plan.model.head_size,
        dtype=dtype,
        tokens_per_state=int(per_state) if per_state.denominator == 1 else per_state,
    )
