"""The benchmark's own steps, with a model of no size."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch

from benchmarks.phi3_small import VARIANTS, main
from benchmarks.results_file import load_results

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")
def test_tiny_run_measures_both_variants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    path = tmp_path / "results.json"
    main(["--tiny", "--output", str(path)])
    _, records = load_results(path)
    sparse, dense = records
    assert [record["variant"] for record in records] == list(VARIANTS)
    assert sparse["stored_fraction"] < dense["stored_fraction"] == 1
    assert sparse["concurrent_requests"] > 0
    assert sparse["single_request"].keys() == {"200", "900"}
    for record in records:
        times = [*record["single_request"].values(), record["batch"]]
        assert all(time["tpot_ms"] > 0 for time in times)
        assert all(time["ttft_ms"] > 0 for time in times[:-1])
    assert "| TTFT, prompt of 900 |" in capsys.readouterr().out


def test_tiny_figures_need_a_file_of_their_own(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--tiny"])
    assert "--output: missing" in capsys.readouterr().err
