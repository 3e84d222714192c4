"""The host's time for a sparse layer of an engine's step, outside CUDA graphs.

    python -m benchmarks.eager_layer

Each batch goes through the layers of a step, as an engine calls them: with every layer's call made for itself
(`s2_kernels.paged.write` and `attend`), and prepared once for the step (`PagedStep`). For scale, the two
calls that vLLM's FlashAttention backend makes for a dense layer, where vLLM is installed. The GPU is kept
busy meanwhile, so that nothing but the host counts. Needs a GPU.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, NamedTuple

import torch

from benchmarks.geometries import GEOMETRIES
from benchmarks.results_file import write_results
from s2_kernels import paged
from s2_kernels.layout import TierLayout, head_tables
from s2_kernels.paged import LayerHeads, PagedRequests, PagedStep
from s2_vllm.cli import positive_int

LAYERS, PAGES, HEAD_SIZE = 30, 256, 128
SCALE = HEAD_SIZE**-0.5
BUSY_CYCLES = 400_000_000
"""Of the GPU's clock: some 0.2 s, longer than the host takes for a step."""
GEOMETRY_NAMES = ("s2-7b", "phi3-small")
BATCHES = {
    "prefill-512": [(0, 512)],
    "prefill-2048": [(0, 2048)],
    "decodes-64": [(2000, 1)] * 64,
    "mixed-63-and-512": [(2000, 1)] * 63 + [(0, 512)],
}
"""(context, queries) of each request; decodes first."""


class Layer(NamedTuple):
    """What differs from layer to layer of a step."""

    q: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    window_cache: torch.Tensor
    strided_cache: torch.Tensor
    out: torch.Tensor


class Batch(NamedTuple):
    """What the layers of a step share."""

    window_table: torch.Tensor
    strided_table: torch.Tensor
    window_slots: torch.Tensor
    strided_slots: torch.Tensor
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.eager_layer", description=__doc__)
    parser.add_argument("--repetitions", type=positive_int, default=15)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/eager-layer.json"))
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        print("benchmarks.eager_layer: no CUDA GPU found, expected one", file=sys.stderr)
        return 2
    records = [
        {"geometry": geometry, "batch": batch, "layers": LAYERS, **measure(geometry, batch, arguments)}
        for geometry in GEOMETRY_NAMES
        for batch in BATCHES
    ]
    write_results(arguments.output, records)
    print(table(records))
    return 0


