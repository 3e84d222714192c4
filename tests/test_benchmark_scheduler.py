"""The scheduler benchmark: real schedulers of a small number of requests, and its table."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from benchmarks import scheduler
from benchmarks.results_file import load_results
from benchmarks.scheduler import ROWS, Decoding, table
from s2_vllm.managers import QuickManager

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize(("sparse", "groups"), [(True, 3), (False, 1)], ids=["s2", "dense"])
def test_requests_that_decode(sparse: bool, groups: int) -> None:
    """Each gets a token a step, two steps are in flight, and S2's groups have the managers of an engine."""
    decoding = Decoding(ROWS["hhst-8b"], sparse, requests=4)
    vllm = decoding.scheduler
    managers = vllm.kv_cache_manager.coordinator.single_type_managers
    assert decoding.num_groups == groups
    assert [isinstance(manager, QuickManager) for manager in managers] == [sparse] * groups
    before = {request.request_id: request.num_output_tokens for request in vllm.running}
    assert len(before) == 4
    assert [request.num_prompt_tokens for request in vllm.running] == [256, 511, 766, 1021]
    assert decoding.time(70) > 0
    assert {r.request_id: r.num_output_tokens - 70 for r in vllm.running} == before
    assert all(r.num_in_flight_tokens == 1 for r in vllm.running)
    assert not vllm.waiting


def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "scheduler.json"
    mix = "s2-7b, 12 layers"
    sizes = ["--requests", "2", "--steps", "3", "--repetitions", "2"]
    monkeypatch.setattr("sys.argv", ["scheduler", "--geometries", mix, *sizes, "--output", str(output)])
    scheduler.main()
    _, (record,) = load_results(output)
    assert capsys.readouterr().out.endswith(table([record]) + "\n")
    assert record["geometry"] == mix
    assert (record["requests"], record["steps"], record["repetitions"]) == (2, 3, 2)
    assert record["kv_cache_groups"] == 3
    assert record["ratio"] == pytest.approx(record["s2_us"] / record["dense_us"], rel=0.01)


def test_table() -> None:
    record = {"geometry": "s2-7b", "kv_cache_groups": 3, "s2_us": 1234.5, "dense_us": 1000.0, "ratio": 1.2345}
    assert table([record]).splitlines()[-1] == "| s2-7b | 3 | 1.23 ms | 1.00 ms | 1.23 |"
