"""A vLLM engine of two tensor-parallel ranks on the CPU, in processes of its own."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import pytest
import torch

from tests.programs import run_python

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))
NUM_TOKENS = 10
SCRIPT = """
import json, sys
from vllm import LLM, SamplingParams
if __name__ == "__main__":
    folder, prompts = sys.argv[1], json.loads(sys.argv[2])
    llm = LLM(folder, tensor_parallel_size=2, skip_tokenizer_init=True, dtype="float32", enforce_eager=True,
              max_model_len=512, max_num_batched_tokens=77, num_gpu_blocks_override=200,
              kv_cache_memory_bytes=1 << 28)
    params = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True, detokenize=False)
    outputs = llm.generate([{"prompt_token_ids": p} for p in prompts], params, use_tqdm=False)
    print("tokens", [list(output.outputs[0].token_ids) for output in outputs])
"""


def needs_two_cores(test: object) -> object:
    """Marks a test that starts two ranks on the CPU."""
    test = pytest.mark.skipif(len(CORES) < 2, reason="vLLM wants a CPU core for each rank")(test)
    return pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")(test)


def output_of_two_ranks(folder: Path, prompts: Sequence[Sequence[int]], scratch: Path) -> str:
    """What a script prints that continues `prompts` greedily: "tokens" and a list for each prompt.

    Args:
        folder: of the checkpoint.
        prompts: token ids.
        scratch: a folder for the script; spawned ranks import it again.
    """
    script = scratch / "script.py"
    script.write_text(SCRIPT)
    return run_python(
        str(script),
        str(folder),
        str([list(prompt) for prompt in prompts]),
        without="VLLM_ENABLE_V1_MULTIPROCESSING",
        timeout=300,
        VLLM_CPU_OMP_THREADS_BIND=f"{CORES[0]}|{CORES[1]}",
    )
