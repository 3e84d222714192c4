"""What the tests' own way to run a Python program leaves behind."""

from __future__ import annotations

import subprocess
import time
from pathlib import Path

import psutil
import pytest

from tests.programs import run_python

SCRIPT = """
import subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(600)"])
open(sys.argv[1], "w").write(str(child.pid))
time.sleep(600)
"""


def test_a_program_that_takes_too_long_ends_with_its_children(tmp_path: Path) -> None:
    """An engine's processes would hold their GPUs otherwise."""
    note = tmp_path / "pid"
    with pytest.raises(subprocess.TimeoutExpired):
        run_python("-c", SCRIPT, str(note), without="NOTHING", timeout=5)
    child = int(note.read_text())
    for _ in range(100):  # a process that has been killed may run on until the system gets to it
        if not psutil.pid_exists(child) or psutil.Process(child).status() == psutil.STATUS_ZOMBIE:
            return
        time.sleep(0.1)
    raise AssertionError(f"process {child} is still there")
