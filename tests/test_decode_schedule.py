"""The splits of a batch's work items: together all of them, evenly, and found again from any item."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from s2_kernels.paged.decode_schedule import MIN_ITEMS, num_splits, split_of_item, split_start
from tests.paged import DEVICE


@triton.jit
def splits_kernel(starts, splits_of_items, num_items, num_programs, SIZE: tl.constexpr):
    splits = num_splits(num_items, num_programs)
    n = tl.arange(0, SIZE)
    tl.store(starts + n, split_start(n, num_items, splits), mask=n <= splits)
    tl.store(splits_of_items + n, split_of_item(n, num_items, splits), mask=n < num_items)


def splits_of(num_items: int, num_programs: int) -> tuple[list[int], list[int]]:
    """Where the splits start, the end of the items included; and the split of each item."""
    starts, splits = torch.full((2, 128), -1, dtype=torch.int32, device=DEVICE)
    kernel: Any = splits_kernel
    kernel[(1,)](starts, splits, num_items, num_programs, SIZE=128)
    return [n for n in starts.tolist() if n >= 0], [n for n in splits.tolist() if n >= 0]


@pytest.mark.parametrize("num_items", [1, 2, 3, 7, 24, 100])
@pytest.mark.parametrize("num_programs", [1, 2, 5, 13, 40])
def test_splits_are_even(num_items: int, num_programs: int) -> None:
    starts, splits = splits_of(num_items, num_programs)
    assert (starts[0], starts[-1]) == (0, num_items)
    sizes = [end - start for start, end in pairwise(starts)]
    assert len(sizes) == min(num_programs, -(-num_items // MIN_ITEMS.value))
    assert max(sizes) - min(sizes) <= 1
    assert splits == [n for n, size in enumerate(sizes) for _ in range(size)]
