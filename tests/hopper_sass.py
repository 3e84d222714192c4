"""Prints the machine code of the Hopper prefill kernel for constants given as JSON.

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

from s2_kernels.hopper.prefill import SWIZZLED, prefill_fwd_kernel

HOPPER = GPUTarget("cuda", 90, 32)
INT32_TENSORS = (
    "window_table",
    "strided_table",
    "query_start_loc",
    "key_start_loc",
    "seq_lens",
    "residues",
    "ranks",
)
DESCRIPTORS = ("window_keys", "window_values", "strided_keys", "strided_values")
INT64 = ("out_stride_token", "out_stride_head", "lse_stride_token")


def compile_for_hopper(dtype: str, **constants: Any) -> str:
    """The machine code, disassembled, for arguments of a dtype and some compile-time constants."""
    constants = {"lse": None, "LOCAL_BLOCKS": 16, "VERT_STRIDE": 8, "STAGES": 2, **constants}
    head_size = constants["HEAD_SIZE"]
    signature = {}
    for name in prefill_fwd_kernel.arg_names:
        if name in constants:
            signature[name] = "constexpr"
        elif name == "queries":
            signature[name] = f"tensordesc<{dtype}[64,{head_size}],{SWIZZLED!r}>"
        elif name in DESCRIPTORS:
            signature[name] = f"tensordesc<{dtype}[64,64],{SWIZZLED!r}>"
        elif name in INT32_TENSORS:
            signature[name] = "*i32"
        elif name in ("out", "lse"):
            signature[name] = f"*{dtype}" if name == "out" else "*fp32"
        elif name == "scale_log2":
            signature[name] = "fp32"
        else:
            signature[name] = "i64" if name in INT64 else "i32"
    names = list(signature)
    source = GluonASTSource(
        prefill_fwd_kernel,
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(n,): [["tt.divisibility", 16]] for n, name in enumerate(names) if name in ("out", *INT64)},
    )
    compiled = triton.compile(source, target=HOPPER, options={"num_warps": 4})
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = (triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(compile_for_hopper(**json.loads(sys.argv[1])))
