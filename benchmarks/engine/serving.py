"""vLLM's OpenAI server under traffic: `vllm serve` in one process, `vllm bench serve` in another.

The traffic is a trace of prompts, token ids; half of them share their first half with others of their length.
It is the same for every server.
"""

from __future__ import annotations

import itertools
import json
import random
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from benchmarks.engine.kv_cache import EXTENSION, METHOD, KVCacheFacts
from benchmarks.engine.processes import ProcessDied, environment, last_lines, started
from benchmarks.engine.workloads import Traffic

Record = dict[str, Any]
_COMMAND = Path(sys.executable).with_name("vllm")
VLLM = [str(_COMMAND)] if _COMMAND.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
"""A vLLM that is on the path without having been installed has no command."""
HOST = "127.0.0.1"
MODEL = "benchmark"
START_SECONDS = 1800
POLL_SECONDS = 0.5
PERCENTILES = (90, 99)

PREFIXES = 4
"""Of each length, so many prefixes are shared."""
SHARED = 0.5
"""Of the requests, so many have a shared prefix; of their prompts, it is as much."""
CHUNK_TOKENS = 16
"""A trace names its tokens in chunks of so many."""

MEASURED = (
    "duration",
    "completed",
    "failed",
    "total_input_tokens",
    "total_output_tokens",
    "request_throughput",
    "request_goodput",
    "output_throughput",
    "total_token_throughput",
    "max_concurrent_requests",
    *(f"{name}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el") for name in ("mean", "median")),
    *(f"p{n}_{metric}_ms" for metric in ("ttft", "tpot", "itl", "e2el") for n in PERCENTILES),
)
"""What a record takes from the result of `vllm bench serve`."""

SPANS = ("queue", "prefill", "decode")


@dataclass(frozen=True)
class Job:
    """What one server is to be put under.

    Attributes:
        folder: of the model's config.json and tokenizer.
        variant: "s2" or "dense".
        flags: of the server, by vLLM's names.
        measurements: the traffic, in this order.
    """

    folder: Path
    variant: str
    flags: dict[str, Any]
    measurements: list[Traffic]


def run(job: Job, scratch: Path, log: Path) -> Iterator[Record]:
    """Start the server, and measure it.

    Args:
        job: what to do.
        scratch: folder for traces and results.
        log: file that the server's output is added to.

    Returns:
        An object with the engine's `KVCacheFacts` under "engine", then every record under "record".

    Raises:
        ProcessDied: the server or its client has ended; whether the engine had started, the objects say.
    """
    port = _free_port()
    # Its workers tell what they have set up on request, in this mode only.
    env = environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    with started([*VLLM, "serve", *_arguments(job, port)], log, env) as process:
        server = Server(process, f"http://{HOST}:{port}", log)
        server.wait_until_healthy()
        facts = server.facts()
        facts.check_variant(job.variant)
        yield {"engine": asdict(facts)}
        client = Client(server, job.folder, scratch)
        for measurement in job.measurements:
            yield from ({"record": record} for record in measure(client, measurement, facts))


def _arguments(job: Job, port: int) -> list[str]:
    flags = {
        "host": HOST,
        "port": port,
        "served_model_name": MODEL,
        "load_format": "dummy",
        "worker_extension_cls": EXTENSION,
        "disable_uvicorn_access_log": True,
        **job.flags,
    }
    options = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
    return [str(job.folder), *(name if value is True else f"{name}={value}" for name, value in options)]


def measure(client: Client, traffic: Traffic, facts: KVCacheFacts) -> Iterator[Record]:
    """A traffic's records, one per repetition; or one that says why this server cannot do it."""
    if traffic.tokens > facts.max_model_len:
        reason = f"the longest request that this engine's KV cache holds has {facts.max_model_len} tokens"
        yield traffic.refusal(reason)
        return
    client.warm_up(traffic)
    for repetition in range(1, traffic.repetitions + 1):
        measured = client.send(traffic, repetition)
        yield traffic.record(traffic.requests) | {"repetition": repetition} | measured


