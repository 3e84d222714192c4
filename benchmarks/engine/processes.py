"""Processes that a benchmark starts: their output goes to a file, whose last lines say why they ended."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
LAST_LINES = 40
STOP_SECONDS = 60

# What vLLM and torch say where the memory does not suffice.
TOO_LITTLE_MEMORY = (
    "No available memory for the cache blocks",
    "KV cache is needed, which is larger than",
    "Cannot auto-fit max_model_len",
    "out of memory",
)


class ProcessDied(RuntimeError):
    """A process ended that should not have; its last lines are in the message."""


def environment() -> dict[str, str]:
    """This process's, for a vLLM that finds this package, and asks nobody for anything."""
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    local = {"PYTHONPATH": os.pathsep.join(paths), "NO_PROXY": "127.0.0.1", "no_proxy": "127.0.0.1"}
    return {**os.environ, **local, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}


@contextmanager
def started(
    command: Sequence[str], log: Path, env: dict[str, str], pass_fds: Sequence[int] = ()
) -> Iterator[subprocess.Popen[bytes]]:
    """A process in a session of its own; nothing of it stays behind.

    Args:
        command: program and arguments.
        log: file that its output is added to.
        env: environment.
        pass_fds: file descriptors that it is to have.
    """
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            env=env,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
            pass_fds=pass_fds,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        stop(process)


def messages(command: Sequence[str], job: Path, log: Path, env: dict[str, str]) -> Iterator[dict[str, Any]]:
    """Start a process, and pass on what it sends with `send_messages`.

    Args:
        command: to which `job` and the number of a file descriptor are added.
        job: the process's file.
        log: file that its output is added to.
        env: environment.

    Raises:
        ProcessDied: it has ended with an error.
    """
    receiver, sender = os.pipe()
    with open(receiver) as lines, started([*command, str(job), str(sender)], log, env, [sender]) as process:
        os.close(sender)
        for line in lines:
            yield json.loads(line)
        status = process.wait()
    if status:
        name = " ".join(command[1:])
        raise ProcessDied(f"{name} ended with exit status {status}; its last lines:\n{last_lines(log)}")


def send_messages(descriptor: int, objects: Iterable[dict[str, Any]]) -> None:
    """Send each object to the process that reads from `messages`, as soon as it is there."""
    # What this process starts must not hold it open.
    os.set_inheritable(descriptor, False)
    with open(descriptor, "w", buffering=1) as sender:
        for message in objects:
            sender.write(json.dumps(message) + "\n")


def stop(process: subprocess.Popen[bytes]) -> None:
    """Ask a process to end, and kill what is left of its session."""
    if process.poll() is None:
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(STOP_SECONDS)
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def last_lines(log: Path) -> str:
    """The end of what a process has printed."""
    return "\n".join(log.read_text(errors="replace").splitlines()[-LAST_LINES:])


def memory_reason(log: Path) -> str | None:
    """The line of a process's output that says that memory did not suffice; None if there is none."""
    lines = log.read_text(errors="replace").splitlines()
    found = [line for line in lines if any(text in line for text in TOO_LITTLE_MEMORY)]
    # The innermost exception's own message, without what a logger or a traceback has put before it.
    return found[0].rpartition("Error: ")[2].strip() if found else None
