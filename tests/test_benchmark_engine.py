"""The engine benchmark: what it measures, refuses, writes, prints and draws, and one real run."""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from benchmarks import plot
from benchmarks.engine import __main__ as command
from benchmarks.engine import client, figures, offline, processes, records, serving
from benchmarks.engine.checkpoint import model_config
from benchmarks.engine.kv_cache import KVCacheFacts
from benchmarks.engine.options import all_traffic, engine_flags, measurements, parse
from benchmarks.engine.records import EngineResultFile, load_engine_results, medians
from benchmarks.engine.table import tables
from benchmarks.engine.workloads import TINY_MIX, Measurement, latency, throughput, traffic
from benchmarks.geometries import SERVED
from benchmarks.results_file import write_results
from s2_kernels.config import find_config
from s2_vllm.plan import ModelGeometry
from s2_vllm.planning import make_plan

HEADER = {
    "date": "2026-01-01T00:00:00+00:00",
    "command": "python -m benchmarks.engine latency",
    "commit": "0" * 40,
    "cpu": "a CPU",
    "gpus": ["NVIDIA H100"],
    "driver": "1.0",
    "torch": "2.11.0",
    "vllm": "0.32.0",
    "tensor_parallel_size": 1,
    "flags": {},
}
LATER = HEADER | {"date": "2026-01-02T00:00:00+00:00", "gpus": ["NVIDIA H100"] * 2, "driver": "1.1"}
SLO = {"ttft": 1000.0}
FACTS = KVCacheFacts(101, 1 << 20, [(16, None)], None, 2048, 256, 64)
DYING = "import sys; print('the last words'); sys.exit(3)"
REASON = (
    "To serve at least one request, 64.0 GiB KV cache is needed, which is larger than the available KV cache "
    "memory (40.0 GiB)"
)
TOO_SMALL = f"import sys; print('ValueError: {REASON}'); print('RuntimeError: see above'); sys.exit(1)"


def record(workload: str, variant: str, repetition: int = 1, **fields: Any) -> dict[str, Any]:
    """A record in which all that a table or figure shows is there."""
    common = {
        "workload": workload,
        "geometry": "hhst-8b",
        "variant": variant,
        "tensor_parallel_size": 1,
        "load": {"latency": "single", "throughput": "pool", "serve": "mix"}[workload],
        "prompt_tokens": 512,
        "output_tokens": 64,
        "requests": 1,
        "repetition": repetition,
        "median_ttft_ms": 20.0,
        "p99_ttft_ms": 25.0,
        "median_tpot_ms": 8.0,
        "p99_tpot_ms": 9.0,
        "output_throughput": 100.0,
        "decode_output_throughput": 120.0,
        "mean_queue_time_ms": 1.0,
        "mean_prefill_time_ms": 20.0,
        "mean_decode_time_ms": 500.0,
        "failed": 0,
    }
    if workload == "serve":
        common |= {"request_rate": 2.0, "request_goodput": 1.5}
    return common | fields


