"""What vLLM's scheduler does to the two tiers: sharing, eviction, preemption, forking and aborting pages."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.checkpoints import random_prompts
from tests.engine.engines import (
    assert_all_pages_free,
    engine,
    generate,
    greedy,
    greedy_params,
    kv_caches,
    pages_handed_out,
    preemptions,
)
from tests.engine.oracle import Oracle
from tests.programs import run_python

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path

    from vllm import LLM

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}

CHUNK = 75
"""Tokens per step: not a multiple of a block, so that chunks cut them."""


@pytest.fixture(scope="module")
def folder(checkpoint: Callable[..., Path]) -> Path:
    return checkpoint("llama", S2)


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture(scope="module")
def shared_llm(folder: Path) -> Iterator[LLM]:
    with engine(folder, max_num_batched_tokens=CHUNK) as llm:
        yield llm


@pytest.fixture
def llm(shared_llm: LLM) -> Iterator[LLM]:
    """The module's engine, with nothing cached before and no page missing after."""
    assert shared_llm.reset_prefix_cache()
    yield shared_llm
    assert_all_pages_free(shared_llm)


def test_32_concurrent_requests(llm: LLM, oracle: Oracle) -> None:
    """Prefills and decodes of every length share their steps."""
    prompts = random_prompts([1 + 13 * n for n in range(32)], seed=1)
    expected = [oracle.greedy(prompt, 10)[0] for prompt in prompts]
    assert greedy(llm, prompts, 10) == expected


def test_prefix_hits(llm: LLM, oracle: Oracle) -> None:
    """Requests that share a prefix read the pages that the first of them wrote."""
    prefix, *suffixes = random_prompts([400, 1, 40, 111], seed=2)
    greedy(llm, [prefix], 1)
    prompts = [prefix + suffix for suffix in suffixes]
    outputs = generate(llm, prompts, greedy_params(10))
    for prompt, output in zip(prompts, outputs, strict=True):
        assert 0 < output.num_cached_tokens < len(prefix)
        assert list(output.outputs[0].token_ids) == oracle.greedy(prompt, 10)[0]


def test_prefix_hit_past_eviction(llm: LLM, oracle: Oracle) -> None:
    """A hit far behind the window needs none of the window pages that were freed during prefill."""
    prompt = random_prompts([700], seed=3)[0]
    greedy(llm, [prompt], 1)
    output = generate(llm, [[*prompt, 7]], greedy_params(10))[0]
    assert output.num_cached_tokens > 400
    assert list(output.outputs[0].token_ids) == oracle.greedy([*prompt, 7], 10)[0]


def test_three_samples_of_a_prompt(llm: LLM, oracle: Oracle) -> None:
    """n=3 at a temperature: three texts from shared pages, each with the oracle's log-probabilities."""
    prompt = random_prompts([333], seed=4)[0]
    greedy(llm, [prompt], 1)
    output = generate(llm, [prompt], greedy_params(12, n=3, temperature=1.0, logprobs=0))[0]
    assert output.num_cached_tokens > 0
    samples = output.outputs
    assert len({tuple(sample.token_ids) for sample in samples}) == 3
    for sample in samples:
        tokens = list(sample.token_ids)
        logits = oracle.logits(prompt + tokens)[len(prompt) - 1 : -1]
        expected = logits.log_softmax(dim=-1)[torch.arange(len(tokens)), torch.tensor(tokens)]
        actual = torch.tensor([step[t].logprob for step, t in zip(sample.logprobs, tokens, strict=True)])
        torch.testing.assert_close(actual, expected, atol=2e-3, rtol=0)


