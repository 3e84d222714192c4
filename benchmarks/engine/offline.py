"""All latency and throughput of one engine: a process that starts vLLM's `LLM` once.

    python -m benchmarks.engine.offline JOB FD

JOB is a JSON file (`Job`); what is measured goes to the file descriptor FD, a JSON object per line.
"""

from __future__ import annotations

import contextlib
import io
import json
import random
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.engine.kv_cache import EXTENSION, METHOD, KVCacheFacts
from benchmarks.engine.processes import environment, messages, send_messages
from benchmarks.engine.workloads import WARM_UP_OUTPUT_TOKENS, Measurement, too_long

Record = dict[str, Any]
PERCENTILES = (99.0,)


@dataclass(frozen=True)
class Job:
    """What one engine is to do.

    Attributes:
        folder: of the model's config.json.
        variant: "s2" or "dense".
        vocabulary: token ids of random prompts are below it.
        flags: of the engine, by vLLM's names.
        measurements: what to measure, in this order.
    """

    folder: str
    variant: str
    vocabulary: int
    flags: dict[str, Any]
    measurements: list[Measurement]

    def save(self, path: Path) -> None:
        path.write_text(json.dumps(asdict(self)))

    @classmethod
    def load(cls, path: Path) -> Job:
        fields = json.loads(path.read_text())
        measurements = [Measurement(**measurement) for measurement in fields.pop("measurements")]
        return cls(**fields, measurements=measurements)


COMMAND = [sys.executable, "-m", "benchmarks.engine.offline"]


def run(job: Job, scratch: Path, log: Path) -> Iterator[Record]:
    """Start the engine in a process of its own, and pass on what it measures.

    Args:
        job: what to do.
        scratch: folder for the job's file.
        log: file that the engine's output is added to.

    Returns:
        An object with the engine's `KVCacheFacts` under "engine", then every record under "record".

    Raises:
        ProcessDied: the process has ended with an error; whether an engine had started, the objects say.
    """
    path = scratch / "offline.json"
    job.save(path)
    return messages(COMMAND, path, log, environment())


def main() -> None:
    path, descriptor = sys.argv[1:]
    send_messages(int(descriptor), serve(Job.load(Path(path))))


def serve(job: Job) -> Iterator[Record]:
    """Start the engine and measure: the objects that `run` passes on."""
    from vllm import LLM

    llm = LLM(
        job.folder,
        load_format="dummy",
        skip_tokenizer_init=True,
        # Every prompt is to be computed; warm-up waves must not answer for it either.
        enable_prefix_caching=False,
        disable_log_stats=False,
        worker_extension_cls=EXTENSION,
        **job.flags,
    )
    facts = KVCacheFacts.of_workers(llm.collective_rpc(METHOD))
    facts.check_variant(job.variant)
    yield {"engine": asdict(facts)}
    engine = Engine(llm, job.vocabulary)
    for measurement in job.measurements:
        yield from ({"record": record} for record in measure(engine, measurement, facts))
    llm.llm_engine.engine_core.shutdown()


def measure(engine: Engine, measurement: Measurement, facts: KVCacheFacts) -> Iterator[Record]:
    """A measurement's records, one per repetition; or one that says why this engine cannot do it."""
    requests = measurement.requests or facts.requests_that_fit(measurement.tokens)
    if measurement.tokens > facts.max_model_len or not requests:
        yield measurement.refusal(too_long(facts.max_model_len))
        return
    warm_up = measurement.warm_up_requests(requests)
    engine.wave(warm_up, measurement.prompt_tokens, min(measurement.output_tokens, WARM_UP_OUTPUT_TOKENS))
    waves = [requests] if measurement.workload == "throughput" else [1] * requests
    for repetition in range(1, measurement.repetitions + 1):
        served = [engine.wave(wave, measurement.prompt_tokens, measurement.output_tokens) for wave in waves]
        yield measurement.record(requests) | {"repetition": repetition} | summary(served, measurement)


@dataclass
class Steps:
    """A logger of vLLM's statistics: when each step's tokens came, and what happened in it.

    Attributes:
        tokens: (time in seconds, tokens, of these first tokens of a request) of each step with any.
        preemptions: requests that had to give back their pages.
    """

    tokens: list[tuple[float, int, int]] = field(default_factory=list)
    preemptions: int = 0

    def record(self, scheduler_stats: Any, iteration_stats: Any, **_: Any) -> None:
        if iteration_stats is None:
            return
        first = len(iteration_stats.time_to_first_tokens_iter)
        self.tokens.append(
            (iteration_stats.iteration_timestamp, iteration_stats.num_generation_tokens, first)
        )
        self.preemptions += iteration_stats.num_preempted_reqs

    def decode_phase(self) -> tuple[int, float]:
        """Tokens that came after the last first token, and the seconds they took."""
        last = max((n for n, (_, _, first) in enumerate(self.tokens) if first), default=None)
        if last is None or last + 1 == len(self.tokens):
            return 0, 0.0
        tokens = sum(count for _, count, _ in self.tokens[last + 1 :])
        return tokens, self.tokens[-1][0] - self.tokens[last][0]

    def log(self) -> None:
        """Nothing: this logger is read."""