@dataclass(frozen=True)
class Server:
    """A server that was started.

    Attributes:
        process: `vllm serve`.
        url: where it answers, without a path.
        log: all that it prints.
    """

    process: Popen[bytes]
    url: str
    log: Path

    def wait_until_healthy(self) -> None:
        """Return once the server answers.

        Raises:
            ProcessDied: it has ended, or does not answer within START_SECONDS.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self._ask("health")
            except OSError:
                time.sleep(POLL_SECONDS)
            else:
                return
        raise ProcessDied(f"no answer within {START_SECONDS} s; the last lines:\n{last_lines(self.log)}")

    def check_alive(self) -> None:
        status = self.process.poll()
        if status is not None:
            lines = last_lines(self.log)
            raise ProcessDied(f"the server ended with exit status {status}; its last lines:\n{lines}")

    def facts(self) -> KVCacheFacts:
        """What the engine has set up."""
        answer = json.loads(self._ask("collective_rpc", {"method": METHOD}))
        return KVCacheFacts.of_workers(answer["results"])

    def counters(self) -> dict[str, float]:
        """vLLM's metrics so far, all labels together."""
        return parse_metrics(self._ask("metrics"))

    def _ask(self, path: str, body: Record | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
            return str(answer.read().decode())


class Client:
    """`vllm bench serve` on a server, a process for each trace.

    Args:
        server: that is to answer.
        folder: of the model, with its tokenizer.
        scratch: folder for traces and results.
    """

    def __init__(self, server: Server, folder: Path, scratch: Path) -> None:
        self._server = server
        self._folder = folder
        self._scratch = scratch
        self._trace = Trace()

    def warm_up(self, traffic: Traffic) -> None:
        """A request of each length, all at once."""
        self._bench(traffic, self._trace.requests(traffic, len(traffic.mix), seed=0), 0)

    def send(self, traffic: Traffic, repetition: int) -> Record:
        """What a record says of the traffic that was sent."""
        before = self._server.counters()
        requests = self._trace.requests(traffic, traffic.requests, repetition)
        result = self._bench(traffic, requests, repetition)
        return {name: result[name] for name in MEASURED} | _differences(before, self._server.counters())

    def _bench(self, traffic: Traffic, requests: list[Record], seed: int) -> Record:
        trace, result = self._scratch / "trace.jsonl", self._scratch / "result.json"
        trace.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
        result.unlink(missing_ok=True)
        log = self._scratch / "client.log"
        # A trace's tokens depend on the hashes of strings, which by default are others in every process.
        env = environment() | {"PYTHONHASHSEED": "0"}
        command = [*VLLM, "bench", "serve", *self._arguments(traffic, trace, result), f"--seed={seed}"]
        with started([*command, f"--num-prompts={len(requests)}"], log, env) as process:
            status = process.wait()
        self._server.check_alive()
        if status or not result.exists():
            raise ProcessDied(
                f"vllm bench serve ended with exit status {status}; its last lines:\n{last_lines(log)}"
            )
        return dict(json.loads(result.read_text()))

    def _arguments(self, traffic: Traffic, trace: Path, result: Path) -> list[str]:
        options = {
            "base-url": self._server.url,
            "model": self._folder,
            "served-model-name": MODEL,
            "dataset-name": "timed_trace",
            "dataset-path": trace,
            "timed-trace-chunk-hash-size": CHUNK_TOKENS,
            "request-rate": traffic.request_rate,
            "temperature": 0,
            # The first request must not be sent twice: the prefix cache would answer.
            "ready-check-timeout-sec": 0,
            "percentile-metrics": "ttft,tpot,itl,e2el",
            "metric-percentiles": ",".join(map(str, PERCENTILES)),
            "result-dir": result.parent,
            "result-filename": result.name,
        }
        goodput = [f"{name}:{milliseconds:g}" for name, milliseconds in traffic.slo.items()]
        return [
            *(f"--{name}={value}" for name, value in options.items()),
            *("--no-self-timed", "--save-result", "--disable-tqdm", "--goodput", *goodput),
        ]


class Trace:
    """Makes traces; no two of one object share a prefix."""

    def __init__(self) -> None:
        self._ids = itertools.count()

    def requests(self, traffic: Traffic, count: int, seed: int) -> list[Record]:
        """`count` requests of the traffic's lengths in random order, in the format of `timed_trace`."""
        generator = random.Random(seed)
        lengths = mixed_lengths(traffic.mix, count)
        generator.shuffle(lengths)
        prefixes = {
            length: [self._chunks(int(length * SHARED)) for _ in range(PREFIXES)] for length in traffic.mix
        }
        return [
            {
                "timestamp": 0,
                "input_length": length,
                "output_length": traffic.output_tokens,
                "hash_ids": self._prompt(
                    length, generator.choice(prefixes[length]) if generator.random() < SHARED else []
                ),
            }
            for length in lengths
        ]

    def _prompt(self, length: int, prefix: list[int]) -> list[int]:
        return prefix + self._chunks(length - len(prefix) * CHUNK_TOKENS)

    def _chunks(self, tokens: int) -> list[int]:
        return list(itertools.islice(self._ids, -(-tokens // CHUNK_TOKENS)))


def mixed_lengths(mix: dict[int, float], count: int) -> list[int]:
    """`count` lengths in the shares of `mix`, the shares rounded: every length at the same intervals."""
    total = sum(mix.values())
    bounds = [bound / total for bound in itertools.accumulate(mix.values())]
    positions = [(n + 0.5) / count for n in range(count)]
    return [next(n for n, bound in zip(mix, bounds, strict=True) if at <= bound) for at in positions]


def parse_metrics(text: str) -> dict[str, float]:
    """The sums over all labels of Prometheus metrics."""
    totals: dict[str, float] = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            name, value = line.partition("{")[0].split(" ")[0], line.rpartition(" ")[2]
            totals[name] = totals.get(name, 0.0) + float(value)
    return totals


def _differences(before: dict[str, float], after: dict[str, float]) -> Record:
    """What the server has counted in between; times are means per request."""

    def change(name: str) -> float:
        return after.get(f"vllm:{name}", 0.0) - before.get(f"vllm:{name}", 0.0)

    found: Record = {"preemptions": int(change("num_preemptions_total"))}
    queries = change("prefix_cache_queries_total")
    found["prefix_cache_hit_rate"] = change("prefix_cache_hits_total") / queries if queries else None
    for span in SPANS:
        count = change(f"request_{span}_time_seconds_count")
        seconds = change(f"request_{span}_time_seconds_sum")
        found[f"mean_{span}_time_ms"] = 1000 * seconds / count if count else None
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
