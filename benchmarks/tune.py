"""Find the launch configurations of the kernels on one GPU, and store them where the kernels look.

    python -m benchmarks.tune
    python -m benchmarks.tune --ops decode

Every candidate's output is checked before it is timed, as in `benchmarks.kernels`. A configuration is stored
for what the kernels distinguish; where several cases share one, the candidate with the lowest geometric mean
of their times is taken.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from statistics import geometric_mean

import torch

from benchmarks.geometries import GEOMETRIES
from benchmarks.kernels.cases import Case
from benchmarks.kernels.check import Expected
from benchmarks.kernels.implementations import IMPLEMENTATIONS
from benchmarks.kernels.inputs import random_inputs
from benchmarks.kernels.run import DTYPE, Measure, num_input_sets, run_implementation
from benchmarks.kernels.timing import Launch, median_ms
from s2_kernels.configs import Config, current_gpu, load_table, table_path, trial
from s2_vllm.config import S2Config

SECONDS = 0.05
# The Hopper kernel takes blocks of 64 tokens only, so these run the portable one on every GPU.
BLOCKS_OF_128 = replace(GEOMETRIES["hhst-8b"], config=S2Config(8, 8, block_size=128))
PORTABLE_GEOMETRIES = {
    "block128-head64": replace(BLOCKS_OF_128, head_size=64),
    "block128-head128": BLOCKS_OF_128,
}
CASES = [
    Case("cache_write", "hhst-8b", 1, 8192),
    Case("decode", "hhst-8b", 16, 32768),
    Case("decode", "hhst-8b", 64, 8192),
    Case("decode", "hhst-8b", 1, 131072),
    Case("decode", "phi3-small", 16, 32768),
    *(Case("prefill", geometry, 1, 32768) for geometry in PORTABLE_GEOMETRIES),
]
OPTIONS = {
    "cache_write": ("ROWS", "num_warps"),
    "decode": ("BLOCK_N", "num_warps", "num_stages", "programs_per_processor"),
    "prefill": ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages"),
}
CANDIDATES: dict[str, list[tuple[int, ...]]] = {
    "cache_write": [(8, 2), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8)],
    "decode": [(64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 4, 2), (64, 8, 3, 2), (32, 4, 4, 3), (32, 2, 4, 4)],
    "prefill": [
        (128, 128, 8, 2),
        (128, 64, 8, 3),
        (128, 64, 8, 4),
        (128, 32, 8, 4),
        (64, 64, 4, 2),
        (64, 64, 4, 3),
        (64, 32, 4, 4),
    ],
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=list(OPTIONS), default=list(OPTIONS))
    options = parser.parse_args(arguments)
    gpu = current_gpu()
    if gpu is None:
        print("benchmarks.tune: no CUDA GPU found, expected one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    GEOMETRIES.update(PORTABLE_GEOMETRIES)
    device = torch.device("cuda", torch.cuda.current_device())
    table = load_table(gpu)
    for op in options.ops:
        best = tune(op, device, measure)
        table = {**table, op: {**table.get(op, {}), **best}}
        table_path(gpu).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
    print(f"saved {table_path(gpu)}")
    return 0


def measure(launches: Sequence[Launch], in_graph: bool) -> float:
    return median_ms(launches, SECONDS, in_graph)


def tune(op: str, device: torch.device, measure: Measure) -> dict[str, Config]:
    """The best configuration for every shape among the cases of `op`, by `shape_key`.

    Raises:
        RuntimeError: no candidate ran on all cases of a shape.
    """
    candidates = [dict(zip(OPTIONS[op], values, strict=True)) for values in CANDIDATES[op]]
    times: dict[str, list[dict[int, float]]] = defaultdict(list)
    for case in CASES:
        if case.op == op:
            shape, measured = time_candidates(case, candidates, device, measure)
            times[shape].append(measured)
    best = {}
    for shape, of_cases in times.items():
        ran = set.intersection(*map(set, of_cases))
        if not ran:
            raise RuntimeError(f"{op} {shape}: no candidate ran on all cases")
        best[shape] = candidates[min(ran, key=lambda n: geometric_mean([ms[n] for ms in of_cases]))]
        print(f"{op} {shape}: {best[shape]}", flush=True)
    return best


def time_candidates(
    case: Case, candidates: Sequence[Config], device: torch.device, measure: Measure
) -> tuple[str, dict[int, float]]:
    """The shape that the case's configuration is stored under, and the milliseconds of those that ran.

    Raises:
        RuntimeError: no candidate ran.
    """
    input_sets = [random_inputs(case, DTYPE, device) for _ in range(num_input_sets(case, device))]
    expected: dict[bool, list[Expected]] = {}
    measured = {}
    shapes: set[str] = set()
    print(case)
    for n, candidate in enumerate(candidates):
        with trial(case.op, candidate) as asked:
            result = run_implementation(IMPLEMENTATIONS["s2"], case, input_sets, expected, measure)
        if "ms" in result:
            measured[n] = result["ms"]
            shapes |= asked
        outcome = f"{result['ms']:.4f} ms" if "ms" in result else result.get("error") or result["reason"]
        print(f"  {candidate}: {outcome}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if not measured:
        raise RuntimeError(f"{case}: no candidate ran")
    (shape,) = shapes
    return shape, measured


if __name__ == "__main__":
    raise SystemExit(main())
