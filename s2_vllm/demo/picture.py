"""A picture of where pass keys lie in a document, and which heads still see them at its end."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2_kernels.draw import DROPPED_COLOR, STRIDED_COLOR, WINDOW_COLOR, cell_colors

if TYPE_CHECKING:
    from pathlib import Path

    from s2_kernels.pattern import S2Pattern

MARK_COLOR = "#b5446e"


def seeing_heads(pattern: S2Pattern, block: int, num_blocks: int) -> list[int]:
    """The query heads that attend to a block from the last of `num_blocks` blocks."""
    heads: list[int] = pattern.block_mask(num_blocks)[:, -1, block].nonzero().flatten().tolist()
    return heads


def draw_places(pattern: S2Pattern, places: dict[str, int], num_blocks: int, path: Path) -> None:
    """Save a row per head: what the last query attends to, with what lies in it marked.

    Args:
        pattern: of the layers.
        places: the block of each name.
        num_blocks: of the document and the question.
        path: of the image, .png or .svg.
    """
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    heads = pattern.num_heads
    figure = Figure(figsize=(11, 0.45 * heads + 1.5), layout="constrained")
    axes = figure.subplots()
    axes.imshow(cell_colors(pattern, num_blocks)[:, -1].numpy(), aspect="auto", interpolation="nearest")
    axes.set_yticks(range(heads), [f"head {head}" for head in range(heads)], fontsize=8)
    axes.set_xlabel(f"block of {pattern.block_size} tokens", fontsize=8)
    axes.tick_params(labelsize=8, length=2)
    for name, block in places.items():
        axes.axvline(block, color=MARK_COLOR, linewidth=0.8)
        for head in seeing_heads(pattern, block, num_blocks):
            axes.plot(block, head, marker="o", markersize=7, color=MARK_COLOR)
        axes.annotate(
            name,
            (block, -0.55),
            ha="center",
            va="bottom",
            color=MARK_COLOR,
            fontsize=8,
            annotation_clip=False,
        )
    axes.set_title("What each head attends to at the end of the document", fontsize=10, pad=18)
    colors = {
        "local window": WINDOW_COLOR,
        "strided": STRIDED_COLOR,
        "not attended": DROPPED_COLOR,
        "a pass key, seen": MARK_COLOR,
    }
    handles = [Patch(facecolor=color, label=label) for label, color in colors.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.savefig(path, dpi=150)
