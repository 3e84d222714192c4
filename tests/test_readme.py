"""The README's figures are those of the result files, and its plan is what the command prints."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks import cpu_decode, kv_capacity, phi3_small
from benchmarks.geometries import GEOMETRIES
from benchmarks.kernels.report import summary
from benchmarks.results_file import load_results
from s2_vllm.cli import main
from s2_vllm.config import S2Config

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_kv_capacity() -> None:
    _, records = load_results(RESULTS / "kv-capacity.json")
    assert kv_capacity.table(records) in README


def test_cpu_decode() -> None:
    _, records = load_results(RESULTS / "cpu-decode.json")
    assert cpu_decode.table(records) in README


def test_phi3_small() -> None:
    _, records = load_results(RESULTS / "phi3-small.json")
    assert phi3_small.table(records) in README


def test_kernels() -> None:
    _, records = load_results(RESULTS / "kernels-h200.json")
    for table in summary(records).split("\n\n"):
        assert table in README
    (copy,) = (r["gbps"] for r in records if r["op"] == "copy")
    assert f"a copy reads and writes {copy / 1000:.2f} TB/s here" in README


def test_kernels_at_the_shortest_length() -> None:
    _, records = load_results(RESULTS / "kernels-h200.json")
    prefills = [r for r in records if r["op"] == "prefill" and r["seq_len"] == 1024 and "ms" in r]
    times = {(r["geometry"], r["impl"]): r["ms"] for r in prefills}
    ratios = [times[name, "s2"] / times[name, "fa3"] for name in GEOMETRIES]
    span = f"at 1,024 tokens a prefill took {min(ratios):.2f} to {max(ratios):.2f} of FA3's time"
    assert span in " ".join(README.split())


def test_plan(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRIES["hhst-8b"].hf_config()))
    assert main(["plan", str(tmp_path)]) == 0
    assert capsys.readouterr().out in README


@pytest.mark.parametrize("key", S2Config.__dataclass_fields__)
def test_every_key_is_explained(key: str) -> None:
    assert f"| `{key}` |" in README


def test_results_name_their_machine_and_command_but_no_folder() -> None:
    for file in RESULTS.glob("*.json"):
        header, records = load_results(file)
        assert records
        assert header["command"].startswith("python -m benchmarks.")
        assert header["cpu"]
        assert header["torch"]
        assert "/" not in header["command"]
