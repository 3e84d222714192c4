"""The README's figures are those of the result files, and its plan is what the command prints."""

from __future__ import annotations

import json
from dataclasses import fields
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
import pytest

from benchmarks import cpu_decode, eager_layer, kv_capacity, phi3_small, scheduler, training_step
from benchmarks.engine.table import tables
from benchmarks.geometries import GEOMETRIES, SERVED, random_full_heads
from benchmarks.kernels.report import gradient_summary, summary
from benchmarks.quality import figures
from benchmarks.results_file import load_results
from s2_kernels.config import S2Config
from s2_vllm.cli import main
from s2_vllm.heads import pattern_of_heads
from s2_vllm.plan import ModelGeometry
from s2_vllm.planning import make_plan

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
README = (ROOT / "README.md").read_text()


def test_kv_capacity() -> None:
    _, records = load_results(RESULTS / "kv-capacity.json")
    assert kv_capacity.table(records) in README


def test_cpu_decode() -> None:
    _, records = load_results(RESULTS / "cpu-decode.json")
    assert cpu_decode.table(records) in README


def test_scheduler() -> None:
    _, records = load_results(RESULTS / "scheduler.json")
    assert scheduler.table(records) in README
    assert [record["geometry"] for record in records] == list(scheduler.ROWS)
    ratios = [record["ratio"] for record in records]
    span = f"{min(ratios):.2f} to {max(ratios):.2f} times as long as for the same model dense"
    assert span in " ".join(README.split())


def test_phi3_small() -> None:
    _, records = load_results(RESULTS / "phi3-small.json")
    assert phi3_small.table(records) in README


@pytest.mark.parametrize("gpu", ["h100", "h200"])
def test_engine(gpu: str) -> None:
    _, records = load_results(RESULTS / f"engine-{gpu}.json")
    for table in tables(records).split("\n\n"):
        assert table in README


def test_quality() -> None:
    header, records = load_results(RESULTS / "quality.json")
    assert figures.table(records) in README
    assert header["gpus"] == ["NVIDIA H200"]
    losses = {record["arm"]: record["loss"] for record in records if record["task"] == "loss"}
    s2, mixed = (losses[arm] / losses["dense"] - 1 for arm in ("s2", "s2-dense"))
    assert f"{s2:.1%} above the dense model's, and {mixed:.1%} with the dense layers" in " ".join(
        README.split()
    )


def test_eager_layer() -> None:
    header, records = load_results(RESULTS / "eager-layer.json")
    assert eager_layer.table(records) in README
    assert header["gpus"] == ["NVIDIA H100 80GB HBM3"]


def test_kernels() -> None:
    _, records = load_results(RESULTS / "kernels-h200.json")
    for table in summary(records).split("\n\n"):
        assert table in README
    (copy,) = (r["gbps"] for r in records if r["op"] == "copy")
    assert f"a copy reads and writes {copy / 1000:.2f} TB/s here" in README


def test_kernels_of_full_and_streaming_heads() -> None:
    _, records = load_results(RESULTS / "kernels-mixed-heads-h200.json")
    assert summary(records).strip() in README
    _, others = load_results(RESULTS / "kernels-h200.json")
    here, there = (r["gbps"] for records in (records, others) for r in records if r["op"] == "copy")
    decodes = [r["gbps"] / there for r in records if r["op"] == "decode" and r["impl"] == "s2"]
    text = " ".join(README.split())
    assert f"A copy reached {here / 1000:.2f} TB/s only" in text
    assert "the decodes have {:.2f}, {:.2f} and {:.2f}".format(*decodes) in text


