"""vLLM's OpenAI server under traffic: `vllm serve` in one process, its client in another."""

from __future__ import annotations

import contextlib
import json
import socket
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from subprocess import Popen, TimeoutExpired
from typing import Any
from urllib.request import ProxyHandler, Request, build_opener

from benchmarks.engine import client
from benchmarks.engine.kv_cache import EXTENSION, METHOD, KVCacheFacts
from benchmarks.engine.processes import ProcessDied, environment, last_lines, messages, started
from benchmarks.engine.workloads import Traffic

Record = dict[str, Any]
_COMMAND = Path(sys.executable).with_name("vllm")
VLLM = [str(_COMMAND)] if _COMMAND.exists() else [sys.executable, "-m", "vllm.entrypoints.cli.main"]
"""A vLLM that is on the path without having been installed has no command."""
CLIENT = [sys.executable, "-m", client.__name__]
HOST = "127.0.0.1"
MODEL = "benchmark"
START_SECONDS = 1800
POLL_SECONDS = 0.5
DYING_SECONDS = 10


@dataclass(frozen=True)
class Job:
    """What one server is to be put under.

    Attributes:
        folder: of the model's config.json and tokenizer.
        variant: "s2" or "dense".
        flags: of the server, by vLLM's names.
        measurements: the traffic, in this order.
    """

    folder: str
    variant: str
    flags: dict[str, Any]
    measurements: list[Traffic]


def run(job: Job, scratch: Path, log: Path) -> Iterator[Record]:
    """Start the server, and measure it.

    Args:
        job: what to do.
        scratch: folder for what the client needs.
        log: file that the server's output is added to.

    Returns:
        An object with the engine's `KVCacheFacts` under "engine", then every record under "record".

    Raises:
        ProcessDied: the server or its client has ended; whether the engine had started, the objects say.
    """
    port = _free_port()
    # Its workers tell what they have set up on request, in this mode only.
    env = environment() | {"VLLM_SERVER_DEV_MODE": "1"}
    with started([*VLLM, "serve", *_arguments(job, port)], log, env) as process:
        server = Server(process, f"http://{HOST}:{port}", log)
        server.wait_until_healthy()
        facts = server.facts()
        facts.check_variant(job.variant)
        yield {"engine": asdict(facts)}
        path, limit = scratch / "client.json", facts.max_model_len
        client.Job(server.url, MODEL, job.folder, str(scratch), limit, job.measurements).save(path)
        yield from _client(server, path, scratch / "client.log")


def _client(server: Server, job: Path, log: Path) -> Iterator[Record]:
    """What the client of a server measures."""
    # A trace's tokens depend on the hashes of strings, which by default are others in every process.
    env = environment() | {"PYTHONHASHSEED": "0"}
    try:
        for message in messages(CLIENT, job, log, env):
            server.check_alive()
            yield message
    except ProcessDied:
        # A client fails when its server dies, whose lines say more.
        with contextlib.suppress(TimeoutExpired):
            server.process.wait(DYING_SECONDS)
        server.check_alive()
        raise


def _arguments(job: Job, port: int) -> list[str]:
    flags = {
        "host": HOST,
        "port": port,
        "served_model_name": MODEL,
        "load_format": "dummy",
        "worker_extension_cls": EXTENSION,
        "disable_uvicorn_access_log": True,
        **job.flags,
    }
    options = [(f"--{name.replace('_', '-')}", value) for name, value in flags.items()]
    return [job.folder, *(name if value is True else f"{name}={value}" for name, value in options)]


@dataclass(frozen=True)
class Server:
    """A server that was started.

    Attributes:
        process: `vllm serve`.
        url: where it answers, without a path.
        log: all that it prints.
    """

    process: Popen[bytes]
    url: str
    log: Path

    def wait_until_healthy(self) -> None:
        """Return once the server answers.

        Raises:
            ProcessDied: it has ended, or does not answer within START_SECONDS.
        """
        deadline = time.monotonic() + START_SECONDS
        while time.monotonic() < deadline:
            self.check_alive()
            try:
                self._ask("health")
            except OSError:
                time.sleep(POLL_SECONDS)
            else:
                return
        raise ProcessDied(f"no answer within {START_SECONDS} s; the last lines:\n{last_lines(self.log)}")

    def check_alive(self) -> None:
        status = self.process.poll()
        if status is not None:
            lines = last_lines(self.log)
            raise ProcessDied(f"the server ended with exit status {status}; its last lines:\n{lines}")

    def facts(self) -> KVCacheFacts:
        """What the engine has set up."""
        answer = json.loads(self._ask("collective_rpc", {"method": METHOD}))
        return KVCacheFacts.of_workers(answer["results"])

    def _ask(self, path: str, body: Record | None = None) -> str:
        data = None if body is None else json.dumps(body).encode()
        request = Request(f"{self.url}/{path}", data, {"Content-Type": "application/json"})
        with build_opener(ProxyHandler({})).open(request, timeout=60) as answer:
            return str(answer.read().decode())


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])
