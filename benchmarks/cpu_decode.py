"""A decode step of one attention layer on the CPU: the pattern against full attention.

    python -m benchmarks.cpu_decode

A step writes one token to the cache and attends to a long context. Full attention takes the same code
path, with a local window that covers the context. Steps of both kinds alternate, so that whatever else
the machine does affects both; the medians are reported. Needs no GPU.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any

import torch

from benchmarks.geometries import GEOMETRIES
from benchmarks.results_file import write_results
from s2_kernels import paged
from s2_kernels.layout import TierLayout
from s2_kernels.paged import PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import attention_reference
from s2_vllm.cli import positive_int

HEAD_SIZE = 128
SCALE = HEAD_SIZE**-0.5
PATTERNS = {name: GEOMETRIES[name].pattern for name in ("hhst-8b", "phi3-small")}
TOLERANCES = {torch.float32: 5e-6, torch.bfloat16: 1e-4}

Step = Callable[[], torch.Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description="decode step of one attention layer on the CPU")
    parser.add_argument("--context", type=positive_int, default=32768, help="tokens, the new one included")
    parser.add_argument("--repetitions", type=positive_int, default=50)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/cpu-decode.json"))
    arguments = parser.parse_args()
    records = []
    for name, pattern in PATTERNS.items():
        for dtype in TOLERANCES:
            record = measure(pattern, arguments.context, dtype, arguments.repetitions)
            records.append({"geometry": name, **record})
    write_results(arguments.output, records)
    print(table(records))


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records."""
    lines = ["| geometry | dtype | sparse | full | sparse / full |", "|---|---|---|---|---|"]
    lines += [
        f"| {r['geometry']} | {r['dtype']} | {r['sparse_ms']:.1f} ms | {r['full_ms']:.1f} ms "
        f"| {r['ratio']:.2f} |"
        for r in records
    ]
    return "\n".join(lines)


def measure(pattern: S2Pattern, context: int, dtype: torch.dtype, repetitions: int) -> dict[str, Any]:
    """Median times of a sparse and of a full step, in milliseconds, after checking both results."""
    full = replace(pattern, local_blocks=-(-context // pattern.block_size))
    steps = [prepare_step(p, context, dtype) for p in (pattern, full)]
    times: tuple[list[float], list[float]] = ([], [])
    for _ in range(repetitions):
        for step, measured in zip(steps, times, strict=True):
            start = perf_counter()
            step()
            measured.append((perf_counter() - start) * 1e3)
    sparse_ms, full_ms = map(median, times)
    return {
        "context": context,
        "dtype": str(dtype).removeprefix("torch."),
        "threads": torch.get_num_threads(),
        "repetitions": repetitions,
        "sparse_ms": round(sparse_ms, 3),
        "full_ms": round(full_ms, 3),
        "ratio": round(sparse_ms / full_ms, 4),
    }


def prepare_step(pattern: S2Pattern, context: int, dtype: torch.dtype) -> Step:
    """A decode step on caches that hold `context` random tokens, on pages in random order.

    Raises:
        AssertionError: the step's result is not that of attention over contiguous keys.
    """
    generator = torch.Generator().manual_seed(0)

    def randn(tokens: int, heads: int) -> torch.Tensor:
        return torch.randn(tokens, heads, HEAD_SIZE, generator=generator).to(dtype)

    q, k, v = randn(1, pattern.num_heads), *(randn(context, pattern.num_kv_heads) for _ in range(2))
    layout = TierLayout(pattern, pattern.num_kept * pattern.block_size)
    positions = torch.arange(context)
    caches, tables, slots = [], [], []
    for span in (layout.window_page_tokens, layout.strided_page_tokens):
        table = torch.randperm(-(-context // span), generator=generator)
        shape = (len(table), pattern.num_kv_heads, layout.page_slots, 2 * HEAD_SIZE)
        caches.append(torch.full(shape, torch.nan, dtype=dtype))
        tables.append(table.int()[None])
        slots.append(table[positions // span] * span + positions % span)
    paged.write(k, v, *caches, *slots, pattern)
    new_slots = [mapping[-1:] for mapping in slots]
    lengths = (torch.tensor(values, dtype=torch.int32) for values in ([0, 1], [context]))
    requests = PagedRequests(*caches, *tables, *lengths)
    out = torch.empty_like(q)

    def step() -> torch.Tensor:
        paged.write(k[-1:], v[-1:], *caches, *new_slots, pattern)
        paged.attend(q, requests, pattern, SCALE, out)
        return out

    expected = attention_reference(q, k, v, pattern, SCALE, [0, 1], [0, context])
    torch.testing.assert_close(step(), expected, atol=TOLERANCES[dtype], rtol=2 * torch.finfo(dtype).eps)
    return step


if __name__ == "__main__":
    main()
