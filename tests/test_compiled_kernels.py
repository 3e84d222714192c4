"""A server compiles its kernels when it starts, and none because of how a batch is made up."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def test_one_prefill_kernel_for_all_batches() -> None:
    finished = subprocess.run(
        [sys.executable, "-m", "tests.compiled_kernels"],
        env={name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"},
        cwd=Path(__file__).parent.parent,
        capture_output=True,
        text=True,
        check=False,
    )
    assert finished.returncode == 0, finished.stderr
    # Hopper's has one for sequences within the window and one for longer ones.
    assert json.loads(finished.stdout) == {"paged_prefill_fwd_kernel": 1, "prefill_fwd_kernel": 2}
