"""The cache plan: which tiers, pages, entries and KV cache groups a model's KV cache consists of.

It is computed once, from the model's geometry alone, before anything is loaded; the attention layers
take their KV cache specs from it, and start-up checks that vLLM set up just that.

A sparse layer keeps its KV in two vLLM KV cache groups (README, "How it works"):
the window tier and the strided tier. vLLM gives every page of a model the same bytes, and splits the
layers of a kind into groups as large as the smallest kind. With many sparse and few dense layers that
would make dozens of groups, each with a block table of its own. So one *entry* may own the pages of
several sparse layers: to vLLM it is one layer with `layers_per_entry` times the heads, and a dense page
then holds `layers_per_entry` times the tokens. Where the sparse layers are the few, entries of theirs that
no layer uses keep the groups large.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import TYPE_CHECKING

from s2_kernels.config import S2Config, S2ConfigError
from s2_kernels.layout import MAX_HEAD_SIZE, TierLayout
from s2_kernels.pattern import S2Pattern

if TYPE_CHECKING:
    from vllm.config import VllmConfig

# KV cache groups of any mix of layers: vLLM's scheduler pays for each, per request and step.
MAX_GROUPS = 5

# Pages that no layer uses, over those in use, where a plan with no more has few enough groups.
MAX_PADDING = Fraction(1, 10)

# How much coarser than the finest a plan's prefix-cache hits may be, where that leaves any.
MAX_COARSER_HITS = 4

# vLLM's CPU attention wants pages of a multiple of 32 tokens, FlashAttention of 16.
PAGE_SLOTS_MULTIPLE = 32

# Of the model's configuration, which vLLM copies whole: `VllmConfig` is remade from its own fields at times.
_ATTRIBUTE = "s2_cache_plan"


@dataclass(frozen=True)
class ModelGeometry:
    """What the plan needs to know of a model, all tensor-parallel ranks together."""

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int
    dtype_bytes: int


@dataclass(frozen=True)
class Tier:
    """One kind of KV cache entry, as vLLM sees it.

    Attributes:
        name: "window", "strided" or "dense".
        num_layers: model layers that keep KV in it.
        num_entries: entries that own their pages.
        block_size: tokens that one page spans (vLLM's block size).
        num_kv_heads: KV heads of an entry's page, on one rank.
        page_slots: slots per KV head and page.
    """

    name: str
    num_layers: int
    num_entries: int
    block_size: int
    num_kv_heads: int
    page_slots: int


@dataclass(frozen=True)
class CachePlan:
    """The KV cache of a model with a pattern, on one tensor-parallel rank.

    Attributes:
        model: the model's geometry.
        pattern: the pattern of a sparse layer, all ranks together.
        sparse_layers, dense_layers: layer indices.
        tensor_parallel_size: ranks.
        page_slots: slots per KV head and layer in a page (P).
        layers_per_entry: sparse layers whose pages one KV cache entry owns.
        padding_entries: entries in each of the sparse layers' tiers that no layer uses.
    """

    model: ModelGeometry
    pattern: S2Pattern
    sparse_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    tensor_parallel_size: int
    page_slots: int
    layers_per_entry: int
    padding_entries: int = 0

    @cached_property
    def layout(self) -> TierLayout:
        """The page layout on one rank; it is the same on all, whatever their residues."""
        return TierLayout(self.pattern.shard(0, self.tensor_parallel_size), self.page_slots)

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one layer on one rank."""
        return self.layout.pattern.num_kv_heads

    @property
    def dense_block_size(self) -> int:
        """Tokens per page of a dense layer: what vLLM calls the model's block size."""
        return self.page_slots * self.layers_per_entry

    @property
    def token_bytes(self) -> int:
        """Bytes of one token's K and V, one layer, one rank."""
        return self.num_kv_heads * 2 * self.model.head_size * self.model.dtype_bytes

    @property
    def page_bytes(self) -> int:
        """Bytes of a page, equal in all tiers."""
        return self.dense_block_size * self.token_bytes

    @cached_property
    def tiers(self) -> tuple[Tier, ...]:
        """The kinds of entries, the dense one only where the model has dense layers."""
        sparse, dense = len(self.sparse_layers), len(self.dense_layers)
        entries = -(-sparse // self.layers_per_entry) + self.padding_entries
        heads = self.num_kv_heads * self.layers_per_entry
        strided_tokens = self.layout.strided_page_tokens
        tiers = [
            Tier("window", sparse, entries, self.page_slots, heads, self.page_slots),
            Tier("strided", sparse, entries, strided_tokens, heads, self.page_slots),
        ]
        if dense:
            size = self.dense_block_size
            tiers.append(Tier("dense", dense, dense, size, self.num_kv_heads, size))
        return tuple(tiers)

    @cached_property
    def entries_per_group(self) -> int:
        """Pages that one block id stands for: vLLM's group size."""
        return _group_size([tier.num_entries for tier in self.tiers])

    def num_groups(self, tier: Tier) -> int:
        """KV cache groups that vLLM makes of a tier's entries."""
        return -(-tier.num_entries // self.entries_per_group)

    @cached_property
    def total_groups(self) -> int:
        """KV cache groups of all tiers."""
        return sum(map(self.num_groups, self.tiers))

    @cached_property
    def padding(self) -> Fraction:
        """Pages that no layer uses, over those that layers use, in the tier where they are most."""
        return max(map(self._padding_of, self.tiers))

    def _padding_of(self, tier: Tier) -> Fraction:
        per_entry = 1 if tier.name == "dense" else self.layers_per_entry
        held = self.num_groups(tier) * self.entries_per_group * per_entry
        return Fraction(held, tier.num_layers) - 1

    @property
    def block_bytes(self) -> int:
        """Bytes of one block id, in every group."""
        return self.entries_per_group * self.page_bytes

    @property
    def hit_alignment(self) -> int:
        """Tokens: prefix-cache hits land on multiples of it."""
        return math.lcm(*(tier.block_size for tier in self.tiers))

    def blocks_per_request(self, length: int, in_flight_tokens: int = 1) -> int:
        """Block ids of a request of `length` tokens, all groups together; by default, while it decodes.

        Args:
            length: tokens of the request.
            in_flight_tokens: tokens that are scheduled but not settled, whose pages are held beside those
                of the window. vLLM counts `VllmConfig.max_in_flight_tokens` of them for every request.
        """
        blocks = 0
        for tier in self.tiers:
            if tier.name == "window":
                tokens = min(self.pattern.window_tokens - 1 + in_flight_tokens, length)
                pages = -(-tokens // tier.block_size) + 1
            else:
                pages = -(-length // tier.block_size)
            blocks += pages * self.num_groups(tier)
        return blocks

    def bytes_per_request(self, length: int, in_flight_tokens: int = 1) -> int:
        """KV bytes of these block ids on one rank."""
        return self.blocks_per_request(length, in_flight_tokens) * self.block_bytes

    def dense_bytes_per_request(self, length: int) -> int:
        """KV bytes of the same request if every layer were dense, in vLLM's 16-token pages."""
        return -(-length // 16) * 16 * self.token_bytes * self.model.num_layers

    def pattern_of_rank(self, rank: int) -> S2Pattern:
        """The pattern of the heads of tensor-parallel rank `rank`."""
        return self.pattern.shard(rank, self.tensor_parallel_size)


def make_plan(
    config: S2Config,
    model: ModelGeometry,
    tensor_parallel_size: int = 1,
    block_size: int | None = None,
) -> CachePlan:
    """The plan for a model: few KV cache groups, at little cost in memory and in prefix-cache hits.

    It has at most `MAX_GROUPS` groups, unless a `block_size` leaves no such plan.

    Args:
        config: the model's pattern.
        model: the model's geometry.
        tensor_parallel_size: ranks that share each layer's heads.
        block_size: tokens per page of a dense layer, where the user has asked for a number.

    Raises:
        S2ConfigError: the heads are too large or the pattern does not fit them, or `block_size` cannot be
            honoured.
    """
    if model.head_size > MAX_HEAD_SIZE:
        raise S2ConfigError(f"head_size: {model.head_size}, expected at most {MAX_HEAD_SIZE}")
    pattern = config.pattern(model.num_heads, model.num_kv_heads)
    try:
        num_kept = pattern.shard(0, tensor_parallel_size).num_kept
    except ValueError as error:
        raise S2ConfigError(str(error)) from error
    if num_kept >= pattern.vert_stride:
        raise config.error(
            "vert_stride",
            f"{pattern.vert_stride}, expected more than the {num_kept} residues that each KV head keeps: a "
            "sparse layer would store as much as a dense one",
        )
    unit = math.lcm(num_kept * pattern.block_size, PAGE_SLOTS_MULTIPLE)
    dense = config.dense_layers
    sparse = tuple(i for i in range(model.num_layers) if i not in dense)
    if block_size is not None and block_size % unit:
        raise S2ConfigError(
            f"block_size: {block_size}, expected a multiple of {unit} "
            f"({num_kept} kept residues x blocks of {pattern.block_size}), or none at all"
        )
    # A page more for a tenth of the layers is a tenth of padding.
    most = math.floor(len(sparse) * (1 + MAX_PADDING)) if dense else 1
    plans = []
    for per_entry in range(1, most + 1):
        slots = block_size or unit * per_entry
        if slots % (unit * per_entry) == 0:
            padding = _padding_entries(-(-len(sparse) // per_entry), len(dense))
            pages = tensor_parallel_size, slots // per_entry, per_entry, padding
            plans.append(CachePlan(model, pattern, sparse, dense, *pages))
    return _choose(plans)


def attach_plan(vllm_config: VllmConfig, plan: CachePlan) -> None:
    """Let the plan go along with an engine's configuration, into every process that receives it."""
    setattr(vllm_config.model_config, _ATTRIBUTE, plan)


def plan_of(vllm_config: VllmConfig) -> CachePlan | None:
    """The plan attached to this configuration, None for a model without a pattern."""
    return getattr(vllm_config.model_config, _ATTRIBUTE, None)


def _padding_entries(entries: int, num_dense: int) -> int:
    """Entries that each of the sparse layers' tiers needs beside `entries`, where dense layers are many.

    Groups are as large as the smallest tier. With one each for the window and the strided tier, the rest
    are for the dense layers.
    """
    return max(0, -(-num_dense // (MAX_GROUPS - 2)) - entries)


def _choose(plans: list[CachePlan]) -> CachePlan:
    """The best plan: few groups first, then hits that are not much coarser, then little padding."""
    finest = min(plan.hit_alignment for plan in plans)
    fewest = max(MAX_GROUPS, min(plan.total_groups for plan in plans))
    few = [plan for plan in plans if plan.total_groups <= fewest]
    fine = [plan for plan in few if plan.hit_alignment <= MAX_COARSER_HITS * finest]
    slim = [plan for plan in fine if plan.padding <= MAX_PADDING]
    if slim:
        return min(slim, key=lambda plan: (plan.total_groups, plan.hit_alignment))
    if fine:
        return min(fine, key=lambda plan: (plan.padding, plan.total_groups, plan.hit_alignment))
    return min(few, key=lambda plan: plan.hit_alignment)


def _group_size(entries_per_tier: list[int]) -> int:
    """vLLM's group size for buckets of these sizes (`_get_kv_cache_groups_uniform_page_size` of
    vllm/v1/core/kv_cache_utils.py, vLLM 0.32.0): the smallest, or the largest if that is close."""
    smallest, largest = min(entries_per_tier), max(entries_per_tier)
    return largest if largest < smallest * 1.5 else smallest
