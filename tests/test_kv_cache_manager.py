"""vLLM's own KV cache manager with a plan's specs: random traffic, and specs that are wrong on purpose."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import pytest
from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from vllm.v1.kv_cache_interface import KVCacheSpec, SlidingWindowSpec

from s2_kernels.layout import TierLayout
from s2_kernels.pattern import S2Pattern
from s2_vllm.managers import SinkWindowManager
from s2_vllm.packing import Place
from s2_vllm.plan import CachePlan, ModelGeometry, uniform_plan
from s2_vllm.planning import plan_for
from s2_vllm.specs import SinkWindowSpec
from tests import fuzz_kv_cache
from tests.fuzz_kv_cache import BLOCK, Add, carry_out, random_episode
from tests.kv_cache_simulation import Memory, Simulation
from tests.plans import cache_specs

if TYPE_CHECKING:
    from collections.abc import Callable
    from random import Random

EVENTS = (
    "aborts",
    "prefix hits",
    "prefix hits after a preemption",
    "preemptions",
    "window pages seen freed",
    "blocks read in the strided tier",
    "blocks read in the sinks tier",
    "pages shared while they are written",
)


def test_every_query_finds_its_pages() -> None:
    events: Counter[str] = Counter()

    @settings(
        max_examples=200,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=[HealthCheck.too_slow],
    )
    @given(rng=st.randoms(use_true_random=False))
    def run(rng: Random) -> None:
        episode = random_episode(rng, most_operations=24)
        note(str(episode))
        episode.run(events)

    run()
    for event in EVENTS:
        assert events[event] > 50, f"{event}: too few to have tested anything"


PLAN = uniform_plan(
    ModelGeometry(num_layers=3, num_heads=2, num_kv_heads=2, head_size=8, dtype_bytes=2),
    S2Pattern.build(2, 2, block_size=BLOCK, local_blocks=3, vert_stride=4),
    sparse_layers=(1, 2),
    dense_layers=(0,),
    tensor_parallel_size=1,
    page_slots=BLOCK,
    layers_per_entry=2,
)


def serve_one_long_request(
    specs: dict[str, KVCacheSpec], plan: CachePlan = PLAN, steps_in_flight: int = 1
) -> Counter[str]:
    events: Counter[str] = Counter()
    simulation = Simulation(plan, specs, 200, steps_in_flight, events)
    carry_out((Add(earlier=0, shared_percent=0, new_tokens=250, outputs=40),), simulation)
    return events


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_the_specs_of_a_plan(steps_in_flight: int) -> None:
    events = serve_one_long_request(cache_specs(PLAN), steps_in_flight=steps_in_flight)
    assert events["window pages seen freed"] > 0


def changed_specs(plan: CachePlan, is_window: bool, change: dict[str, int]) -> dict[str, KVCacheSpec]:
    """The specs of a plan, those of its window tier or of its strided tier changed."""
    first_sparse = len(plan.dense_layers)
    return {
        name: replace(spec, **change)
        if int(name.split(".")[2]) >= first_sparse and isinstance(spec, SlidingWindowSpec) == is_window
        else spec
        for name, spec in cache_specs(plan).items()
    }


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
    with pytest.raises(AssertionError, match=message):
        serve_one_long_request(changed_specs(PLAN, is_window, change))


def test_wrong_residues_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pages that keep, for each head, the blocks after those that the pattern asks for."""
    layout_of = CachePlan.layout_of

    def moved(self: CachePlan, index: int, rank: int) -> TierLayout:
        layout = layout_of(self, index, rank)
        residues = tuple((r + 1) % layout.pattern.vert_stride for r in layout.pattern.residues)
        return replace(layout, pattern=replace(layout.pattern, residues=residues))

    monkeypatch.setattr(CachePlan, "layout_of", moved)
    with pytest.raises(AssertionError, match="attends to what it does not keep"):
        serve_one_long_request(cache_specs(PLAN))


MIXED = plan_for(
    {
        # On both ranks a full head and a strided one; two streaming ones; a full and a streaming one.
        0: S2Pattern(BLOCK, 3, 4, (-1, 0, 3, -1), 4, 1, (0, 3)),
        1: S2Pattern(BLOCK, 1, 1, (-1,) * 4, 4, 3),
        2: S2Pattern(BLOCK, 2, 1, (-1,) * 4, 4, 0, (1, 2)),
        3: S2Pattern(BLOCK, 2, 2, (1, 1, 0, -1), 4, 0, (3,)),
    },
    ModelGeometry(num_layers=5, num_heads=4, num_kv_heads=4, head_size=8, dtype_bytes=2),
    tensor_parallel_size=2,
)


