"""A server compiles its kernels when it starts, and none because of how a batch is made up."""

from __future__ import annotations

import json

from tests.programs import run_python


def test_one_kernel_for_all_batches() -> None:
    counts = json.loads(run_python("-m", "tests.compiled_kernels", without="TRITON_INTERPRET"))
    # One for heads of one kind, one for those of several, and one where none has a strided set; Hopper's has
    # either for sequences within the window and for longer ones.
    assert counts == {
        "paged_prefill_fwd_kernel": 3,
        "prefill_fwd_kernel": 6,
        "paged_decode_fwd_kernel": 3,
        "paged_decode_combine_kernel": 3,
    }
