"""What is written: a record per repetition, in one file per GPU, to which later runs add."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import results_file
from benchmarks.results_file import ResultFile, known_by, load_results

Record = dict[str, Any]

KEY = (
    "workload",
    "load",
    "geometry",
    "variant",
    "tensor_parallel_size",
    "prompt_tokens",
    "output_tokens",
    "request_rate",
)
"""What a measurement is known by. Its repetitions have these fields in common."""

OF_A_RUN = (*results_file.OF_A_RUN, "tensor_parallel_size", "flags")


def load_engine_results(path: Path) -> tuple[Record, list[Record]]:
    """(header, records) of a file that an `EngineResultFile` wrote.

    Raises:
        ValueError: it is another file.
    """
    header, records = load_results(path)
    if "runs" not in header:
        raise ValueError(f"{path}: expected a file from benchmarks.engine")
    return header, records


class EngineResultFile(ResultFile):
    """A `ResultFile` of the engine's benchmark.

    Raises:
        ValueError: as a `ResultFile` does, or the file that is there is of another benchmark.
    """

    def __init__(self, path: Path, header: Record) -> None:
        if path.exists():
            load_engine_results(path)
        super().__init__(path, header, KEY, OF_A_RUN)


def medians(records: Iterable[Record]) -> list[Record]:
    """A record per measurement: the medians of its repetitions' numbers; all else is the first one's."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(known_by(record, KEY), []).append(record)
    return [_median(group) for group in groups.values()]


def _median(group: list[Record]) -> Record:
    merged = dict(group[0])
    for name in group[0].keys() - set(KEY):
        numbers = [record[name] for record in group if isinstance(record.get(name), int | float)]
        if len(set(numbers)) > 1:
            merged[name] = median(numbers)
    return merged | {"repetitions": len(group)}
