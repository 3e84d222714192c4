"""How the cache plan is chosen: few KV cache groups, at little cost in memory and in prefix-cache hits.

Where all sparse layers have one pattern, of strided heads alone, the strided tier has the window tier's
shape, and the search is for the number of layers that share an entry. Where heads are of several kinds or
layers differ, it is for the shape of the pages too, and the strided tier's entries are bins that are packed.
"""

from __future__ import annotations

import math
from fractions import Fraction
from typing import TYPE_CHECKING

from s2_kernels.config import S2Config, S2ConfigError
from s2_kernels.layout import MAX_HEAD_SIZE
from s2_kernels.pattern import S2Pattern
from s2_vllm.packing import Packing, share_tightly
from s2_vllm.plan import CachePlan, ModelGeometry, shard, uniform_plan

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

# KV cache groups of any mix of layers: vLLM's scheduler pays for each, per request and step.
MAX_GROUPS = 5

# The same where heads are of different kinds: their strided tier wants many entries, to be filled well.
MAX_MIXED_GROUPS = 8

# Tokens of the request whose KV bytes such a plan keeps low, and how much more than the least it may take for
# finer hits and fewer groups.
LONG_REQUEST = 131072
MAX_MORE_BYTES = Fraction(1, 20)

# Tokens: where hits land on multiples of no more, few groups are worth more than finer hits.
FINE_HITS = 1024

# Super-blocks of its pages, at most: so many fit as many times less rows.
MAX_SUPER_BLOCKS = 16

# Pages that no layer uses, over those in use, where a plan with no more has few enough groups.
MAX_PADDING = Fraction(1, 10)

# How much coarser than the finest a plan's prefix-cache hits may be, where that leaves any.
MAX_COARSER_HITS = 4

# vLLM's CPU attention wants pages of a multiple of 32 tokens, FlashAttention of 16.
PAGE_SLOTS_MULTIPLE = 32


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
    for layer, pattern in patterns.items():
        most = _most_strided(pattern, tensor_parallel_size)
        if most >= pattern.vert_stride:
            raise config.error(
                config.name_of("vert_stride", layer),
                f"{pattern.vert_stride}, expected more than the {most} residues that each KV head keeps: a "
                "sparse layer would store as much as a dense one",
            )
    return plan_for(patterns, model, tensor_parallel_size, block_size)


def _most_strided(pattern: S2Pattern, ranks: int) -> int:
    """Residues that some strided KV head of a layer keeps on some rank."""
    try:
        return max(shard(pattern, rank, ranks).most_strided for rank in range(ranks))
    except ValueError as error:
        raise S2ConfigError(str(error)) from error


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
    plans = list(mixed_plans(patterns, dense, model, tensor_parallel_size, block_size))
    if not plans:
        raise S2ConfigError(f"block_size: {block_size}, expected a larger number, or none at all")
    return _choose_mixed(plans)


def _uniform_plans(
    pattern: S2Pattern,
    dense: tuple[int, ...],
    model: ModelGeometry,
    ranks: int,
    block_size: int | None,
) -> list[CachePlan]:
    """Plans for layers with one pattern, with any number of layers per entry."""
    num_kept = shard(pattern, 0, ranks).num_kept
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
    shards = [[shard(pattern, rank, ranks) for rank in range(ranks)] for pattern in in_order]
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


def _choose_mixed(plans: list[CachePlan]) -> CachePlan:
    """The best plan: little memory for a long request first, then fine hits, then few groups."""
    by_groups = sorted(plans, key=lambda plan: plan.total_groups)
    fewest = max(MAX_MIXED_GROUPS, by_groups[0].total_groups)
    few = [plan for plan in by_groups if plan.total_groups <= fewest]
    least = min(plan.bytes_per_request(LONG_REQUEST) for plan in few)
    slim = [plan for plan in few if plan.bytes_per_request(LONG_REQUEST) <= least * (1 + MAX_MORE_BYTES)]
    return min(
        slim,
        key=lambda plan: (
            max(plan.hit_alignment, FINE_HITS),
            plan.total_groups,
            plan.hit_alignment,
            plan.block_bytes,
        ),
    )


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
