"""Python programs that tests run in a process of their own."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def run_python(*arguments: str, without: str, timeout: float | None = None, **variables: str) -> str:
    """Standard output of `python ARGUMENTS`, which must succeed, run in the checkout's root.

    Args:
        arguments: of the interpreter.
        without: a variable that the tests' own environment may have, and the program's has not.
        timeout: seconds, after which the program and all processes that it has started are killed.
        variables: of the program's environment, on top of the tests' own.
    """
    environment = {name: value for name, value in os.environ.items() if name != without} | variables
    with subprocess.Popen(
        [sys.executable, *arguments],
        env=environment,
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    ) as program:
        try:
            output, errors = program.communicate(timeout=timeout)
        except BaseException:
            os.killpg(program.pid, signal.SIGKILL)
            raise
    assert program.returncode == 0, errors[-4000:]
    return output
