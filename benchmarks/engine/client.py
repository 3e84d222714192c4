"""Traffic for a server, and what it measures: `vllm bench serve`, many times in one process.

    python -m benchmarks.engine.client JOB FD

JOB is a JSON file (`Job`); what is measured goes to the file descriptor FD, a JSON object per line.

The traffic is a trace of prompts, token ids; half of them share their first half with others of their length.
It is the same for every server.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.request import ProxyHandler, build_opener

from benchmarks.engine.processes import send_messages
from benchmarks.engine.workloads import Traffic, too_long

Record = dict[str, Any]
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
    """What a server is to be put under.

    Attributes:
        url: where the server answers, without a path.
        model: its name there.
        folder: with the model's tokenizer.
        scratch: folder for traces.
        max_model_len: the server's longest request, in tokens.
        measurements: the traffic, in this order.
    """

    url: str
    model: str
    folder: str
    scratch: str
    max_model_len: int
    measurements: list[Traffic]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        measurements = [Traffic.of_json(measurement) for measurement in fields.pop("measurements")]
        return cls(**fields, measurements=measurements)


def main() -> None:
    path, descriptor = sys.argv[1:]
    job = Job.load(Path(path))
    bench = Bench(job)
    send_messages(
        int(descriptor),
        ({"record": record} for traffic in job.measurements for record in measure(bench, traffic)),
    )


def measure(bench: Bench, traffic: Traffic) -> Iterator[Record]:
    """A traffic's records, one per repetition; or one that says why this server cannot do it."""
    if traffic.tokens > bench.job.max_model_len:
        yield traffic.refusal(too_long(bench.job.max_model_len))
        return
    bench.warm_up(traffic)
    for repetition in range(1, traffic.repetitions + 1):
        measured = bench.send(traffic, repetition)
        yield traffic.record(traffic.requests) | {"repetition": repetition} | measured


class Bench:
    """`vllm bench serve`, for one server."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._trace = Trace()

    def warm_up(self, traffic: Traffic) -> None:
        """A request of each length, all at once."""
        self._bench(traffic, self._trace.requests(traffic, len(traffic.mix), seed=0), 0)

    def send(self, traffic: Traffic, repetition: int) -> Record:
        """What a record says of the traffic that was sent."""
        before = self._counters()
        requests = self._trace.requests(traffic, traffic.requests, repetition)
        result = self._bench(traffic, requests, repetition)
        return {name: result[name] for name in MEASURED} | differences(before, self._counters())

    def _bench(self, traffic: Traffic, requests: list[Record], seed: int) -> Record:
        from vllm.benchmarks.serve import add_cli_args, main
        from vllm.utils.argparse_utils import FlexibleArgumentParser

        trace = Path(self.job.scratch) / "trace.jsonl"
        trace.write_text("".join(f"{json.dumps(request)}\n" for request in requests))
        parser = FlexibleArgumentParser()
        add_cli_args(parser)
        sizes = [f"--seed={seed}", f"--num-prompts={len(requests)}"]
        return dict(main(parser.parse_args([*self._arguments(traffic, trace), *sizes])))

    def _arguments(self, traffic: Traffic, trace: Path) -> list[str]:
        options = {
            "base-url": self.job.url,
            "model": self.job.folder,
            "served-model-name": self.job.model,
            "dataset-name": "timed_trace",
            "dataset-path": trace,
            "timed-trace-chunk-hash-size": CHUNK_TOKENS,
            "request-rate": traffic.request_rate,
            "temperature": 0,
            # The first request must not be sent twice: the prefix cache would answer.
            "ready-check-timeout-sec": 0,
            "percentile-metrics": "ttft,tpot,itl,e2el",
            "metric-percentiles": ",".join(map(str, PERCENTILES)),
        }
        goodput = [f"{name}:{milliseconds:g}" for name, milliseconds in traffic.slo.items()]
        return [
            *(f"--{name}={value}" for name, value in options.items()),
            *("--no-self-timed", "--disable-tqdm", "--goodput", *goodput),
        ]

    def _counters(self) -> dict[str, float]:
        """vLLM's metrics so far, all labels together."""
        with build_opener(ProxyHandler({})).open(f"{self.job.url}/metrics", timeout=60) as answer:
            return parse_metrics(answer.read().decode())


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


def differences(before: dict[str, float], after: dict[str, float]) -> Record:
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


if __name__ == "__main__":
    main()
