"""Two tensor-parallel ranks on the CPU: an even KV head on one, an odd one on the other."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
import torch

from tests.engine.test_tensor_parallel import CORES, SCRIPT
from tests.phi3_small.checkpoints import random_prompts
from tests.phi3_small.oracle import Oracle

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path


@pytest.mark.skipif(len(CORES) < 2, reason="vLLM wants a CPU core for each rank")
@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU build")
def test_two_ranks_give_the_oracles_tokens(checkpoint: Callable[..., Path], tmp_path: Path) -> None:
    """Their KV heads keep different residues; fused QKV, interleaved MLP and tied embeddings are divided."""
    folder = checkpoint()
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
