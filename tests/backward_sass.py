"""Prints the machine code of the kernels for gradients, for a Hopper GPU: JSON, by the kernel's name.

    python -m tests.backward_sass BLOCK_SIZE HEAD_SIZE

A program of its own, because a process in which Triton interprets cannot compile.
"""

from __future__ import annotations

import json
import subprocess
import sys
from tempfile import NamedTemporaryFile
from typing import Any

import torch
import triton
from triton.compiler import ASTSource

from s2_kernels.contiguous.block_sparse_bwd import block_sparse_bwd_configs
from s2_kernels.contiguous.block_sparse_bwd_dkdv import block_sparse_bwd_dkdv_kernel
from s2_kernels.contiguous.block_sparse_bwd_dq import block_sparse_bwd_dq_kernel
from s2_kernels.launch.limits import padded_head_size
from tests.hopper_sass import HOPPER

KERNELS = {"dq": block_sparse_bwd_dq_kernel, "dkdv": block_sparse_bwd_dkdv_kernel}
CONSTANTS: dict[str, dict[str, int]] = {
    "dq": {"NUM_HEADS": 32, "GROUP_SIZE": 4, "MASK_GROUP_SIZE": 4, "TILE_FIELDS": 7, "GROUP_FIELDS": 7},
    "dkdv": {"NUM_KV_HEADS": 8, "GROUP_SIZE": 4, "TILE_FIELDS": 6, "VISIT_FIELDS": 5},
}
INPUTS = ("q", "k", "v", "d_out", "dq", "dk", "dv")


def argument_type(name: str) -> str:
    if name in INPUTS:
        return "*bf16"
    if name in ("lse", "delta"):
        return "*fp32"
    if name in ("groups", "visits"):
        return "*i64"
    if name.startswith("scale"):
        return "fp32"
    if name.startswith("num_"):
        return "i32"
    return "i64" if "stride" in name else "*i32"


def compile_for_hopper(kernel: str, block_size: int, head_size: int) -> str:
    """The machine code, disassembled, of the kernel as it is launched where no table says otherwise."""
    padded = padded_head_size(head_size)
    configs = dict(zip(KERNELS, block_sparse_bwd_configs(padded, torch.bfloat16, block_size), strict=True))
    config = configs[kernel]
    options = {name: config.pop(name) for name in ("num_warps", "num_stages")}
    shape = {"HEAD_SIZE": head_size, "HEAD_PADDED": padded, "BLOCK_SIZE": block_size, "CAUSAL": True}
    constants: dict[str, Any] = {**CONSTANTS[kernel], **shape, **config}
    names = KERNELS[kernel].arg_names
    signature = {name: "constexpr" if name in constants else argument_type(name) for name in names}
    aligned = [n for n, name in enumerate(names) if name in INPUTS or "_stride_" in name]
    source = ASTSource(
        KERNELS[kernel],
        signature,
        {(names.index(name),): value for name, value in constants.items()},
        {(n,): [["tt.divisibility", 16]] for n in aligned},
    )
    compiled = triton.compile(source, target=HOPPER, options=options)
    with NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = (triton.knobs.nvidia.nvdisasm.path, "--print-code", file.name)
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout


if __name__ == "__main__":
    print(json.dumps({kernel: compile_for_hopper(kernel, *map(int, sys.argv[1:3])) for kernel in KERNELS}))
