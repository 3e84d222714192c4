"""Tables of the records: one per operation, with the ratios that count."""

from __future__ import annotations

from typing import Any

from benchmarks.geometries import GEOMETRIES, VARIATIONS

Record = dict[str, Any]
BASELINES = ("fa2", "fa3")


def tables(records: list[Record]) -> str:
    """A Markdown table for every operation in the records, in their order."""
    ops = dict.fromkeys(record["op"] for record in records if "geometry" in record)
    return "\n\n".join(table(op, records) for op in ops)


def table(op: str, records: list[Record]) -> str:
    """A Markdown table of one operation: times, rates, and how many times faster than FlashAttention.

    A memory-bound operation's rate is compared with the copy bandwidth, a compute-bound one's with that of
    fa3 on its own, dense, work. The last column is the most memory that a launch allocates, of gradients.
    """
    rows = [record for record in records if record["op"] == op and "geometry" in record]
    copy = next((record["gbps"] for record in records if record["op"] == "copy"), None)
    unit, of = ("TFLOP/s", "of fa3") if any("tflops" in row for row in rows) else ("GB/s", "of copy")
    lines = [
        f"{op}",
        "",
        f"| geometry | batch | tokens | impl | ms | {unit} | {of} | over fa2 | over fa3 "
        "| max_rel_err | MiB |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = f"| {row['geometry']} | {row['batch']} | {row['seq_len']} | {row['impl']} "
        if "ms" not in row:
            lines.append(what + f"| {row.get('error') or row.get('reason')} | | | | | | |")
            continue
        peers = _peers(row, rows)
        rate = row.get("tflops") or row.get("gbps")
        if unit == "GB/s":
            fraction = rate / copy if copy else None
        else:
            fraction = rate / peers["fa3"]["tflops"] if "fa3" in peers else None
        over = " | ".join(_speedup(row, peers.get(name)) for name in BASELINES)
        lines.append(
            what
            + f"| {row['ms']:.4g} | {rate:.0f} | {_ratio(fraction)} | {over} | {row['max_rel_err']:.1e} "
            + f"| {row.get('peak_mib', '')} |"
        )
    return "\n".join(lines)


def summary(records: list[Record]) -> str:
    """Two short Markdown tables of s2: compute-bound work on the longest sequences, and memory-bound work."""
    return f"{_compute_summary(records)}\n\n{_memory_summary(records)}"


def gradient_summary(records: list[Record]) -> str:
    """A Markdown table of s2's gradients: backward passes of all lengths, both passes of the longest."""
    lines = [
        "| operation | geometry | tokens | ms | TFLOP/s | MiB | over FA2 | over cuDNN | over Flex |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    rows = [row for row in _times_of_s2(records, "tflops") if row["op"] == "backward"]
    rows += _longest([row for row in _times_of_s2(records, "tflops") if row["op"] == "forward_backward"])
    order = {name: place for place, name in enumerate((*GEOMETRIES, *VARIATIONS))}
    for row in sorted(rows, key=lambda row: (row["op"], row["seq_len"], order[row["geometry"]])):
        peers = _peers(row, records)
        over = [_speedup(row, peers.get(name)) for name in ("fa2", "cudnn", "flex")]
        cells = [f"{row['ms']:.3g}", f"{row['tflops']:.0f}", f"{row['peak_mib']:.0f}", *over]
        what = f"{row['op']} | {row['geometry']} | {row['seq_len']}"
        lines.append(f"| {what} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _compute_summary(records: list[Record]) -> str:
    lines = [
        "| operation | geometry | tokens | ms | TFLOP/s | of FA3's | over FA2 | over FA3 | over Flex |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for row in _longest(_times_of_s2(records, "tflops")):
        peers = _peers(row, records)
        over = [_speedup(row, peers.get(name)) for name in (*BASELINES, "flex")]
        share = row["tflops"] / peers["fa3"]["tflops"] if "fa3" in peers else None
        cells = [f"{row['ms']:.3g}", f"{row['tflops']:.0f}", _ratio(share), *over]
        lines.append(f"| {row['op']} | {row['geometry']} | {row['seq_len']} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _memory_summary(records: list[Record]) -> str:
    copy = next(record["gbps"] for record in records if record["op"] == "copy")
    lines = [
        "| operation | geometry | requests x tokens | µs | TB/s | of a copy's | over FA3 |",
        "|---|---|---|---|---|---|---|",
    ]
    for row in _times_of_s2(records, "gbps"):
        cells = [
            f"{row['ms'] * 1e3:.1f}",
            f"{row['gbps'] / 1e3:.2f}",
            _ratio(row["gbps"] / copy),
            _speedup(row, _peers(row, records).get("fa3")),
        ]
        shape = f"{row['batch']} x {row['seq_len']}"
        lines.append(f"| {row['op']} | {row['geometry']} | {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _longest(rows: list[Record]) -> list[Record]:
    """The rows with the longest sequences of their operation and geometry."""
    longest = {(row["op"], row["geometry"]): row for row in sorted(rows, key=lambda row: row["seq_len"])}
    return [row for row in rows if row is longest[row["op"], row["geometry"]]]


def _times_of_s2(records: list[Record], unit: str) -> list[Record]:
    return [record for record in records if record["impl"] == "s2" and unit in record]


def _peers(row: Record, records: list[Record]) -> dict[str, Record]:
    """The timed records of the row's case, by implementation."""
    same = (peer for peer in records if peer["op"] == row["op"] and "ms" in peer)
    return {peer["impl"]: peer for peer in same if _case(peer) == _case(row)}


def line(record: Record) -> str:
    """One record on one line, for the log of a run."""
    facts = f"{record['op']} {record.get('geometry', '')}".strip()
    if "seq_len" in record:
        facts += f" {record['batch']} x {record['seq_len']}"
    facts += f" {record['impl']}:"
    if "ms" not in record:
        return f"{facts} {'ERROR: ' + record['error'] if 'error' in record else record['reason']}"
    rate = f"{record['tflops']} TFLOP/s" if "tflops" in record else f"{record['gbps']} GB/s"
    return f"{facts} {record['ms']} ms, {rate}"


def _case(record: Record) -> tuple[Any, ...]:
    return record["geometry"], record["batch"], record["seq_len"]


def _speedup(row: Record, peer: Record | None) -> str:
    return "" if peer is None else f"{peer['ms'] / row['ms']:.2f}x"


def _ratio(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
