"""Time the kernels and their peers on one GPU, after checking every output.

    python -m benchmarks.kernels
    python -m benchmarks.kernels --ops decode --geometries hhst-8b --impls s2 fa3

Results are written after every case, so that a run that is stopped loses nothing. A peer that cannot run is
recorded with the reason, an implementation whose output is wrong with the error, neither with a time.
"""

from __future__ import annotations

import argparse
import gc
import sys
from collections.abc import Callable, Sequence
from math import ceil
from pathlib import Path

import torch

from benchmarks.geometries import GEOMETRIES
from benchmarks.kernels.cases import OPS, Case, select_cases
from benchmarks.kernels.check import CheckFailed, Expected, check_attention, check_cache, expected_rows
from benchmarks.kernels.implementations import IMPLEMENTATIONS, Implementation, Unavailable
from benchmarks.kernels.inputs import Inputs, random_inputs
from benchmarks.kernels.report import Record, line, tables
from benchmarks.kernels.timing import Launch, median_ms
from benchmarks.kernels.work import rate, required_bytes
from benchmarks.results_file import write_results

DTYPE = torch.bfloat16
SECONDS, QUICK_SECONDS = 0.3, 0.1
MAX_INPUT_SETS = 32
COPY_BYTES = 2**31
MATMUL_SIZE = 8192

Measure = Callable[[Sequence[Launch], bool], float]
"""Launches, and whether they must be in a CUDA graph, to milliseconds."""


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
    records = ceilings(device, measure)
    for record in records:
        print(line(record), flush=True)
    for case in select_cases(options.ops, options.geometries, options.seq_lens, options.quick):
        records += run_case(case, options.impls, device, DTYPE, measure)
        write_results(output, records)
        torch._dynamo.reset()
        gc.collect()
        torch.cuda.empty_cache()
    print(f"\n{tables(records)}\n\nsaved {output}")
    return 0


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.kernels", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=OPS, help="default: all")
    parser.add_argument("--geometries", nargs="+", choices=list(GEOMETRIES), help="default: by operation")
    parser.add_argument(
        "--seq-lens", nargs="+", type=_positive, metavar="TOKENS", help="default: by operation"
    )
    parser.add_argument("--impls", nargs="+", choices=list(IMPLEMENTATIONS), default=list(IMPLEMENTATIONS))
    parser.add_argument(
        "--quick", action="store_true", help="fewer cases by default, and shorter measurements"
    )
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/kernels-<gpu>.json")
    return parser.parse_args(arguments)


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer")
    return int(text)


def gpu_name(device: torch.device) -> str:
    """The GPU's name as part of a file name: "NVIDIA H200" is h200."""
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return "".join(letter if letter.isalnum() else "-" for letter in name)


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


def run_case(
    case: Case, impls: Sequence[str], device: torch.device, dtype: torch.dtype, measure: Measure
) -> list[Record]:
    """A record for each implementation that has the case's operation; prints them as they come."""
    input_sets = [random_inputs(case, dtype, device) for _ in range(num_input_sets(case, device))]
    expected: dict[bool, list[Expected]] = {}
    records = []
    for name in impls:
        implementation = IMPLEMENTATIONS[name]
        if case.op not in implementation.ops:
            continue
        result = run_implementation(implementation, case, input_sets, expected, measure)
        records.append({**case.facts, "impl": name, **result})
        print(line(records[-1]), flush=True)
    return records


def num_input_sets(case: Case, device: torch.device) -> int:
    """Sets of inputs that together are more than twice what the L2 cache holds, for S2 as for the others."""
    if device.type != "cuda":
        return 1
    l2_bytes = torch.cuda.get_device_properties(device).L2_cache_size
    return min(MAX_INPUT_SETS, max(1, ceil(2 * l2_bytes / required_bytes(case, dense=False))))


def run_implementation(
    implementation: Implementation,
    case: Case,
    input_sets: list[Inputs],
    expected: dict[bool, list[Expected]],
    measure: Measure,
) -> Record:
    """Check every output, then measure: {"ms", a rate, "max_rel_err"}, or an "error", or a "reason".

    Args:
        implementation: what to run.
        case: what to run it on, with its `input_sets`.
        expected: references that implementations share, by whether they are dense; filled as needed.
        measure: takes the time.
    """
    try:
        launches = [implementation.ops[case.op](inputs) for inputs in input_sets]
        error = check(implementation.dense, case, launches, input_sets, expected)
        ms = measure(launches, case.op == "decode")
    except Unavailable as unavailable:
        return {"reason": str(unavailable)}
    except CheckFailed as failure:
        return {"error": str(failure)}
    except Exception as failure:  # whatever a peer raises must not end the run
        return {"reason": f"{type(failure).__name__}: {str(failure).strip().split(chr(10))[0]}"[:300]}
    return {
        "ms": float(f"{ms:.5g}"),
        **rate(case, implementation.dense, ms),
        "max_rel_err": float(f"{error:.2g}"),
    }


def check(
    dense: bool,
    case: Case,
    launches: Sequence[Launch],
    input_sets: list[Inputs],
    expected: dict[bool, list[Expected]],
) -> float:
    """The largest error of the launches' outputs.

    Raises:
        CheckFailed: an output is wrong.
    """
    if case.op == "cache_write":
        return max(check_cache(launch(), inputs) for launch, inputs in zip(launches, input_sets, strict=True))
    if dense not in expected:
        expected[dense] = [expected_rows(inputs, dense) for inputs in input_sets]
    return max(
        check_attention(_poisoned(launch, inputs), reference)
        for launch, inputs, reference in zip(launches, input_sets, expected[dense], strict=True)
    )


def _poisoned(launch: Launch, inputs: Inputs) -> torch.Tensor:
    """What `launch` returns, as rows. Memory that it allocates is most likely this NaN, freed at once."""
    inputs.poisoned_output()
    return launch().reshape(inputs.q.shape)


if __name__ == "__main__":
    raise SystemExit(main())
