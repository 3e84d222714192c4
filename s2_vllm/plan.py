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

With full and streaming heads the layers keep different amounts in the strided tier, which counts its pages in
rows. A page spans `page_tokens` tokens of all layers, and a virtual head of stride s has the slots of
page_tokens / s of them, which is a whole number of rows. An entry is a bin of rows (`packing`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from fractions import Fraction
from functools import cache, cached_property
from typing import TYPE_CHECKING

from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern
from s2_vllm.packing import Packing, Place, share_evenly

if TYPE_CHECKING:
    from vllm.config import VllmConfig

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
        return shard(self.patterns[index], rank, self.tensor_parallel_size)

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

    def strided_rows(self, index: int, rank: int) -> tuple[int, tuple[int, int] | None]:
        """How many rows of the strided tier a sparse layer has on one rank, and as what it sees them.

        Returns:
            The rows, and the second and third dimension of the layer's cache where they are not those of the
            rows, None where they are.
        """
        assert self.strided is not None, "a model without a strided tier"
        size, (_, slots) = self.strided.sizes[index][rank], self.strided_shape
        shape = self.layout_of(index, rank).strided_shape
        return size, None if shape == (size, slots) else shape

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
        parts = [self.pattern_of(i, rank) for i in range(len(self.patterns)) for rank in ranks]
        sparse = sum(part.stored_fraction(length) for part in parts) / self.tensor_parallel_size
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
    of_rank = shard(pattern, 0, tensor_parallel_size)
    tokens = page_slots // of_rank.num_kept * of_rank.vert_stride
    layers, heads = len(sparse_layers), of_rank.num_kv_heads
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


def attach_plan(vllm_config: VllmConfig, plan: CachePlan) -> None:
    """Let the plan go along with an engine's configuration, into every process that receives it."""
    setattr(vllm_config.model_config, _ATTRIBUTE, plan)


def plan_of(vllm_config: VllmConfig) -> CachePlan | None:
    """The plan attached to this configuration, None for a model without a pattern."""
    return getattr(vllm_config.model_config, _ATTRIBUTE, None)


@cache
def shard(pattern: S2Pattern, rank: int, ranks: int) -> S2Pattern:
    """The pattern of one rank's heads, made once."""
    return pattern.shard(rank, ranks)


def _group_size(entries_per_tier: list[int]) -> int:
    """vLLM's group size for buckets of these sizes (`_get_kv_cache_groups_uniform_page_size` of
    vllm/v1/core/kv_cache_utils.py, vLLM 0.32.0): the smallest, or the largest if that is close."""
    smallest, largest = min(entries_per_tier), max(entries_per_tier)
    return largest if largest < smallest * 1.5 else smallest
