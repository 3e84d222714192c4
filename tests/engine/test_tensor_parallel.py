"""Two tensor-parallel ranks on the CPU: each keeps the residues of its own heads."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from s2_kernels.pattern import S2Pattern
from tests.engine.checkpoints import random_prompts
from tests.engine.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

CORES = sorted(os.sched_getaffinity(0))
S2 = {
    "block_size": 16,
    "local_blocks": 2,
    "vert_stride": 7,
    "pattern_heads": "query",
    "dense_layers": [1],
}
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


@pytest.mark.skipif(len(CORES) < 2, reason="vLLM wants a CPU core for each rank")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")
def test_two_ranks_give_the_oracles_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    folder = checkpoint("llama", S2, **heads)
    pattern = S2Pattern.build(8, 4, block_size=16, local_blocks=2, vert_stride=7, pattern_heads="query")
    assert pattern.shard(0, 2).residues != pattern.shard(1, 2).residues
    prompts = random_prompts([5, 150, 300], seed=11)

    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    environment = {k: v for k, v in os.environ.items() if k != "VLLM_ENABLE_V1_MULTIPROCESSING"}
    environment["VLLM_CPU_OMP_THREADS_BIND"] = f"{CORES[0]}|{CORES[1]}"
    done = subprocess.run(
        [sys.executable, str(script), str(folder), str(prompts)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    oracle = Oracle(folder)
    assert f"tokens {[oracle.greedy(prompt, 10)[0] for prompt in prompts]}" in done.stdout
