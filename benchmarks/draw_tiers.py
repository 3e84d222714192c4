"""Draws the README's picture of the two tiers: python -m benchmarks.draw_tiers"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from s2_kernels.draw import DROPPED_COLOR, STRIDED_COLOR, WINDOW_COLOR
from s2_kernels.pattern import S2Pattern

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PATTERN = S2Pattern.build(4, 4, block_size=64, local_blocks=3, vert_stride=4)
NUM_BLOCKS = 15


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the two tiers of the KV cache")
    parser.add_argument("--output", type=Path, default=Path("benchmarks/figures/tiers.svg"))
    output = parser.parse_args().output
    figure = Figure(figsize=(9.6, 4.6), layout="constrained")
    FigureCanvasAgg(figure)
    seen, stored = figure.subplots(2, 1, height_ratios=[1, 1.05])
    _draw_attended(seen)
    _draw_tiers(stored)
    figure.savefig(output)
    print(f"saved {output}")


def _draw_attended(axes: Axes) -> None:
    """A row per head: what the newest query block attends to."""
    query = NUM_BLOCKS - 1
    for head in range(PATTERN.num_heads):
        for block in range(NUM_BLOCKS):
            colour = DROPPED_COLOR
            if PATTERN.attends(head, query, block):
                colour = WINDOW_COLOR if query - block < PATTERN.local_blocks else STRIDED_COLOR
            _cell(axes, block, head, colour, str(block) if colour is not DROPPED_COLOR else "")
        axes.text(-0.2, head + 0.5, f"head {head}", ha="right", va="center", fontsize=9)
    _finish(axes, f"What a query in block {query} attends to: its head's shard, and the window", NUM_BLOCKS)


def _draw_tiers(axes: Axes) -> None:
    """The pages that hold it: super-blocks of the strided tier, then the window tier."""
    stride, query = PATTERN.vert_stride, NUM_BLOCKS - 1
    num_super_blocks = -(-NUM_BLOCKS // stride)
    for head in range(PATTERN.num_heads):
        for page in range(num_super_blocks):
            block = page * stride + PATTERN.residues[head]
            written = block <= query
            _cell(
                axes, page * 1.35, head, STRIDED_COLOR if written else "white", str(block) if written else ""
            )
        for n, block in enumerate(range(query - PATTERN.local_blocks + 1, query + 1)):
            _cell(axes, 9 + n * 1.35, head, WINDOW_COLOR, str(block))
        axes.text(-0.2, head + 0.5, f"head {head}", ha="right", va="center", fontsize=9)
    for page in range(num_super_blocks):
        label = f"blocks\n{page * stride}-{page * stride + stride - 1}"
        axes.text(page * 1.35 + 0.5, 4.15, label, ha="center", va="top", fontsize=8)
    for n in range(PATTERN.local_blocks):
        label = f"block\n{query - PATTERN.local_blocks + 1 + n}"
        axes.text(9 + n * 1.35 + 0.5, 4.15, label, ha="center", va="top", fontsize=8)
    axes.text(
        5.6,
        2,
        "strided tier:\none page per super-block,\nfor each head only\nits own block",
        va="center",
        fontsize=9,
    )
    axes.text(13.2, 2, "window tier:\nthe newest blocks,\nall heads", va="center", fontsize=9)
    _finish(axes, "What the KV cache stores: a column is a page; all else has been freed", NUM_BLOCKS + 1.6)
    axes.set_ylim(5.1, -0.1)


def _cell(axes: Axes, x: float, y: float, colour: str, text: str) -> None:
    axes.add_patch(Rectangle((x, y), 1, 1, facecolor=colour, edgecolor="#999999", linewidth=0.6))
    axes.text(x + 0.5, y + 0.5, text, ha="center", va="center", fontsize=8, color="white")


def _finish(axes: Axes, title: str, width: float) -> None:
    axes.set_title(title, fontsize=10, loc="left")
    axes.set_xlim(-1.6, width)
    axes.set_ylim(PATTERN.num_heads + 0.1, -0.1)
    axes.axis("off")


if __name__ == "__main__":
    main()
