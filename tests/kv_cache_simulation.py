"""A simulation of a vLLM engine around vLLM's KV cache manager, with a plan's specs, and its checks.

The manager decides which page holds what. `Simulation` plays the scheduler, which asks the manager for pages,
and the worker, which writes the pages through block-table rows that only ever grow. There is no model: a
slot holds a number that stands for the KV of a token, made of that token and all before it.

The checks are the functions at the end. The one that matters most: for every query that runs, each block that
the pattern lets it see has to be in a page that the request still holds, and the page has to hold the
request's own tokens there.
"""

from __future__ import annotations

from collections import defaultdict, deque
from dataclasses import dataclass, field
from functools import cache
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
from tests.plans import cache_config, cache_groups, engine_config, tier_of

if TYPE_CHECKING:
    from collections import Counter
    from collections.abc import Iterator

    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec

    from s2_kernels.pattern import S2Pattern
    from s2_vllm.plan import CachePlan

MAX_MODEL_LEN = 512
MAX_BATCHED_TOKENS = 96

# Far more than any set of requests needs that the simulation is given.
MAX_STEPS_TO_FINISH = 10_000

init_none_hash(sha256)


class Memory:
    """The pages by block id: [KV head][slot], None where nothing was written yet."""

    def __init__(self, num_kv_heads: int, slots: int) -> None:
        self._shape = num_kv_heads, slots
        self._pages: dict[int, list[list[int | None]]] = defaultdict(self._fresh)

    def _fresh(self) -> list[list[int | None]]:
        heads, slots = self._shape
        return [[None] * slots for _ in range(heads)]

    def write(self, block_id: int, kv_head: int, slot: int, content: int) -> None:
        self._pages[block_id][kv_head][slot] = content

    def read(self, block_id: int, kv_head: int, slot: int, count: int) -> list[int | None]:
        return self._pages[block_id][kv_head][slot : slot + count]


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

    def contents(self, group: int, positions: range) -> list[int]:
        """The KV of the tokens at `positions`, in the layers of a group."""
        return [number + group for number in self.prefix_hashes()[positions.start : positions.stop]]


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


