"""The command in a result file's header, and how a file is written."""

from __future__ import annotations

import sys
from importlib.machinery import ModuleSpec
from pathlib import Path

import pytest

from benchmarks.results_file import OF_A_RUN, ResultFile, describe_run, load_results, write_results


@pytest.mark.parametrize(
    ("module", "expected"),
    [
        ("benchmarks.kernels.__main__", "python -m benchmarks.kernels --quick out.json"),
        ("benchmarks.phi3_small", "python -m benchmarks.phi3_small --quick out.json"),
        (None, "python script.py --quick out.json"),
    ],
    ids=["package", "module", "file"],
)
def test_command_as_it_was_typed_without_folders(
    module: str | None, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = None if module is None else ModuleSpec(module, None)
    monkeypatch.setattr(sys.modules["__main__"], "__spec__", spec)
    monkeypatch.setattr(sys, "argv", ["/some/folder/script.py", "--quick", "/some/folder/out.json"])
    assert describe_run()["command"] == expected


def test_results_that_cannot_be_written_leave_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "new" / "results.json"
    write_results(path, [{"ms": 1.0}])
    before = path.read_text()
    with pytest.raises(TypeError):
        write_results(path, [{"ms": 2.0}, {"ms": object()}])
    assert path.read_text() == before
    assert list(path.parent.iterdir()) == [path]


def test_a_file_of_one_run_can_grow(tmp_path: Path) -> None:
    header = {**dict.fromkeys(OF_A_RUN, "then"), "gpus": ["A"], "torch": "2.11.0"}
    path = tmp_path / "results.json"
    write_results(path, [{"op": "a", "ms": 1.0}, {"op": "b", "ms": 2.0}], header)
    ResultFile(path, header | {"date": "now"}, ["op"]).add({"op": "b", "ms": 3.0}, {"op": "c", "ms": 4.0})
    found, records = load_results(path)
    assert records == [
        {"run": "then", "op": "a", "ms": 1.0},
        {"op": "b", "ms": 3.0, "run": "now"},
        {"op": "c", "ms": 4.0, "run": "now"},
    ]
    assert [run["date"] for run in found["runs"]] == ["then", "now"]
