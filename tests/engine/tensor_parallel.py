"""vLLM engines of one or more tensor-parallel ranks, on CPUs or GPUs, in processes of their own."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import pytest
import torch

from tests.engine.checkpoints import random_prompts, save_checkpoint
from tests.programs import run_python

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from tests.engine.oracle import Oracle

CORES = sorted(os.sched_getaffinity(0))
SECONDS_PER_RUN = 500

# vLLM spawns processes that import the script again.
SCRIPT = """
import json, sys
from pathlib import Path
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    task, result = map(Path, sys.argv[1:])
    engine, prompts, num_tokens = json.loads(task.read_text())
    llm = LLM(**engine)
    params = SamplingParams(temperature=0, max_tokens=num_tokens, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    tokens = [list(output.outputs[0].token_ids) for output in outputs]
    preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    result.write_text(json.dumps([tokens, preemptions]))
"""

ENGINE: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "seed": 0,
    "max_model_len": 512,
    "max_num_seqs": 32,
    "max_num_batched_tokens": 77,
    "num_gpu_blocks_override": 200,
    "kv_cache_memory_bytes": 1 << 28,
    # The tests' own process holds memory on the GPUs as well.
    "gpu_memory_utilization": 0.1,
    "disable_log_stats": False,
}


@dataclass(frozen=True)
class Run:
    """What an engine has done.

    Attributes:
        tokens: the greedy continuation of each prompt.
        preemptions: how many there were.
    """

    tokens: list[list[int]]
    preemptions: int


def needs_two_cores(test: object) -> object:
    """Marks a test that starts two ranks on the CPU."""
    test = pytest.mark.skipif(len(CORES) < 2, reason="vLLM wants a CPU core for each rank")(test)
    return pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")(test)


def run_ranks(
    ranks: int,
    folder: Path,
    prompts: Sequence[Sequence[int]],
    num_tokens: int,
    scratch: Path,
    **options: Any,
) -> Run:
    """Continue all prompts at the same time, greedily.

    Args:
        ranks: tensor-parallel size.
        folder: of the checkpoint.
        prompts: token ids.
        num_tokens: to generate for each prompt.
        scratch: a folder for the script, what it is to do and what it has done.
        options: engine arguments, on top of ENGINE.
    """
    script, task, result = (scratch / name for name in ("script.py", "task.json", "result.json"))
    script.write_text(SCRIPT)
    arguments = {**ENGINE, "model": str(folder), "tensor_parallel_size": ranks, **options}
    task.write_text(json.dumps([arguments, [list(prompt) for prompt in prompts], num_tokens]))
    variables = {}
    if not torch.cuda.is_available() and ranks > 1:
        variables["VLLM_CPU_OMP_THREADS_BIND"] = "|".join(map(str, CORES[:ranks]))
    result.unlink(missing_ok=True)
    run_python(
        str(script),
        str(task),
        str(result),
        without="VLLM_ENABLE_V1_MULTIPROCESSING",
        timeout=SECONDS_PER_RUN,
        **variables,
    )
    return Run(*json.loads(result.read_text()))


class Case(NamedTuple):
    """A model whose ranks differ in what they keep.

    Attributes:
        s2: the config's `s2_attention` key.
        shape: other config values.
        num_blocks: by number of ranks, blocks of a pool in which PROMPTS run only with preemption.
    """

    s2: dict[str, Any]
    shape: dict[str, Any]
    num_blocks: dict[int, int]

    def save(self, folder: Path) -> Path:
        """Save a tiny random model in `folder`, and return `folder`."""
        return save_checkpoint(folder, "llama", self.s2, head_dim=64, **self.shape)

    def run(self, ranks: int, folder: Path, scratch: Path, **options: Any) -> Run:
        """Continue PROMPTS; some of the requests are preempted."""
        # Asynchronous scheduling, a GPU's default, reserves window pages for two steps: so few requests would
        # be admitted that hardly one has to be preempted.
        pool = {"num_gpu_blocks_override": self.num_blocks[ranks], "async_scheduling": False}
        run = run_ranks(ranks, folder, PROMPTS, NUM_TOKENS, scratch, **pool, **options)
        assert run.preemptions > 0
        return run


CASES = {
    "kv": Case(
        {"block_size": 32, "local_blocks": 2, "vert_stride": 5, "head_sliding_step": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {1: 20, 2: 20},
    ),
    "query": Case(
        {
            "block_size": 32,
            "local_blocks": 2,
            "vert_stride": 7,
            "head_sliding_step": 1,
            "pattern_heads": "query",
        },
        {"num_attention_heads": 8, "num_key_value_heads": 4},
        {1: 16, 2: 16},
    ),
    # Each rank has the KV head, and keeps of it what its own query heads attend to.
    "one_kv_head": Case(
        {
            "block_size": 32,
            "local_blocks": 2,
            "vert_stride": 6,
            "head_sliding_step": 1,
            "head_sliding_offset": 2,
            "pattern_heads": "query",
        },
        {"num_attention_heads": 4, "num_key_value_heads": 1},
        {1: 13, 2: 16},
    ),
}

PROMPTS = random_prompts([20 + 13 * n for n in range(8)], seed=12)
NUM_TOKENS = 300
"""Enough for a pool that holds all requests at first to be short of pages later."""

ERROR_BOUND = 1e-3
"""The largest difference of two logits that float32 explains."""


def assert_agrees(oracle: Oracle, tokens: list[list[int]]) -> None:
    """No continuation of PROMPTS differs from the oracle's where its margin decides, as it mostly does."""
    agreements = [
        oracle.agreement(prompt, out, ERROR_BOUND) for prompt, out in zip(PROMPTS, tokens, strict=True)
    ]
    assert [mismatch for agreement in agreements for mismatch in agreement.mismatches] == []
    assert sum(a.decided for a in agreements) > 0.9 * sum(a.total for a in agreements)


def first_differences(first: list[list[int]], second: list[list[int]]) -> list[tuple[int, int]]:
    """(prompt, index) of the first token in which two continuations of a prompt differ."""
    return [
        (prompt, next(i for i, pair in enumerate(zip(*both, strict=True)) if pair[0] != pair[1]))
        for prompt, both in enumerate(zip(first, second, strict=True))
        if both[0] != both[1]
    ]


def assert_equal_up_to_near_ties(oracle: Oracle, first: list[list[int]], second: list[list[int]]) -> None:
    """Two continuations of each of PROMPTS part, if at all, where the oracle hardly prefers either token."""
    for prompt, index in first_differences(first, second):
        before = [*PROMPTS[prompt], *first[prompt][:index]]
        logits = oracle.logits(before)[-1]
        margin = abs(float(logits[first[prompt][index]] - logits[second[prompt][index]]))
        assert margin <= ERROR_BOUND, f"prompt {prompt}, token {index}: {margin} apart"
