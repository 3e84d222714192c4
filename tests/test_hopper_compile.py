"""The Hopper prefill kernel compiles for its GPU under the installed Triton, to the code it is meant to be.

What can be seen without a GPU: that the matrix products are Hopper's own, that they run ahead, and that what
they add to stays in registers.
"""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.programs import run_python

CASES: dict[str, dict[str, Any]] = {
    "paged-128-short": {"HEAD_SIZE": 128, "PAGE_SLOTS": 64, "NUM_KEPT": 1, "HALF_START": False},
    "paged-128": {"HEAD_SIZE": 128, "PAGE_SLOTS": 64, "NUM_KEPT": 1, "HALF_START": True},
    "paged-128-kept4": {"HEAD_SIZE": 128, "PAGE_SLOTS": 256, "NUM_KEPT": 4, "HALF_START": True},
    "paged-64": {"HEAD_SIZE": 64, "PAGE_SLOTS": 64, "NUM_KEPT": 1, "HALF_START": True},
    "contiguous-128": {"HEAD_SIZE": 128, "PAGE_SLOTS": 0, "NUM_KEPT": 1, "HALF_START": True},
}


def machine_code(case: dict[str, Any]) -> list[str]:
    """Lines of the kernel's disassembly."""
    arguments = json.dumps({"dtype": "bf16", "GROUP_SIZE": 4, **case})
    return run_python("-m", "tests.hopper_sass", arguments, without="TRITON_INTERPRET").splitlines()


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_matrix_products_run_ahead(case: dict[str, Any]) -> None:
    lines = machine_code(case)
    # Instructions of matrix products between waits for one. Where ptxas finds that registers of a product in
    # flight are in use, it waits after every instruction.
    runs = [0]
    for line in lines:
        if "WARPGROUP.DEPBAR" in line:
            runs.append(0)
        runs[-1] += "HGMMA" in line
    # In the main loop of each consumer the logits of a step are followed at once by the output of the one
    # before, in instructions of 16.
    both_products = case["HEAD_SIZE"] // 16 + 128 // 16
    assert sum(run >= both_products for run in runs) >= 2
    # A few scalars may be kept in local memory; an accumulator of either consumer would be 128 accesses.
    assert len([line for line in lines if "LDL" in line or "STL" in line]) < 128