class Places:
    """Where the KV cache groups of a plan keep a token.

    Attributes:
        plan: the plan.
        tiers: "window", "strided" or "dense" for each group.
        block_sizes: tokens that a page of each group spans.
    """

    def __init__(self, plan: CachePlan, pool: KVCacheConfig) -> None:
        self.plan = plan
        self.tiers = [tier_of(group) for group in pool.kv_cache_groups]
        self.block_sizes = [group.kv_cache_spec.block_size for group in pool.kv_cache_groups]

    def written(self, group: int, position: int) -> Iterator[tuple[int, int]]:
        """(KV head, slot) where a worker writes a token, by its place in the page that vLLM gives it."""
        in_page = position % self.block_sizes[group]
        for head in range(self.plan.num_kv_heads):
            if self.tiers[group] != "strided":
                yield head, in_page
            elif (place := self.plan.layout_of(0, 0).strided_slot(head, in_page)) is not None:
                page, slot = place
                assert page == 0, "a strided page that spans more tokens than it has slots for"
                yield head, slot

    def looked_for(self, group: int, head: int, position: int) -> tuple[int, int]:
        """(index in the block table, slot) where the kernels look for a token."""
        if self.tiers[group] == "dense":
            return divmod(position, self.plan.dense_block_size)
        if self.tiers[group] == "window":
            return self.plan.layout_of(0, 0).window_slot(position)
        place = self.plan.layout_of(0, 0).strided_slot(head, position)
        assert place is not None, f"KV head {head} attends to token {position}, which it does not keep"
        return place


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
        self.places = Places(plan, pool)
        self.steps_in_flight = steps_in_flight
        self.memory = Memory(plan.num_kv_heads, plan.dense_block_size)
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

    def writes(self, chunk: Chunk) -> Iterator[tuple[int, int, int]]:
        """(group, position, block id) of each token that a chunk writes, by vLLM's slot mapping."""
        for group, size in enumerate(self.places.block_sizes):
            for position in range(chunk.start, chunk.end):
                yield group, position, chunk.rows[group][position // size]

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
            hashes = chunk.sequence.prefix_hashes()
            for group, position, block_id in self.writes(chunk):
                # An aborted request's last token may never become known.
                known = chunk.is_alive or position < len(hashes)
                content = hashes[position] + group if known else 0
                for head, slot in self.places.written(group, position):
                    self.memory.write(block_id, head, slot, content)
            self.events["tokens written"] += chunk.end - chunk.start
        for chunk in chunks:
            if chunk.is_alive:
                check_reads(self, chunk)


@cache
def attended(pattern: S2Pattern, query_block: int) -> dict[str, frozenset[tuple[int, int]]]:
    """The (KV head, block) that a query block attends to in each tier; in a dense layer, all before it."""
    blocks = range(query_block + 1)
    sets: dict[str, set[tuple[int, int]]] = {"window": set(), "strided": set(), "dense": set()}
    for query_head in range(pattern.num_heads):
        head = query_head // pattern.group_size
        for block in blocks:
            sets["dense"].add((head, block))
            if pattern.attends(query_head, query_block, block):
                tier = "window" if query_block - block < pattern.local_blocks else "strided"
                sets[tier].add((head, block))
    return {tier: frozenset(pairs) for tier, pairs in sets.items()}


def needed(pattern: S2Pattern, tier: str, chunk: Chunk) -> dict[tuple[int, int], int]:
    """The last token that a chunk's queries attend to in each (KV head, block) of a tier."""
    size = pattern.block_size
    last: dict[tuple[int, int], int] = {}
    for query_block in range(chunk.start // size, (chunk.end - 1) // size + 1):
        newest = min((query_block + 1) * size, chunk.end) - 1
        for head, block in attended(pattern, query_block)[tier]:
            last[head, block] = min((block + 1) * size - 1, newest)
    return last


def check_reads(simulation: Simulation, chunk: Chunk) -> None:
    """All that the chunk's queries attend to is in pages that their request holds, with its own tokens."""
    places, pattern = simulation.places, simulation.plan.patterns[0]
    live = simulation.pages_of(chunk.sequence)
    for group, tier in enumerate(places.tiers):
        row = chunk.rows[group]
        blocks = needed(pattern, tier, chunk)
        for (head, block), last in blocks.items():
            first = block * pattern.block_size
            page, slot = places.looked_for(group, head, first)
            assert row[page] == live[group][page] != 0, (
                f"freed too early: {tier} tier, KV head {head}, block {block}, {chunk}"
            )
            expected = chunk.sequence.contents(group, range(first, last + 1))
            assert simulation.memory.read(row[page], head, slot, len(expected)) == expected, (
                f"wrong tokens: {tier} tier, KV head {head}, block {block}, {chunk}"
            )
        simulation.events[f"blocks read in the {tier} tier"] += len(blocks)


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
        for group, position, block_id in simulation.writes(chunk):
            assert block_id != 0, f"written to the null block: {chunk}"
            assert writers.setdefault(block_id, chunk.sequence) is chunk.sequence, "two writers of a page"
            place = group, position // simulation.places.block_sizes[group]
            for other, held_as in holders[block_id]:
                assert held_as == place, "two requests hold a page for different places"
                if other is not chunk.sequence:
                    assert other.prefix_hashes()[position] == hashes[position], "a page overwritten"
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
        tier, size = simulation.places.tiers[group], simulation.places.block_sizes[group]
        pages = [page for page, block_id in enumerate(ids) if block_id != 0]
        assert len(ids) == -(-end // size)
        if tier == "window":
            simulation.events["window pages seen freed"] += len(ids) - len(pages)
            assert (pages[0] + 1) * size > settled - plan.window_tokens + 1, "not freed"
            assert pages == list(range(pages[0], len(ids))), "the window tier has a hole"
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
