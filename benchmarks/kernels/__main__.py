"""Time the kernels and their peers on one GPU, after checking every output.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --ops decode --geometries hhst-8b --impls s2 fa3

Results are written after every case, so that a run that is stopped loses nothing, and added to those that the
file has of other cases. A peer that cannot run is recorded with the reason, an implementation whose output is
wrong with the error, neither with a time.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from benchmarks.geometries import GEOMETRIES, VARIATIONS
from benchmarks.kernels.cases import OPS, select_cases
from benchmarks.kernels.implementations import IMPLEMENTATIONS
from benchmarks.kernels.report import Record, line, tables
from benchmarks.kernels.run import DTYPE, Measure, run_case
from benchmarks.kernels.timing import Launch, median_ms
from benchmarks.results_file import ResultFile, describe_run, gpu_name
from s2_vllm.cli import positive_int

KEY = ("op", "geometry", "batch", "seq_len", "impl")
"""What a measurement is known by."""
SECONDS, QUICK_SECONDS = 0.3, 0.1
COPY_BYTES = 2**31
MATMUL_SIZE = 8192


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    if not torch.cuda.is_available():
        print("benchmarks.kernels: no CUDA GPU found, expected one", file=sys.stderr)
        return 2
    device = torch.device("cuda", torch.cuda.current_device())
    output = options.output or Path(f"benchmarks/results/kernels-{gpu_name(device)}.json")
    seconds = QUICK_SECONDS if options.quick else SECONDS

    def measure(launches: Sequence[Launch], in_graph: bool) -> float:
        return median_ms(launches, seconds, in_graph)

    torch.manual_seed(0)
    file = ResultFile(output, describe_run(), KEY)
    records = ceilings(device, measure)
    for record in records:
        print(line(record), flush=True)
    file.add(*records)
    stream = torch.cuda.Stream(device)  # one that can be captured
    for case in select_cases(options.ops, options.geometries, options.seq_lens, options.quick):
        with torch.cuda.stream(stream):
            measured = run_case(case, options.impls, device, DTYPE, measure)
        records += measured
        file.add(*measured)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{tables(records)}\n\nsaved {output}")
    return int(any("error" in record for record in records))


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, help="default: all")
    geometries = [*GEOMETRIES, *VARIATIONS]
    parser.add_argument("--geometries", nargs="+", choices=geometries, help="default: by operation")
    parser.add_argument(
        "--seq-lens", nargs="+", type=positive_int, metavar="TOKENS", help="default: by operation"
    )
    parser.add_argument("--impls", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases by default, and shorter measurements"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels-<gpu>.json")
    return parser.parse_args(arguments)


def ceilings(device: torch.device, measure: Measure) -> list[Record]:
    """What the device reaches in this run: the bandwidth of a copy, and the rate of a matrix product."""
    target, source = torch.ones(2, COPY_BYTES, dtype=torch.uint8, device=device)
    copy_ms = measure([lambda: target.copy_(source)], False)
    a, b = torch.randn(2, MATMUL_SIZE, MATMUL_SIZE, dtype=DTYPE, device=device)
    matmul_ms = measure([lambda: a @ b], False)
    return [
        {
            "op": "copy",
            "impl": "torch",
            "ms": round(copy_ms, 4),
            "gbps": round(2 * COPY_BYTES / copy_ms / 1e6, 1),
        },
        {
            "op": "matmul",
            "impl": "torch",
            "ms": round(matmul_ms, 4),
            "tflops": round(2 * MATMUL_SIZE**3 / matmul_ms / 1e9, 1),
        },
    ]


if __name__ == "__main__":
    raise SystemExit(main())
