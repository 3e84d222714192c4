"""A real `vllm serve` of the demo's checkpoint, and the real `openai` client talking to it."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.request import ProxyHandler, build_opener

import psutil
import pytest
from openai import DefaultHttpxClient, OpenAI
from transformers import AutoTokenizer

from s2_vllm.demo.checkpoint import make_checkpoint
from s2_vllm.demo.corpus import project_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from transformers import PreTrainedTokenizerBase

MODEL = "s2-demo"
START_SECONDS = 240
STOP_SECONDS = 60
FLAGS = [
    "--dtype",
    "float32",
    "--enforce-eager",
    "--kv-cache-memory-bytes",
    "512M",
    "--max-model-len",
    "4096",
]
GREEDY = {"temperature": 0.0, "max_tokens": 12, "extra_body": {"ignore_eos": True}}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkpoint = tmp_path_factory.mktemp("server")
    make_checkpoint(checkpoint)
    return checkpoint


@pytest.fixture(scope="module")
def tokenizer(folder: Path) -> PreTrainedTokenizerBase:
    return AutoTokenizer.from_pretrained(folder)


@pytest.fixture(scope="module")
def client(folder: Path) -> Iterator[OpenAI]:
    """A client of a server that runs as long as this module's tests, and then has to stop cleanly."""
    port, log = _free_port(), folder / "server.log"
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "VLLM_NO_USAGE_STATS": "1"}
    # In-process engines of other tests set it; a server is to run as it does by default.
    environment.pop("VLLM_ENABLE_V1_MULTIPROCESSING", None)
    command = [
        str(Path(sys.executable).with_name("vllm")),
        "serve",
        str(folder),
        "--served-model-name",
        MODEL,
    ]
    command += ["--host", "127.0.0.1", "--port", str(port), *FLAGS]
    with log.open("w") as output:
        server = subprocess.Popen(command, env=environment, stdout=output, stderr=subprocess.STDOUT)
    try:
        _wait_until_healthy(server, port, log)
        with DefaultHttpxClient(trust_env=False) as http:
            yield OpenAI(base_url=f"http://127.0.0.1:{port}/v1", api_key="none", http_client=http)
        _stop(server, log)
    finally:
        if server.poll() is None:
            server.kill()
            server.wait()


def test_server_reports_the_plan_of_the_sparse_layers(client: OpenAI, folder: Path) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert "4 sparse and 1 dense layers" in (folder / "server.log").read_text()


def test_completion_counts_the_tokens_of_its_prompt(
    client: OpenAI, tokenizer: PreTrainedTokenizerBase
) -> None:
    prompt = project_text()[:3000]
    answer = client.completions.create(model=MODEL, prompt=prompt, **GREEDY)
    assert answer.choices[0].text
    assert answer.usage is not None
    assert answer.usage.prompt_tokens == len(tokenizer.encode(prompt))
    assert answer.usage.completion_tokens == GREEDY["max_tokens"]


def test_streamed_pieces_add_up_to_the_completion(client: OpenAI) -> None:
    prompt = "A head attends to"
    whole = client.completions.create(model=MODEL, prompt=prompt, **GREEDY).choices[0].text
    stream = client.completions.create(model=MODEL, prompt=prompt, stream=True, **GREEDY)
    pieces = [chunk.choices[0].text for chunk in stream if chunk.choices]
    assert len(pieces) > 1
    assert "".join(pieces) == whole


def test_chat_is_a_completion_of_the_rendered_template(
    client: OpenAI, tokenizer: PreTrainedTokenizerBase
) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is a block?"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    chat = client.chat.completions.create(model=MODEL, messages=turns, **GREEDY)
    plain = client.completions.create(model=MODEL, prompt=rendered, **GREEDY)
    assert chat.choices[0].message.content == plain.choices[0].text


def test_16_concurrent_requests_get_what_each_gets_alone(client: OpenAI) -> None:
    text = project_text()
    prompts = [text[100 * i : 100 * i + 300 * (i + 1)] for i in range(12)]
    prompts += [text[:6000] + text[700 * i : 700 * i + 60] for i in range(4)]

    def complete(prompt: str) -> str:
        return client.completions.create(model=MODEL, prompt=prompt, **GREEDY).choices[0].text

    with ThreadPoolExecutor(len(prompts)) as pool:
        together = list(pool.map(complete, prompts))
    alone = [complete(prompt) for prompt in prompts]
    assert together == alone
    assert len(set(alone)) > len(prompts) // 2


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
