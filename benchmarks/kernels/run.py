"""One case: every implementation's output is checked, then its time is taken."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import ceil

import torch

from benchmarks.kernels.cases import GRADIENT_OPS, Case
from benchmarks.kernels.check import CheckFailed, Expected, check_attention, check_cache, expected_rows
from benchmarks.kernels.check_gradients import check_gradients, expected_gradients
from benchmarks.kernels.implementations import IMPLEMENTATIONS, Implementation, Unavailable
from benchmarks.kernels.inputs import Inputs, random_inputs
from benchmarks.kernels.report import Record, line
from benchmarks.kernels.timing import Launch
from benchmarks.kernels.work import rate, required_bytes

DTYPE = torch.bfloat16
MAX_INPUT_SETS = 32

Measure = Callable[[Sequence[Launch], bool], float]
"""Launches, and whether they must be in a CUDA graph, to milliseconds."""


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

    A wrong output is an error, and so is an exception of ours; a peer that does not run has a reason.

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
    except Exception as failure:  # whatever one raises must not end the run of the others
        what = f"{type(failure).__name__}: {str(failure).strip().split(chr(10))[0]}"[:300]
        return {"error" if implementation.is_ours else "reason": what}
    return {
        "ms": float(f"{ms:.5g}"),
        **rate(case, implementation.dense, ms),
        "max_rel_err": float(f"{error:.2g}"),
        **(_peak_memory(launches[0], input_sets[0]) if case.op in GRADIENT_OPS else {}),
    }


def _peak_memory(launch: Launch, inputs: Inputs) -> Record:
    """{"peak_mib"}: what a launch has allocated at most, results included; nothing on a CPU."""
    device = inputs.q.device
    if device.type != "cuda":
        return {}
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    launch()
    return {"peak_mib": round((torch.cuda.max_memory_allocated(device) - before) / 2**20, 1)}


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
    if case.op in GRADIENT_OPS:
        # One set's reference is dear, and the sets are alike.
        reference = expected_gradients(input_sets[0], dense)
        return check_gradients(launches[0](), reference)
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
