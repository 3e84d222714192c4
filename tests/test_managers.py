"""The managers that answer at once, beside vLLM's own: the same pages, hits, evictions and preemptions."""

from __future__ import annotations

from collections import Counter
from dataclasses import fields
from functools import partial
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, assume, given, note, settings
from hypothesis import strategies as st
from vllm.v1.core.block_pool import BlockPool
from vllm.v1.core.kv_cache_utils import BlockHash, KVCacheBlock, make_block_hash_with_group_id
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import (
    ChunkedLocalAttentionSpec,
    FullAttentionSpec,
    KVCacheGroupSpec,
    KVCacheSpecKind,
    MLAAttentionSpec,
    SlidingWindowSpec,
    get_kv_cache_spec_kind,
)
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from s2_vllm.managers import (
    QuickFullAttentionManager,
    QuickSlidingWindowManager,
    SinkWindowManager,
    use_quick_managers,
)
from s2_vllm.specs import QuickFullAttentionSpec, QuickSlidingWindowSpec, SinkWindowSpec
from tests.fuzz_kv_cache import random_episode
from tests.kv_cache_simulation import Simulation
from tests.plans import DTYPE, cache_config, cache_groups, cache_specs, reference_plan
from tests.test_kv_cache_manager import PLAN

if TYPE_CHECKING:
    from random import Random

SETTINGS = settings(
    max_examples=200,
    deadline=None,
    derandomize=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow],
)


class Recorded(Simulation):
    """A simulation that records after each step all that the managers have decided."""

    def __init__(self, *args: Any, history: list[Any], **options: Any) -> None:
        super().__init__(*args, **options)
        self.history = history

    def step(self, most_tokens: int, preempt: bool = False) -> None:
        super().step(most_tokens, preempt)
        pool = self.manager.block_pool
        self.history.append(
            (
                [(s.request.request_id, self.pages_of(s)) for s in self.running],
                [s.request.request_id for s in self.waiting],
                # In the order in which they will be given out, and lose what they hold.
                [block.block_id for block in pool.free_block_queue.get_all_free_blocks()],
                {key: contents(found) for key, found in pool.cached_block_hash_to_block._cache.items()},
                dict(self.events),
            )
        )


def contents(found: Any) -> list[int]:
    """The block ids behind a hash in vLLM's prefix cache."""
    return sorted(found) if isinstance(found, dict) else [found.block_id]


@pytest.mark.parametrize("caching", [True, False], ids=["caching", "no-caching"])
def test_the_same_decisions_in_every_step(caching: bool) -> None:
    events: Counter[str] = Counter()

    @SETTINGS
    @given(rng=st.randoms(use_true_random=False))
    def run(rng: Random) -> None:
        episode = random_episode(rng, most_operations=24)
        note(str(episode))
        assume(episode.plan.sink_pages == 0)
        histories: dict[bool, list[Any]] = {True: [], False: []}
        for quick, history in histories.items():
            counted: Counter[str] = Counter()
            episode.run(counted, partial(Recorded, history=history, quick=quick, caching=caching))
        events.update(counted)
        for ours, vllms in zip(histories[True], histories[False], strict=True):
            assert ours == vllms

    run()
    for event in ("aborts", "preemptions", "window pages seen freed"):
        assert events[event] > 50, f"{event}: too few to have tested anything"
    assert (events["prefix hits"] > 50) == caching


def no_work(*_: Any, **__: Any) -> None:
    pytest.fail("vLLM's own manager was asked")


def test_a_step_without_a_new_page_is_answered_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """When 257 tokens are computed, all pages have room for 15 more, and no page leaves the window in 14."""
    simulation = Simulation(PLAN, cache_specs(PLAN), 200, 1, Counter())
    sequence = simulation.add([1] * 250, 40)
    while sequence.request.num_computed_tokens < 257:
        simulation.step(96)
    kinds = {type(manager) for manager in simulation.manager.coordinator.single_type_managers}
    assert kinds == {QuickFullAttentionManager, QuickSlidingWindowManager}
    for name in (
        "get_num_blocks_to_allocate",
        "allocate_new_blocks",
        "cache_blocks",
        "remove_skipped_blocks",
    ):
        for manager in (SingleTypeKVCacheManager, FullAttentionManager, SlidingWindowManager):
            if name in vars(manager):
                monkeypatch.setattr(manager, name, no_work)
    for _ in range(14):
        simulation.step(96)
    assert sequence.request.num_computed_tokens == 271
    # Before the next token a page leaves the window.
    with pytest.raises(pytest.fail.Exception):
        simulation.step(96)


