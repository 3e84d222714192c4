"""Result files as Markdown tables, S2 beside dense."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.engine.records import medians

Record = dict[str, Any]
Pair = dict[str, Record]
"""A measurement's records by variant."""

MISSING = "-"


def tables(records: list[Record]) -> str:
    """The medians of the repetitions: a table per workload, a line per measurement; and what failed."""
    pairs = pair_up(medians(records))
    found = [table(pairs) for table in (_latency, _throughput, _serve)]
    found.append(
        "\n".join(_reason(record) for pair in pairs for record in pair.values() if "reason" in record)
    )
    return "\n\n".join(table for table in found if table)


def pair_up(records: list[Record]) -> list[Pair]:
    """The records of both variants of each measurement, ordered by workload, geometry, length and rate."""
    pairs: dict[tuple[Any, ...], Pair] = {}
    for record in records:
        pairs.setdefault(_same(record), {})[record["variant"]] = record
    return [pairs[key] for key in sorted(pairs)]


def _same(record: Record) -> tuple[Any, ...]:
    rate = record.get("request_rate", 0.0)
    names = ("workload", "geometry", "tensor_parallel_size", "load", "prompt_tokens", "output_tokens")
    return (*(record[name] for name in names), rate)


def _latency(pairs: list[Pair]) -> str:
    chosen = [pair for pair in pairs if _any(pair)["workload"] == "latency"]
    columns: list[tuple[str, str, str, bool]] = [
        ("TTFT, ms", "median_ttft_ms", "{:,.1f}", False),
        ("TPOT, ms", "median_tpot_ms", "{:.2f}", False),
    ]
    return _table(["geometry", "tokens"], lambda pair: [_model(pair), _tokens(pair)], columns, chosen)


def _throughput(pairs: list[Pair]) -> str:
    chosen = [pair for pair in pairs if _any(pair)["workload"] == "throughput"]
    columns = [
        ("output tokens/s", "output_throughput", "{:,.1f}", True),
        ("after the last first token", "decode_output_throughput", "{:,.1f}", True),
    ]
    names = ["geometry", "requests: dense, S2", "tokens in, out"]
    return _table(
        names,
        lambda pair: [_model(pair), _requests(pair), f"{_tokens(pair)}, {_output(pair)}"],
        columns,
        chosen,
    )


def _serve(pairs: list[Pair]) -> str:
    chosen = [pair for pair in pairs if _any(pair)["workload"] == "serve"]
    columns = [
        ("good requests/s", "request_goodput", "{:.2f}", True),
        ("output tokens/s", "output_throughput", "{:,.1f}", True),
        ("median TTFT, ms", "median_ttft_ms", "{:,.1f}", False),
        ("p99 TTFT, ms", "p99_ttft_ms", "{:,.1f}", False),
        ("median TPOT, ms", "median_tpot_ms", "{:.2f}", False),
        ("p99 TPOT, ms", "p99_tpot_ms", "{:.2f}", False),
    ]
    names = ["geometry", "requests/s"]
    return _table(names, lambda pair: [_model(pair), f"{_any(pair)['request_rate']:g}"], columns, chosen)


def _table(
    names: list[str],
    describe: Callable[[Pair], list[str]],
    columns: list[tuple[str, str, str, bool]],
    pairs: list[Pair],
) -> str:
    """A table, empty without lines.

    Args:
        names: of the columns that say what was measured.
        describe: their cells.
        columns: title, field, format, and whether more is better; each is shown dense, S2, and as the
            gain: above 1 where S2 is better.
        pairs: a line each.
    """
    if not pairs:
        return ""
    titles = [text for title, *_ in columns for text in (f"{title}: dense", "S2", "gain")]
    lines = [_row([*names, *titles]), f"|{'---|' * (len(names) + len(titles))}"]
    for pair in pairs:
        cells = [cell for _, *column in columns for cell in _compared(pair, *column)]
        lines.append(_row([*describe(pair), *cells]))
    return "\n".join(lines)


def _compared(pair: Pair, name: str, layout: str, more_is_better: bool) -> list[str]:
    values = [pair.get(variant, {}).get(name) for variant in ("dense", "s2")]
    cells = [MISSING if value is None else layout.format(value) for value in values]
    dense, s2 = values
    if not dense or not s2:
        return [*cells, MISSING]
    return [*cells, f"{s2 / dense if more_is_better else dense / s2:.2f}x"]


def _reason(record: Record) -> str:
    pair = {record["variant"]: record}
    what = f"{record['workload']} ({record['load']}), {_tokens(pair)} tokens"
    return f"- {_model(pair)}, {record['variant']}, {what}: {record['reason']}"


def _any(pair: Pair) -> Record:
    return next(iter(pair.values()))


def _model(pair: Pair) -> str:
    record = _any(pair)
    ranks = record["tensor_parallel_size"]
    return str(record["geometry"]) if ranks == 1 else f"{record['geometry']}, {ranks} GPUs"


def _tokens(pair: Pair) -> str:
    return f"{_any(pair)['prompt_tokens']:,}"


def _output(pair: Pair) -> str:
    return f"{_any(pair)['output_tokens']:,}"


def _requests(pair: Pair) -> str:
    counts = [pair[variant]["requests"] if variant in pair else MISSING for variant in ("dense", "s2")]
    kind = "full pool" if _any(pair)["load"] == "pool" else "same batch"
    return f"{kind}: {counts[0]}, {counts[1]}"


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"
