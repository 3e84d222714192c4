"""A real `vllm serve` in a process of its own, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import ProxyHandler, build_opener

import psutil
from openai import DefaultHttpxClient, OpenAI

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 240
STOP_SECONDS = 60
LOG_NAME = "server.log"


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[OpenAI]:
    """A client of a server of the checkpoint in `folder`, which has to stop cleanly in the end.

    Args:
        folder: of the checkpoint; the server's log goes there too, as LOG_NAME.
        flags: of `vllm serve`.
    """
    port, log = _free_port(), folder / LOG_NAME
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # In-process engines of other tests set it; a server is to run as it does by default.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    script = Path(sys.executable).with_name("vllm")
    # A vLLM that is on the path without having been installed has no command.
    vllm = [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    command = [*vllm, "serve", str(folder), "--host", "127.0.0.1"]
    with log.open("w") as output:
        server = subprocess.Popen(
            [*command, "--port", str(port), *flags], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    try:
        _wait_until_healthy(server, port, log)
        with DefaultHttpxClient(trust_env=False) as http:
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=http)
        _stop(server, log)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _wait_until_healthy(server: subprocess.Popen[bytes], port: int, log: Path) -> None:
    opener = build_opener(ProxyHandler({}))
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert server.poll() is None, f"the server has stopped by itself:\n{_tail(log)}"
        try:
            with opener.open(f"http://127.0.0.1:{port}/health", timeout=5):
                return
        except OSError:
            time.sleep(0.5)
    raise AssertionError(f"no answer within {START_SECONDS} s:\n{_tail(log)}")


def _stop(server: subprocess.Popen[bytes], log: Path) -> None:
    """Ask the server to stop as Ctrl-C does; nothing of it may stay behind."""
    children = psutil.Process(server.pid).children(recursive=True)
    assert children
    server.send_signal(signal.SIGINT)
    status = server.wait(STOP_SECONDS)
    _, alive = psutil.wait_procs(children, timeout=STOP_SECONDS)
    for process in alive:
        process.kill()
    assert not alive, f"processes left behind: {alive}"
    assert status == 0, f"exit status {status}:\n{_tail(log)}"


def _tail(log: Path) -> str:
    return log.read_text()[-4000:]