# What is refused


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["speed"], "argument {latency,throughput,serve}: invalid choice: 'speed'"),
        (["latency", "--geometry", "s2-70b"], "--geometry: 's2-70b', expected one of phi3-small, hhst-8b"),
        (["latency", "--variants", "s2,sparse"], "--variants: 'sparse', expected one of s2, dense"),
        (["throughput", "--loads", "queue"], "--loads: 'queue', expected one of batch, pool"),
        (["latency", "--lengths", "512,0"], "--lengths: '0', expected a positive integer"),
        (["latency", "--lengths", ","], "--lengths: nothing, expected at least one value"),
        (
            ["latency", "--lengths", "512,131040"],
            "--lengths: 131040 with latency's 64 output tokens, expected at most 131072 in all, "
            "hhst-8b's max_position_embeddings",
        ),
        (
            ["latency", "throughput", "--throughput-lengths", "2000", "--max-model-len", "2048"],
            "--throughput-lengths: 2000 with throughput's 128 output tokens, expected at most 2048 in all",
        ),
        (
            ["throughput", "--lengths", "512", "--pool-lengths", "2000", "--max-model-len", "2048"],
            "--pool-lengths: 2000 with throughput's 128 output tokens, expected at most 2048 in all",
        ),
        (
            ["throughput", "--lengths", "2000", "--max-model-len", "2048"],
            "--lengths: 2000 with throughput's 128 output tokens, expected at most 2048 in all",
        ),
        (["latency", "--max-model-len", "200000"], "--max-model-len: 200000, expected at most 131072"),
        (["serve", "--max-model-len", "2048"], "--max-model-len: 2048, expected at least 32896"),
        (["latency", "--tensor-parallel-size", "3"], "3, expected a divisor of hhst-8b's 8 KV heads"),
        (["latency", "--gpu-memory-utilization", "1.5"], "'1.5', expected a number above 0 and at most 1"),
        (["latency", "--repetitions", "0"], "--repetitions: '0', expected a positive integer"),
        (["serve", "--request-rates", "1,inf"], "--request-rates: 'inf', expected a positive number"),
        (["serve", "--slo", "itl:5"], "--slo: 'itl:5', expected NAME:MS with a name of ttft, tpot, e2el"),
        (["serve", "--slo", "ttft:soon"], "--slo: 'soon', expected a positive number"),
        (["serve", "--seconds", "-1"], "--seconds: '-1', expected a positive number"),
        (["latency", "--tiny"], "--output: missing, expected a file with --tiny"),
        (["table", "nowhere.json"], "No such file"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_bad_options_are_named_before_anything_starts(
    arguments: list[str],
    message: str,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(command, "Run", None)
    with pytest.raises(SystemExit) as stopped:
        command.main(arguments)
    assert stopped.value.code == 2
    assert message in " ".join(capsys.readouterr().err.split())


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_a_machine_without_a_gpu_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["latency"]) == 2
    assert "0 CUDA GPUs, expected 1, or --tiny on a CPU" in capsys.readouterr().err


def test_another_benchmarks_file_is_not_overwritten(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "kernels.json"
    write_results(path, [{"op": "decode"}])
    before = path.read_text()
    assert command.main(["latency", "--tiny", "--output", str(path)]) == 2
    assert "expected a file from benchmarks.engine" in capsys.readouterr().err
    assert path.read_text() == before


# What is measured


def test_the_usual_settings() -> None:
    options = parse(["latency", "throughput"])
    found = {(m.workload, m.load, m.prompt_tokens): m for m in measurements(options)}
    single = [key[2] for key in found if key[0] == "latency"]
    assert single == [512, 2048, 8192, 32768, 129024]
    for load in ("batch", "pool"):
        assert [key[2] for key in found if key[1] == load] == [256, 1024, 8192, 32768, 129024]
        assert found["throughput", load, 129024].output_tokens == 1024
    assert (batch := found["throughput", "batch", 256]).requests == 200
    assert batch.output_tokens == 64
    assert (batch := found["throughput", "batch", 1024]).requests == 64
    assert batch.output_tokens == 128
    assert found["throughput", "pool", 256].requests is None
    assert all(m.repetitions == 3 for m in found.values())


def test_lists_by_commas_and_blanks_and_what_was_chosen() -> None:
    options = parse(
        [
            *("latency", "throughput", "--geometry", "hhst-8b,s2-7b", "--lengths", "2048,512", "1024"),
            *("--loads", "pool", "--repetitions", "1", "--max-num-seqs", "7"),
        ]
    )
    assert options.geometry == ["hhst-8b", "s2-7b"]
    assert [(m.load, m.prompt_tokens) for m in measurements(options)] == [
        *(("single", length) for length in (512, 1024, 2048)),
        *(("pool", length) for length in (512, 1024, 2048)),
    ]
    assert engine_flags(options) == {"max_model_len": -1, "tensor_parallel_size": 1, "max_num_seqs": 7}
    assert all_traffic(options) == []


@pytest.mark.parametrize(
    ("options", "pool"),
    [((), [256, 1024]), (("--pool-lengths", "8192"), [8192]), (("--loads", "batch"), [])],
    ids=["as the batch", "another", "none"],
)
def test_lengths_of_every_load(options: tuple[str, ...], pool: list[int]) -> None:
    lengths = ("--lengths", "512", "--throughput-lengths", "1024,256", *options)
    parsed = parse(["latency", "throughput", *lengths])
    found = [(measurement.load, measurement.prompt_tokens) for measurement in measurements(parsed)]
    assert found == [("single", 512), ("batch", 256), ("batch", 1024), *(("pool", n) for n in pool)]


def test_of_the_usual_lengths_those_that_the_engine_is_to_hold() -> None:
    found = measurements(parse(["latency", "--max-model-len", "4096"]))
    assert [m.prompt_tokens for m in found] == [512, 2048]


@pytest.mark.parametrize("tiny", [False, True], ids=["full", "tiny"])
@pytest.mark.parametrize("name", SERVED)
def test_variants_differ_in_the_pattern_alone(name: str, tiny: bool) -> None:
    sparse, dense = (model_config(name, variant, tiny) for variant in ("s2", "dense"))
    layers = sparse["num_hidden_layers"]
    found = find_config(sparse, layers)
    assert found is not None
    assert found.pattern_heads == SERVED[name].config.pattern_heads
    assert find_config(dense, layers) is None
    differing = {key for key in sparse if sparse[key] != dense.get(key)}
    assert differing <= {"s2_attention", "dense_attention_every_n_layers"}
    if not tiny:
        assert asdict(found) == asdict(SERVED[name].config)
        assert sparse["hidden_size"] == 4096 or name == "s2-1.3b"
        assert (sparse["num_attention_heads"], sparse["num_key_value_heads"]) == (
            SERVED[name].num_heads,
            SERVED[name].num_kv_heads,
        )


# What an engine has set up


def test_requests_that_fit_a_dense_pool() -> None:
    # 100 pages are free, of 16 tokens; 160 tokens need ten, 161 eleven.
    assert FACTS.requests_that_fit(160) == 10
    assert FACTS.requests_that_fit(161) == 9
    assert FACTS.requests_that_fit(1601) == 0
    assert FACTS.requests_that_fit(1) == FACTS.max_num_seqs == 64


def test_requests_that_fit_a_pool_of_tiers() -> None:
    facts = replace(FACTS, groups=[(512, None), (64, 512), (64, None)])
    # 8 strided pages, 64 dense ones, and 8 of the window, which may begin inside a page. The two steps in
    # flight, of 256 tokens each, need another 8, and vLLM keeps one page to itself.
    needed = 1 + 8 + 10 * (8 + 9 + 64)
    assert replace(facts, num_blocks=needed).requests_that_fit(4096) == 10
    assert replace(facts, num_blocks=needed - 1).requests_that_fit(4096) == 9


def test_at_rest_a_request_has_the_plans_pages() -> None:
    geometry = SERVED["hhst-8b"]
    plan = make_plan(geometry.config, ModelGeometry(32, 32, 8, 128, 2))
    groups = [
        (tier.block_size, plan.window_tokens if tier.name == "window" else None)
        for tier in plan.tiers
        for _ in range(plan.num_groups(tier))
    ]
    tokens, requests = 40_000, 14
    windows = sum(window is not None for _, window in groups)
    blocks = 1 + windows + requests * plan.blocks_per_request(tokens, 1)
    facts = KVCacheFacts(blocks, 0, groups, len(groups), 131072, 1, 1024)
    assert facts.requests_that_fit(tokens) == requests
    assert replace(facts, num_blocks=blocks - 1).requests_that_fit(tokens) == requests - 1


def test_a_model_served_without_the_plugin_is_noticed() -> None:
    with pytest.raises(RuntimeError, match="vLLM has not loaded the s2_vllm plugin"):
        FACTS.check_variant("s2")
    with pytest.raises(RuntimeError, match="KV cache groups: 1, expected the plan's 3"):
        replace(FACTS, planned_groups=3).check_variant("s2")
    with pytest.raises(RuntimeError, match="3 groups, expected none of a dense model"):
        replace(FACTS, planned_groups=3).check_variant("dense")
    FACTS.check_variant("dense")
    replace(FACTS, planned_groups=1).check_variant("s2")


def test_bytes_are_those_of_all_ranks() -> None:
    answer = json.loads(json.dumps(asdict(FACTS)))
    assert KVCacheFacts.of_workers([answer, answer]).kv_cache_bytes == 2 * FACTS.kv_cache_bytes


# Offline


def output(scheduled: float, first: float, last: float, tokens: int) -> Any:
    """Of a request that arrived and was queued at second 0."""
    times = SimpleNamespace(
        arrival_time=0.0,
        queued_ts=0.0,
        scheduled_ts=scheduled,
        first_token_ts=first,
        last_token_ts=last,
        first_token_latency=first,
    )
    return SimpleNamespace(metrics=times, outputs=[SimpleNamespace(token_ids=[0] * tokens)])


def test_what_a_repetition_says() -> None:
    steps = offline.Steps([(1.0, 1, 1), (2.0, 2, 1), (3.0, 2, 0), (5.0, 2, 0)], preemptions=4)
    outputs = [output(0.5, 1.0, 5.0, 5), output(1.5, 2.0, 5.0, 4), output(5.5, 6.0, 6.0, 1)]
    wave = offline.Wave(outputs, steps, seconds=10.0)
    found = offline.summary([wave], Measurement("throughput", "pool", 100, 5, 3, 1))
    # The second and the third lack a token and more.
    assert (found["completed"], found["failed"]) == (1, 2)
    assert found["median_ttft_ms"] == pytest.approx(1000)
    assert found["median_tpot_ms"] == pytest.approx(4000 / 4)
    assert found["output_throughput"] == pytest.approx(5 / 10)
    assert found["total_token_throughput"] == pytest.approx(105 / 10)
    assert found["duration"] == 10
    # Four tokens in the three seconds after the last first token.
    assert found["decode_output_throughput"] == pytest.approx(4 / 3)
    assert found["max_concurrent_requests"] == 2
    assert found["preemptions"] == 4
    assert found["mean_queue_time_ms"] == pytest.approx(1000 * (0.5 + 1.5 + 5.5) / 3)
    assert found["mean_prefill_time_ms"] == pytest.approx(500)
    assert found["mean_decode_time_ms"] == pytest.approx(1000 * (4 + 3) / 3)


def test_without_tokens_after_the_last_first_one_there_is_no_decode_phase() -> None:
    assert offline.Steps([(1.0, 1, 1)]).decode_phase() == (0, 0.0)
    assert offline.Steps().decode_phase() == (0, 0.0)


class FakeEngine(offline.Engine):
    """Records the waves that it is to serve."""

    def __init__(self) -> None:
        self.waves: list[tuple[int, int, int]] = []

    def wave(self, requests: int, prompt_tokens: int, output_tokens: int) -> offline.Wave:
        self.waves.append((requests, prompt_tokens, output_tokens))
        return offline.Wave([output(0.5, 1.0, 2.0, output_tokens)] * requests, offline.Steps(), 1.0)


def test_a_warm_up_wave_goes_before_the_repetitions() -> None:
    engine = FakeEngine()
    found = list(offline.measure(engine, throughput(256, "batch", 2), FACTS))
    assert engine.waves == [(200, 256, 8), (200, 256, 64), (200, 256, 64)]
    assert [record["repetition"] for record in found] == [1, 2]


def test_latency_is_that_of_single_requests() -> None:
    engine = FakeEngine()
    (found,) = offline.measure(engine, latency(512, 1), FACTS)
    assert engine.waves == [(5, 512, 8), *[(1, 512, 64)] * 5]
    assert (found["completed"], found["max_concurrent_requests"]) == (5, 1)


def test_a_full_pool_is_what_fits() -> None:
    engine = FakeEngine()
    (found,) = offline.measure(engine, throughput(256, "pool", 1), FACTS)
    assert found["requests"] == FACTS.requests_that_fit(256 + 64) == 5
    assert engine.waves[-1] == (5, 256, 64)


@pytest.mark.parametrize("measurement", [latency(4096, 1), throughput(4096, "pool", 1)], ids=str)
def test_a_length_that_does_not_fit_says_so(measurement: Measurement) -> None:
    engine = FakeEngine()
    (found,) = offline.measure(engine, measurement, FACTS)
    assert engine.waves == []
    assert found["reason"] == "the longest request that this engine's KV cache holds has 2048 tokens"
    assert found["requests"] == 0


# Serving


def test_a_trace_has_the_lengths_of_the_mix() -> None:
    load = traffic(10.0, 10, SLO, 1)
    assert load.requests == 100
    requests = client.Trace().requests(load, load.requests, seed=1)
    lengths = [request["input_length"] for request in requests]
    assert {length: lengths.count(length) / 100 for length in load.mix} == load.mix
    assert lengths != sorted(lengths)
    for request in requests:
        assert len(request["hash_ids"]) == -(-request["input_length"] // client.CHUNK_TOKENS)
        assert request["output_length"] == load.output_tokens


def test_a_few_requests_have_every_length() -> None:
    assert client.mixed_lengths(TINY_MIX, len(TINY_MIX)) == list(TINY_MIX)


def test_prompts_share_prefixes_within_a_trace_alone() -> None:
    load = traffic(10.0, 10, SLO, 1)
    trace = client.Trace()
    first, second = (trace.requests(load, load.requests, seed) for seed in (1, 1))
    assert [r["input_length"] for r in first] == [r["input_length"] for r in second]
    ids = [{n for request in requests for n in request["hash_ids"]} for requests in (first, second)]
    assert not ids[0] & ids[1]
    long = [tuple(r["hash_ids"]) for r in first if r["input_length"] == 4096]
    assert len(set(long)) == len(long)
    half = len(long[0]) // 2
    prefixes = [prompt[:half] for prompt in long]
    shared = [prefix for prefix in prefixes if prefixes.count(prefix) > 1]
    assert 0.3 < len(shared) / len(long) < 0.7
    assert 1 < len(set(shared)) <= client.PREFIXES
    # Every server is sent the same.
    assert client.Trace().requests(load, load.requests, 1) == first


def test_a_clients_job_comes_back_from_its_file(tmp_path: Path) -> None:
    job = client.Job("http://here", "model", "folder", "scratch", 2048, [traffic(2.0, 30, SLO, 3)])
    job.save(tmp_path / "job.json")
    assert client.Job.load(tmp_path / "job.json") == job


def test_a_server_that_holds_too_little_says_so() -> None:
    bench = SimpleNamespace(job=client.Job("", "", "", "", 2048, []))
    (found,) = client.measure(bench, traffic(2.0, 30, SLO, 3))  # type: ignore[arg-type]
    assert found["reason"] == "the longest request that this engine's KV cache holds has 2048 tokens"
    assert (found["request_rate"], found["requests"]) == (2.0, 0)


METRICS = """# HELP vllm:num_preemptions_total Preemptions.
vllm:num_preemptions_total{engine="0",model_name="m o"} %d.0
vllm:num_preemptions_total{engine="1",model_name="m o"} 1.0
vllm:prefix_cache_queries_total{engine="0"} %d.0
vllm:prefix_cache_hits_total{engine="0"} %d.0
vllm:request_queue_time_seconds_sum{engine="0"} %f
vllm:request_queue_time_seconds_count{engine="0"} %d.0
process_cpu_seconds_total 1.5e+01
"""


def test_what_a_server_counted_meanwhile() -> None:
    before = client.parse_metrics(METRICS % (3, 100, 0, 1.0, 2))
    after = client.parse_metrics(METRICS % (8, 300, 50, 3.0, 6))
    assert before["vllm:num_preemptions_total"] == 4
    assert before["process_cpu_seconds_total"] == 15
    found = client.differences(before, after)
    assert found == {
        "preemptions": 5,
        "prefix_cache_hit_rate": 0.25,
        "mean_queue_time_ms": 500.0,
        "mean_prefill_time_ms": None,
        "mean_decode_time_ms": None,
    }


# Processes


def test_nothing_of_a_process_stays_behind(tmp_path: Path) -> None:
    grandchild = "import time; print('up', flush=True); time.sleep(600)"
    program = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {grandchild!r}])"
    log = tmp_path / "log"
    with processes.started([sys.executable, "-c", program], log, processes.environment()) as process:
        while "up" not in log.read_text():
            assert process.poll() is None
            time.sleep(0.05)
        family = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        assert len(family) == 2
    gone, alive = psutil.wait_procs(family, timeout=30)
    assert len(gone) == 2
    assert not alive


def test_messages_come_through_and_a_failure_has_the_last_lines(tmp_path: Path) -> None:
    program = (
        "import sys; from benchmarks.engine.processes import send_messages; "
        "send_messages(int(sys.argv[2]), ({'n': n} for n in (1, 2))); "
        "print('trouble'); sys.exit(int(sys.argv[1]))"
    )
    log = tmp_path / "log"

    def received(status: str) -> list[dict[str, Any]]:
        found = processes.messages(
            [sys.executable, "-c", program], Path(status), log, processes.environment()
        )
        return list(found)

    assert received("0") == [{"n": 1}, {"n": 2}]
    with pytest.raises(processes.ProcessDied, match=r"exit status 7; its last lines:\n.*trouble"):
        received("7")


def test_only_a_lack_of_memory_is_a_reason(tmp_path: Path) -> None:
    log = tmp_path / "log"
    log.write_text(f"(EngineCore) ERROR ValueError: {REASON}\nRuntimeError: Engine core failed")
    assert processes.memory_reason(log) == REASON
    log.write_text("torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 2.00 GiB.")
    assert processes.memory_reason(log) == "CUDA out of memory. Tried to allocate 2.00 GiB."
    log.write_text("ValueError: head_size: 300, expected at most 256")
    assert processes.memory_reason(log) is None


# Whole runs, with programs in the place of engines


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Sets what stands in for the engines and the servers."""

    def set_to(program: str) -> None:
        monkeypatch.setattr(offline, "COMMAND", [sys.executable, "-c", program])
        monkeypatch.setattr(serving, "VLLM", [sys.executable, "-c", program])

    return set_to


def tiny_run(path: Path, *arguments: str) -> int:
    return command.main([*arguments, "--tiny", "--repetitions", "1", "--output", str(path)])


def test_a_server_that_dies_shows_its_last_lines(
    tmp_path: Path, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(DYING)
    path = tmp_path / "results.json"
    assert tiny_run(path, "serve", "--variants", "s2") == 1
    error = capsys.readouterr().err
    assert "tiny-hhst-8b, s2: the server ended with exit status 3; its last lines:\nthe last words" in error
    assert list(tmp_path.iterdir()) == []


def test_an_engine_that_dies_leaves_what_was_there(
    tmp_path: Path, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(TOO_SMALL)
    path = tmp_path / "results.json"
    tiny_run(path, "latency")
    before = path.read_text()
    programs(DYING)
    assert tiny_run(path, "latency", "throughput", "--variants", "dense") == 1
    assert "exit status 3; its last lines:\nthe last words" in capsys.readouterr().err
    assert path.read_text() == before
    assert list(tmp_path.iterdir()) == [path]


def test_an_engine_without_enough_memory_is_a_reason_and_the_rest_runs(
    tmp_path: Path, programs: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    programs(TOO_SMALL)
    path = tmp_path / "results.json"
    assert tiny_run(path, "latency", "serve", "--request-rates", "1") == 0
    header, found = load_engine_results(path)
    assert [(r["workload"], r["variant"], r.get("request_rate", r["prompt_tokens"])) for r in found] == [
        (workload, variant, what)
        for variant in ("s2", "dense")
        for workload, what in (("latency", 64), ("latency", 200), ("serve", 1))
    ]
    assert all(r["reason"] == REASON for r in found)
    assert header["flags"]["enforce_eager"]
    assert REASON in capsys.readouterr().out


def test_failed_requests_are_a_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def run(*_: object) -> Iterator[dict[str, Any]]:
        time.sleep(0.2)
        yield {"engine": asdict(FACTS)}
        yield {"record": record("latency", "s2", failed=2)}

    monkeypatch.setattr(offline, "run", run)
    assert tiny_run(tmp_path / "results.json", "latency", "--variants", "s2") == 1
    assert "2 requests failed" in capsys.readouterr().err
    ((found),) = load_engine_results(tmp_path / "results.json")[1]
    assert (found["kv_cache_groups"], found["kv_cache_bytes"], found["failed"]) == (1, 1 << 20, 2)
    assert found["start_seconds"] >= 0.2


# Result files


def test_a_file_grows_with_every_record(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    file = EngineResultFile(path, HEADER)
    assert not path.exists()
    for n in (1, 2):
        file.add(record("latency", "s2", n))
        header, found = load_engine_results(path)
        assert [r["repetition"] for r in found] == list(range(1, n + 1))
    assert header == HEADER | {"runs": [{name: HEADER[name] for name in records.OF_A_RUN}]}
    assert list(tmp_path.iterdir()) == [path]


def test_a_later_run_adds_and_replaces(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    file = EngineResultFile(path, HEADER)
    for n in (1, 2, 3):
        file.add(record("latency", "s2", n))
    file.add(record("latency", "dense"))
    later = EngineResultFile(path, LATER)
    later.add(record("latency", "s2", 1, median_ttft_ms=10.0))
    later.add(record("latency", "s2", 1, prompt_tokens=2048))
    header, found = load_engine_results(path)
    # All three repetitions of the older run are gone, not the first alone.
    assert [(r["variant"], r["prompt_tokens"], r["run"]) for r in found] == [
        ("dense", 512, HEADER["date"]),
        ("s2", 512, LATER["date"]),
        ("s2", 2048, LATER["date"]),
    ]
    assert [run["date"] for run in header["runs"]] == [HEADER["date"], LATER["date"]]
    assert header["date"] == LATER["date"]
    # A run of which nothing is left is not named any more.
    EngineResultFile(path, LATER | {"date": "now"}).add(record("latency", "dense"))
    assert [run["date"] for run in load_engine_results(path)[0]["runs"]] == [LATER["date"], "now"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"vllm": "0.33.0"}, "results with vllm 0.32.0, expected 0.33.0"),
        ({"gpus": ["NVIDIA H200"]}, r"results with gpus \['NVIDIA H100'\], expected \['NVIDIA H200'\]"),
    ],
    ids=["version", "gpu"],
)
def test_results_that_do_not_go_together_are_not_mixed(
    tmp_path: Path, changed: dict[str, Any], message: str
) -> None:
    EngineResultFile(tmp_path / "results.json", HEADER).add(record("latency", "s2"))
    with pytest.raises(ValueError, match=message):
        EngineResultFile(tmp_path / "results.json", LATER | changed)


def test_medians_of_the_repetitions() -> None:
    group = [
        record("latency", "s2", n, median_ttft_ms=ttft, decode_output_throughput=tokens)
        for n, (ttft, tokens) in enumerate([(30.0, None), (10.0, 4.0), (11.0, 8.0)], 1)
    ]
    (found,) = medians(group)
    assert found["median_ttft_ms"] == 11.0
    assert found["decode_output_throughput"] == 6.0
    assert (found["repetitions"], found["requests"], found["prompt_tokens"]) == (3, 1, 512)
    assert len(medians([*group, record("latency", "dense")])) == 2


SYNTHETIC = [
    record("latency", "s2", median_ttft_ms=25.0),
    record("latency", "dense", median_ttft_ms=20.0),
    record("latency", "s2", prompt_tokens=129024, median_ttft_ms=4000.0),
    record("latency", "dense", prompt_tokens=129024) | {"requests": 0, "reason": "too small"},
    record("throughput", "s2", requests=14, output_throughput=500.0, decode_output_throughput=900.0),
    record("throughput", "dense", requests=3),
    *(
        record("serve", variant, request_rate=rate, median_tpot_ms=tpot, output_throughput=tokens, **more)
        for variant, rate, tpot, tokens, more in [
            ("s2", 2.0, 10.0, 200.0, {"request_goodput": 2.0}),
            ("dense", 2.0, 20.0, 190.0, {"request_goodput": 1.0}),
            ("s2", 1.0, 5.0, 100.0, {"mean_queue_time_ms": None}),
        ]
    ),
]
for _impossible in [r for r in SYNTHETIC if "reason" in r]:
    for _name in [name for name in _impossible if name.endswith(("_ms", "_throughput"))]:
        del _impossible[_name]


def test_tables_show_what_was_lost_and_what_was_impossible() -> None:
    lines = tables(SYNTHETIC).splitlines()
    assert "| hhst-8b | 512 | 20.0 | 25.0 | 0.80x | 8.00 | 8.00 | 1.00x |" in lines
    assert "| hhst-8b | 129,024 | - | 4,000.0 | - | - | 8.00 | - |" in lines
    assert "| hhst-8b | full pool: 3, 14 | 512, 64 | 100.0 | 500.0 | 5.00x | 120.0 | 900.0 | 7.50x |" in lines
    serve = next(line for line in lines if line.startswith("| hhst-8b | 2 |"))
    assert serve.startswith("| hhst-8b | 2 | 1.00 | 2.00 | 2.00x | 190.0 | 200.0 | 1.05x |")
    assert "- hhst-8b, dense, latency (single), 129,024 tokens: too small" in lines


def test_the_command_prints_tables(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine-h100.json"
    file = EngineResultFile(path, HEADER)
    for measured in SYNTHETIC:
        file.add(measured)
    assert command.main(["table", str(path)]) == 0
    assert capsys.readouterr().out == tables(SYNTHETIC) + "\n"


def test_figures(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "engine-h100.json"
    file = EngineResultFile(path, HEADER)
    for measured in SYNTHETIC:
        file.add(measured)
    assert plot.main([str(path), "--output", str(tmp_path / "figures")]) == 0
    drawn = sorted(file.name for file in (tmp_path / "figures").iterdir())
    assert drawn == [f"engine-h100-{name}.svg" for name in ("lengths", "pareto", "time")]
    assert tables(SYNTHETIC) in capsys.readouterr().out


def test_what_figures_show() -> None:
    measured = [r for r in medians(SYNTHETIC) if "reason" not in r]
    assert figures.ttft(measured) == {
        ("hhst-8b", "s2"): [(512, 25.0), (129024, 4000.0)],
        ("hhst-8b", "dense"): [(512, 20.0)],
    }
    assert figures.full_pool_throughput(measured)["hhst-8b", "s2"] == [(512, 500.0)]
    assert figures.pareto(measured) == {
        ("hhst-8b", "s2"): [(200.0, 100.0), (100.0, 200.0)],
        ("hhst-8b", "dense"): [(50.0, 190.0)],
    }
    two_gpus = [r | {"tensor_parallel_size": 2} for r in measured]
    assert figures.pareto(two_gpus)["hhst-8b, 2 GPUs", "s2"] == [(200.0, 50.0), (100.0, 100.0)]
    # A server's, and not those whose times it did not count.
    assert figures.spans(measured) == {
        "hhst-8b, 2/s, dense": [0.001, 0.02, 0.5],
        "hhst-8b, 2/s, s2": [0.001, 0.02, 0.5],
    }
    offline_only = [r for r in measured if r["workload"] == "latency"]
    assert len(figures.spans(offline_only)) == 3


# The real thing


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")
def test_tiny_run_of_both_variants(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    # An engine within its process starts sooner.
    monkeypatch.setenv("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    path = tmp_path / "results.json"
    assert tiny_run(path, "latency", "throughput", "--lengths", "200", "--loads", "pool") == 0
    _, found = load_engine_results(path)
    assert [(r["workload"], r["variant"]) for r in found] == [
        (workload, variant) for variant in ("s2", "dense") for workload in ("latency", "throughput")
    ]
    sparse, dense = found[1], found[3]
    assert (sparse["kv_cache_groups"], dense["kv_cache_groups"]) == (3, 1)
    assert sparse["kv_cache_bytes"] == pytest.approx(4 << 20, rel=0.02)
    assert dense["kv_cache_bytes"] == pytest.approx(4 << 20, rel=0.02)
    assert sparse["requests"] > dense["requests"]
    for measured in found:
        assert (measured["failed"], measured["completed"]) == (0, measured["requests"])
        assert measured["preemptions"] == 0
        assert measured["median_ttft_ms"] > 0
        assert measured["median_tpot_ms"] > 0
        assert measured["decode_output_throughput"] > 0
        assert 1 <= measured["max_concurrent_requests"] <= measured["requests"]
    assert "tiny-hhst-8b, dense: throughput, pool" in capsys.readouterr().out
