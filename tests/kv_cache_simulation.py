"""A simulation of a vLLM engine around vLLM's KV cache manager, with a plan's specs, and its checks.

The manager decides which page holds what. `Simulation` plays the scheduler, which asks the manager for pages,
and the worker, which writes the pages through block-table rows that only ever grow. There is no model: a
slot holds a number that stands for the KV of a token in one KV head of one layer, made of these, that token
and all before it. Every tensor-parallel rank has a worker of its own.

The checks are the functions at the end. The one that matters most: for every query that runs, each block that
the pattern lets it see has to be in a page that the request still holds, and the page has to hold the
request's own tokens there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from copy import copy
from dataclasses import dataclass, field
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, NamedTuple

from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.request import Request, RequestStatus

from s2_vllm.managers import use_quick_managers
from s2_vllm.specs import PADDING_SUFFIX
from tests.plans import cache_config, cache_groups, engine_config, tier_of

if TYPE_CHECKING:
    from collections.abc import Iterator

    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from s2_kernels.pattern import S2Pattern
    from s2_vllm.packing import Place
    from s2_vllm.plan import CachePlan

MAX_MODEL_LEN = 512
MAX_BATCHED_TOKENS = 96

# Far more than any set of requests needs that the simulation is given.
MAX_STEPS_TO_FINISH = 10_000

init_none_hash(sha256)


class Memory:
    """A worker's pages by block id and entry of its group: a run of slots, None where nothing was written."""

    def __init__(self, slots: int) -> None:
        self._pages: dict[tuple[int, int], list[int | None]] = defaultdict(lambda: [None] * slots)

    def write(self, block_id: int, entry: int, slot: int, contents: list[int]) -> None:
        self._pages[block_id, entry][slot : slot + len(contents)] = contents

    def read(self, block_id: int, entry: int, slot: int, count: int) -> list[int | None]:
        return self._pages[block_id, entry][slot : slot + count]


@dataclass(eq=False)
class Sequence:
    """A request, and what its worker knows of it.

    Attributes:
        request: vLLM's own.
        rows: its block-table row in each group, as the worker has it: new ids are appended to it, and an
            id that the manager has since freed stays.
        life: counts preemptions, after which chunks in flight are nobody's.
    """

    request: Request
    rows: list[list[int]] = field(default_factory=list)
    life: int = 0
    _prefix_hashes: list[int] = field(default_factory=list)

    def prefix_hashes(self) -> list[int]:
        """A number for each token, made of it and all before it. Tokens are only ever appended."""
        hashes = self._prefix_hashes
        for position in range(len(hashes), self.request.num_tokens):
            before = hashes[-1] if hashes else 0
            hashes.append(hash((before, self.request.all_token_ids[position])))
        return hashes

    def contents(self, of: Home, head: int, positions: range) -> list[int]:
        """The KV of the tokens at `positions`, in a KV head of a layer; 0 for tokens that are not known."""
        salt = hash((of, head))
        numbers = [number + salt for number in self.prefix_hashes()[positions.start : positions.stop]]
        return numbers + [0] * (len(positions) - len(numbers))


class Chunk(NamedTuple):
    """Tokens [start, end) of a sequence, scheduled in one step."""

    sequence: Sequence
    life: int
    rows: list[list[int]]
    start: int
    end: int
    samples: bool

    @property
    def is_alive(self) -> bool:
        running = self.sequence.request.status == RequestStatus.RUNNING
        return running and self.life == self.sequence.life

    def __str__(self) -> str:
        return f"{self.sequence.request.request_id}, tokens {self.start} to {self.end - 1}"


class Home(NamedTuple):
    """Where a layer keeps KV: in one of the entries of a KV cache group.

    Attributes:
        group, entry: their numbers, the entry's in its group.
        layer: the layer's place among the sparse layers, or among the dense ones.
    """

    group: int
    entry: int
    layer: int


