"""How many long requests fit: the KV cache that vLLM sets up, with and without the pattern.

    python -m benchmarks.kv_capacity

For each reference geometry, starts a vLLM engine twice (the pattern, and every layer dense) with the
same KV cache memory, and records what vLLM itself reports. The models have the geometry's attention
and next to no other weights, which the KV cache does not depend on. Needs a GPU with that much memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.geometries import GEOMETRIES, Geometry
from benchmarks.results_file import write_results

MAX_MODEL_LEN = 131072
GIB = 2**30


def main() -> None:
    parser = argparse.ArgumentParser(description="KV cache capacity of the reference geometries")
    parser.add_argument("--geometries", nargs="+", default=["phi3-small", "hhst-8b", "s2-1.3b", "s2-7b"])
    parser.add_argument("--kv-cache-gib", type=float, default=40)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kv-capacity.json"))
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    records = []
    for name in arguments.geometries:
        for sparse in (True, False):
            record = measure(GEOMETRIES[name], sparse, int(arguments.kv_cache_gib * GIB))
            records.append({"geometry": name, "layers": "s2" if sparse else "dense", **record})
            print(json.dumps(records[-1]), flush=True)
    write_results(arguments.output, records)
    print(table(records))


def measure(geometry: Geometry, sparse: bool, memory: int) -> dict[str, Any]:
    """Start an engine, and take from it what it has set up.

    Args:
        geometry: the model's attention.
        sparse: with the pattern, or every layer dense.
        memory: KV cache bytes.
    """
    import torch
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(geometry.hf_config(sparse)))
        llm = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            kv_cache_memory_bytes=memory,
        )
    engine = llm.llm_engine
    cache = engine.vllm_config.cache_config
    groups = engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    record = {
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_bytes": memory,
        "kv_cache_groups": len(groups),
        "concurrent_requests": cache.kv_cache_max_concurrency,
        "kv_cache_tokens": cache.kv_cache_size_tokens,
        "stored_fraction_sparse_layer": _stored_fraction(geometry) if sparse else 1.0,
    }
    del llm, engine, groups
    cleanup_dist_env_and_memory()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return record


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records, a line per geometry."""
    lines = [
        "| geometry | a sparse layer stores | requests, all layers dense | requests, S2 | KV cache groups |",
        "|---|---|---|---|---|",
    ]
    by_key = {(r["geometry"], r["layers"]): r for r in records}
    for name in dict.fromkeys(r["geometry"] for r in records):
        s2, dense = by_key[name, "s2"], by_key[name, "dense"]
        gain = s2["concurrent_requests"] / dense["concurrent_requests"]
        lines.append(
            f"| {name} | {s2['stored_fraction_sparse_layer']:.1%} | {dense['concurrent_requests']:.2f} "
            f"| {s2['concurrent_requests']:.2f} ({gain:.1f}x) | {s2['kv_cache_groups']} |"
        )
    return "\n".join(lines)


def _stored_fraction(geometry: Geometry) -> float:
    pattern = geometry.config.pattern(geometry.num_heads, geometry.num_kv_heads)
    return pattern.stored_fraction(MAX_MODEL_LEN)


if __name__ == "__main__":
    main()
