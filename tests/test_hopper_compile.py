"""The Hopper kernels compile for their GPU under the installed Triton, to the code they are meant to be.

What can be seen without a GPU: that the matrix products are Hopper's own, that they run ahead, and that what
they add to stays in registers.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from tests.programs import run_python

KINDS = {"KINDS": True, "NUM_KEPT": 0, "SINK_BLOCKS": 1}
"""Heads of several kinds: where they are and what they see takes some more scalars."""

CASES: dict[str, dict[str, Any]] = {
    "paged-128-short": {"HEAD_SIZE": 128, "PAGE_SLOTS": 64, "NUM_KEPT": 1, "HALF_START": False},
    "paged-128": {"HEAD_SIZE": 128, "PAGE_SLOTS": 64, "NUM_KEPT": 1, "HALF_START": True},
    "paged-128-kept4": {"HEAD_SIZE": 128, "PAGE_SLOTS": 256, "NUM_KEPT": 4, "HALF_START": True},
    "paged-64": {"HEAD_SIZE": 64, "PAGE_SLOTS": 64, "NUM_KEPT": 1, "HALF_START": True},
    "contiguous-128": {"HEAD_SIZE": 128, "PAGE_SLOTS": 0, "NUM_KEPT": 1, "HALF_START": True},
    "kinds-128-short": {**KINDS, "HEAD_SIZE": 128, "PAGE_SLOTS": 64, "HALF_START": False},
    "kinds-128": {**KINDS, "HEAD_SIZE": 128, "PAGE_SLOTS": 64, "HALF_START": True},
    "kinds-64": {**KINDS, "HEAD_SIZE": 64, "PAGE_SLOTS": 64, "HALF_START": True},
}


GRADIENTS = {name: {"HEAD_SIZE": 128} for name in ("query_gradients", "key_gradients")}


@pytest.fixture(scope="module")
def machine_code() -> Iterator[Callable[[str], list[str]]]:
    """Gives the lines of the disassembly of a case, a kernel with constants; all are compiled at once."""
    kernels = {name: {"kernel": "prefill", **case} for name, case in CASES.items()}
    kernels |= {name: {"kernel": name, **case} for name, case in GRADIENTS.items()}

    def disassemble(arguments: dict[str, Any]) -> list[str]:
        given = json.dumps({"dtype": "bf16", "GROUP_SIZE": 4, **arguments})
        return run_python("-m", "tests.hopper_sass", given, without="TRITON_INTERPRET").splitlines()

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        lines = {name: pool.submit(disassemble, arguments) for name, arguments in kernels.items()}
        yield lambda name: lines[name].result()


def products_between_waits(lines: list[str]) -> list[int]:
    """Instructions of matrix products between waits for one.

    Where ptxas finds that registers of a product in flight are in use, it waits after every instruction.
    """
    runs = [0]
    for line in lines:
        if "WARPGROUP.DEPBAR" in line:
            runs.append(0)
        runs[-1] += "HGMMA" in line
    return runs


def local_accesses(lines: list[str]) -> int:
    """A few scalars may be kept in local memory; an accumulator of either consumer would be 128 accesses."""
    return len([line for line in lines if "LDL" in line or "STL" in line])


@pytest.mark.parametrize("name", CASES)
def test_matrix_products_run_ahead(name: str, machine_code: Callable[[str], list[str]]) -> None:
    lines, case = machine_code(name), CASES[name]
    # In the main loop of each consumer the logits of a step are followed at once by the output of the one
    # before, in instructions of 16.
    both_products = case["HEAD_SIZE"] // 16 + 128 // 16
    assert sum(run >= both_products for run in products_between_waits(lines)) >= 2
    assert local_accesses(lines) < (192 if "KINDS" in case else 128)


def test_gradients_of_queries_run_ahead(machine_code: Callable[[str], list[str]]) -> None:
    lines = machine_code("query_gradients")
    # The logits of a unit and the gradients of its weights, then the gradients by the unit before.
    products = 2 * 128 // 16 + 64 // 16
    assert products_between_waits(lines).count(products) == 2
    assert local_accesses(lines) < 256


def test_gradients_of_keys_stay_in_registers(machine_code: Callable[[str], list[str]]) -> None:
    lines = machine_code("key_gradients")
    # Of both consumers: the logits and the gradients of weights, then each gradient.
    runs = [run for run in products_between_waits(lines) if run]
    assert runs == 2 * [2 * 128 // 16, 64 // 16, 64 // 16]
    assert local_accesses(lines) < 256