class Places:
    """Where the KV cache groups of a plan keep a token, on one rank.

    Attributes:
        tiers: "window", "strided" or "dense" for each group.
        block_sizes: tokens that a page of each group spans.
        homes: the layers that have KV in each group.
    """

    def __init__(self, plan: CachePlan, pool: KVCacheConfig, rank: int) -> None:
        groups = pool.kv_cache_groups
        self.tiers = [tier_of(group) for group in groups]
        self.block_sizes = [group.kv_cache_spec.block_size for group in groups]
        self._plan, self._rank = plan, rank
        self._layouts = [plan.layout_of(index, rank) for index in range(len(plan.patterns))]
        self.homes = [list(self._homes(number, group.layer_names)) for number, group in enumerate(groups)]
        homes = Counter(self.tiers[home.group] for home in chain.from_iterable(self.homes))
        assert homes == {tier.name: tier.num_layers for tier in plan.tiers}, "a layer without a place"

    def _homes(self, group: int, names: list[str]) -> Iterator[Home]:
        for entry, name in enumerate(names):
            layer = int(name.split(".")[2])
            if self.tiers[group] == "dense":
                yield Home(group, entry, self._plan.dense_layers.index(layer))
            elif PADDING_SUFFIX not in name:
                owner = self._plan.sparse_layers.index(layer)
                for index in range(len(self._layouts)):
                    place = self._place(group, index)
                    if place is not None and place.leader == owner:
                        yield Home(group, entry, index)

    def _place(self, group: int, index: int) -> Place | None:
        if self.tiers[group] == "window":
            return self._plan.window_place(index)
        return self._plan.strided_place(index, self._rank)

    def find(self, home: Home, head: int, position: int) -> tuple[int, int] | None:
        """(index in the block table, slot in the entry's page) of a token by the layout; None if not kept."""
        if self.tiers[home.group] == "dense":
            size = self._plan.dense_block_size
            page, slot = divmod(position, size)
            return page, head * size + slot
        place, layout = self._place(home.group, home.layer), self._layouts[home.layer]
        assert place is not None
        if self.tiers[home.group] == "window":
            page, slot = layout.window_slot(position)
            return page, (place.first + head) * layout.page_slots + slot
        found = layout.strided_index(head, position)
        if found is None:
            return None
        page, row, slot = found
        in_layer = row * layout.strided_shape[1] + slot
        return page, place.first * self._plan.strided_shape[1] + in_layer

    def written(self, home: Home, head: int, position: int) -> int | None:
        """The slot where a worker writes a token, by its place in the page that vLLM gives it."""
        found = self.find(home, head, position % self.block_sizes[home.group])
        assert found is None or found[0] == 0, "a strided page that spans more tokens than it has slots for"
        return found and found[1]


class Worker:
    """A rank's pages, and where they keep what.

    Attributes:
        rank: the tensor-parallel rank.
        places: where it keeps a token.
        memory: its pages.
    """

    def __init__(self, plan: CachePlan, pool: KVCacheConfig, rank: int) -> None:
        self.rank = rank
        self.places = Places(plan, pool, rank)
        self.memory = Memory(plan.dense_block_size * plan.num_kv_heads)
        self._num_kv_heads = plan.num_kv_heads

    def write(self, chunk: Chunk, group: int, positions: range, block_id: int) -> None:
        """Write tokens of one block, in all layers and KV heads that keep it."""
        for home in self.places.homes[group]:
            for head in range(self._num_kv_heads):
                slot = self.places.written(home, head, positions.start)
                if slot is not None:
                    contents = chunk.sequence.contents(home, head, positions)
                    self.memory.write(block_id, home.entry, slot, contents)