@pytest.fixture
def manager() -> QuickFullAttentionManager:
    """Of pages of 16 tokens, in a pool of 8."""
    spec = QuickFullAttentionSpec(block_size=16, num_kv_heads=1, head_size=8, dtype=DTYPE)
    return QuickFullAttentionManager(spec, BlockPool(8, True, 16), True, 0, 16)


def test_a_hit_counts_though_there_is_room(manager: QuickFullAttentionManager) -> None:
    """A page that could be evicted until now leaves the free ones."""
    held, hit = manager.block_pool.get_new_blocks(2)
    manager.block_pool.free_blocks([hit])
    manager.req_to_blocks["request"].append(held)
    assert manager.get_num_blocks_to_allocate("request", 16, [], 16, 16, 16) == 0
    assert manager.get_num_blocks_to_allocate("request", 16, [hit], 16, 16, 16) == 1


def test_a_page_that_is_hit_in_part_is_copied_though_there_is_room(
    manager: QuickFullAttentionManager,
) -> None:
    (shared,) = manager.block_pool.get_new_blocks(1)
    manager.req_to_blocks["request"].append(shared)
    assert manager.allocate_new_blocks("request", 16, 16) == []
    manager._partial_hit_reqs["request"] = (0, shared)
    (copy,) = manager.allocate_new_blocks("request", 16, 16)
    assert manager.req_to_blocks["request"] == [copy]
    assert copy is not shared


def test_a_prefix_is_cached_again_once_it_is_hashed(
    manager: QuickFullAttentionManager, monkeypatch: pytest.MonkeyPatch
) -> None:
    """vLLM 0.33 caches no more than what has been hashed, and the rest when it is asked again."""
    asked: list[int] = []
    monkeypatch.setattr(
        FullAttentionManager, "cache_blocks", lambda self, request, tokens, *_, **__: asked.append(tokens)
    )
    request = SimpleNamespace(request_id="request", block_hashes=[b"first"])
    for _ in range(2):
        manager.cache_blocks(request, 32, replay_boundaries=())
    request.block_hashes.append(b"second")
    for _ in range(2):
        manager.cache_blocks(request, 32, replay_boundaries=())
    assert asked == [32, 32, 32]
    manager.cache_blocks(request, 33, replay_boundaries=())
    assert asked == [32, 32, 32, 33]
    manager.free("request")
    request.block_hashes.append(b"third")
    manager.cache_blocks(request, 33, replay_boundaries=())
    assert asked == [32, 32, 32, 33, 33]


def test_specs_are_vllms_but_for_their_names() -> None:
    groups = cache_groups(cache_specs(reference_plan("hhst-8b")))
    before = [group.kv_cache_spec for group in groups]
    config = cache_config(groups, 1 << 30)
    for _ in range(2):
        use_quick_managers(config)
        after = [group.kv_cache_spec for group in config.kv_cache_groups]
        quick = Counter({QuickFullAttentionSpec: 2, QuickSlidingWindowSpec: 1})
        assert Counter(map(type, after)) == quick
    for old, new in zip(before, after, strict=True):
        assert isinstance(new, type(old))
        assert {f.name: getattr(new, f.name) for f in fields(new)} == {
            f.name: getattr(old, f.name) for f in fields(old)
        }
        assert get_kv_cache_spec_kind(new) == get_kv_cache_spec_kind(old)
        base = KVCacheSpecRegistry.get_uniform_type_base_spec
        assert base(new) is base(old)
        # vLLM's own keep theirs.
        assert KVCacheSpecRegistry.get_manager_class(old) in (FullAttentionManager, SlidingWindowManager)


def test_other_kinds_of_groups_keep_their_managers() -> None:
    shape = {"block_size": 16, "num_kv_heads": 1, "head_size": 8, "dtype": DTYPE}
    specs = [ChunkedLocalAttentionSpec(**shape, attention_chunk_size=32), MLAAttentionSpec(**shape)]
    config = SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec([], spec) for spec in specs])
    use_quick_managers(config)
    assert [group.kv_cache_spec for group in config.kv_cache_groups] == specs
    assert all(type(spec) is not FullAttentionSpec for spec in specs)


def sink_manager() -> SinkWindowManager:
    """Of pages of 16 tokens, a window of 32 and two pages of sinks, in a pool of 20."""
    spec = SinkWindowSpec(
        block_size=16, num_kv_heads=1, head_size=8, dtype=DTYPE, sliding_window=32, sink_pages=2
    )
    pool = BlockPool(20, True, 16)
    return SinkWindowManager(
        spec, block_pool=pool, enable_caching=True, kv_cache_group_id=0, scheduler_block_size=16
    )


