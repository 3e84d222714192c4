"""The demo's trained model, served: it knows the pass keys, and from where."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

from s2_vllm.demo.checkpoint import TRAINED
from s2_vllm.demo.document import hide
from s2_vllm.demo.trained import is_right
from s2_vllm.demo.vocabulary import decode, encode
from s2_vllm.specs import STRIDED_SUFFIX
from tests.engine.engines import engine, greedy_params, kv_caches, scheduler

if TYPE_CHECKING:
    from vllm import LLM

    from s2_vllm.demo.document import Document
    from s2_vllm.demo.passkeys import PassKey

# Farther from the end than eight windows of 256 tokens: no layer can hand a key on to the end.
DEPTHS, TOKENS = (0.05, 0.2), 3000
ANSWER_TOKENS = 8


def test_an_answer_is_right_until_the_strided_pages_of_its_key_are_overwritten() -> None:
    document = hide(DEPTHS, TOKENS)
    near, far = document.keys[::-1]
    assert len(document.tokens) - document.positions(near)[-1] > 8 * 256
    with engine(TRAINED, max_model_len=4096, async_scheduling=False) as llm:
        assert is_right(near, ask(llm, document, near))
        assert is_right(near, ask(llm, document, near, overwritten=far))
        assert not is_right(far, ask(llm, document, far))  # its pages are still in the prefix cache
        assert llm.reset_prefix_cache()
        assert is_right(far, ask(llm, document, far))
        assert not is_right(near, ask(llm, document, near, overwritten=near))


def ask(llm: LLM, document: Document, key: PassKey, overwritten: PassKey | None = None) -> str:
    """The answer about a key, with another's strided pages overwritten before its number is said."""
    prompt = {"prompt_token_ids": encode(document.prompt(key))}
    llm.llm_engine.add_request("question", prompt, greedy_params(ANSWER_TOKENS))
    ids: list[int] = []
    while llm.llm_engine.has_unfinished_requests():
        for output in llm.llm_engine.step():
            ids = list(output.outputs[0].token_ids)
        if overwritten is not None and ids:
            overwrite(llm, document.positions(overwritten))
            overwritten = None
    return decode(ids)


def overwrite(llm: LLM, positions: range) -> None:
    """Noise for all that the strided tier of the one request has of these positions, in every layer."""
    manager, groups = scheduler(llm).kv_cache_manager, scheduler(llm).kv_cache_config.kv_cache_groups
    (running,) = scheduler(llm).running
    strided = [group.layer_names[0].endswith(STRIDED_SUFFIX) for group in groups]
    assert any(strided)
    generator = torch.Generator().manual_seed(0)
    for is_strided, group, ids in zip(
        strided, groups, manager.get_block_ids(running.request_id), strict=True
    ):
        for page in {ids[n // group.kv_cache_spec.block_size] for n in positions} if is_strided else ():
            assert page, "the null page"
            for cache in kv_caches(llm):
                cache[page] = torch.randn(cache[page].shape, generator=generator).to(cache)