def test_the_engine_of_full_and_streaming_heads() -> None:
    _, records = load_results(RESULTS / "engine-h200.json")
    chosen = [r for r in records if r["geometry"] == "llama-3.1-8b-half" and r["prompt_tokens"] > 512]

    def of(variant: str, load: str, tokens: int, name: str) -> Any:
        (record,) = (
            r for r in chosen if (r["variant"], r["load"], r["prompt_tokens"]) == (variant, load, tokens)
        )
        return record[name]

    def gain(tokens: int, name: str) -> float:
        return float(of("s2", "pool", tokens, name) / of("dense", "pool", tokens, name))

    sooner = of("dense", "single", 129024, "median_ttft_ms") / of("s2", "single", 129024, "median_ttft_ms")
    requests = [of(variant, "pool", 129024, "requests") for variant in ("s2", "dense")]
    rates = ("output_throughput", "decode_output_throughput")
    longer, shorter = ([gain(tokens, name) for name in rates] for tokens in (129024, 32768))
    text = " ".join(README.split())
    assert f"with its first token {sooner:.2f} times sooner" in text
    assert "{} instead of {}, it gave".format(*requests) in text
    assert "gave {:.2f} times the tokens per second, {:.2f} times once".format(*longer) in text
    assert "into reading the prompts, {:.2f} and {:.2f} times".format(*shorter) in text


def test_gradients() -> None:
    _, records = load_results(RESULTS / "gradients-h200.json")
    assert gradient_summary(records) in README
    assert not any("error" in record for record in records)
    _, steps = load_results(RESULTS / "training-step-h200.json")
    assert training_step.table(steps) in README


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


@pytest.mark.parametrize(
    ("num_kv_heads", "num_full", "text"),
    [
        (8, 128, "{:.2f} to {:.2f} GiB of KV memory, and {:.2f} GiB if all layers were dense"),
        (32, 256, "{:.2f} to {:.2f} GiB of {:.2f}."),
    ],
    ids=["llama-3.1-8b", "llama-2-7b"],
)
def test_the_memory_of_streaming_heads(num_kv_heads: int, num_full: int, text: str) -> None:
    model = ModelGeometry(32, 32, num_kv_heads, 128, 2)
    sizes = []
    for seed in range(8):
        is_full = np.zeros((32, num_kv_heads), dtype=np.bool_)
        for layer, heads in enumerate(random_full_heads(Random(seed), 32, num_kv_heads, num_full)):
            is_full[layer, list(heads)] = True
        plan = make_plan(S2Config.parse(pattern_of_heads(is_full, 64, 256), 32), model)
        sizes.append(plan.bytes_per_request(131072) / 2**30)
    dense = plan.dense_bytes_per_request(131072) / 2**30
    assert text.format(min(sizes), max(sizes), dense) in " ".join(README.split())


def test_a_block_size_for_finer_hits(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = "with 512, hhst-8b has five groups and hits on multiples of 512 tokens"
    assert text in " ".join(README.split())
    (tmp_path / "config.json").write_text(json.dumps(GEOMETRIES["hhst-8b"].hf_config()))
    assert main(["plan", str(tmp_path), "--block-size=512", "--json"]) == 0
    facts = json.loads(capsys.readouterr().out)
    assert (facts["kv_cache_groups"], facts["prefix_hit_tokens"]) == (5, 512)


def test_plan_and_measured_capacity_are_reconciled(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """For the same steps the plan says what vLLM counts; the README says which steps each figure has."""
    _, records = load_results(RESULTS / "kv-capacity.json")
    fitting = {}
    for record in records:
        steps, name = record["max_num_batched_tokens"], record["geometry"]
        if record["variant"] == "dense":
            continue
        (tmp_path / "config.json").write_text(json.dumps(SERVED[name].hf_config()))
        memory, length = record["kv_cache_bytes"], record["max_model_len"]
        options = ["--json", f"--kv-cache-memory-bytes={memory}", f"--max-model-len={length}"]
        assert main(["plan", str(tmp_path), f"--max-num-batched-tokens={steps}", *options]) == 0
        planned = json.loads(capsys.readouterr().out)
        for key in ("concurrent_requests", "concurrent_requests_decoding", "kv_cache_groups"):
            assert planned[key] == pytest.approx(record[key], rel=1e-9)
        fitting[name, steps] = planned["concurrent_requests"]
    assert len(fitting) == 2 * len(SERVED)
    figures = f"{fitting['hhst-8b', 16384]:.2f} and {fitting['hhst-8b', 2048]:.2f} for this model"
    text = " ".join(README.split())
    assert "has 16,384, the default of the `LLM` class there, and 2,048;" in text
    assert f"the plan says the same for them ({figures})" in text
    assert "The 7.79 of the plan are for 8,192 tokens" in text


@pytest.mark.parametrize("key", [field.name for field in fields(S2Config)])
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
