"""Figures of result files: against the length of the prompts, under load, and where a request's time goes."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from benchmarks.drawing import COLORS, log_log, new_figure
from benchmarks.engine.client import SPANS
from benchmarks.engine.records import medians

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Record = dict[str, Any]
Points = dict[tuple[str, str], list[tuple[float, float]]]
"""By geometry and variant."""

STYLES = {"s2": {"linestyle": "-"}, "dense": {"linestyle": "--", "markerfacecolor": "none"}}
OTHER_COLOR = "#555555"
SPAN_COLORS = dict(zip(SPANS, ("#c9ced6", "#f2a03d", "#2f6db3"), strict=True))


def figures(records: list[Record], gpu: str) -> dict[str, Figure]:
    """The figures that there are records for, by name.

    Args:
        records: of a result file.
        gpu: for the titles.
    """
    middle = [record for record in medians(records) if "reason" not in record]
    drawn = {}
    workloads = {record["workload"] for record in middle}
    if workloads & {"latency", "throughput"}:
        drawn["lengths"] = _draw_lengths(middle, gpu)
    if "serve" in workloads:
        drawn["pareto"] = _draw_pareto(middle, gpu)
    if middle:
        drawn["time"] = _draw_time(middle, gpu)
    return drawn


def ttft(records: list[Record]) -> Points:
    """(prompt tokens, milliseconds) of single requests, ascending."""
    return _points(records, "latency", "single", "prompt_tokens", "median_ttft_ms")


def full_pool_throughput(records: list[Record]) -> Points:
    """(prompt tokens, output tokens per second) of as many requests as the memory holds, ascending."""
    return _points(records, "throughput", "pool", "prompt_tokens", "output_throughput")


def pareto(records: list[Record]) -> Points:
    """(tokens per second and user, tokens per second and GPU) in the order of the request rates."""
    points: Points = {}
    served = [record for record in records if record["workload"] == "serve"]
    for record in sorted(served, key=lambda record: record["request_rate"]):
        per_user = 1000 / record["median_tpot_ms"]
        per_gpu = record["output_throughput"] / record["tensor_parallel_size"]
        points.setdefault(_line(record), []).append((per_user, per_gpu))
    return points


def spans(records: list[Record]) -> dict[str, list[float]]:
    """Seconds in the queue, to the first token and to the last one, by what was measured.

    Requests under load are shown where there are any, and else what else there is.
    """
    served = [record for record in records if record["workload"] == "serve"]
    chosen = served or records
    found = {}
    for record in sorted(chosen, key=_order):
        times = [record[f"mean_{span}_time_ms"] for span in SPANS]
        if None not in times:
            found[_label(record)] = [time / 1000 for time in times]
    return found


def _points(records: list[Record], workload: str, load: str, x: str, y: str) -> Points:
    points: Points = {}
    for record in sorted(records, key=lambda record: record[x]):
        if (record["workload"], record["load"]) == (workload, load):
            points.setdefault(_line(record), []).append((record[x], record[y]))
    return points


def _line(record: Record) -> tuple[str, str]:
    ranks = record["tensor_parallel_size"]
    return record["geometry"] + (f", {ranks} GPUs" if ranks > 1 else ""), record["variant"]


def _order(record: Record) -> tuple[Any, ...]:
    return (*_line(record)[:1], record.get("request_rate", 0), record["prompt_tokens"], record["variant"])


def _label(record: Record) -> str:
    name, variant = _line(record)
    if record["workload"] == "serve":
        return f"{name}, {record['request_rate']:g}/s, {variant}"
    return f"{name}, {record['workload']} ({record['load']}), {record['prompt_tokens']:,}, {variant}"


def _draw_lengths(records: list[Record], gpu: str) -> Figure:
    figure = new_figure(9.6, 3.8)
    panels = figure.subplots(1, 2)
    for axes, points, title in (
        (panels[0], ttft(records), "time to the first token of one request, ms"),
        (panels[1], full_pool_throughput(records), "output tokens/s, memory full of requests"),
    ):
        _plot(axes, points)
        axes.set_title(title, fontsize=10, loc="left")
        axes.set_xlabel("prompt tokens")
        log_log(axes, 10)
    figure.suptitle(f"Engine, {gpu}; solid: s2, dashed: dense", fontsize=10)
    return figure


def _draw_pareto(records: list[Record], gpu: str) -> Figure:
    figure = new_figure(6.4, 4.4)
    axes = figure.subplots()
    _plot(axes, pareto(records))
    axes.set_xlabel("output tokens/s per user (1 / median TPOT)")
    axes.set_ylabel("output tokens/s per GPU")
    axes.grid(True, color="#e9ecf0")
    figure.suptitle(f"Serving at several request rates, {gpu}\nsolid: s2, dashed: dense", fontsize=10)
    return figure


def _draw_time(records: list[Record], gpu: str) -> Figure:
    bars = spans(records)
    figure = new_figure(8.4, 1.4 + 0.24 * len(bars))
    axes = figure.subplots()
    left = [0.0] * len(bars)
    for n, span in enumerate(SPANS):
        widths = [times[n] for times in bars.values()]
        axes.barh(list(bars), widths, left=left, color=SPAN_COLORS[span], label=span)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    axes.invert_yaxis()
    axes.set_xlabel("seconds per request, mean")
    axes.tick_params(axis="y", labelsize=8)
    axes.legend(fontsize=8)
    figure.suptitle(f"Where a request's time goes, {gpu}", fontsize=10)
    return figure


def _plot(axes: Axes, lines: Points) -> None:
    for (name, variant), points in lines.items():
        colour = COLORS.get(name.partition(",")[0], OTHER_COLOR)
        marker = "s" if "GPUs" in name else "o"
        axes.plot(
            *zip(*points, strict=True),
            marker=marker,
            color=colour,
            label=f"{name}, {variant}",
            **STYLES[variant],
        )
    if lines:
        axes.legend(fontsize=8)
