"""vLLM's own KV cache manager, driven with a plan's specs as vLLM's scheduler drives it.

The manager decides which page holds what. `Engine` plays the scheduler, `Memory` the pages, which are
written as a worker writes them: through block-table rows that only ever grow. For every query that runs,
each block that the pattern lets it see has to be in a page that the request still holds, and the page has
to hold the request's own tokens there.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from dataclasses import dataclass, field, replace
from itertools import accumulate, chain
from typing import TYPE_CHECKING, NamedTuple

import pytest
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from vllm.sampling_params import SamplingParams
from vllm.utils.hashing import sha256
from vllm.v1.core.kv_cache_manager import KVCacheManager
from vllm.v1.core.kv_cache_utils import (
    get_request_block_hasher,
    init_none_hash,
    resolve_kv_cache_block_sizes,
)
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec
from vllm.v1.request import Request, RequestStatus

from s2_kernels.pattern import S2Pattern
from s2_vllm.plan import CachePlan, ModelGeometry
from tests.plans import cache_config, cache_groups, cache_specs, engine_config, tier_of

if TYPE_CHECKING:
    from collections.abc import Iterator

BLOCK = 16
MAX_MODEL_LEN = 512
MAX_BATCHED_TOKENS = 96

init_none_hash(sha256)


class Content(NamedTuple):
    """What a slot holds: the KV of a token, made of it and all tokens before it, in the layers of a group."""

    group: int
    prefix_hash: int


class Memory:
    """The pages by block id: slots by KV head, None where nothing was written yet."""

    def __init__(self, num_kv_heads: int, slots: int) -> None:
        self._shape = num_kv_heads, slots
        self._pages: dict[int, list[list[Content | None]]] = defaultdict(self._fresh)

    def _fresh(self) -> list[list[Content | None]]:
        heads, slots = self._shape
        return [[None] * slots for _ in range(heads)]

    def write(self, block_id: int, kv_head: int, slot: int, content: Content) -> None:
        self._pages[block_id][kv_head][slot] = content

    def read(self, block_id: int, kv_head: int, slot: int, count: int) -> list[Content | None]:
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

    def prefix_hashes(self) -> list[int]:
        return list(accumulate(self.request.all_token_ids, lambda *pair: hash(pair), initial=0))[1:]


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


class Engine:
    """vLLM's scheduler around its KV cache manager, and a worker.

    Args:
        plan: the plan under test.
        specs: the specs of its entries.
        num_blocks: blocks of the pool, the null block included.
        steps_in_flight: 1, or 2 to schedule a step before the one before it has run (asynchronous
            scheduling).
    """

    def __init__(
        self, plan: CachePlan, specs: dict[str, KVCacheSpec], num_blocks: int, steps_in_flight: int
    ) -> None:
        config = engine_config(MAX_MODEL_LEN, MAX_BATCHED_TOKENS)
        pool = cache_config(cache_groups(specs), num_blocks * plan.block_bytes)
        assert pool.num_blocks == num_blocks
        scheduler_block_size, hash_block_size = resolve_kv_cache_block_sizes(pool, config)
        self.manager = KVCacheManager(
            pool,
            MAX_MODEL_LEN,
            scheduler_block_size,
            hash_block_size,
            max_in_flight_tokens=steps_in_flight * MAX_BATCHED_TOKENS,
        )
        self.plan = plan
        self.steps_in_flight = steps_in_flight
        self.tiers = [tier_of(group) for group in pool.kv_cache_groups]
        self.block_sizes = [group.kv_cache_spec.block_size for group in pool.kv_cache_groups]
        self.memory = Memory(plan.num_kv_heads, plan.dense_block_size)
        self.hasher = get_request_block_hasher(hash_block_size, sha256)
        self.running: list[Sequence] = []
        self.waiting: deque[Sequence] = deque()
        self.in_flight: deque[list[Chunk]] = deque()
        self.seen: Counter[str] = Counter()

    def add(self, prompt: list[int], outputs: int) -> Sequence:
        request = Request(
            f"request {self.seen['requests']}",
            list(prompt),
            SamplingParams(max_tokens=outputs),
            pooling_params=None,
            block_hasher=self.hasher,
        )
        self.seen["requests"] += 1
        self.waiting.append(Sequence(request))
        return self.waiting[-1]

    def stop(self, sequence: Sequence, status: RequestStatus = RequestStatus.FINISHED_ABORTED) -> None:
        if sequence in self.running:
            self.running.remove(sequence)
            self.manager.free(sequence.request)
        else:
            self.waiting.remove(sequence)
        sequence.request.status = status

    def step(self, most_tokens: int, preempt: bool = False) -> None:
        """Run the step that is due, and schedule one with at most `most_tokens` tokens of each sequence.

        `preempt` makes the sequence that came last give way, whether or not blocks are short.
        """
        if len(self.in_flight) == self.steps_in_flight:
            self._settle()
        self.manager.new_step_starts()
        chunks = self._schedule(most_tokens, preempt)
        if chunks:
            self.in_flight.append(chunks)
        elif self.in_flight:
            self._settle()
        self._check_nothing_leaks()

    def finish(self) -> None:
        """Run to the end."""
        while self.running or self.waiting or self.in_flight:
            self.step(MAX_BATCHED_TOKENS)
            self.seen["steps to the end"] += 1
            assert self.seen["steps to the end"] < 10_000, "no progress"
        assert self.manager.block_pool.get_num_free_blocks() == self.manager.block_pool.num_gpu_blocks - 1

    def _preempt(self) -> None:
        sequence = self.running.pop()
        request = sequence.request
        self.manager.free(request)
        request.status = RequestStatus.PREEMPTED
        request.num_computed_tokens = 0
        request.num_output_placeholders = 0
        sequence.life += 1
        self.waiting.appendleft(sequence)
        self.seen["preemptions"] += 1

    def _schedule(self, most_tokens: int, preempt: bool) -> list[Chunk]:
        chunks: list[Chunk] = []
        budget = MAX_BATCHED_TOKENS
        preemptions = self.seen["preemptions"]
        if preempt and self.running:
            self._preempt()
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
        while self.waiting and budget and self.seen["preemptions"] == preemptions:
            count = self._admit(self.waiting[0], min(most_tokens, budget))
            if count == 0:
                break
            self.running.append(self.waiting.popleft())
            chunks.append(self._chunk(self.running[-1], count))
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
        self.seen["hits"] += hit > 0
        self.seen["hits after a preemption"] += hit > 0 and request.status == RequestStatus.PREEMPTED
        request.status = RequestStatus.RUNNING
        request.num_computed_tokens = hit
        sequence.rows = [list(ids) for ids in self.manager.get_block_ids(request.request_id)]
        return count

    def _chunk(self, sequence: Sequence, count: int) -> Chunk:
        request = sequence.request
        start = request.num_computed_tokens
        settled, end = start - request.num_in_flight_tokens, start + count
        self._check_what_is_held(sequence, max(settled, 0), end)
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
                self.stop(chunk.sequence, RequestStatus.FINISHED_STOPPED)

    def _run(self, chunks: list[Chunk]) -> None:
        """As in a layer, all new tokens are written before attention reads any."""
        self._check_writers(chunks)
        for chunk in chunks:
            hashes = chunk.sequence.prefix_hashes()
            for group, position, block_id in self._written(chunk):
                # An aborted request's last token may never become known.
                prefix_hash = hashes[position] if chunk.is_alive or position < len(hashes) else 0
                for head, slot in self._slots(group, position):
                    self.memory.write(block_id, head, slot, Content(group, prefix_hash))
        for chunk in chunks:
            if chunk.is_alive:
                self._check_reads(chunk)

    def _written(self, chunk: Chunk) -> Iterator[tuple[int, int, int]]:
        """(group, position, block id) of each token that a chunk writes, by vLLM's slot mapping."""
        for group, size in enumerate(self.block_sizes):
            for position in range(chunk.start, chunk.end):
                yield group, position, chunk.rows[group][position // size]

    def _slots(self, group: int, position: int) -> Iterator[tuple[int, int]]:
        """(KV head, slot in the page) where a group keeps the token at `position`."""
        in_page = position % self.block_sizes[group]
        for head in range(self.plan.num_kv_heads):
            if self.tiers[group] != "strided":
                yield head, in_page
            elif (place := self.plan.layout.strided_slot(head, in_page)) is not None:
                page, slot = place
                assert page == 0, "a strided page that spans more tokens than it has slots for"
                yield head, slot

    def _check_reads(self, chunk: Chunk) -> None:
        hashes = chunk.sequence.prefix_hashes()
        live = self.manager.get_block_ids(chunk.sequence.request.request_id)
        for group, head, block, last in self._needed(chunk):
            page, slot = self._place(group, head, block * BLOCK)
            where = f"{self.tiers[group]} tier, KV head {head}, block {block}, {chunk}"
            assert chunk.rows[group][page] == live[group][page] != 0, f"freed too early: {where}"
            positions = range(block * BLOCK, min((block + 1) * BLOCK, last + 1))
            held = self.memory.read(chunk.rows[group][page], head, slot, len(positions))
            assert held == [Content(group, hashes[p]) for p in positions], f"wrong tokens: {where}"

    def _needed(self, chunk: Chunk) -> Iterator[tuple[int, int, int, int]]:
        """(group, KV head, block, last position seen) of all blocks that a chunk's queries attend to."""
        pattern = self.plan.pattern
        seen: dict[tuple[str, int, int], int] = {}
        for position in range(chunk.start, chunk.end):
            if (position + 1) % BLOCK and position + 1 < chunk.end:
                continue
            query = position // BLOCK
            for query_head in range(pattern.num_heads):
                head = query_head // pattern.group_size
                for block in range(query + 1):
                    seen["dense", head, block] = position
                    if pattern.attends(query_head, query, block):
                        tier = "window" if query - block < pattern.local_blocks else "strided"
                        seen[tier, head, block] = position
                        self.seen[f"blocks read in the {tier} tier"] += 1
        for group, tier in enumerate(self.tiers):
            for (of_tier, head, block), last in seen.items():
                if of_tier == tier:
                    yield group, head, block, last

    def _place(self, group: int, head: int, position: int) -> tuple[int, int]:
        """(index in the block table, slot) where the kernels look for the token at `position`."""
        if self.tiers[group] == "dense":
            return divmod(position, self.plan.dense_block_size)
        if self.tiers[group] == "window":
            return self.plan.layout.window_slot(position)
        place = self.plan.layout.strided_slot(head, position)
        assert place is not None
        return place

    def _check_writers(self, chunks: list[Chunk]) -> None:
        """Nobody but its writer holds a page that is written, save for the same tokens at the same place."""
        holders: dict[int, list[tuple[Sequence, int, int]]] = defaultdict(list)
        for sequence in self.running:
            ids_of_groups = self.manager.get_block_ids(sequence.request.request_id)
            for group, ids in enumerate(ids_of_groups):
                for page, block_id in enumerate(ids):
                    holders[block_id].append((sequence, group, page))
        writers: dict[int, Sequence] = {}
        for chunk in filter(lambda chunk: chunk.is_alive, chunks):
            hashes = chunk.sequence.prefix_hashes()
            for group, position, block_id in self._written(chunk):
                assert block_id != 0, f"written to the null block: {chunk}"
                assert writers.setdefault(block_id, chunk.sequence) is chunk.sequence, "two writers of a page"
                place = group, position // self.block_sizes[group]
                for other, *held_as in holders[block_id]:
                    assert tuple(held_as) == place, "two requests hold a page for different places"
                    if other is not chunk.sequence:
                        assert other.prefix_hashes()[position] == hashes[position], "a page overwritten"
                        self.seen["pages shared while they are written"] += 1

    def _check_what_is_held(self, sequence: Sequence, settled: int, end: int) -> None:
        """After the allocation for a chunk that ends at `end`, with `settled` tokens computed for sure."""
        plan = self.plan
        held = 0
        for group, ids in enumerate(self.manager.get_block_ids(sequence.request.request_id)):
            size = self.block_sizes[group]
            pages = [page for page, block_id in enumerate(ids) if block_id != 0]
            assert len(ids) == -(-end // size)
            if self.tiers[group] == "window":
                self.seen["window pages freed"] += len(ids) - len(pages)
                assert (pages[0] + 1) * size > settled - plan.pattern.window_tokens + 1, "not freed"
                assert pages == list(range(pages[0], len(ids)))
            else:
                assert len(pages) == len(ids), f"the {self.tiers[group]} tier has lost a page"
            held += len(pages)
        assert held <= plan.blocks_per_request(end, end - settled), "more blocks than planned"
        in_flight = self.steps_in_flight * MAX_BATCHED_TOKENS
        assert held <= plan.blocks_per_request(MAX_MODEL_LEN, in_flight), "more blocks than reserved"

    def _check_nothing_leaks(self) -> None:
        held = {
            block_id
            for sequence in self.running
            for block_id in chain.from_iterable(self.manager.get_block_ids(sequence.request.request_id))
        }
        pool = self.manager.block_pool
        assert pool.get_num_free_blocks() == pool.num_gpu_blocks - len(held | {0}), "blocks leak"


@st.composite
def plans(draw: st.DrawFn) -> CachePlan:
    """Small plans, with prefix hits within reach of short prompts."""
    stride = draw(st.integers(2, 5))
    num_kv_heads = draw(st.integers(1, 2))
    pattern_heads = draw(st.sampled_from(["kv", "query"]))
    group = draw(st.integers(1, min(2, stride - 1)))
    pattern = S2Pattern.build(
        group * num_kv_heads,
        num_kv_heads,
        block_size=BLOCK,
        local_blocks=draw(st.integers(1, 5)),
        vert_stride=stride,
        head_sliding_offset=draw(st.integers(0, 3)),
        pattern_heads=pattern_heads,
    )
    layers_per_entry = draw(st.integers(1, 3))
    sparse = draw(st.integers(layers_per_entry, 2 * layers_per_entry))
    dense = draw(st.integers(0, 2))
    assume(dense or layers_per_entry == 1)
    plan = CachePlan(
        ModelGeometry(sparse + dense, pattern.num_heads, num_kv_heads, head_size=8, dtype_bytes=2),
        pattern,
        sparse_layers=tuple(range(dense, dense + sparse)),
        dense_layers=tuple(range(dense)),
        tensor_parallel_size=1,
        page_slots=pattern.num_kept * BLOCK * draw(st.integers(1, 2)),
        layers_per_entry=layers_per_entry,
    )
    assume(plan.hit_alignment <= MAX_MODEL_LEN // 3)
    return plan


@dataclass(frozen=True)
class Add:
    """A request whose prompt starts like an earlier one's tokens (in per cent of them) and goes on anew."""

    earlier: int
    shared_percent: int
    new_tokens: int
    outputs: int


@dataclass(frozen=True)
class Steps:
    """Steps with at most `most_tokens` tokens of each request."""

    count: int
    most_tokens: int


@dataclass(frozen=True)
class Abort:
    """The end of a request, whatever its state."""

    index: int


@dataclass(frozen=True)
class Preempt:
    """A step that preempts the request that came last."""


Operation = Add | Steps | Abort | Preempt

operations = st.lists(
    st.one_of(
        st.builds(
            Add, st.integers(0, 9), st.sampled_from([0, 50, 90, 100]), st.integers(1, 250), st.integers(1, 40)
        ),
        st.builds(Steps, st.integers(1, 12), st.integers(1, MAX_BATCHED_TOKENS)),
        st.builds(Abort, st.integers(0, 9)),
        st.just(Preempt()),
    ),
    min_size=6,
    max_size=24,
)


def serve(engine: Engine, operations: list[Operation]) -> Counter[str]:
    """Carry out the operations and run to the end; count what has happened."""
    sequences: list[Sequence] = []
    for serial, operation in enumerate(operations):
        match operation:
            case Add(earlier, shared_percent, new_tokens, outputs):
                tokens: list[int] = []
                if sequences:
                    tokens = list(sequences[earlier % len(sequences)].request.all_token_ids)
                prompt = tokens[: len(tokens) * shared_percent // 100] + [1000 + serial] * new_tokens
                sequences.append(engine.add(prompt[: MAX_MODEL_LEN - outputs], outputs))
            case Steps(count, most_tokens):
                for _ in range(count):
                    engine.step(most_tokens)
            case Abort(index):
                unfinished = [*engine.running, *engine.waiting]
                if unfinished:
                    engine.stop(unfinished[index % len(unfinished)])
            case Preempt():
                engine.step(MAX_BATCHED_TOKENS, preempt=True)
    engine.finish()
    return engine.seen


def test_every_query_finds_its_pages() -> None:
    seen: Counter[str] = Counter()

    @settings(
        max_examples=150,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
    )
    @given(
        plan=plans(),
        operations=operations,
        steps_in_flight=st.integers(1, 2),
        room=st.sampled_from([1.0, 1.3, 2.0, 5.0]),
    )
    def run(plan: CachePlan, operations: list[Operation], steps_in_flight: int, room: float) -> None:
        blocks = plan.blocks_per_request(MAX_MODEL_LEN, steps_in_flight * MAX_BATCHED_TOKENS)
        engine = Engine(plan, cache_specs(plan), int(blocks * room) + 1, steps_in_flight)
        seen.update(serve(engine, operations))

    run()
    for event in (
        "hits",
        "hits after a preemption",
        "preemptions",
        "window pages freed",
        "blocks read in the strided tier",
        "pages shared while they are written",
    ):
        assert seen[event] > 50, f"{event}: too few to have tested anything"


PLAN = CachePlan(
    ModelGeometry(num_layers=3, num_heads=2, num_kv_heads=2, head_size=8, dtype_bytes=2),
    S2Pattern.build(2, 2, block_size=BLOCK, local_blocks=3, vert_stride=4),
    sparse_layers=(1, 2),
    dense_layers=(0,),
    tensor_parallel_size=1,
    page_slots=BLOCK,
    layers_per_entry=2,
)

ONE_LONG_REQUEST: list[Operation] = [Add(0, 0, 250, 40)]


def serve_one(specs: dict[str, KVCacheSpec], **options: int) -> Counter[str]:
    return serve(Engine(PLAN, specs, num_blocks=200, **({"steps_in_flight": 1} | options)), ONE_LONG_REQUEST)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_the_specs_of_a_plan(steps_in_flight: int) -> None:
    seen = serve_one(cache_specs(PLAN), steps_in_flight=steps_in_flight)
    assert seen["window pages freed"] > 0


@pytest.mark.parametrize(
    ("is_window", "change", "message"),
    [
        pytest.param(True, {"sliding_window": 2 * BLOCK}, "freed too early", id="window-a-block-short"),
        pytest.param(True, {"sliding_window": 4 * BLOCK}, "not freed", id="window-a-block-long"),
        pytest.param(
            False, {"block_size": 8 * BLOCK, "tokens_per_state": 8}, "more tokens than", id="strided-two-fold"
        ),
        pytest.param(
            False, {"block_size": 2 * BLOCK, "tokens_per_state": 2}, "wrong tokens", id="strided-half"
        ),
    ],
)
def test_a_wrong_spec_is_noticed(is_window: bool, change: dict[str, int], message: str) -> None:
    specs = {
        name: replace(spec, **change) if name in sparse_names(is_window) else spec
        for name, spec in cache_specs(PLAN).items()
    }
    with pytest.raises(AssertionError, match=message):
        serve_one(specs)


def sparse_names(is_window: bool) -> list[str]:
    """The names of the entries of the window tier or of the strided tier."""
    return [
        name
        for name, spec in cache_specs(PLAN).items()
        if isinstance(spec, SlidingWindowSpec) == is_window and "layers.0." not in name
    ]


def test_a_skipped_write_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Memory.write

    def all_but_one(self: Memory, block_id: int, kv_head: int, slot: int, content: Content) -> None:
        if (kv_head, slot, content.group) != (1, 5, 1):
            write(self, block_id, kv_head, slot, content)

    monkeypatch.setattr(Memory, "write", all_but_one)
    with pytest.raises(AssertionError, match="wrong tokens"):
        serve_one(cache_specs(PLAN))
