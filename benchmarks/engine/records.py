"""What is written: a record per repetition, in one file per GPU, to which later runs add."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.results_file import PACKAGES, load_results, write_results

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

OF_A_RUN = ("date", "command", "commit", "cpu", "gpus", "driver", "tensor_parallel_size", "flags")
"""Of the header: what is kept of every run that has records in the file, under "runs"."""


def load_engine_results(path: Path) -> tuple[Record, list[Record]]:
    """(header, records) of a file that a `ResultFile` wrote.

    Raises:
        ValueError: it is another file.
    """
    header, records = load_results(path)
    if "runs" not in header:
        raise ValueError(f"{path}: expected a file from benchmarks.engine")
    return header, records


def key(record: Record) -> tuple[Any, ...]:
    return tuple(record.get(name) for name in KEY)


class ResultFile:
    """A result file that grows with every record, and keeps what other runs have written.

    A measurement that is made again replaces the older run's repetitions of it, all of them. The header is
    that of the last run; records name their run by its date.

    Args:
        path: of the file, which may be there already.
        header: of this run, with "tensor_parallel_size" and "flags".

    Raises:
        ValueError: the file that is there was written on another GPU or with other versions, or is none.
    """

    def __init__(self, path: Path, header: Record) -> None:
        self.path = path
        self.records: list[Record] = []
        run = {name: header[name] for name in OF_A_RUN}
        self._header = {**header, "runs": [run]}
        if path.exists():
            self._continue(*load_engine_results(path))

    def _continue(self, header: Record, records: list[Record]) -> None:
        for name, found in _same_in_a_file(header).items():
            expected = _same_in_a_file(self._header)[name]
            if found != expected:
                raise ValueError(f"{self.path}: results with {name} {found}, expected {expected}, as now")
        self._header["runs"] = [*header["runs"], *self._header["runs"]]
        self.records = records

    def add(self, record: Record) -> None:
        """Write `record` as well, in place of older runs' of the same measurement."""
        date = self._header["date"]
        self.records = [other for other in self.records if other["run"] == date or key(other) != key(record)]
        self.records.append({**record, "run": date})
        dates = {record["run"] for record in self.records}
        runs = [run for run in self._header["runs"] if run["date"] in dates]
        write_results(self.path, self.records, {**self._header, "runs": runs})


def _same_in_a_file(header: Record) -> Record:
    """What has to be the same for records to be in one file: the kind of GPU, and versions."""
    return {"gpus": sorted(set(header["gpus"])), **{package: header.get(package) for package in PACKAGES}}


def medians(records: Iterable[Record]) -> list[Record]:
    """A record per measurement: the medians of its repetitions' numbers; all else is the first one's."""
    groups: dict[tuple[Any, ...], list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return [_median(group) for group in groups.values()]


def _median(group: list[Record]) -> Record:
    merged = dict(group[0])
    for name in group[0].keys() - set(KEY):
        numbers = [record[name] for record in group if isinstance(record.get(name), int | float)]
        if len(set(numbers)) > 1:
            merged[name] = median(numbers)
    return merged | {"repetitions": len(group)}
