"""A real `vllm serve` of the demo's checkpoint, and the real `openai` client talking to it."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING

import pytest
from transformers import AutoTokenizer

from s2_vllm.demo.checkpoint import make_checkpoint
from s2_vllm.demo.corpus import project_text
from tests.engine.server import LOG_NAME, serving

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from openai import OpenAI
    from transformers import PreTrainedTokenizerBase

MODEL = "s2-demo"
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
    """A client of a server that runs as long as this module's tests."""
    with serving(folder, "--served-model-name", MODEL, *FLAGS) as client:
        yield client


def test_server_reports_the_plan_of_the_sparse_layers(client: OpenAI, folder: Path) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert "4 sparse and 1 dense layers" in (folder / LOG_NAME).read_text()


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