class Simulation:
    """vLLM's scheduler around its KV cache manager, and a worker; every step is checked.

    Args:
        plan: the plan under test.
        specs: the specs of its entries.
        num_blocks: blocks of the pool, the null block included.
        steps_in_flight: 1, or 2 to schedule a step before the one before it has run (asynchronous
            scheduling).
        events: what happens is counted here: a run in which nothing did has tested nothing.
        quick: whether the groups have the plugin's managers, as in an engine, or vLLM's own.
        caching: whether prefixes are cached.

    Raises:
        AssertionError: by any method, when a check fails.
    """

    def __init__(
        self,
        plan: CachePlan,
        specs: dict[str, KVCacheSpec],
        num_blocks: int,
        steps_in_flight: int,
        events: Counter[str],
        quick: bool = True,
        caching: bool = True,
    ) -> None:
        config = engine_config(MAX_MODEL_LEN, MAX_BATCHED_TOKENS)
        pool = cache_config(cache_groups(specs), num_blocks * plan.block_bytes)
        if quick:
            use_quick_managers(pool)
        assert pool.num_blocks == num_blocks
        # As an engine's core does, whatever the plan calls the block size.
        config.cache_config = copy(config.cache_config)
        config.cache_config.block_size = min(g.kv_cache_spec.block_size for g in pool.kv_cache_groups)
        scheduler_block_size, hash_block_size = resolve_kv_cache_block_sizes(pool, config)
        self.manager = KVCacheManager(
            pool,
            MAX_MODEL_LEN,
            scheduler_block_size,
            hash_block_size,
            max_in_flight_tokens=steps_in_flight * MAX_BATCHED_TOKENS,
            enable_caching=caching,
        )
        self.plan = plan
        self.workers = [Worker(plan, pool, rank) for rank in range(plan.tensor_parallel_size)]
        self.tiers, self.block_sizes = self.workers[0].places.tiers, self.workers[0].places.block_sizes
        self.steps_in_flight = steps_in_flight
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.in_flight: deque[list[Chunk]] = deque()
        self.events = events
        self._hasher = get_request_block_hasher(hash_block_size, sha256)

    def add(self, prompt: list[int], outputs: int) -> Sequence:
        """Queue a request that ends after `outputs` tokens."""
        request = Request(
            f"request {self.events['requests']}",
            list(prompt),
            SamplingParams(max_tokens=outputs),
            pooling_params=None,
            block_hasher=self._hasher,
        )
        self.events["requests"] += 1
        self.waiting.append(Sequence(request))
        return self.waiting[-1]

    def abort(self, sequence: Sequence) -> None:
        """End a request whatever its state."""
        self._stop(sequence, RequestStatus.FINISHED_ABORTED)
        self.events["aborts"] += 1

    def step(self, most_tokens: int, preempt: bool = False) -> None:
        """Run the step that is due, and schedule one with at most `most_tokens` tokens of each sequence.

        `preempt` makes the sequence that came last give way, whether or not blocks are short.
        """
        self.events["steps"] += 1
        if len(self.in_flight) == self.steps_in_flight:
            self._settle()
        self.manager.new_step_starts()
        chunks = self._schedule(most_tokens, preempt)
        if chunks:
            self.in_flight.append(chunks)
        elif self.in_flight:
            self._settle()
        check_nothing_leaks(self)

    def finish(self) -> None:
        """Run until every request has ended."""
        last = self.events["steps"] + MAX_STEPS_TO_FINISH
        while self.running or self.waiting or self.in_flight:
            self.step(MAX_BATCHED_TOKENS)
            assert self.events["steps"] < last, "no progress"
        check_all_is_free(self)

    def pages_of(self, sequence: Sequence) -> tuple[list[int], ...]:
        """The block ids of a running sequence as the manager has them, 0 where it has freed one, by group."""
        return self.manager.get_block_ids(sequence.request.request_id)

    def writes(self, chunk: Chunk) -> Iterator[tuple[int, range, int]]:
        """(group, positions, block id) of the tokens of a block that a chunk writes, by vLLM's slot mapping.

        They are in one page: pages hold whole blocks.
        """
        block = self.plan.patterns[0].block_size
        for group, size in enumerate(self.block_sizes):
            for first in range(chunk.start // block * block, chunk.end, block):
                positions = range(max(first, chunk.start), min(first + block, chunk.end))
                yield group, positions, chunk.rows[group][positions.start // size]

    def _stop(self, sequence: Sequence, status: RequestStatus) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            self.manager.free(sequence.request)
        else:
            self.waiting.remove(sequence)
        sequence.request.status = status

    def _preempt(self) -> None:
        sequence = self.running.pop()
        request = sequence.request
        self.manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0
        sequence.life += 1
        self.waiting.appendleft(sequence)
        self.events["preemptions"] += 1

    def _schedule(self, most_tokens: int, preempt: bool) -> list[Chunk]:
        """As vLLM's scheduler does: running requests first, then waiting ones if nothing was preempted."""
        preemptions = self.events["preemptions"]
        if preempt and self.running:
            self._preempt()
        chunks = self._go_on(most_tokens)
        budget = MAX_BATCHED_TOKENS - sum(chunk.end - chunk.start for chunk in chunks)
        while self.waiting and budget and self.events["preemptions"] == preemptions:
            count = self._admit(self.waiting[0], min(most_tokens, budget))
            if count == 0:
                break
            self.running.append(self.waiting.popleft())
            chunks.append(self._chunk(self.running[-1], count))
            budget -= count
        return chunks

    def _go_on(self, most_tokens: int) -> list[Chunk]:
        """The next chunks of the running sequences; the last of them give way where blocks are short."""
        chunks: list[Chunk] = []
        budget = MAX_BATCHED_TOKENS
        for sequence in list(self.running):
            request = sequence.request
            if sequence not in self.running:
                break
            sampled = request.num_output_tokens + request.num_output_placeholders
            wanted = request.num_tokens + request.num_output_placeholders - request.num_computed_tokens
            count = min(wanted, most_tokens, budget)
            if count == 0 or sampled >= request.max_tokens:
                continue
            while (blocks := self.manager.allocate_slots(request, count)) is None:
                self._preempt()
                if sequence not in self.running:
                    break
            if blocks is None:
                break
            for row, ids in zip(sequence.rows, blocks.get_block_ids(), strict=True):
                row.extend(ids)
            chunks.append(self._chunk(sequence, count))
            budget -= count
        return chunks

    def _admit(self, sequence: Sequence, most_tokens: int) -> int:
        """Allocate the first chunk of a waiting sequence, and return its tokens; 0 when it does not fit."""
        request = sequence.request
        hit_blocks, hit, request.shared_prefix_boundary = self.manager.get_computed_blocks(request)
        assert hit % self.plan.hit_alignment == 0
        count = min(request.num_tokens - hit, most_tokens)
        blocks = self.manager.allocate_slots(
            request,
            count,
            num_new_computed_tokens=hit,
            new_computed_blocks=hit_blocks,
            full_sequence_must_fit=True,
            has_scheduled_reqs=bool(self.running),
        )
        if blocks is None:
            assert self.running, "a request alone does not fit into a pool that was made for it"
            return 0
        self.events["prefix hits"] += hit > 0
        self.events["prefix hits after a preemption"] += hit > 0 and request.status == RequestStatus.PREEMPTED
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit
        sequence.rows = [list(ids) for ids in self.pages_of(sequence)]
        return count

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        request = sequence.request
        start = request.num_computed_tokens
        settled, end = start - request.num_in_flight_tokens, start + count
        check_what_is_held(self, sequence, max(settled, 0), end)
        request.num_computed_tokens = end
        request.num_in_flight_tokens += count
        samples = end >= request.num_tokens + request.num_output_placeholders
        request.num_output_placeholders += samples
        return Chunk(sequence, sequence.life, [list(row) for row in sequence.rows], start, end, samples)

    def _settle(self) -> None:
        """Run the oldest step, and take its sampled tokens."""
        chunks = self.in_flight.popleft()
        self._run(chunks)
        for chunk in chunks:
            request = chunk.sequence.request
            request.num_in_flight_tokens -= chunk.end - chunk.start
            if not chunk.samples or request.is_finished():
                continue
            # A token that was in flight when its request was preempted still counts.
            request.append_output_token_ids(request.num_tokens % 7)
            if chunk.is_alive:
                request.num_output_placeholders -= 1
                if self.steps_in_flight > 1:
                    known = request.num_computed_tokens - request.num_output_placeholders
                    self.manager.cache_blocks(request, known)
            if request.num_output_tokens >= request.max_tokens:
                self._stop(chunk.sequence, RequestStatus.FINISHED_STOPPED)

    def _run(self, chunks: list[Chunk]) -> None:
        """As in a layer, all new tokens are written before attention reads any."""
        check_writers(self, chunks)
        for chunk in chunks:
            for group, positions, block_id in self.writes(chunk):
                for worker in self.workers:
                    worker.write(chunk, group, positions, block_id)
            self.events["tokens written"] += chunk.end - chunk.start
        for chunk in chunks:
            if chunk.is_alive:
                for worker in self.workers:
                    check_reads(self, worker, chunk)


@cache
def attended(pattern: S2Pattern, query_block: int) -> dict[str, frozenset[tuple[int, int]]]:
    """The (KV head, block) that a query block attends to in each tier; in a dense layer, all before it.

    The window tier has the sinks as well. What is both a sink and of a kept residue has to be in both tiers.
    """
    sets: dict[str, set[tuple[int, int]]] = {
        "window": set(),
        "sinks": set(),
        "strided": set(),
        "dense": set(),
    }
    for query_head in range(pattern.num_heads):
        head = query_head // pattern.group_size
        for block in range(query_block + 1):
            sets["dense"].add((head, block))
            if not pattern.attends(query_head, query_block, block):
                continue
            if query_block - block < pattern.local_blocks:
                sets["window"].add((head, block))
                continue
            if block < pattern.sink_blocks:
                sets["sinks"].add((head, block))
            if block >= pattern.sink_blocks or block % pattern.vert_stride in pattern.kept_residues[head]:
                sets["strided"].add((head, block))
    return {tier: frozenset(pairs) for tier, pairs in sets.items()}


@lru_cache(4096)
def needed(pattern: S2Pattern, tier: str, start: int, end: int) -> dict[tuple[int, int], int]:
    """The last token that the queries `start` to `end` - 1 attend to in each (KV head, block) of a tier."""
    size = pattern.block_size
    last: dict[tuple[int, int], int] = {}
    for query_block in range(start // size, (end - 1) // size + 1):
        newest = min((query_block + 1) * size, end) - 1
        for head, block in attended(pattern, query_block)[tier]:
            last[head, block] = min((block + 1) * size - 1, newest)
    return last


def check_reads(simulation: Simulation, worker: Worker, chunk: Chunk) -> None:
    """All that the chunk's queries attend to is in pages that their request holds, with its own tokens."""
    live = simulation.pages_of(chunk.sequence)
    for group, tier in enumerate(simulation.tiers):
        for kind in ("window", "sinks") if tier == "window" else (tier,):
            for home in worker.places.homes[group]:
                index = home.layer if tier != "dense" else 0
                pattern = simulation.plan.pattern_of(index, worker.rank)
                blocks = needed(pattern, kind, chunk.start, chunk.end)
                for (head, block), last in blocks.items():
                    positions = range(block * pattern.block_size, last + 1)
                    check_read(worker, chunk, home, head, positions, live[group])
                simulation.events[f"blocks read in the {kind} tier"] += len(blocks)


def check_read(
    worker: Worker, chunk: Chunk, home: Home, head: int, positions: range, live: list[int]
) -> None:
    """Tokens of one block are where a KV head of a layer looks for them."""
    row, tier = chunk.rows[home.group], worker.places.tiers[home.group]
    what = f"{tier} tier, layer {home.layer}, KV head {head}, tokens from {positions.start}, {chunk}"
    found = worker.places.find(home, head, positions.start)
    assert found is not None, f"attends to what it does not keep: {what}"
    page, slot = found
    assert row[page] == live[page] != 0, f"freed too early: {what}"
    expected = chunk.sequence.contents(home, head, positions)
    held = worker.memory.read(row[page], home.entry, slot, len(expected))
    assert held == expected, f"wrong tokens: {what}"


def check_writers(simulation: Simulation, chunks: list[Chunk]) -> None:
    """Nobody but its writer holds a page that is written, save for the same tokens at the same place."""
    holders: dict[int, list[tuple[Sequence, tuple[int, int]]]] = defaultdict(list)
    for sequence in simulation.running:
        for group, ids in enumerate(simulation.pages_of(sequence)):
            for page, block_id in enumerate(ids):
                holders[block_id].append((sequence, (group, page)))
    writers: dict[int, Sequence] = {}
    for chunk in filter(lambda chunk: chunk.is_alive, chunks):
        hashes = chunk.sequence.prefix_hashes()
        for group, positions, block_id in simulation.writes(chunk):
            assert block_id != 0, f"written to the null block: {chunk}"
            assert writers.setdefault(block_id, chunk.sequence) is chunk.sequence, "two writers of a page"
            place = group, positions.start // simulation.block_sizes[group]
            for other, held_as in holders[block_id]:
                assert held_as == place, "two requests hold a page for different places"
                if other is not chunk.sequence:
                    written = slice(positions.start, positions.stop)
                    assert other.prefix_hashes()[written] == hashes[written], "a page overwritten"
                    simulation.events["pages shared while they are written"] += 1


def check_what_is_held(simulation: Simulation, sequence: Sequence, settled: int, end: int) -> None:
    """A request holds its window and its strided and dense pages, and no more than the plan says.

    Args:
        simulation: asked after the allocation for a chunk.
        sequence: the chunk's.
        settled: tokens of it that are computed for sure.
        end: tokens of it when the chunk has run.
    """
    plan = simulation.plan
    held = 0
    for group, ids in enumerate(simulation.pages_of(sequence)):
        tier, size = simulation.tiers[group], simulation.block_sizes[group]
        pages = [page for page, block_id in enumerate(ids) if block_id != 0]
        assert len(ids) == -(-end // size)
        if tier == "window":
            simulation.events["window pages seen freed"] += len(ids) - len(pages)
            sinks = min(plan.sink_pages, len(ids))
            assert pages[:sinks] == list(range(sinks)), "a sink freed"
            window = pages[sinks:]
            if window:
                assert (window[0] + 1) * size > settled - plan.window_tokens + 1, "not freed"
                assert window == list(range(window[0], len(ids))), "the window tier has a hole"
        else:
            assert len(pages) == len(ids), f"the {tier} tier has lost a page"
        held += len(pages)
    assert held <= plan.blocks_per_request(end, end - settled), "more blocks than planned"
    in_flight = simulation.steps_in_flight * MAX_BATCHED_TOKENS
    assert held <= plan.blocks_per_request(MAX_MODEL_LEN, in_flight), "more blocks than reserved"


def check_nothing_leaks(simulation: Simulation) -> None:
    """Every block that is not free is held by a running request, or is the null block."""
    held = {
        block_id
        for sequence in simulation.running
        for block_id in chain.from_iterable(simulation.pages_of(sequence))
    }
    pool = simulation.manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - len(held | {0}), "blocks leak"


def check_all_is_free(simulation: Simulation) -> None:
    """Without requests every block but the null block is free."""
    pool = simulation.manager.block_pool
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1, "blocks leak"
