"""Shows the results of benchmarks.kernels, benchmarks.engine and benchmarks.quality: pictures, and tables.

python -m benchmarks.plot
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.drawing import COLORS, log_log, new_figure
from benchmarks.engine import figures as engine_figures
from benchmarks.engine import table as engine_table
from benchmarks.kernels.cases import GRADIENT_OPS, OPS, Case
from benchmarks.kernels.report import gradient_summary, summary
from benchmarks.kernels.work import flop, required_bytes
from benchmarks.quality import figures as quality_figures
from benchmarks.results_file import load_results

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

BASELINES = {
    "fa2": "FlashAttention-2 (torch SDPA)",
    "fa3": "FlashAttention-3 (vLLM)",
    "cudnn": "cuDNN (torch SDPA)",
}
MARKERS = {"prefill": "o", "chunked_prefill": "s", "decode": "^"}
FORMATS = ("svg", "png")
SOURCES = "benchmarks.kernels, benchmarks.engine or benchmarks.quality"
PATTERNS = ("kernels-*.json", "gradients-*.json", "engine-*.json", "quality.json")

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    for path in options.results:
        header, records = load_results(path)
        gpu = ", ".join(dict.fromkeys(header["gpus"])) or header["cpu"]
        ops = {record.get("op") for record in records}
        if all("workload" in record for record in records):
            figures, tables = engine_figures.figures(records, gpu), engine_table.tables(records)
        elif all("task" in record for record in records):
            figures, tables = quality_figures.figures(records), quality_figures.table(records)
        elif not ops.isdisjoint(GRADIENT_OPS):
            figures, tables = gradient_figures(records, gpu), gradient_summary(records)
        elif None not in ops:
            figures, tables = kernel_figures(records, gpu), summary(records)
        else:
            raise SystemExit(f"benchmarks.plot: {path}: expected a file from {SOURCES}")
        for name, figure in figures.items():
            output = options.output / f"{path.stem}-{name}.{options.format}"
            output.parent.mkdir(parents=True, exist_ok=True)
            figure.savefig(output, dpi=150)
            print(f"saved {output}")
        print(f"\n{tables}\n")
    return 0


def kernel_figures(records: list[Record], gpu: str) -> dict[str, Figure]:
    """The figures of the kernels that an engine runs, by name."""
    speedup = draw_speedup(records, "prefill", ("fa2", "fa3"), f"S2-Attention prefill, batch 1, {gpu}")
    return {"speedup": speedup, "roofline": draw_roofline(records, gpu)}


def gradient_figures(records: list[Record], gpu: str) -> dict[str, Figure]:
    """The figures of the kernels for training, by name."""
    title = f"S2-Attention forward and backward, batch 1, {gpu}"
    return {"speedup": draw_speedup(records, "forward_backward", ("fa2", "cudnn"), title)}


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.plot", description=f"Draw and sum up the results of {SOURCES}"
    )
    found = [path for pattern in PATTERNS for path in sorted(Path("benchmarks/results").glob(pattern))]
    parser.add_argument(
        "results", nargs="*", type=Path, default=found, help=f"default: all {', '.join(PATTERNS)}"
    )
    parser.add_argument("--output", type=Path, default=Path("benchmarks/figures"), help="folder")
    parser.add_argument("--format", choices=FORMATS, default=FORMATS[0])
    options = parser.parse_args(arguments)
    if not options.results:
        parser.error(
            f"results: no {' or '.join(PATTERNS)} in benchmarks/results, expected one from {SOURCES}"
        )
    for path in options.results:
        if not path.is_file():
            parser.error(f"results: {path}, expected a file from {SOURCES}")
    return options


def draw_speedup(records: list[Record], op: str, baselines: Sequence[str], title: str) -> Figure:
    """How many times faster than dense attention an operation on one sequence is: a panel per baseline."""
    figure = new_figure(9.6, 3.8)
    timed = {baseline: points for baseline in baselines if (points := speedups(records, baseline, op))}
    shown = timed or {baselines[0]: {}}
    panels = figure.subplots(1, len(shown), sharey=True, squeeze=False)[0]
    for axes, (baseline, lines) in zip(panels, shown.items(), strict=True):
        for geometry, points in lines.items():
            axes.plot(*zip(*points, strict=True), marker="o", color=COLORS[geometry], label=geometry)
        axes.axhline(1, color="#999999", linewidth=0.8)
        axes.set_title(f"over {BASELINES[baseline]}", fontsize=10, loc="left")
        axes.set_xlabel("tokens")
        log_log(axes, 2)
    panels[0].set_ylabel("times faster")
    if timed:
        panels[0].legend(fontsize=8)
    figure.suptitle(title, fontsize=10)
    return figure


def speedups(records: list[Record], baseline: str, op: str = "prefill") -> dict[str, list[tuple[int, float]]]:
    """For each geometry, ascending (tokens, time of `baseline` / time of s2) where both have one."""
    times = {
        (record["geometry"], record["seq_len"], record["impl"]): record["ms"]
        for record in records
        if record["op"] == op and record["batch"] == 1 and "ms" in record
    }
    points: dict[str, list[tuple[int, float]]] = {}
    for (geometry, seq_len, impl), ms in sorted(times.items()):
        if impl == "s2" and (geometry, seq_len, baseline) in times:
            points.setdefault(geometry, []).append((seq_len, times[geometry, seq_len, baseline] / ms))
    return points


def draw_roofline(records: list[Record], gpu: str) -> Figure:
    """Achieved TFLOP/s against arithmetic intensity, under the ceilings that the same run measured."""
    figure = new_figure(7.2, 4.6)
    axes = figure.subplots()
    points = roofline_points(records)
    bandwidth = _ceiling(records, "copy", "gbps") / 1e3
    peak = _ceiling(records, "matmul", "tflops")
    ridge = peak / bandwidth
    left = min([ridge / 4, *(intensity / 2 for _, intensity, _ in points)])
    right = max([ridge * 4, *(intensity * 2 for _, intensity, _ in points)])
    axes.plot([left, ridge, right], [left * bandwidth, peak, peak], color="#555555", linewidth=1)
    axes.text(right, peak * 1.08, f"matrix product, {peak:.0f} TFLOP/s", fontsize=8, ha="right")
    axes.text(left, left * bandwidth * 12, f"copy, {bandwidth:.2f} TB/s", fontsize=8)
    for record, intensity, tflops in points:
        colour = COLORS[record["geometry"]]
        fill = colour if record["impl"] == "s2" else "none"
        axes.plot(intensity, tflops, MARKERS[record["op"]], color=colour, markerfacecolor=fill, markersize=6)
    _roofline_legend(axes, points)
    axes.set_xlabel("attended FLOP per required byte")
    axes.set_ylabel("TFLOP/s")
    log_log(axes, 10)
    figure.suptitle(f"Roofline, {gpu}; filled: s2, hollow: FlashAttention-3, dense", fontsize=10)
    return figure


def roofline_points(records: list[Record]) -> list[tuple[Record, float, float]]:
    """(record, FLOP per byte, TFLOP/s) of the attention of s2 and fa3, each on the work it requires."""
    points = []
    for record in records:
        if record["op"] not in MARKERS or record["impl"] not in ("s2", "fa3") or "ms" not in record:
            continue
        case = Case(record["op"], record["geometry"], record["batch"], record["seq_len"])
        dense = record["impl"] == "fa3"
        work = flop(case, dense)
        points.append((record, work / required_bytes(case, dense), work / record["ms"] / 1e9))
    return points


def _roofline_legend(axes: Axes, points: list[tuple[Record, float, float]]) -> None:
    from matplotlib.lines import Line2D

    geometries = dict.fromkeys(record["geometry"] for record, _, _ in points)
    ops = [op for op in OPS if any(record["op"] == op for record, _, _ in points)]
    handles = [
        Line2D([], [], marker="o", linestyle="", color=COLORS[name], label=name) for name in geometries
    ]
    handles += [
        Line2D([], [], marker=MARKERS[op], linestyle="", color="#555555", markerfacecolor="none", label=op)
        for op in ops
    ]
    axes.legend(handles=handles, fontsize=8, loc="lower right")


def _ceiling(records: list[Record], op: str, unit: str) -> float:
    for record in records:
        if record["op"] == op:
            return float(record[unit])
    raise ValueError(f"records: none with op {op!r}, expected the ceilings that benchmarks.kernels measures")


if __name__ == "__main__":
    raise SystemExit(main())
