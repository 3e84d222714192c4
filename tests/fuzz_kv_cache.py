"""Random plans, pools and traffic for the KV cache simulation: `python -m tests.fuzz_kv_cache --help`.

A run is a sequence of episodes, each with a plan, a pool and operations of its own. An episode follows from
the seed and its number alone, so that the one that found a violation can be run again without the others.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from dataclasses import dataclass
from itertools import count
from random import Random
from typing import TYPE_CHECKING

from s2_kernels.pattern import NO_RESIDUE, S2Pattern
from s2_vllm.plan import CachePlan, ModelGeometry, uniform_plan
from s2_vllm.planning import mixed_plans
from tests.kv_cache_simulation import MAX_BATCHED_TOKENS, MAX_MODEL_LEN, Sequence, Simulation
from tests.plans import cache_specs

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

BLOCK = 16
MOST_OPERATIONS = 60
PROGRESS_SECONDS = 10.0


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


@dataclass(frozen=True)
class Episode:
    """What is simulated from an empty pool to an empty pool.

    Attributes:
        plan: the plan under test.
        steps_in_flight: 1, or 2 with asynchronous scheduling.
        room: blocks of the pool, in requests of the greatest length.
        operations: what happens, in this order.
    """

    plan: CachePlan
    steps_in_flight: int
    room: float
    operations: tuple[Operation, ...]

    def run(self, events: Counter[str], make: Callable[..., Simulation] = Simulation) -> None:
        """Simulate it, by what `make` makes, and count in `events` what happens.

        Raises:
            AssertionError: a check has failed.
        """
        blocks = self.plan.blocks_per_request(MAX_MODEL_LEN, self.steps_in_flight * MAX_BATCHED_TOKENS)
        num_blocks = int(blocks * self.room) + 1
        carry_out(
            self.operations,
            make(self.plan, cache_specs(self.plan), num_blocks, self.steps_in_flight, events),
        )


def random_episode(rng: Random, most_operations: int = MOST_OPERATIONS) -> Episode:
    return Episode(
        random_plan(rng),
        steps_in_flight=rng.randint(1, 2),
        room=rng.choice([1.0, 1.3, 2.0, 5.0]),
        operations=tuple(random_operation(rng) for _ in range(rng.randint(6, most_operations))),
    )


def random_plan(rng: Random) -> CachePlan:
    """A small plan, with prefix hits within reach of short prompts."""
    return random_uniform_plan(rng) if rng.random() < 0.5 else random_mixed_plan(rng)


def random_mixed_plan(rng: Random) -> CachePlan:
    """One of heads of several kinds on one rank or two: any that `plan_for` may choose from."""
    while True:
        ranks = rng.randint(1, 2)
        num_kv_heads = ranks * rng.randint(1, 2)
        sparse, dense = rng.randint(1, 5), rng.randint(0, 2)
        model = ModelGeometry(sparse + dense, num_kv_heads, num_kv_heads, head_size=8, dtype_bytes=2)
        sinks = rng.randint(0, 2)
        patterns = {dense + i: random_pattern(rng, num_kv_heads, sinks) for i in range(sparse)}
        plans = list(mixed_plans(patterns, tuple(range(dense)), model, ranks, None))
        fine = [plan for plan in plans if plan.hit_alignment <= MAX_MODEL_LEN // 3]
        if fine:
            return rng.choice(fine)


def random_pattern(rng: Random, num_kv_heads: int, most_sinks: int) -> S2Pattern:
    """With full, streaming and strided heads, or some of these; in one of four layers all are of one kind."""
    kinds = rng.choice([["full"], ["streaming"], *[["full", "streaming", "strided"]] * 6])
    of_heads = [rng.choice(kinds) for _ in range(num_kv_heads)]
    stride = rng.choice([2, 4]) if "strided" in of_heads else 1
    return S2Pattern(
        BLOCK,
        rng.randint(1, 5),
        stride,
        tuple(rng.randrange(stride) if kind == "strided" else NO_RESIDUE for kind in of_heads),
        num_kv_heads,
        rng.randint(0, most_sinks),
        tuple(head for head, kind in enumerate(of_heads) if kind == "full"),
    )


def random_uniform_plan(rng: Random) -> CachePlan:
    """One of layers that have the same pattern, with a residue or more of every head."""
    while True:
        stride = rng.randint(2, 5)
        num_kv_heads = rng.randint(1, 2)
        pattern = S2Pattern.build(
            rng.randint(1, min(2, stride - 1)) * num_kv_heads,
            num_kv_heads,
            block_size=BLOCK,
            local_blocks=rng.randint(1, 5),
            vert_stride=stride,
            head_sliding_offset=rng.randint(0, 3),
            pattern_heads=rng.choice(["kv", "query"]),
        )
        dense = rng.randint(0, 2)
        layers_per_entry = rng.randint(1, 3) if dense else 1
        sparse = rng.randint(layers_per_entry, 2 * layers_per_entry)
        plan = uniform_plan(
            ModelGeometry(sparse + dense, pattern.num_heads, num_kv_heads, head_size=8, dtype_bytes=2),
            pattern,
            sparse_layers=tuple(range(dense, dense + sparse)),
            dense_layers=tuple(range(dense)),
            tensor_parallel_size=1,
            page_slots=pattern.num_kept * BLOCK * rng.randint(1, 2),
            layers_per_entry=layers_per_entry,
            padding_entries=rng.randint(0, 1),
        )
        if plan.hit_alignment <= MAX_MODEL_LEN // 3:
            return plan


def random_operation(rng: Random) -> Operation:
    match rng.choice(["add", "steps", "steps", "abort", "preempt"]):
        case "add":
            shared = rng.choice([0, 50, 90, 100])
            return Add(rng.randint(0, 9), shared, rng.randint(1, 250), rng.randint(1, 40))
        case "steps":
            return Steps(rng.randint(1, 12), rng.randint(1, MAX_BATCHED_TOKENS))
        case "abort":
            return Abort(rng.randint(0, 9))
        case _:
            return Preempt()


def carry_out(operations: tuple[Operation, ...], simulation: Simulation) -> None:
    """Carry out the operations and run to the end."""
    sequences: list[Sequence] = []
    for serial, operation in enumerate(operations):
        match operation:
            case Add(earlier, shared_percent, new_tokens, outputs):
                tokens: list[int] = []
                if sequences:
                    tokens = list(sequences[-1 - earlier % len(sequences)].request.all_token_ids)
                prompt = tokens[: len(tokens) * shared_percent // 100] + [1000 + serial] * new_tokens
                sequences.append(simulation.add(prompt[: MAX_MODEL_LEN - outputs], outputs))
            case Steps(repeat, most_tokens):
                for _ in range(repeat):
                    simulation.step(most_tokens)
            case Abort(index):
                unfinished = [*simulation.running, *simulation.waiting]
                if unfinished:
                    simulation.abort(unfinished[index % len(unfinished)])
            case Preempt():
                simulation.step(MAX_BATCHED_TOKENS, preempt=True)
    simulation.finish()


class ViolationError(Exception):
    """A check that failed, or an exception of vLLM's or the plan's."""


def fuzz(seed: int, first_episode: int = 0) -> Iterator[Counter[str]]:
    """Run episode after episode, and yield the events of each.

    Raises:
        ViolationError: says how to run the episode again.
    """
    steps = 0
    for number in count(first_episode):
        episode = random_episode(Random(f"{seed} {number}"))
        events: Counter[str] = Counter()
        try:
            episode.run(events)
        except Exception as error:
            raise ViolationError(
                f"{type(error).__name__}: {error}\n"
                f"in step {events['steps']} of episode {number}, step {steps + events['steps']} of the run\n"
                f"to reproduce: python -m tests.fuzz_kv_cache --seed {seed} --episode {number}"
            ) from error
        steps += events["steps"]
        yield events


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        "python -m tests.fuzz_kv_cache",
        description="Drive vLLM's KV cache manager with random plans, pools and traffic; check every step.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    parser.add_argument("--steps", type=int, default=100_000, help="engine steps to run, at least")
    parser.add_argument("--seed", type=int, default=0, help="of the episodes")
    parser.add_argument("--episode", type=int, help="run this episode alone, whatever its steps")
    options = parser.parse_args(arguments)
    if options.steps < 1:
        parser.error(f"--steps: {options.steps}, expected a positive integer")
    if not __debug__:
        parser.error("the checks are assertions, which python -O leaves out")

    print(f"seed {options.seed}", flush=True)
    start = printed = time.monotonic()
    events: Counter[str] = Counter()
    episodes = 0
    try:
        for of_episode in fuzz(options.seed, options.episode or 0):
            events += of_episode
            episodes += 1
            if options.episode is not None or events["steps"] >= options.steps:
                break
            if time.monotonic() - printed > PROGRESS_SECONDS:
                printed = time.monotonic()
                print(
                    f"{events['steps']} steps, {events['steps'] / (printed - start):.0f} a second", flush=True
                )
    except ViolationError as violation:
        traceback.print_exception(violation)
        return 1
    seconds = time.monotonic() - start
    print(f"no violation in {episodes} episodes with seed {options.seed}, {seconds:.0f} s")
    for event, times in sorted(events.items()):
        print(f"{times:>12} {event}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
