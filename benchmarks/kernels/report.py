"""Tables of the records: one per operation, with the ratios that count."""

from __future__ import annotations

from typing import Any

Record = dict[str, Any]
BASELINES = ("fa2", "fa3")


def tables(records: list[Record]) -> str:
    """A Markdown table for every operation in the records, in their order."""
    ops = dict.fromkeys(record["op"] for record in records if "geometry" in record)
    return "\n\n".join(table(op, records) for op in ops)


def table(op: str, records: list[Record]) -> str:
    """A Markdown table of one operation: times, rates, and how many times faster than FlashAttention.

    A memory-bound operation's rate is compared with the copy bandwidth, a compute-bound one's with that of
    fa3 on its own, dense, work.
    """
    rows = [record for record in records if record["op"] == op and "geometry" in record]
    copy = next((record["gbps"] for record in records if record["op"] == "copy"), None)
    unit, of = ("TFLOP/s", "of fa3") if any("tflops" in row for row in rows) else ("GB/s", "of copy")
    lines = [
        f"{op}",
        "",
        f"| geometry | batch | tokens | impl | ms | {unit} | {of} | over fa2 | over fa3 | max_rel_err |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        what = f"| {row['geometry']} | {row['batch']} | {row['seq_len']} | {row['impl']} "
        if "ms" not in row:
            lines.append(what + f"| {row.get('error') or row.get('reason')} | | | | | |")
            continue
        peers = {peer["impl"]: peer for peer in rows if _case(peer) == _case(row) and "ms" in peer}
        rate = row.get("tflops") or row.get("gbps")
        if unit == "GB/s":
            fraction = rate / copy if copy else None
        else:
            fraction = rate / peers["fa3"]["tflops"] if "fa3" in peers else None
        speedups = [peers[name]["ms"] / row["ms"] if name in peers else None for name in BASELINES]
        lines.append(
            what + f"| {row['ms']:.4g} | {rate:.0f} | {_ratio(fraction)} | {_ratio(speedups[0], 'x')} "
            f"| {_ratio(speedups[1], 'x')} | {row['max_rel_err']:.1e} |"
        )
    return "\n".join(lines)


def line(record: Record) -> str:
    """One record on one line, for the log of a run."""
    facts = f"{record['op']} {record.get('geometry', '')}".strip()
    if "seq_len" in record:
        facts += f" {record['batch']} x {record['seq_len']}"
    facts += f" {record['impl']}:"
    if "ms" not in record:
        return f"{facts} {'WRONG: ' + record['error'] if 'error' in record else record['reason']}"
    rate = f"{record['tflops']} TFLOP/s" if "tflops" in record else f"{record['gbps']} GB/s"
    return f"{facts} {record['ms']} ms, {rate}"


def _case(record: Record) -> tuple[Any, ...]:
    return record["geometry"], record["batch"], record["seq_len"]


def _ratio(value: float | None, suffix: str = "") -> str:
    return "" if value is None else f"{value:.2f}{suffix}"