HASHES = [BlockHash(bytes([page]) * 32) for page in range(8)]


def cached(manager: SinkWindowManager, pages: list[int]) -> dict[int, KVCacheBlock]:
    """Free blocks that are cached as these pages of a prompt."""
    pool = manager.block_pool
    blocks = dict(zip(pages, pool.get_new_blocks(len(pages)), strict=True))
    for page, block in blocks.items():
        pool.cached_block_hash_to_block.insert(make_block_hash_with_group_id(HASHES[page], 0), block)
    pool.free_blocks(blocks.values())
    return blocks


def find(manager: SinkWindowManager, alignment: int = 16) -> tuple[list[KVCacheBlock], int]:
    (blocks,), length = manager.find_longest_cache_hit(
        HASHES, 128, [0], manager.block_pool, manager.kv_cache_spec, False, alignment
    )
    return blocks, length


def test_a_hit_needs_the_sinks() -> None:
    """The window of the token after 128 begins in page 6."""
    manager = sink_manager()
    blocks = cached(manager, [0, 1, 6, 7])
    null = manager.block_pool.null_block
    assert find(manager) == ([blocks[0], blocks[1], *[null] * 4, blocks[6], blocks[7]], 128)


@pytest.mark.parametrize(
    ("pages", "alignment", "length"),
    [([0, 6, 7], 16, 16), ([1, 6, 7], 16, 0), ([0, 6, 7], 32, 0), ([0, 1, 6, 7], 32, 128), ([0, 1], 32, 32)],
)
def test_a_hit_ends_before_a_sink_that_is_not_cached(pages: list[int], alignment: int, length: int) -> None:
    manager = sink_manager()
    blocks = cached(manager, pages)
    found, hit = find(manager, alignment)
    assert hit == length
    assert len(found) * 16 == length
    assert all(found[page] is blocks[page] for page in range(min(2, len(found))))


def test_the_sinks_of_a_hit_count_and_are_kept() -> None:
    """Four cached blocks leave the free ones, and two are new; without sinks it would be two and two."""
    manager = sink_manager()
    blocks = cached(manager, [0, 1, 6, 7])
    found, hit = find(manager)
    free = manager.block_pool.get_num_free_blocks()
    needed = manager.get_num_blocks_to_allocate("request", 160, found, hit, hit, 160)
    assert needed == 4 + 2
    manager.add_local_computed_blocks("request", found, hit, 0)
    assert manager.req_to_blocks["request"] == found
    assert all(block.ref_cnt == 1 for block in blocks.values())
    manager.allocate_new_blocks("request", 160, 160)
    assert free - manager.block_pool.get_num_free_blocks() == needed


def test_the_sinks_are_never_freed() -> None:
    manager = sink_manager()
    manager.allocate_new_blocks("request", 128, 128)
    for tokens in range(0, 127, 7):
        manager.remove_skipped_blocks("request", tokens)
    held = [not block.is_null for block in manager.req_to_blocks["request"]]
    # After 126 tokens the window begins with token 95, the last of page 5.
    assert held == [True, True, False, False, False, True, True, True]


def test_the_sinks_are_always_cached() -> None:
    """A hit on a multiple of 128 tokens needs the two pages before it."""
    manager = sink_manager()
    arguments = 128, manager.kv_cache_spec, False
    reachable = [True, True, *[False] * 4, True, True, *[False] * 4]
    assert manager.reachable_block_mask(0, 12, *arguments) == reachable
    assert manager.reachable_block_mask(1, 12, *arguments) == reachable[1:]
    assert manager.reachable_block_mask(0, 1, *arguments) == [True]
    assert manager.reachable_block_mask(0, 12, 32, manager.kv_cache_spec, False) is None


def test_the_window_tier_with_sinks_gets_its_manager() -> None:
    spec = sink_manager().kv_cache_spec
    use_quick_managers(SimpleNamespace(kv_cache_groups=[KVCacheGroupSpec([], spec)]))
    assert KVCacheSpecRegistry.get_manager_class(spec) is SinkWindowManager
    assert KVCacheSpecRegistry.get_uniform_type_base_spec(spec) is SlidingWindowSpec
    assert get_kv_cache_spec_kind(spec) == KVCacheSpecKind.SLIDING_WINDOW