@pytest.mark.parametrize("steps_in_flight", [1, 2])
def test_the_specs_of_a_plan_of_mixed_heads(steps_in_flight: int) -> None:
    events = serve_one_long_request(cache_specs(MIXED), MIXED, steps_in_flight)
    assert events["window pages seen freed"] > 0
    assert events["blocks read in the sinks tier"] > 0


def test_a_sink_that_is_freed_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(SinkWindowManager, "_remove_blocks_in_range")
    with pytest.raises(AssertionError, match="a sink freed"):
        serve_one_long_request(cache_specs(MIXED), MIXED)


def test_too_few_sinks_are_noticed() -> None:
    specs = {
        name: replace(spec, sink_pages=MIXED.sink_pages - 1) if isinstance(spec, SinkWindowSpec) else spec
        for name, spec in cache_specs(MIXED).items()
    }
    with pytest.raises(AssertionError, match="a sink freed"):
        serve_one_long_request(specs, MIXED)


@pytest.mark.parametrize("method", ["window_place", "strided_place"])
def test_layers_in_each_others_place_are_noticed(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place_of = getattr(CachePlan, method)

    def at_the_start(*arguments: Any, **named: Any) -> Place | None:
        place = place_of(*arguments, **named)
        return place and place._replace(first=0)

    monkeypatch.setattr(CachePlan, method, at_the_start)
    with pytest.raises(AssertionError, match="wrong tokens"):
        serve_one_long_request(cache_specs(MIXED), MIXED)


def test_a_skipped_write_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    write = Memory.write

    def all_but_one(self: Memory, block_id: int, entry: int, slot: int, contents: list[int]) -> None:
        """The 6th slot of the second row."""
        skipped = BLOCK + 5 - slot
        write(self, block_id, entry, slot, [0 if i == skipped else c for i, c in enumerate(contents)])

    monkeypatch.setattr(Memory, "write", all_but_one)
    with pytest.raises(AssertionError, match="wrong tokens"):
        serve_one_long_request(cache_specs(PLAN))


def test_command_reports_steps_events_and_the_seed(capsys: pytest.CaptureFixture[str]) -> None:
    assert fuzz_kv_cache.main(["--steps", "300", "--seed", "5"]) == 0
    output = capsys.readouterr().out
    assert "no violation" in output
    assert "with seed 5" in output
    counts = {line[13:]: int(line[:12]) for line in output.splitlines() if line[:1] == " "}
    assert counts["steps"] >= 300
    assert counts["preemptions"] > 0


@pytest.mark.parametrize(
    "specs",
    [
        pytest.param(
            lambda plan: changed_specs(
                plan, True, {"sliding_window": max(BLOCK, plan.window_tokens - BLOCK)}
            ),
            id="window-a-block-short",
        ),
        pytest.param(
            lambda plan: changed_specs(plan, True, {"sliding_window": plan.window_tokens + BLOCK}),
            id="window-a-block-long",
        ),
    ],
)
def test_command_names_the_episode_of_a_violation(
    specs: Callable[[CachePlan], dict[str, KVCacheSpec]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """Run alone, the episode violates the same check in the same step."""
    monkeypatch.setattr(fuzz_kv_cache, "cache_specs", specs)
    assert fuzz_kv_cache.main(["--steps", "20000", "--seed", "5"]) == 1
    message, place, advice = capsys.readouterr().err.strip().splitlines()[-3:]
    arguments = advice.removeprefix("to reproduce: python -m tests.fuzz_kv_cache ").split()
    assert arguments[:3] == ["--seed", "5", "--episode"]
    assert fuzz_kv_cache.main(arguments) == 1
    again, place_again, _ = capsys.readouterr().err.strip().splitlines()[-3:]
    assert again == message
    assert place_again.split(",")[0] == place.split(",")[0]


def test_command_refuses_no_steps(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        fuzz_kv_cache.main(["--steps", "0"])
    assert "--steps: 0, expected a positive integer" in capsys.readouterr().err
