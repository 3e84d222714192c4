"""What the figures of all benchmarks have in common."""

from __future__ import annotations

from itertools import cycle
from typing import TYPE_CHECKING

from benchmarks.geometries import GEOMETRIES, PRETRAINED, VARIATIONS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

COLORS = dict(zip(GEOMETRIES, ("#2f6db3", "#f2a03d", "#3a9d5d", "#b5446e", "#6b5ca5"), strict=True))
"""Of each geometry; the reference geometries' are their own, the others share some."""
# The colours have no end.
COLORS |= zip((*PRETRAINED, *VARIATIONS), cycle(("#8c6d46", "#4fb0c6", "#a3a847", "#777777")), strict=False)


def new_figure(width: float, height: float) -> Figure:
    """A figure without a window, of so many inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def log_log(axes: Axes, y_base: int) -> None:
    """Logarithmic axes, x to base 2, with plain numbers."""
    from matplotlib.ticker import StrMethodFormatter

    axes.set_xscale("log", base=2)
    axes.set_yscale("log", base=y_base)
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
    axes.grid(True, which="major", color="#e9ecf0")
