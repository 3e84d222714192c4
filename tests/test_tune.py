"""The tuning script: what it runs, and what it takes for best."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from benchmarks import tune
from benchmarks.geometries import GEOMETRIES, Geometry
from benchmarks.kernels import cases
from benchmarks.kernels.cases import Case
from benchmarks.kernels.timing import Launch
from s2_kernels.configs import Config
from s2_vllm.config import S2Config
from tests.paged import DEVICE

CASES = [
    Case("cache_write", "tiny", 1, 100),
    Case("decode", "tiny", 2, 200),
    Case("prefill", "tiny", 1, 100),
]


@pytest.fixture
def tiny_cases(monkeypatch: pytest.MonkeyPatch) -> None:
    """Every operation on a small geometry, in a type that Triton's interpreter multiplies rightly."""
    monkeypatch.setitem(GEOMETRIES, "tiny", Geometry(1, 2, 1, 32, S2Config(2, 4, block_size=16)))
    monkeypatch.setattr(tune, "CASES", CASES)
    monkeypatch.setattr(tune, "DTYPE", torch.float16)
    cases._pattern.cache_clear()


@pytest.mark.usefixtures("tiny_cases")
@pytest.mark.parametrize("op", tune.OPTIONS)
def test_the_fastest_candidate_is_stored_under_its_shape(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    candidates = tune.CANDIDATES[op][:3]
    monkeypatch.setitem(tune.CANDIDATES, op, candidates)
    milliseconds = iter([3.0, 1.0, 2.0])

    def measure(launches: Sequence[Launch], in_graph: bool) -> float:
        for launch in launches:
            launch()
        return next(milliseconds)

    best = tune.tune(op, torch.device(DEVICE), measure)
    (shape,) = best
    assert shape.startswith("head32-16bit")
    assert best[shape] == dict(zip(tune.OPTIONS[op], candidates[1], strict=True))


def test_best_is_the_geometric_mean_of_all_cases_of_a_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    times = iter([{0: 1.0, 1: 9.0, 2: 0.1}, {0: 200.0, 1: 20.0}])

    def time_candidates(case: Case, candidates: Sequence[Config], *_: object) -> tuple[str, dict[int, float]]:
        return "shape", next(times)

    monkeypatch.setattr(tune, "time_candidates", time_candidates)
    monkeypatch.setattr(tune, "CASES", 2 * CASES[1:2])
    best = tune.tune("decode", torch.device(DEVICE), tune.measure)
    assert tuple(best["shape"].values()) == tune.CANDIDATES["decode"][1]


@pytest.mark.usefixtures("tiny_cases")
def test_candidates_that_do_not_run_are_no_choice(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(tune.CANDIDATES, "cache_write", [(3, 4)])  # not a power of two
    with pytest.raises(RuntimeError, match="no candidate ran"):
        tune.tune("cache_write", torch.device(DEVICE), tune.measure)


def test_every_case_has_candidates_and_a_geometry() -> None:
    for case in tune.CASES:
        assert case.geometry in GEOMETRIES | tune.PORTABLE_GEOMETRIES
    for op, candidates in tune.CANDIDATES.items():
        assert all(len(values) == len(tune.OPTIONS[op]) for values in candidates)
        assert any(case.op == op for case in tune.CASES)