def measure(geometry: str, name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Median microseconds of host time per layer, each way."""
    pattern = GEOMETRIES[geometry].pattern
    requests = BATCHES[name]
    # Not for the calls: a default device is paid for in every call of torch.
    with torch.device("cuda"):
        batch = make_batch(requests, TierLayout(pattern, pattern.num_kept * pattern.block_size))
        layers = [make_layer(pattern, len(batch.window_slots)) for _ in range(4)]
        ways = {
            "each_call_us": each_call(batch, layers, pattern, requests),
            "step_us": prepared_step(batch, layers, pattern, requests),
            "dense_us": dense(batch, layers, pattern, requests),
        }
    times: dict[str, list[float]] = {way: [] for way in ways}
    for repetition in range(arguments.repetitions + 3):
        for way, run in ways.items():
            if run is None:
                continue
            torch.cuda._sleep(BUSY_CYCLES)
            start = perf_counter()
            run()
            seconds = perf_counter() - start
            torch.cuda.synchronize()
            if repetition >= 3:  # warm by now
                times[way].append(seconds / LAYERS * 1e6)
    return {way: round(median(t), 1) if t else None for way, t in times.items()}


def make_batch(requests: list[tuple[int, int]], layout: TierLayout) -> Batch:
    """Block tables into a small pool, whose contents do not matter here."""
    lengths = [context + queries for context, queries in requests]
    tokens = sum(queries for _, queries in requests)
    pages = -(-max(lengths) // layout.page_slots)

    def integers(values: list[int]) -> torch.Tensor:
        return torch.tensor(values, dtype=torch.int32)

    starts = torch.tensor([0, *(queries for _, queries in requests)]).cumsum(0).to(torch.int32)
    return Batch(
        torch.randint(1, PAGES, (len(requests), pages), dtype=torch.int32),
        torch.randint(1, PAGES, (len(requests), pages), dtype=torch.int32),
        torch.randperm((PAGES - 1) * layout.page_slots)[:tokens] + layout.page_slots,
        torch.randperm((PAGES - 1) * layout.strided_page_tokens)[:tokens] + layout.strided_page_tokens,
        starts,
        integers(lengths),
    )


def make_layer(pattern: Any, tokens: int) -> Layer:
    """Queries, keys and values as views of one projection, as models have them."""
    dtype = torch.bfloat16
    q_size, kv_size = pattern.num_heads * HEAD_SIZE, pattern.num_kv_heads * HEAD_SIZE
    q, key, value = torch.randn(tokens, q_size + 2 * kv_size, dtype=dtype).split(
        [q_size, kv_size, kv_size], dim=-1
    )
    slots = pattern.num_kept * pattern.block_size
    caches = [torch.randn(PAGES, pattern.num_kv_heads, slots, 2 * HEAD_SIZE, dtype=dtype) for _ in range(2)]
    return Layer(
        q.view(tokens, -1, HEAD_SIZE),
        key.view(tokens, -1, HEAD_SIZE),
        value.view(tokens, -1, HEAD_SIZE),
        *caches,
        torch.empty(tokens, pattern.num_heads, HEAD_SIZE, dtype=dtype),
    )


def each_call(
    batch: Batch, layers: list[Layer], pattern: Any, requests: list[tuple[int, int]]
) -> Callable[[], None]:
    """Every layer writes and attends for itself."""
    decodes = sum(queries == 1 for _, queries in requests)
    max_seq_len = max(map(sum, requests))

    def run() -> None:
        later_starts = batch.query_start_loc[decodes:] - decodes
        for n in range(LAYERS):
            q, key, value, *caches, out = layers[n % len(layers)]
            paged.write(key, value, *caches, batch.window_slots, batch.strided_slots, pattern)
            all_requests = PagedRequests(
                *caches, batch.window_table, batch.strided_table, batch.query_start_loc, batch.seq_lens
            )
            if decodes:
                first = all_requests.first(decodes)
                paged.attend(q[:decodes], first, pattern, SCALE, out[:decodes], max_query_len=1)
            if decodes < len(requests):
                others = all_requests.after(decodes, later_starts)
                paged.attend(q[decodes:], others, pattern, SCALE, out[decodes:], max_seq_len=max_seq_len)

    return run


def prepared_step(
    batch: Batch, layers: list[Layer], pattern: Any, requests: list[tuple[int, int]]
) -> Callable[[], None]:
    """A step, whose first layer prepares the calls of all."""
    decodes = sum(queries == 1 for _, queries in requests)
    tables = head_tables(pattern, torch.empty(0).device)
    heads = LayerHeads(pattern, SCALE, None)

    def run() -> None:
        step = PagedStep(
            *batch,
            num_tokens=len(batch.window_slots),
            num_decodes=decodes,
            num_decode_tokens=decodes,
            max_seq_len=max(map(sum, requests)),
        )
        for n in range(LAYERS):
            step.run_layer(*layers[n % len(layers)], heads, tables)

    return run


def dense(
    batch: Batch, layers: list[Layer], pattern: Any, requests: list[tuple[int, int]]
) -> Callable[[], None] | None:
    """vLLM's FlashAttention calls for the same batch, None without vLLM's CUDA build."""
    try:
        from vllm import _custom_ops as ops
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return None
    cache = torch.randn(PAGES, 2, 16, pattern.num_kv_heads, HEAD_SIZE, dtype=torch.bfloat16)
    k_cache, v_cache = cache.unbind(1)
    longest = max(map(sum, requests))
    block_table = torch.randint(1, PAGES, (len(requests), -(-longest // 16)), dtype=torch.int32)
    slots = torch.randperm(PAGES * 16)[: len(batch.window_slots)]
    one = torch.ones(1)
    max_queries = max(queries for _, queries in requests)

    def run() -> None:
        for n in range(LAYERS):
            q, key, value, _, _, out = layers[n % len(layers)]
            ops.reshape_and_cache_flash(key, value, k_cache, v_cache, slots, "auto", one, one)
            flash_attn_varlen_func(
                q=q,
                k=k_cache,
                v=v_cache,
                out=out,
                cu_seqlens_q=batch.query_start_loc,
                max_seqlen_q=max_queries,
                seqused_k=batch.seq_lens,
                max_seqlen_k=longest,
                softmax_scale=SCALE,
                causal=True,
                block_table=block_table,
                fa_version=3,
            )

    return run


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records."""
    lines = ["| geometry | batch | every call | prepared step | dense |", "|---|---|---|---|---|"]
    for r in records:
        dense_us = "-" if r["dense_us"] is None else f"{r['dense_us']:.0f} µs"
        lines.append(
            f"| {r['geometry']} | {r['batch']} | {r['each_call_us']:.0f} µs | {r['step_us']:.0f} µs "
            f"| {dense_us} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