@dataclass(frozen=True)
class Wave:
    """Requests that were served together.

    Attributes:
        outputs: vLLM's.
        steps: of the engine meanwhile.
        seconds: all in all.
    """

    outputs: list[Any]
    steps: Steps
    seconds: float


class Engine:
    """An engine and the random prompts that it serves."""

    def __init__(self, llm: Any, vocabulary: int) -> None:
        self._llm = llm
        self._vocabulary = range(vocabulary)
        self._generator = random.Random(0)

    def wave(self, requests: int, prompt_tokens: int, output_tokens: int) -> Wave:
        """Serve as many new prompts at once."""
        from vllm import SamplingParams

        params = SamplingParams(temperature=0.0, max_tokens=output_tokens, ignore_eos=True, detokenize=False)
        prompts = [
            {"prompt_token_ids": self._generator.choices(self._vocabulary, k=prompt_tokens)}
            for _ in range(requests)
        ]
        with self._logged() as steps:
            start = time.perf_counter()
            outputs = self._llm.generate(prompts, params, use_tqdm=False)
            seconds = time.perf_counter() - start
        return Wave(outputs, steps, seconds)

    @contextlib.contextmanager
    def _logged(self) -> Iterator[Steps]:
        loggers = self._llm.llm_engine.logger_manager.stat_loggers
        steps = Steps()
        loggers.append(steps)
        try:
            yield steps
        finally:
            loggers.remove(steps)


def summary(waves: list[Wave], measurement: Measurement) -> Record:
    """What a repetition's record says, in the names of `vllm bench serve`; times in milliseconds.

    Args:
        waves: one after the other.
        measurement: of which they are a repetition.
    """
    outputs = [output for wave in waves for output in wave.outputs]
    duration = sum(wave.seconds for wave in waves)
    metrics = _bench_metrics(outputs, duration, measurement)
    tokens, seconds = map(sum, zip(*(wave.steps.decode_phase() for wave in waves), strict=True))
    return {
        "duration": duration,
        **{name: getattr(metrics, name) for name in ("completed", "failed")},
        **{name: float(getattr(metrics, name)) for name in _THROUGHPUTS},
        **_statistics(metrics),
        "decode_output_throughput": tokens / seconds if seconds else None,
        "max_concurrent_requests": max(_most_at_once(wave.outputs) for wave in waves),
        "preemptions": sum(wave.steps.preemptions for wave in waves),
        **_shares_of_time(outputs),
    }


_THROUGHPUTS = ("request_throughput", "output_throughput", "total_token_throughput")


def _bench_metrics(outputs: list[Any], duration: float, measurement: Measurement) -> Any:
    """vLLM's `BenchmarkMetrics` of these outputs."""
    from vllm.benchmarks.lib.endpoint_request_func import RequestFuncOutput
    from vllm.benchmarks.serve import calculate_metrics

    answers = []
    for output in outputs:
        times, count = output.metrics, len(output.outputs[0].token_ids)
        decoding = times.last_token_ts - times.first_token_ts
        answers.append(
            RequestFuncOutput(
                success=count == measurement.output_tokens,
                error=f"{count} tokens, expected {measurement.output_tokens}",
                prompt_len=measurement.prompt_tokens,
                output_tokens=count,
                ttft=times.first_token_latency,
                latency=times.first_token_latency + decoding,
                start_time=times.arrival_time,
            )
        )
    # It advertises a plotting library on every call.
    with contextlib.redirect_stdout(io.StringIO()):
        metrics, _ = calculate_metrics([], answers, duration, None, list(PERCENTILES), {})
    return metrics


def _statistics(metrics: Any) -> Record:
    found = {}
    for name in ("ttft", "tpot", "e2el"):
        percentiles = getattr(metrics, f"percentiles_{name}_ms")
        found[f"mean_{name}_ms"] = float(getattr(metrics, f"mean_{name}_ms"))
        found[f"median_{name}_ms"] = float(getattr(metrics, f"median_{name}_ms"))
        found |= {f"p{percent:g}_{name}_ms": float(value) for percent, value in percentiles}
    return found


def _most_at_once(outputs: list[Any]) -> int:
    """The most requests that ran at the same time, between their first step and their last token."""
    events = [(output.metrics.scheduled_ts, 1) for output in outputs]
    events += [(output.metrics.last_token_ts, -1) for output in outputs]
    running = most = 0
    for _, change in sorted(events):
        running += change
        most = max(most, running)
    return most


def _shares_of_time(outputs: list[Any]) -> Record:
    """Where a request's time goes, on average: in the queue, to its first token, to its last."""
    spans: dict[str, Callable[[Any], float]] = {
        "mean_queue_time_ms": lambda times: times.scheduled_ts - times.queued_ts,
        "mean_prefill_time_ms": lambda times: times.first_token_ts - times.scheduled_ts,
        "mean_decode_time_ms": lambda times: times.last_token_ts - times.first_token_ts,
    }
    times = [output.metrics for output in outputs]
    return {name: 1000 * sum(map(span, times)) / len(times) for name, span in spans.items()}


if __name__ == "__main__":
    main()
