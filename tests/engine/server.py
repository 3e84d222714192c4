"""A real `vllm serve` in a process of its own, and a client of it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.error import HTTPError
from urllib.request import ProxyHandler, build_opener

import psutil
from openai import DefaultHttpxClient, OpenAI

if TYPE_CHECKING:
    from collections.abc import Iterator

START_SECONDS = 480
STOP_SECONDS = 60
LOG_NAME = "server.log"


@dataclass(frozen=True)
class Server:
    """A server that was started.

    Attributes:
        process: `vllm serve`.
        url: where it answers, without a path.
        log: all that it prints.
    """

    process: subprocess.Popen[bytes]
    url: str
    log: Path

    def children(self) -> list[psutil.Process]:
        """The server's processes apart from its own: the engine's, above all."""
        return psutil.Process(self.process.pid).children(recursive=True)

    def health(self) -> int | None:
        """The status of its health check, None where nobody answers."""
        try:
            with build_opener(ProxyHandler({})).open(f"{self.url}/health", timeout=5) as answer:
                return int(answer.status)
        except HTTPError as error:
            return error.code
        except OSError:
            return None

    def wait_until_healthy(self) -> None:
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            assert self.process.poll() is None, f"the server has stopped by itself:\n{self.tail_of_log()}"
            if self.health() == 200:
                return
            time.sleep(0.5)
        raise AssertionError(f"no answer within {START_SECONDS} s:\n{self.tail_of_log()}")

    def stop(self) -> None:
        """Ask the server to stop as Ctrl-C does; nothing of it may stay behind."""
        children = self.children()
        assert children
        self.process.send_signal(signal.SIGINT)
        status = self.process.wait(STOP_SECONDS)
        assert_ended(children)
        assert status == 0, f"exit status {status}:\n{self.tail_of_log()}"

    def tail_of_log(self) -> str:
        return self.log.read_text()[-4000:]


@contextmanager
def started_server(folder: Path, *flags: str) -> Iterator[Server]:
    """A healthy server of the checkpoint in `folder`; what is left of it in the end is killed.

    Args:
        folder: of the checkpoint; the server's log is added to LOG_NAME there.
        flags: of `vllm serve`.
    """
    port, log = _free_port(), folder / LOG_NAME
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # In-process engines of other tests set it; a server is to run as it does by default.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    script = Path(sys.executable).with_name("vllm")
    # A vLLM that is on the path without having been installed has no command.
    vllm = [str(script)] if script.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
    # Several test processes may share a GPU.
    command = [*vllm, "serve", str(folder), "--host", "127.0.0.1", "--gpu-memory-utilization", "0.1"]
    with log.open("a") as output:
        process = subprocess.Popen(
            [*command, "--port", str(port), *flags], env=environment, stdout=output, stderr=subprocess.STDOUT
        )
    server = Server(process, f"http://127.0.0.1:{port}", log)
    try:
        server.wait_until_healthy()
        yield server
    finally:
        if process.poll() is None:
            children = server.children()
            process.kill()
            process.wait()
            for child in children:
                child.kill()


@contextmanager
def serving(folder: Path, *flags: str) -> Iterator[OpenAI]:
    """A client of a server of the checkpoint in `folder`, which has to stop cleanly in the end.

    Args:
        folder: of the checkpoint; the server's log is added to LOG_NAME there.
        flags: of `vllm serve`.
    """
    with started_server(folder, *flags) as server:
        with DefaultHttpxClient(trust_env=False) as http:
            yield OpenAI(base_url=f"{server.url}/v1", api_key="none", http_client=http)
        server.stop()


def assert_ended(processes: list[psutil.Process]) -> None:
    """All of them end within STOP_SECONDS; those that do not are killed."""
    _, alive = psutil.wait_procs(processes, timeout=STOP_SECONDS)
    for process in alive:
        process.kill()
    assert not alive, f"processes left behind: {alive}"


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
