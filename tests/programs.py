"""Python programs that tests run in a process of their own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str, without: str, timeout: float | None = None, **variables: str) -> str:
    """Standard output of `python ARGUMENTS`, which must succeed, run in the checkout's root.

    Args:
        arguments: of the interpreter.
        without: a variable that the tests' own environment may have, and the program's has not.
        timeout: seconds.
        variables: of the program's environment, on top of the tests' own.
    """
    environment = {name: value for name, value in os.environ.items() if name != without} | variables
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout
