"""Prints how many times an engine's batches would have each attention kernel compiled, for a Hopper GPU.

A program of its own, because a process in which Triton interprets cannot tell. Nothing is compiled or run.
"""

from __future__ import annotations

import json
from itertools import product
from typing import Any
from unittest.mock import patch

import torch
from triton.compiler.compiler import make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from s2_kernels import hopper, paged
from s2_kernels.hopper import prefill as hopper_prefill
from s2_kernels.launch import limits
from s2_kernels.launch.choice import Impl
from s2_kernels.layout import TierLayout
from s2_kernels.paged import decode
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern
from tests.hopper_sass import HOPPER

BACKEND = make_backend(HOPPER)
PATTERNS = [
    S2Pattern.build(8, 4, local_blocks=4, vert_stride=vert_stride, full_heads=full_heads)
    for vert_stride, full_heads in [(8, []), (8, [0]), (8, [2]), (8, [1, 2, 3]), (None, []), (None, [1])]
]
LENGTHS = (4 * 64, 4 * 64 + 1)
DECODES = (65, 100, decode.MIN_REQUESTS_PADDED)
"""Requests of a step: as many as share a compiled kernel."""


def serve_prefills(
    impl: Impl,
    pattern: S2Pattern,
    num_decodes: int,
    num_prefills: int,
    table_width: int,
    max_seq_len: int,
) -> None:
    """Launch the prefill of a step as the engine does: its requests are the last ones of the step's."""
    total = num_decodes + num_prefills
    table = torch.zeros(total, table_width, dtype=torch.int32)[num_decodes:]
    lengths = torch.full((total,), max_seq_len, dtype=torch.int32)[num_decodes:]
    starts = torch.arange(num_prefills + 1, dtype=torch.int32) * 7
    q = torch.zeros(num_decodes + num_prefills * 7, 8, 64, dtype=torch.bfloat16)[num_decodes:]
    requests = PagedRequests(*caches(pattern), table, table, starts, lengths)
    paged.attend(q, requests, pattern, 0.125, torch.empty_like(q), max_seq_len=max_seq_len, impl=impl)


def serve_decodes(pattern: S2Pattern, num_requests: int) -> None:
    """Launch the decodes of a step."""
    table = torch.zeros(num_requests, 16, dtype=torch.int32)
    starts = torch.arange(num_requests + 1, dtype=torch.int32)
    q = torch.zeros(num_requests, 8, 64, dtype=torch.bfloat16)
    requests = PagedRequests(*caches(pattern), table, table, starts, starts[1:])
    paged.attend(q, requests, pattern, 0.125, torch.empty_like(q), max_query_len=1, impl="triton")


def caches(pattern: S2Pattern) -> tuple[torch.Tensor, torch.Tensor]:
    """Pages of both tiers."""
    layout = TierLayout(pattern, 64, 64)
    shapes = (4, 64), layout.strided_shape
    window, strided = (torch.zeros(3, *shape, 128, dtype=torch.bfloat16) for shape in shapes)
    return window, strided


def count_compiled() -> dict[str, int]:
    """Distinct compilations of each kernel, by what Triton tells them apart by."""
    compiled: dict[str, set[str]] = {}

    def record(kernel: JITFunction[Any], *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> None:
        bind = create_function_from_signature(kernel.signature, kernel.params, BACKEND)
        bound, specialization, options = bind(*args, **kwargs)
        constants = [bound[p.name] for p in kernel.params if p.is_constexpr]
        compiled.setdefault(kernel.__name__, set()).add(str((specialization, constants, options)))

    with (
        patch.object(JITFunction, "run", record),
        patch.object(hopper_prefill, "num_multiprocessors", lambda _: 132),
        patch.object(decode, "num_multiprocessors", lambda _: 132),
        patch.object(hopper, "refusal", lambda *_, **__: None),
        patch.object(limits, "refusal", lambda *_, **__: None),
    ):
        for call in product(("triton", "hopper"), PATTERNS, range(5), (1, 2, 16, 17), (1, 16, 33), LENGTHS):
            serve_prefills(*call)
        for pattern, num_requests in product(PATTERNS, DECODES):
            serve_decodes(pattern, num_requests)
    return {name: len(kinds) for name, kinds in compiled.items()}


if __name__ == "__main__":
    print(json.dumps(count_compiled()))