def test_abort_while_others_run(llm: LLM, oracle: Oracle) -> None:
    """One request is aborted in its prefill, one while it decodes; the rest finish as if alone."""
    prompts = dict(zip("abcd", random_prompts([120, 200, 700, 90], seed=6), strict=True))
    core = llm.llm_engine
    for name, prompt in prompts.items():
        core.add_request(name, {"prompt_token_ids": prompt}, greedy_params(30))
    finished: dict[str, list[int]] = {}

    def step() -> dict[str, int]:
        """Tokens generated so far, by request."""
        progress = {}
        for output in core.step():
            progress[output.request_id] = len(output.outputs[0].token_ids)
            if output.finished:
                finished[output.request_id] = list(output.outputs[0].token_ids)
        return progress

    while step().get("a", 0) < 3:
        pass
    core.abort_request(["a"])
    while "c" not in _computed(llm):
        step()
    assert 0 < _computed(llm)["c"] < len(prompts["c"])
    core.abort_request(["c"])
    while core.has_unfinished_requests():
        step()
    assert finished == {name: oracle.greedy(prompts[name], 30)[0] for name in "bd"}


def test_reused_pages_and_preemption(folder: Path, oracle: Oracle) -> None:
    """A pool far too small for its requests: pages are reused all the time, requests start over."""
    prompts = random_prompts([180, 220, 150, 200, 170, 210, 190, 160], seed=7)
    expected = [oracle.greedy(prompt, 60)[0] for prompt in prompts]
    # Asynchronous scheduling, a GPU's default, reserves window pages for two steps: so few requests would be
    # admitted that none has to be preempted.
    pool = {"max_model_len": 320, "num_gpu_blocks_override": 48, "async_scheduling": False}
    with engine(folder, max_num_batched_tokens=CHUNK, **pool) as llm:
        before = preemptions(llm)
        with pages_handed_out(llm) as pages:
            assert greedy(llm, prompts, 60) == expected
        assert preemptions(llm) > before
        assert len(pages) > 2 * 48
        assert_all_pages_free(llm)


def test_reads_nothing_that_was_not_written(checkpoint: Callable[..., Path]) -> None:
    """With a pool full of NaN, output stays right: no page or slot outside a query's set is used."""
    s2 = {key: value for key, value in S2.items() if key != "dense_layers"}
    folder = checkpoint("llama", s2)
    oracle = Oracle(folder)
    prompts = random_prompts([5, 100, 333], seed=8)
    with engine(folder, max_num_batched_tokens=CHUNK) as llm:
        for cache in kv_caches(llm):
            cache.fill_(float("nan"))
        assert greedy(llm, prompts, 10) == [oracle.greedy(prompt, 10)[0] for prompt in prompts]
        assert_all_pages_free(llm)


def test_engine_in_processes_of_its_own(folder: Path, oracle: Oracle) -> None:
    """vLLM's default, where the engine and its workers are spawned and load the plugin themselves."""
    prompt = random_prompts([260], seed=9)[0]
    script = (
        "from vllm import LLM, SamplingParams\n"
        "if __name__ == '__main__':\n"
        f"    llm = LLM({str(folder)!r}, skip_tokenizer_init=True, dtype='float32', enforce_eager=True,\n"
        "              max_model_len=512, num_gpu_blocks_override=128, kv_cache_memory_bytes=1 << 28,\n"
        "              gpu_memory_utilization=0.1)\n"
        "    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)\n"
        f"    output = llm.generate({{'prompt_token_ids': {prompt}}}, params, use_tqdm=False)[0]\n"
        "    print('tokens', list(output.outputs[0].token_ids))\n"
    )
    output = _run_script(script, folder)
    assert f"tokens {oracle.greedy(prompt, 10)[0]}" in output


def _computed(llm: LLM) -> dict[str, int]:
    """Prompt and output tokens in the cache, by the running request's external id."""
    running: list[Any] = llm.llm_engine.engine_core.engine_core.scheduler.running
    return {request.request_id.split("-")[0]: request.num_computed_tokens for request in running}


def _run_script(script: str, folder: Path) -> str:
    """Standard output of a Python script, run in a fresh interpreter with vLLM's own defaults."""
    path = folder / "script.py"
    path.write_text(script)
    return run_python(str(path), without="VLLM_ENABLE_V1_MULTIPROCESSING", timeout=300)
