"""Runs mutants: each in a process forked from one that has imported the libraries, but nothing of ours."""

from __future__ import annotations

import gc
import importlib
import os
import resource
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec, SourceFileLoader
from importlib.util import spec_from_file_location
from pathlib import Path
from types import CodeType
from typing import Any

import pytest
from hypothesis import Phase, settings

from tests.mutation.mutants import Mutant

OURS = {"benchmarks", "s2_kernels", "s2_vllm", "tests"}
# Of pytest: no test could be asked for, or none was found.
NOT_RUN = (pytest.ExitCode.USAGE_ERROR, pytest.ExitCode.NO_TESTS_COLLECTED)
MEMORY = 16 << 30
"""Bytes of address space of a process: a mutant may ask for any amount."""
CACHE = tempfile.TemporaryDirectory()
"""vLLM's: it asks another Python about every class of models that it does not find there."""


def preload(tests: Sequence[str]) -> None:
    """Import the libraries that `tests` import (vLLM takes ten seconds) once, for all mutants.

    Raises:
        RuntimeError: the tests fail on the code as it is.
    """
    # Threads do not survive a fork.
    os.environ |= {"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "VLLM_CACHE_ROOT": CACHE.name}
    # What the tests set before they import any library.
    importlib.import_module("tests.conftest")
    with tempfile.TemporaryDirectory() as folder:
        output, imported = Path(folder, "output"), Path(folder, "imported")
        if _wait(_fork(lambda: _pytest(tests, imported), output)) != 0:
            raise RuntimeError(f"{output.read_text()}\nthe tests must pass before a mutant can fail them")
        for name in imported.read_text().split():
            with suppress(ImportError):
                importlib.import_module(name)


def processor_seconds(tests: Sequence[str]) -> float:
    """What `tests` take on the code as it is, once all is loaded."""
    _, _, usage = os.wait4(_fork(lambda: _pytest(tests)), 0)
    return usage.ru_utime + usage.ru_stime


def survivors(
    mutants: Iterable[Mutant], file: Path, tests: Sequence[str], limit: int, processes: int
) -> Iterator[Mutant]:
    """Those of one module's mutants that `tests` do not tell from the original.

    Args:
        mutants: of the module.
        file: the module's source file.
        tests: what pytest runs.
        limit: seconds of processor time after which a mutant counts as killed; for one that waits, minutes.
        processes: how many run at a time.
    """
    waiting = iter(mutants)
    running: dict[int, tuple[Mutant, float]] = {}
    try:
        while True:
            while len(running) < processes and (mutant := next(waiting, None)) is not None:
                pid = _fork(lambda mutant=mutant: _mutated(mutant, file, tests, limit))
                running[pid] = (mutant, time.monotonic() + 60 * limit)
            if not running:
                return
            for mutant, code in _ended(running):
                if code in NOT_RUN:
                    raise RuntimeError(f"pytest found no test to run:\n{mutant}")
                if code == 0:
                    yield mutant
            time.sleep(0.005)
    finally:
        for pid in running:
            with suppress(ProcessLookupError):
                os.killpg(pid, signal.SIGKILL)


def _ended(running: dict[int, tuple[Mutant, float]]) -> Iterator[tuple[Mutant, int]]:
    """Mutants that have ended, with their exit codes; those whose time is over are ended."""
    for pid, (mutant, deadline) in list(running.items()):
        if is_overdue := time.monotonic() > deadline:
            os.killpg(pid, signal.SIGKILL)
        code = _wait(pid, 0 if is_overdue else os.WNOHANG)
        if code is not None:
            del running[pid]
            if code in (-signal.SIGXCPU, -signal.SIGKILL):
                print(f"Killed by the time limit:\n{mutant}\n", flush=True)
            yield mutant, code


def _mutated(mutant: Mutant, file: Path, tests: Sequence[str], limit: int) -> int:
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    resource.setrlimit(resource.RLIMIT_CPU, (limit, limit + 5))
    sys.meta_path.insert(0, _Finder(mutant, file))
    return _pytest(tests)


def _pytest(tests: Sequence[str], imported: Path | None = None) -> int:
    """pytest's exit code; `imported` is a file for the names of the libraries that the tests imported."""
    # The same examples every time, no search for the smallest one that fails, no limit to an example's time.
    settings.register_profile(
        "mutants", derandomize=True, deadline=None, database=None, phases=[Phase.explicit, Phase.generate]
    )
    settings.load_profile("mutants")
    if imported is None:
        subprocess.Popen = _Popen
    with tempfile.TemporaryDirectory() as folder:
        code = pytest.main(["-xq", "-p", "no:cacheprovider", f"--basetemp={folder}/files", *tests])
    if imported:
        imported.write_text("\n".join(name for name in sys.modules if name.partition(".")[0] not in OURS))
    return code


class _Popen(subprocess.Popen[Any]):
    """Skips the test that starts another Python: it would import the original, and take its time."""

    def __init__(self, args: Any, *others: Any, **options: Any) -> None:
        if not isinstance(args, str) and next(iter(args), None) == sys.executable:
            pytest.skip("another process does not see the mutant")
        super().__init__(args, *others, **options)


class _Finder:
    """Gives the interpreter the mutant for the module's source."""

    def __init__(self, mutant: Mutant, file: Path) -> None:
        self.name, self.file, self.source = mutant.module, file, mutant.source

    def find_spec(self, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        if name != self.name:
            return None
        return spec_from_file_location(name, self.file, loader=_Loader(name, str(self.file), self.source))


class _Loader(SourceFileLoader):
    def __init__(self, name: str, path: str, source: str) -> None:
        super().__init__(name, path)
        self.source = source

    def get_code(self, fullname: str) -> CodeType:
        return compile(self.source, self.path, "exec", dont_inherit=True)


def _fork(run: Callable[[], int], output: str | Path = os.devnull) -> int:
    """The id of a process, in a group of its own, that ends with what `run` returns."""
    pid = os.fork()
    if pid:
        return pid
    # pytest collects garbage at its end: it need not look through the libraries.
    gc.freeze()
    code = 1
    try:
        os.setpgid(0, 0)
        file = os.open(output, os.O_RDWR | os.O_CREAT)
        for stream in range(3):
            os.dup2(file, stream)
        code = run()
    finally:
        sys.stdout.flush()
        os._exit(code)


def _wait(pid: int, options: int = 0) -> int | None:
    """A process's exit code, None while it runs."""
    ended, status = os.waitpid(pid, options)
    return os.waitstatus_to_exitcode(status) if ended else None
