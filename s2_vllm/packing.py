"""Bin packing: layers that need different numbers of rows, in KV cache entries that all have as many.

To vLLM an entry is one layer with a page of [rows, slots, 2 * head_size]. It owns the pages of several layers
of the model, each with a run of rows of its own. The layer of lowest index among them, the entry's leader, is
constructed first and brings it. A layer may need more rows on one tensor-parallel rank than on another: all
ranks have the same entries, but the layers' runs need not begin at the same row.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

Sizes = tuple[tuple[int, ...], ...]
"""Rows that each layer needs on each tensor-parallel rank: [layer][rank]."""


class Place(NamedTuple):
    """Where a layer keeps its KV.

    Attributes:
        leader: the layer whose entry it is, by its place among the sparse layers.
        first: the layer's first row in the entry's pages.
    """

    leader: int
    first: int


@dataclass(frozen=True)
class Packing:
    """The entries of the strided tier.

    Attributes:
        rows: rows of an entry's page.
        page_tokens: tokens that a page spans, kept or not.
        sizes: rows that the sparse layers need.
        leaders: of the entry of each sparse layer, None for one that needs no row on any rank.
    """

    rows: int
    page_tokens: int
    sizes: Sizes
    leaders: tuple[int | None, ...]

    @property
    def num_layers(self) -> int:
        """Layers that have rows."""
        return len(self.leaders) - self.leaders.count(None)

    @property
    def num_entries(self) -> int:
        """Entries that own the layers' pages."""
        return len({*self.leaders} - {None})

    @property
    def used_rows(self) -> list[int]:
        """Rows that layers need, of all entries, by rank."""
        return [sum(of_rank) for of_rank in zip(*self.sizes, strict=True)]

    @property
    def fullest_rows(self) -> int:
        """Rows that layers need, of all entries, each on the rank where its layers need most."""
        ranks = range(len(self.sizes[0]))
        needed = [Counter[int | None]() for _ in ranks]
        for leader, size in zip(self.leaders, self.sizes, strict=True):
            for rank in ranks:
                needed[rank][leader] += size[rank]
        return sum(max(of_rank[leader] for of_rank in needed) for leader in {*self.leaders})

    def place(self, index: int, rank: int) -> Place | None:
        """Where a sparse layer has its rows on a rank, in the order of the layers; None if it needs none."""
        leader = self.leaders[index]
        if leader is None:
            return None
        return Place(leader, sum(self.sizes[i][rank] for i in range(index) if self.leaders[i] == leader))


def share_evenly(num_layers: int, per_entry: int) -> tuple[int, ...]:
    """The leaders where `per_entry` consecutive layers share an entry."""
    return tuple(i - i % per_entry for i in range(num_layers))


def share_tightly(sizes: Sizes, rows: int) -> tuple[int | None, ...]:
    """The leaders where layers share few entries: the layers of most rows first, each where it fits best.

    Args:
        sizes: rows of the layers, on each rank at most `rows`.
        rows: of an entry.
    """
    leaders: list[int | None] = [None] * len(sizes)
    bins: list[list[int]] = []
    free: list[tuple[int, ...]] = []
    for layer in sorted(filter(lambda i: any(sizes[i]), range(len(sizes))), key=lambda i: -sum(sizes[i])):
        tightest = _tightest(free, sizes[layer])
        if tightest is None:
            assert max(sizes[layer]) <= rows, f"layer {layer} needs {sizes[layer]} rows, an entry has {rows}"
            tightest = len(bins)
            bins.append([])
            free.append((rows,) * len(sizes[layer]))
        bins[tightest].append(layer)
        free[tightest] = tuple(left - size for left, size in zip(free[tightest], sizes[layer], strict=True))
    for layers in bins:
        for layer in layers:
            leaders[layer] = min(layers)
    return tuple(leaders)


def _tightest(free: Sequence[tuple[int, ...]], size: tuple[int, ...]) -> int | None:
    """Of the bins with so many rows free, the fullest that has room for `size` on every rank."""
    fitting = (i for i, left in enumerate(free) if all(map(int.__ge__, left, size)))
    return min(fitting, key=lambda i: sum(free[i]), default=None)
