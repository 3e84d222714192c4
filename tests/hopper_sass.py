"""Prints the machine code of a Hopper kernel for constants given as JSON.

A program of its own, because a process in which Triton interprets cannot compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from tempfile import NamedTemporaryFile
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.experimental.gluon._runtime import GluonASTSource

from s2_kernels.hopper.key_gradients import key_gradients_bwd_kernel
from s2_kernels.hopper.key_items import ITEM_FIELDS
from s2_kernels.hopper.prefill import SWIZZLED, prefill_fwd_kernel
from s2_kernels.hopper.query_gradients import query_gradients_bwd_kernel

HOPPER = GPUTarget("cuda", 90, 32)
KERNELS = {
    "prefill": prefill_fwd_kernel,
    "key_gradients": key_gradients_bwd_kernel,
    "query_gradients": query_gradients_bwd_kernel,
}
HEAD_BLOCKS = ("queries", "d_out", "keys", "values")
PANELS = ("window_keys", "window_values", "strided_keys", "strided_values")
"""TMA descriptors: of 64 rows of a head, and of 64 of its columns."""
POINTERS = {
    **dict.fromkeys(("window_table", "strided_table", "query_start_loc", "key_start_loc"), "*i32"),
    **dict.fromkeys(("seq_lens", "row_starts", "residues", "ranks", "items"), "*i32"),
    **dict.fromkeys(("first_kept", "by_work"), "*i32"),
    **dict.fromkeys(("lse", "row_lse", "row_delta"), "*fp32"),
}
OUTPUTS = ("out", "d_keys", "d_values", "d_queries")
OF_KINDS = ("first_kept", "by_work", "num_streaming", "first_full", "full_per_section")
"""What the prefill kernel has arguments for where heads are of several kinds."""


def type_of(name: str, dtype: str, head_size: int) -> str:
    """The type of a kernel's argument, as Triton spells it."""
    if name in HEAD_BLOCKS:
        return f"tensordesc<{dtype}[64,{head_size}],{SWIZZLED!r}>"
    if name in PANELS:
        return f"tensordesc<{dtype}[64,64],{SWIZZLED!r}>"
    if name in OUTPUTS:
        return f"*{dtype}"
    if name.startswith("scale"):
        return "fp32"
    is_64_bit = "_stride_" in name and "table" not in name
    return POINTERS.get(name, "i64" if is_64_bit else "i32")


def compile_for_hopper(kernel: str, dtype: str, **constants: Any) -> str:
    """The machine code, disassembled, for arguments of a dtype and some compile-time constants."""
    function = KERNELS[kernel]
    constants = {
        "lse": None,
        **({} if constants.get("KINDS") else dict.fromkeys(OF_KINDS)),
        "LOCAL_BLOCKS": 16,
        "VERT_STRIDE": 8,
        "STAGES": 2,
        "NUM_KEPT": 1,
        "RESIDUE_SLOTS": 64,
        "KINDS": False,
        "SINK_BLOCKS": 0,
        "ITEM_FIELDS": ITEM_FIELDS,
        **constants,
    }
    constants = {name: value for name, value in constants.items() if name in function.arg_names}
    signature = {
        name: "constexpr" if name in constants else type_of(name, dtype, constants["HEAD_SIZE"])
        for name in function.arg_names
    }
    names = list(signature)
    source = GluonASTSource(
        function,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {
            (n,): [["tt.divisibility", 16]]
            for n, name in enumerate(names)
            if name in OUTPUTS or signature[name] in ("i64", "*fp32")
        },
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": 4})
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = (triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(compile_for_hopper(**json.loads(sys.argv[1])))
