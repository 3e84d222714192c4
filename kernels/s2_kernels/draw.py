"""Draw a pattern: one panel per head, showing which key blocks each query block attends to."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import torch

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WINDOW_COLOR = "#2f6db3"
STRIDED_COLOR = "#f2a03d"
SINK_COLOR = "#3a9d5d"
DROPPED_COLOR = "#e9ecf0"
FUTURE_COLOR = "#ffffff"

_SUFFIXES = (".png", ".svg")
_MAX_DEFAULT_BLOCKS = 64
_MAX_COLUMNS = 8


class Drawable(Protocol):
    """What a pattern tells to be drawn; `s2_kernels.pattern.S2Pattern` is one, and imports this module."""

    @property
    def block_size(self) -> int: ...
    @property
    def local_blocks(self) -> int: ...
    @property
    def vert_stride(self) -> int: ...
    @property
    def num_heads(self) -> int: ...
    @property
    def num_kv_heads(self) -> int: ...
    @property
    def residues(self) -> tuple[int, ...]: ...
    @property
    def sink_blocks(self) -> int: ...
    @property
    def full_heads(self) -> tuple[int, ...]: ...
    def block_mask(self, num_blocks: int) -> torch.Tensor: ...


def draw_pattern(pattern: Drawable, path: str | Path, num_blocks: int | None = None) -> None:
    """Save one panel per head as an image. Needs matplotlib.

    A block is coloured by what a query has it from: the local window, the sinks, or the strided set.

    Args:
        pattern: the pattern to draw.
        path: where to save the image; the suffix, .png or .svg, is the format.
        num_blocks: blocks along each side of a panel; by default enough to see the window leave two
            strided blocks behind, or leave the sinks, 64 at most.

    Raises:
        ValueError: the suffix is neither, or `num_blocks` is not positive.
    """
    path = Path(path)
    if path.suffix.lower() not in _SUFFIXES:
        raise ValueError(f"path: suffix {path.suffix!r} of {str(path)!r}, expected .png or .svg")
    if num_blocks is None:
        always = pattern.sink_blocks + pattern.local_blocks
        num_blocks = min(always + 3 * pattern.vert_stride, _MAX_DEFAULT_BLOCKS)
    if num_blocks < 1:
        raise ValueError(f"num_blocks: {num_blocks}, expected a positive integer")

    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    columns = _MAX_COLUMNS if pattern.num_heads > 16 else math.ceil(math.sqrt(pattern.num_heads))
    rows = math.ceil(pattern.num_heads / columns)
    side = 2.6 if columns <= 4 else 1.7
    figure = Figure(figsize=(columns * side + 0.8, rows * (side + 0.25) + 1.1), layout="constrained")
    grid = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False)
    panels = grid.flatten()
    for head, cells in enumerate(cell_colors(pattern, num_blocks)):
        _draw_head(panels[head], cells, f"head {head} \u00b7 {_kind(pattern, head)}")
    for unused in panels[pattern.num_heads :]:
        unused.set_axis_off()
    for column, panel in enumerate(grid[-1]):
        lowest = grid[-2, column] if not panel.axison else panel
        lowest.set_xlabel("key block", fontsize=8)
        lowest.tick_params(labelbottom=True)
    for panel in grid[:, 0]:
        panel.set_ylabel("query block", fontsize=8)

    strided = any(residue >= 0 for residue in pattern.residues)
    stride = f"stride {pattern.vert_stride}" if strided else "no stride"
    figure.suptitle(
        f"block size {pattern.block_size} \u00b7 local blocks {pattern.local_blocks} \u00b7 "
        f"{stride} \u00b7 query heads {pattern.num_heads} \u00b7 "
        f"KV heads {pattern.num_kv_heads}",
        fontsize=10,
    )
    older = "strided, or older of a full head" if pattern.full_heads else "strided"
    tiers = {"local window": WINDOW_COLOR, older: STRIDED_COLOR, "not attended": DROPPED_COLOR}
    if pattern.sink_blocks:
        tiers["sinks"] = SINK_COLOR
    handles = [Patch(facecolor=color, label=label) for label, color in tiers.items()]
    figure.legend(handles=handles, loc="outside lower center", ncols=4, fontsize=9, frameon=False)
    figure.savefig(path, dpi=150)


def cell_colors(pattern: Drawable, num_blocks: int) -> torch.Tensor:
    """The colour of every cell: uint8 [num_heads, query blocks, key blocks, RGB], on the CPU."""
    query = torch.arange(num_blocks, device="cpu")[:, None]
    key = torch.arange(num_blocks, device="cpu")[None, :]
    cells = _rgb(DROPPED_COLOR).expand(pattern.num_heads, num_blocks, num_blocks, 3).clone()
    cells[pattern.block_mask(num_blocks)] = _rgb(STRIDED_COLOR)
    cells[:, (key < pattern.sink_blocks).expand_as(query - key)] = _rgb(SINK_COLOR)
    cells[:, query - key < pattern.local_blocks] = _rgb(WINDOW_COLOR)
    cells[:, key > query] = _rgb(FUTURE_COLOR)
    return cells


def _kind(pattern: Drawable, head: int) -> str:
    if head * pattern.num_kv_heads // pattern.num_heads in pattern.full_heads:
        return "full"
    return "streaming" if pattern.residues[head] < 0 else f"residue {pattern.residues[head]}"


def _draw_head(axes: Axes, cells: torch.Tensor, title: str) -> None:
    axes.imshow(cells.numpy(), interpolation="nearest")
    axes.set_title(title, fontsize=8, pad=3)
    axes.tick_params(labelsize=7, length=2)
    axes.locator_params(integer=True, nbins=5)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def _rgb(color: str) -> torch.Tensor:
    return torch.tensor(list(bytes.fromhex(color[1:])), dtype=torch.uint8, device="cpu")
