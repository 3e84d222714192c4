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
from functools import cache, cached_property
from typing import TYPE_CHECKING

from s2_kernels.config import S2Config, S2ConfigError
from s2_kernels.layout import MAX_HEAD_SIZE, TierLayout
from s2_kernels.pattern import S2Pattern
from s2_vllm.packing import Packing, Place, share_evenly, share_tightly

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping

    from vllm.config import VllmConfig

# KV cache groups of any mix of layers: vLLM's scheduler pays for each, per request and step.
MAX_GROUPS = 5

# The same where heads are of different kinds: their strided tier wants many entries, to be filled well.
MAX_MIXED_GROUPS = 8

# Tokens of the request whose KV bytes such a plan keeps low, and how much more than the least it may take for
# finer hits and fewer groups.
LONG_REQUEST = 131072
MAX_MORE_BYTES = Fraction(3, 100)

# Super-blocks of its pages, at most: so many fit as many times less rows.
MAX_SUPER_BLOCKS = 16

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
        num_kv_heads: rows of an entry's page on one rank: KV heads, of all its layers.
        page_slots: slots per row and page.
    """

    name: str
    num_layers: int
    num_entries: int
    block_size: int
    num_kv_heads: int
    page_slots: int


@dataclass(frozen=True)
class CachePlan:
    """The KV cache of a model with a pattern. It is the same on every tensor-parallel rank.

    Attributes:
        model: the model's geometry.
        patterns: of each sparse layer, all ranks together.
        sparse_layers, dense_layers: layer indices, ascending.
        tensor_parallel_size: ranks.
        page_slots: tokens of a window page (P).
        layers_per_entry: sparse layers whose window pages one KV cache entry owns.
        strided: the strided tier's entries, None where no head keeps anything older than window and sinks.
        window_padding, strided_padding: entries of the tier that no layer uses.
    """

    model: ModelGeometry
    patterns: tuple[S2Pattern, ...]
    sparse_layers: tuple[int, ...]
    dense_layers: tuple[int, ...]
    tensor_parallel_size: int
    page_slots: int
    layers_per_entry: int
    strided: Packing | None
    window_padding: int = 0
    strided_padding: int = 0

    @property
    def num_kv_heads(self) -> int:
        """KV heads of one layer on one rank; a KV head is replicated where there are more ranks."""
        return max(1, self.model.num_kv_heads // self.tensor_parallel_size)

    @property
    def dense_block_size(self) -> int:
        """Tokens per page of a dense layer: what vLLM calls the model's block size."""
        return self.page_slots * self.layers_per_entry

    @property
    def window_tokens(self) -> int:
        """Tokens of the longest local window: all layers' pages are kept that long."""
        return max(pattern.window_tokens for pattern in self.patterns)

    @property
    def sink_pages(self) -> int:
        """The window tier's first pages, of which every request keeps all that hold sinks of some layer."""
        return -(-self.sink_blocks * self.patterns[0].block_size // self.page_slots)

    @property
    def window_shape(self) -> tuple[int, int]:
        """(rows, slots) of a page of the window tier: the KV heads of an entry's layers, P."""
        return self.num_kv_heads * self.layers_per_entry, self.page_slots

    @property
    def strided_shape(self) -> tuple[int, int]:
        """(rows, slots) of a page of the strided tier, as many bytes as a window page."""
        assert self.strided is not None, "a model without a strided tier"
        rows, slots = self.window_shape
        return self.strided.rows, rows * slots // self.strided.rows

    def pattern_of(self, index: int, rank: int) -> S2Pattern:
        """The pattern of a sparse layer's heads on one tensor-parallel rank.

        Args:
            index: the layer's place among the sparse layers.
            rank: the rank.
        """
        return _shard(self.patterns[index], rank, self.tensor_parallel_size)

    def layout_of(self, index: int, rank: int) -> TierLayout:
        """Where a sparse layer keeps a token on one rank, in its own rows of both tiers' pages."""
        pattern = self.pattern_of(index, rank)
        tokens = self.page_slots if self.strided is None else self.strided.page_tokens
        return TierLayout(pattern, self.page_slots, tokens // pattern.vert_stride)

    def window_place(self, index: int) -> Place:
        """Where a sparse layer's KV heads are in the window tier."""
        in_entry = index % self.layers_per_entry
        return Place(index - in_entry, in_entry * self.num_kv_heads)

    def strided_place(self, index: int, rank: int) -> Place | None:
        """Where a sparse layer's rows are in the strided tier on one rank, None if it has none on any."""
        return None if self.strided is None else self.strided.place(index, rank)

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
        """The kinds of entries that the model has."""
        sparse, dense = len(self.sparse_layers), len(self.dense_layers)
        entries = -(-sparse // self.layers_per_entry) + self.window_padding
        tiers = [Tier("window", sparse, entries, self.page_slots, *self.window_shape)]
        if self.strided is not None:
            layers, tokens = self.strided.num_layers, self.strided.page_tokens
            entries = self.strided.num_entries + self.strided_padding
            tiers.append(Tier("strided", layers, entries, tokens, *self.strided_shape))
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
        """Rows of pages that no layer uses, over those in use, in the tier where they are most."""
        return max(map(self.padding_of, self.tiers))

    def padding_of(self, tier: Tier) -> Fraction:
        """Rows of a tier's pages that no layer uses, over those in use, on average over the ranks."""
        used = Fraction(tier.num_layers * self.num_kv_heads)
        if tier.name == "strided":
            assert self.strided is not None
            used = Fraction(sum(self.strided.used_rows), self.tensor_parallel_size)
        return self.num_groups(tier) * self.entries_per_group * tier.num_kv_heads / used - 1

    @property
    def rank_padding(self) -> Fraction:
        """The part of the strided tier's padding that is there because other ranks use these rows."""
        if self.strided is None:
            return Fraction(0)
        used = Fraction(sum(self.strided.used_rows), self.tensor_parallel_size)
        return self.strided.fullest_rows / used - 1

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
                tokens = min(self.window_tokens - 1 + in_flight_tokens, length)
                pages = -(-tokens // tier.block_size) + 1 + self.sink_pages
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

    def stored_fraction(self, length: int) -> float:
        """Tokens that a sparse layer stores at a context of `length`, on average, over a dense one's.

        Of what its own heads need: no padding, and no whole pages.
        """
        return sum(pattern.stored_fraction(length) for pattern in self.patterns) / len(self.patterns)

    @cached_property
    def heads(self) -> dict[str, int]:
        """KV heads of all sparse layers and ranks by their kind: "full", "streaming" or "strided"."""
        full = sum(len(pattern.full_heads) for pattern in self.patterns)
        streaming = sum(pattern.kept_residues.count(()) for pattern in self.patterns)
        strided = len(self.patterns) * self.model.num_kv_heads - full - streaming
        return {"full": full, "streaming": streaming, "strided": strided}

    @property
    def is_mixed(self) -> bool:
        """Whether there is more to the heads than a strided set each, or layers differ."""
        return self.patterns[0].kinds is not None or len(set(self.patterns)) > 1

    @property
    def sink_blocks(self) -> int:
        """The most sinks of a layer, in blocks."""
        return max(pattern.sink_blocks for pattern in self.patterns)

    @property
    def num_incomplete_layers(self) -> int:
        """Sparse layers in which some old blocks are in no head's set."""
        return sum(not pattern.is_union_complete for pattern in self.patterns)

    def needed_bytes_per_request(self, length: int) -> float:
        """KV bytes that the layers need for a request of `length` tokens, on one rank, on average."""
        ranks = range(self.tensor_parallel_size)
        shards = [self.pattern_of(i, rank) for i in range(len(self.patterns)) for rank in ranks]
        sparse = sum(shard.stored_fraction(length) for shard in shards) / self.tensor_parallel_size
        return (sparse + len(self.dense_layers)) * length * self.token_bytes


def uniform_plan(
    model: ModelGeometry,
    pattern: S2Pattern,
    sparse_layers: tuple[int, ...],
    dense_layers: tuple[int, ...],
    tensor_parallel_size: int,
    page_slots: int,
    layers_per_entry: int,
    padding_entries: int = 0,
) -> CachePlan:
    """The plan where all sparse layers have one pattern, whose KV heads all keep equally many residues.

    The strided tier then has the window tier's places and shape.
    """
    shard = _shard(pattern, 0, tensor_parallel_size)
    tokens = page_slots // shard.num_kept * shard.vert_stride
    layers, heads = len(sparse_layers), shard.num_kv_heads
    sizes = ((heads,) * tensor_parallel_size,) * layers
    strided = Packing(heads * layers_per_entry, tokens, sizes, share_evenly(layers, layers_per_entry))
    return CachePlan(
        model,
        (pattern,) * layers,
        sparse_layers,
        dense_layers,
        tensor_parallel_size,
        page_slots,
        layers_per_entry,
        strided,
        padding_entries,
        padding_entries,
    )


def make_plan(
    config: S2Config,
    model: ModelGeometry,
    tensor_parallel_size: int = 1,
    block_size: int | None = None,
) -> CachePlan:
    """The plan for a model: few KV cache groups, at little cost in memory and in prefix-cache hits.

    Args:
        config: the model's patterns.
        model: the model's geometry.
        tensor_parallel_size: ranks that share each layer's heads.
        block_size: tokens per page of a dense layer, where the user has asked for a number.

    Raises:
        S2ConfigError: the heads are too large or the pattern does not fit them, or `block_size` cannot be
            honoured.
    """
    if model.head_size > MAX_HEAD_SIZE:
        raise S2ConfigError(f"head_size: {model.head_size}, expected at most {MAX_HEAD_SIZE}")
    patterns = config.layer_patterns(model.num_heads, model.num_kv_heads, model.num_layers)
    try:
        shards = [_shard(pattern, 0, tensor_parallel_size) for pattern in patterns.values()]
    except ValueError as error:
        raise S2ConfigError(str(error)) from error
    for shard in shards:
        if shard.kinds is None and shard.num_kept >= shard.vert_stride:
            raise config.error(
                "vert_stride",
                f"{shard.vert_stride}, expected more than the {shard.num_kept} residues that each KV head "
                "keeps: a sparse layer would store as much as a dense one",
            )
    return plan_for(patterns, model, tensor_parallel_size, block_size)


def plan_for(
    patterns: Mapping[int, S2Pattern],
    model: ModelGeometry,
    tensor_parallel_size: int = 1,
    block_size: int | None = None,
) -> CachePlan:
    """The plan for a model with these patterns.

    It has at most `MAX_GROUPS` groups where all are one, without full or streaming heads, `MAX_MIXED_GROUPS`
    where not, unless a `block_size` or the layers leave no such plan.

    Args:
        patterns: of the sparse layers by their indices, all ranks together.
        model, tensor_parallel_size, block_size: as `make_plan`.

    Raises:
        S2ConfigError: `block_size` cannot be honoured.
    """
    dense = tuple(i for i in range(model.num_layers) if i not in patterns)
    first = next(iter(patterns.values()))
    if first.kinds is None and set(patterns.values()) == {first}:
        return _choose(_uniform_plans(first, dense, model, tensor_parallel_size, block_size))
    return _choose_mixed(mixed_plans(patterns, dense, model, tensor_parallel_size, block_size))


def attach_plan(vllm_config: VllmConfig, plan: CachePlan) -> None:
    """Let the plan go along with an engine's configuration, into every process that receives it."""
    setattr(vllm_config.model_config, _ATTRIBUTE, plan)


def plan_of(vllm_config: VllmConfig) -> CachePlan | None:
    """The plan attached to this configuration, None for a model without a pattern."""
    return getattr(vllm_config.model_config, _ATTRIBUTE, None)


@cache
def _shard(pattern: S2Pattern, rank: int, ranks: int) -> S2Pattern:
    return pattern.shard(rank, ranks)


def _uniform_plans(
    pattern: S2Pattern,
    dense: tuple[int, ...],
    model: ModelGeometry,
    ranks: int,
    block_size: int | None,
) -> list[CachePlan]:
    """Plans for layers with one pattern, with any number of layers per entry."""
    num_kept = _shard(pattern, 0, ranks).num_kept
    unit = math.lcm(num_kept * pattern.block_size, PAGE_SLOTS_MULTIPLE)
    if block_size is not None and block_size % unit:
        raise S2ConfigError(
            f"block_size: {block_size}, expected a multiple of {unit} "
            f"({num_kept} kept residues x blocks of {pattern.block_size}), or none at all"
        )
    sparse = tuple(i for i in range(model.num_layers) if i not in dense)
    # A page more for a tenth of the layers is a tenth of padding.
    most = math.floor(len(sparse) * (1 + MAX_PADDING)) if dense else 1
    plans = []
    for per_entry in range(1, most + 1):
        slots = block_size or unit * per_entry
        if slots % (unit * per_entry) == 0:
            padding = _padding_entries(-(-len(sparse) // per_entry), len(dense))
            pages = slots // per_entry, per_entry, padding
            plans.append(uniform_plan(model, pattern, sparse, dense, ranks, *pages))
    return plans


def mixed_plans(
    patterns: Mapping[int, S2Pattern],
    dense: tuple[int, ...],
    model: ModelGeometry,
    ranks: int,
    block_size: int | None,
) -> Iterator[CachePlan]:
    """Plans for layers whose heads keep different numbers of residues, with pages of many shapes.

    All layers count the strided tier's pages in units: the slots of one block in every S, the least common
    multiple of the strides. A virtual head of stride s needs S / s of them.
    """
    sparse, in_order = tuple(patterns), tuple(patterns.values())
    block = in_order[0].block_size
    stride = math.lcm(*(pattern.vert_stride for pattern in in_order))
    shards = [[_shard(pattern, rank, ranks) for rank in range(ranks)] for pattern in in_order]
    sizes = tuple(tuple(p.num_virtual_heads * stride // p.vert_stride for p in layer) for layer in shards)
    heads, most_rows = shards[0][0].num_kv_heads, max(map(max, sizes))
    for per_entry, slots in _window_pages(len(sparse), block, heads, most_rows, block_size):
        window = model, in_order, sparse, dense, ranks, slots, per_entry
        blocks = per_entry * slots // block * heads
        entries = -(-len(sparse) // per_entry)
        if most_rows == 0:
            for padding in _paddings(entries, 0, len(dense)):
                yield CachePlan(*window, None, *padding)
            continue
        for super_blocks in range(1, MAX_SUPER_BLOCKS + 1):
            rows = blocks // super_blocks
            # A strided page laid out like a dense one would be in one group with it.
            like_dense = len(dense) > 0 and stride == 1 and rows == heads
            if blocks % super_blocks or rows < most_rows or like_dense:
                continue
            strided = Packing(rows, super_blocks * stride * block, sizes, share_tightly(sizes, rows))
            for padding in _paddings(entries, strided.num_entries, len(dense)):
                yield CachePlan(*window, strided, *padding)


def _window_pages(
    num_layers: int, block: int, heads: int, most_rows: int, block_size: int | None
) -> Iterator[tuple[int, int]]:
    """(layers per entry, slots) of window pages that have room for `most_rows` rows of a block each."""
    unit = math.lcm(block, PAGE_SLOTS_MULTIPLE)
    # In units of all the tokens that a page has for each KV head of one layer.
    least = max(1, -(-most_rows * block // (heads * unit)))
    if block_size is not None and (block_size % unit or block_size < least * unit):
        raise S2ConfigError(
            f"block_size: {block_size}, expected a multiple of {unit} of at least {least * unit}, or none at "
            "all"
        )
    for per_entry in range(1, math.floor(num_layers * (1 + MAX_PADDING)) + 1):
        if block_size is not None:
            if block_size % (unit * per_entry) == 0:
                yield per_entry, block_size // per_entry
            continue
        fewest = -(-least // per_entry) * unit
        yield from ((per_entry, fewest * times) for times in (1, 2, 4, 8))


def _paddings(window: int, strided: int, dense: int) -> set[tuple[int, int]]:
    """Entries to add to so many of the window and the strided tier, for groups of a size worth trying.

    Groups are as large as the smallest tier.
    """
    sizes = {-(-entries // groups) for entries in (strided, dense) for groups in range(1, MAX_MIXED_GROUPS)}
    return {(max(0, size - window), max(0, size - strided) if strided else 0) for size in {0, *sizes}}


def _choose_mixed(plans: Iterable[CachePlan]) -> CachePlan:
    """The best plan: little memory for a long request first, then fine hits, then few groups."""
    by_groups = sorted(plans, key=lambda plan: plan.total_groups)
    fewest = max(MAX_MIXED_GROUPS, by_groups[0].total_groups)
    few = [plan for plan in by_groups if plan.total_groups <= fewest]
    least = min(plan.bytes_per_request(LONG_REQUEST) for plan in few)
    slim = [plan for plan in few if plan.bytes_per_request(LONG_REQUEST) <= least * (1 + MAX_MORE_BYTES)]
    finest = min(plan.hit_alignment for plan in slim)
    fine = [plan for plan in slim if plan.hit_alignment <= MAX_COARSER_HITS * finest]
    return min(fine, key=lambda plan: (plan.total_groups, plan.hit_alignment, plan.block_bytes))


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
