"""The shares of a line of places: together all of it, evenly, and found again from any place."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
import triton
import triton.language as tl

from s2_kernels.decode_schedule import MIN_TILES, num_shares, share_of_place, share_start
from tests.paged import DEVICE


@triton.jit
def shares_kernel(starts, shares_of_places, line_length, num_programs, SIZE: tl.constexpr):
    shares = num_shares(line_length, num_programs)
    n = tl.arange(0, SIZE)
    tl.store(starts + n, share_start(n, line_length, shares), mask=n <= shares)
    tl.store(shares_of_places + n, share_of_place(n, line_length, shares), mask=n < line_length)


def shares_of(line_length: int, num_programs: int) -> tuple[list[int], list[int]]:
    """Where the shares start, the line's end included; and the share of each place."""
    starts, shares = torch.full((2, 128), -1, dtype=torch.int32, device=DEVICE)
    kernel: Any = shares_kernel
    kernel[(1,)](starts, shares, line_length, num_programs, SIZE=128)
    return [n for n in starts.tolist() if n >= 0], [n for n in shares.tolist() if n >= 0]


@pytest.mark.parametrize("line_length", [1, 2, 3, 7, 24, 100])
@pytest.mark.parametrize("num_programs", [1, 2, 5, 13, 40])
def test_shares_cut_the_line_evenly(line_length: int, num_programs: int) -> None:
    starts, shares = shares_of(line_length, num_programs)
    assert (starts[0], starts[-1]) == (0, line_length)
    sizes = [end - start for start, end in pairwise(starts)]
    assert len(sizes) == min(num_programs, -(-line_length // MIN_TILES.value))
    assert max(sizes) - min(sizes) <= 1
    assert shares == [n for n, size in enumerate(sizes) for _ in range(size)]
