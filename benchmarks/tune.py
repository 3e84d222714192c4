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
from dataclasses import dataclass
from statistics import geometric_mean

import torch

from benchmarks.geometries import VARIATIONS
from benchmarks.kernels.cases import Case
from benchmarks.kernels.check import Expected
from benchmarks.kernels.implementations import IMPLEMENTATIONS
from benchmarks.kernels.inputs import random_inputs
from benchmarks.kernels.run import DTYPE, Measure, num_input_sets, run_implementation
from benchmarks.kernels.timing import Launch, median_ms
from s2_kernels.launch.configs import Config, current_gpu, load_table, table_path, trial

SECONDS = 0.05


@dataclass(frozen=True)
class Search:
    """What is tried for a kernel.

    Attributes:
        cases: what it is measured on.
        options: the names of its options.
        candidates: values for them.
        impl: the implementation of `benchmarks.kernels` that runs it.
    """

    cases: list[Case]
    options: tuple[str, ...]
    candidates: list[tuple[int, ...]]
    impl: str = "s2"

    @property
    def configs(self) -> list[Config]:
        return [dict(zip(self.options, values, strict=True)) for values in self.candidates]


TRITON_OPTIONS = ("BLOCK_M", "BLOCK_N", "num_warps", "num_stages")
# The Hopper kernel takes blocks of 64 only, so those of 128 run the portable kernels on every GPU.
PORTABLE_CASES = [Case("prefill", name, 1, 32768) for name in ("block128-head64", "block128-head128")]
# The Hopper kernels take blocks of 64 only.
PORTABLE_GRADIENT_CASES = [Case("backward", name, 1, 32768) for name in VARIATIONS if name != "head64"]
GRADIENT_CASES = [Case("backward", geometry, 1, 32768) for geometry in ("hhst-8b", "s2-7b", "head64")]
SEARCHES = {
    "cache_write": Search(
        [Case("cache_write", "hhst-8b", 1, 8192)],
        ("ROWS", "num_warps"),
        [(8, 2), (16, 2), (16, 4), (32, 2), (32, 4), (64, 4), (64, 8), (128, 8)],
    ),
    "decode": Search(
        [
            Case("decode", "hhst-8b", 16, 32768),
            Case("decode", "hhst-8b", 64, 8192),
            Case("decode", "hhst-8b", 1, 131072),
            Case("decode", "phi3-small", 16, 32768),
        ],
        ("BLOCK_N", "num_warps", "num_stages", "programs_per_processor"),
        [(64, 4, 3, 2), (64, 4, 3, 3), (64, 4, 4, 2), (64, 8, 3, 2), (32, 4, 4, 3), (32, 2, 4, 4)],
    ),
    "prefill": Search(
        PORTABLE_CASES,
        TRITON_OPTIONS,
        [
            (128, 128, 8, 2),
            (128, 64, 8, 3),
            (128, 64, 8, 4),
            (128, 64, 4, 3),
            (128, 32, 8, 4),
            (64, 64, 4, 2),
            (64, 64, 4, 3),
            (64, 32, 4, 4),
        ],
    ),
    "hopper_prefill": Search(
        [
            Case("prefill", geometry, 1, seq_len)
            for geometry in ("hhst-8b", "s2-7b", "head64")
            for seq_len in (8192, 131072)
        ],
        ("STAGES", "section_mib"),
        [(2, 1), (2, 2), (2, 4), (2, 8), (2, 16), (4, 4), (4, 8)],
    ),
    "hopper_key_gradients": Search(GRADIENT_CASES, ("STAGES",), [(2,), (3,), (4,), (6,)]),
    "hopper_query_gradients": Search(
        GRADIENT_CASES,
        ("STAGES", "section_mib"),
        [(2, 4), (3, 4), (4, 1), (4, 2), (4, 4), (4, 8), (4, 16)],
    ),
    "block_sparse_bwd_dq": Search(
        PORTABLE_GRADIENT_CASES,
        TRITON_OPTIONS,
        [(128, 64, 8, 3), (128, 64, 8, 2), (128, 32, 8, 3), (64, 64, 4, 2), (64, 64, 4, 3), (64, 32, 4, 3)],
        impl="s2_triton",
    ),
    "block_sparse_bwd_dkdv": Search(
        PORTABLE_GRADIENT_CASES,
        TRITON_OPTIONS,
        [(64, 128, 8, 2), (32, 128, 8, 2), (64, 64, 4, 2), (32, 64, 4, 2), (32, 64, 4, 3), (64, 64, 8, 2)],
        impl="s2_triton",
    ),
    "block_sparse": Search(
        PORTABLE_CASES,
        TRITON_OPTIONS,
        [(128, 128, 8, 2), (128, 64, 8, 3), (128, 64, 4, 3), (64, 128, 4, 2), (64, 64, 4, 3), (64, 64, 4, 4)],
        impl="s2_contiguous",
    ),
}


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--ops", nargs="+", choices=list(SEARCHES), default=list(SEARCHES))
    options = parser.parse_args(arguments)
    gpu = current_gpu()
    if gpu is None:
        print("benchmarks.tune: no CUDA GPU found, expected one", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    device = torch.device("cuda", torch.cuda.current_device())
    table = load_table(gpu)
    for op in options.ops:
        with torch.cuda.stream(torch.cuda.Stream(device)):  # one that can be captured
            best = tune(op, device, measure)
        if best:
            table = {**table, op: {**table.get(op, {}), **best}}
            table_path(gpu).write_text(json.dumps(table, indent=2, sort_keys=True) + "\n")
            print(f"saved {table_path(gpu)}")
    return 0


def measure(launches: Sequence[Launch], in_graph: bool) -> float:
    return median_ms(launches, SECONDS, in_graph)


def tune(op: str, device: torch.device, measure: Measure) -> dict[str, Config]:
    """The best configuration for every shape among the cases of `op`, by `shape_key`.

    None for a kernel that this GPU never runs: nobody asked for its configuration.

    Raises:
        RuntimeError: no candidate ran on all cases of a shape.
    """
    search = SEARCHES[op]
    times: dict[str, list[dict[int, float]]] = defaultdict(list)
    for case in search.cases:
        for shape, measured in time_candidates(op, case, device, measure).items():
            times[shape].append(measured)
    best = {}
    for shape, of_cases in times.items():
        ran = set.intersection(*map(set, of_cases))
        if not ran:
            raise RuntimeError(f"{op} {shape}: no candidate ran on all cases")
        best[shape] = search.configs[min(ran, key=lambda n: geometric_mean([ms[n] for ms in of_cases]))]
        print(f"{op} {shape}: {best[shape]}", flush=True)
    return best


def time_candidates(
    op: str, case: Case, device: torch.device, measure: Measure
) -> dict[str, dict[int, float]]:
    """By the shape that the configuration is stored under, the milliseconds of the candidates that ran.

    Raises:
        RuntimeError: no candidate ran.
    """
    search = SEARCHES[op]
    input_sets = [random_inputs(case, DTYPE, device) for _ in range(num_input_sets(case, device))]
    expected: dict[bool, list[Expected]] = {}
    measured: dict[str, dict[int, float]] = defaultdict(dict)
    has_run = False
    print(f"{op}: {case}")
    for n, candidate in enumerate(search.configs):
        with trial(op, candidate) as shapes:
            result = run_implementation(IMPLEMENTATIONS[search.impl], case, input_sets, expected, measure)
        if "ms" in result:
            has_run = True
            for shape in shapes:
                measured[shape][n] = result["ms"]
        outcome = f"{result['ms']:.4f} ms" if "ms" in result else result.get("error") or result["reason"]
        print(f"  {candidate}: {outcome}", flush=True)
        gc.collect()
        torch.cuda.empty_cache()
    if not has_run:
        raise RuntimeError(f"{op}: no candidate ran on {case}")
    return measured


if __name__ == "__main__":
    raise SystemExit(main())
