"""Text in, text out: the checkpoint's tokenizer files and chat template, in process and served."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import tiktoken

from tests.engine.engines import assert_all_pages_free, engine, greedy_params
from tests.engine.server import serving
from tests.phi3_small.checkpoints import (
    SPECIAL_TOKEN_OFFSETS,
    save_checkpoint,
    save_remote_code,
    save_tokenizer,
    special_id,
)
from tests.phi3_small.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from vllm import LLM

CL100K_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""How cl100k_base cuts text into words, as tiktoken has published it."""

TURNS = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "What is a block?"},
    {"role": "assistant", "content": "Which one?"},
    {"role": "user", "content": "  The  sparse\none,\r\n\tin 12345 words: café, 世界 and 😀"},
]

RENDERED = (
    "<|endoftext|><|system|>\nBe brief.<|end|>\n<|user|>\nWhat is a block?<|end|>\n"
    "<|assistant|>\nWhich one?<|end|>\n"
    "<|user|>\n  The  sparse\none,\r\n\tin 12345 words: café, 世界 and 😀<|end|>\n<|assistant|>\n"
)

NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with all the files that a published one has; its own code must not run."""
    path = save_checkpoint(tmp_path_factory.mktemp("phi3-small-chat"))
    save_tokenizer(path)
    save_remote_code(path)
    return path


@pytest.fixture(scope="module")
def encoding(tmp_path_factory: pytest.TempPathFactory) -> tiktoken.Encoding:
    """tiktoken itself, with the same vocabulary and the trained special tokens."""
    ranks = save_tokenizer(tmp_path_factory.mktemp("vocabulary"))
    special = {token: special_id(token) for token in SPECIAL_TOKEN_OFFSETS}
    return tiktoken.Encoding("mini", pat_str=CL100K_PATTERN, mergeable_ranks=ranks, special_tokens=special)


@pytest.fixture(scope="module")
def prompt(encoding: tiktoken.Encoding) -> list[int]:
    """The token ids of TURNS."""
    return encoding.encode(RENDERED, allowed_special="all")


@pytest.fixture(scope="module")
def answer(folder: Path, prompt: list[int]) -> list[int]:
    """The oracle's answer to TURNS."""
    return Oracle(folder).greedy(prompt, NUM_TOKENS)[0]


@pytest.fixture(scope="module")
def llm(folder: Path) -> Iterator[LLM]:
    with engine(folder, skip_tokenizer_init=False) as llm:
        yield llm
        assert_all_pages_free(llm)


def test_chat_in_process(llm: LLM, encoding: tiktoken.Encoding, prompt: list[int], answer: list[int]) -> None:
    """The template's rendering, tiktoken's ids, the oracle's answer, and its text; without remote code."""
    output = llm.chat(TURNS, greedy_params(NUM_TOKENS, detokenize=True), use_tqdm=False)[0]
    tokenizer = llm.get_tokenizer()
    assert tokenizer.apply_chat_template(TURNS, tokenize=False, add_generation_prompt=True) == RENDERED
    assert list(output.prompt_token_ids) == prompt
    assert list(output.outputs[0].token_ids) == answer
    ordinary = [token for token in answer if token not in map(special_id, SPECIAL_TOKEN_OFFSETS)]
    # vLLM holds back the bytes of a character that is not yet complete.
    assert output.outputs[0].text == encoding.decode(ordinary).rstrip("\ufffd")


@pytest.mark.parametrize("token", ["<|end|>", "<|endoftext|>"])
def test_end_tokens_end_the_answer(llm: LLM, token: str) -> None:
    """`<|end|>` is in generation_config.json alone."""
    params = greedy_params(NUM_TOKENS, ignore_eos=False, logit_bias={special_id(token): 100.0})
    output = llm.chat(TURNS, params, use_tqdm=False)[0].outputs[0]
    assert (output.finish_reason, list(output.token_ids)) == ("stop", [special_id(token)])


def test_chat_through_the_server(folder: Path, prompt: list[int], answer: list[int]) -> None:
    """The chat endpoint answers what completions of the rendered template answer, and the oracle.

    With --trust-remote-code, which the checkpoint's own code would need, and must not make run.
    """
    flags = ["--trust-remote-code", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    flags += ["--kv-cache-memory-bytes", "256M", "--served-model-name", "phi3-small"]
    request = {"model": "phi3-small", "temperature": 0.0, "max_tokens": NUM_TOKENS}
    extra = {"ignore_eos": True, "return_token_ids": True}
    with serving(folder, *flags) as client:
        chat = client.chat.completions.create(messages=TURNS, extra_body=extra, **request)
        plain = client.completions.create(
            prompt=RENDERED, extra_body={**extra, "add_special_tokens": False}, **request
        )
    assert chat.usage is not None
    assert chat.usage.prompt_tokens == len(prompt)
    assert chat.choices[0].message.content == plain.choices[0].text
    assert chat.choices[0].token_ids == answer


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  two  spaces\n\n\ttab ",
        "Größe, 世界, 😀, e\u0301",
        "def f(x: int) -> str:\r\n    ...",
        "I'LL 1234567 \x00",
    ],
    ids=["empty", "whitespace", "unicode", "code", "contraction"],
)
def test_tokenizer_is_tiktokens(folder: Path, encoding: tiktoken.Encoding, text: str) -> None:
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(folder))
    ids = tokenizer.encode(text)
    assert ids == encoding.encode(text)
    assert tokenizer.decode(ids) == text


def test_special_tokens_have_their_ids(folder: Path) -> None:
    from vllm.tokenizers import get_tokenizer

    tokenizer = get_tokenizer(str(folder))
    assert tokenizer.convert_tokens_to_ids(list(SPECIAL_TOKEN_OFFSETS)) == [
        special_id(token) for token in SPECIAL_TOKEN_OFFSETS
    ]
    assert len(tokenizer) == 512
