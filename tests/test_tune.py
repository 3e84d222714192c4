"""The tuning script: what it runs, and what it takes for best."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from functools import partial

import pytest
import torch

from benchmarks import tune
from benchmarks.geometries import GEOMETRIES, VARIATIONS, Geometry
from benchmarks.kernels import cases, implementations
from benchmarks.kernels.cases import Case
from benchmarks.kernels.implementations import IMPLEMENTATIONS
from benchmarks.kernels.timing import Launch
from s2_kernels import paged
from s2_kernels.config import S2Config
from tests.paged import DEVICE

CASES = {
    "cache_write": Case("cache_write", "tiny", 1, 100),
    "decode": Case("decode", "tiny", 2, 200),
    "prefill": Case("prefill", "tiny", 1, 100),
    "block_sparse": Case("prefill", "tiny", 1, 100),
}


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Every operation on a small geometry, in a type that Triton's interpreter multiplies rightly."""
    monkeypatch.setitem(GEOMETRIES, "tiny", Geometry(1, 2, 1, 32, S2Config(2, 4, block_size=16)))
    for op, case in CASES.items():
        monkeypatch.setitem(tune.SEARCHES, op, replace(tune.SEARCHES[op], cases=[case]))
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    if DEVICE == "cpu":
        for name in ("write", "attend"):
            monkeypatch.setattr(paged, name, partial(getattr(paged, name), impl="triton"))
        triton_attention = partial(implementations.s2_attention, impl="triton")
        monkeypatch.setattr(implementations, "s2_attention", triton_attention)
    cases._pattern.cache_clear()
    yield
    cases._pattern.cache_clear()


@pytest.mark.usefixtures("tiny_cases")
@pytest.mark.parametrize("op", CASES)
def test_the_fastest_candidate_is_stored_under_its_shape(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    search = replace(tune.SEARCHES[op], candidates=tune.SEARCHES[op].candidates[:3])
    monkeypatch.setitem(tune.SEARCHES, op, search)
    milliseconds = iter([3.0, 1.0, 2.0])

    def measure(launches: Sequence[Launch], in_graph: bool) -> float:
        for launch in launches:
            launch()
        return next(milliseconds)

    best = tune.tune(op, torch.device(DEVICE), measure)
    (shape,) = best
    assert shape.startswith("head32-16bit")
    assert best[shape] == search.configs[1]


def test_best_is_the_geometric_mean_of_all_cases_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    search = replace(tune.SEARCHES["decode"], cases=2 * [CASES["decode"]])
    times = iter([{0: 1.0, 1: 9.0, 2: 0.1}, {0: 200.0, 1: 20.0}])
    monkeypatch.setattr(tune, "time_candidates", lambda *_: {"shape": next(times)})
    monkeypatch.setitem(tune.SEARCHES, "decode", search)
    best = tune.tune("decode", torch.device(DEVICE), tune.measure)
    assert best["shape"] == search.configs[1]


@pytest.mark.usefixtures("tiny_cases")
def test_candidates_that_do_not_run_are_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    search = replace(tune.SEARCHES["cache_write"], candidates=[(3, 4)])  # not a power of two
    monkeypatch.setitem(tune.SEARCHES, "cache_write", search)
    with pytest.raises(RuntimeError, match="no candidate ran"):
        tune.tune("cache_write", torch.device(DEVICE), tune.measure)


@pytest.mark.usefixtures("tiny_cases")
def test_nothing_is_stored_for_a_kernel_that_the_gpu_never_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    search = replace(tune.SEARCHES["hopper_prefill"], cases=[CASES["prefill"]])
    monkeypatch.setitem(tune.SEARCHES, "hopper_prefill", search)
    assert tune.tune("hopper_prefill", torch.device(DEVICE), lambda *_: 1.0) == {}


@pytest.mark.parametrize("op", tune.SEARCHES)
def test_every_search_has_what_it_names(op: str) -> None:
    search = tune.SEARCHES[op]
    assert search.configs
    assert search.cases
    for case in search.cases:
        assert case.geometry in GEOMETRIES | VARIATIONS
        assert case.op in IMPLEMENTATIONS[search.impl].ops
