"""How many long requests fit: the KV cache that vLLM sets up, with and without the pattern.

    python -m benchmarks.kv_capacity

For each reference geometry, starts vLLM engines with the same KV cache memory: every layer dense, the
pattern, and the pattern with shorter steps. Records what vLLM itself reports: requests of the longest
length that fit. With a window tier vLLM reserves pages for the tokens of all steps in flight, so shorter
steps let more requests in. The models have the geometry's attention and next to no other weights, which
the KV cache does not depend on. Needs a GPU with that much memory.
"""

from __future__ import annotations

import argparse
import gc
import json
import math
import os
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.geometries import GEOMETRIES, SERVED, Geometry
from benchmarks.results_file import write_results

MAX_MODEL_LEN = 131072
SHORT_STEP = 2048
GIB = 2**30

VARIANTS: dict[str, tuple[bool, int | None]] = {
    "dense": (False, None),
    "s2": (True, None),
    "s2, short steps": (True, SHORT_STEP),
}
"""Name, whether it has the pattern, and max_num_batched_tokens (None: vLLM's default)."""


def main() -> None:
    parser = argparse.ArgumentParser(description="KV cache capacity of the reference geometries")
    parser.add_argument("--geometries", nargs="+", choices=list(GEOMETRIES), default=list(SERVED))
    parser.add_argument("--kv-cache-gib", type=_positive, default=40)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kv-capacity.json"))
    arguments = parser.parse_args()
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    records = []
    for name in arguments.geometries:
        for variant in VARIANTS:
            record = measure(GEOMETRIES[name], variant, int(arguments.kv_cache_gib * GIB))
            records.append({"geometry": name, "variant": variant, **record})
            print(json.dumps(records[-1]), flush=True)
            # At once: a run that ends early leaves what it has measured.
            write_results(arguments.output, records)
    print(table(records))


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return value


def measure(geometry: Geometry, variant: str, memory: int) -> dict[str, Any]:
    """Start an engine, and take from it what it has set up, or why it would not start.

    Args:
        geometry: the model's attention.
        variant: a key of VARIANTS.
        memory: KV cache bytes.
    """
    import torch
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    sparse, batched_tokens = VARIANTS[variant]
    facts = {
        "max_model_len": MAX_MODEL_LEN,
        "kv_cache_bytes": memory,
        "stored_fraction_sparse_layer": geometry.pattern.stored_fraction(MAX_MODEL_LEN) if sparse else 1.0,
    }
    try:
        return facts | _start(geometry.hf_config(sparse), memory, batched_tokens)
    except ValueError as error:
        return facts | {"concurrent_requests": None, "reason": str(error).split(" Based on")[0]}
    finally:
        cleanup_dist_env_and_memory()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _start(hf_config: dict[str, Any], memory: int, batched_tokens: int | None) -> dict[str, Any]:
    from vllm import LLM

    with tempfile.TemporaryDirectory() as folder:
        Path(folder, "config.json").write_text(json.dumps(hf_config))
        engine = LLM(
            folder,
            load_format="dummy",
            skip_tokenizer_init=True,
            enforce_eager=True,
            max_model_len=MAX_MODEL_LEN,
            max_num_batched_tokens=batched_tokens,
            kv_cache_memory_bytes=memory,
        ).llm_engine
    config = engine.vllm_config
    groups = engine.engine_core.engine_core.scheduler.kv_cache_config.kv_cache_groups
    record = {
        "max_num_batched_tokens": config.scheduler_config.max_num_batched_tokens,
        "kv_cache_groups": len(groups),
        "concurrent_requests": config.cache_config.kv_cache_max_concurrency,
        "kv_cache_tokens": config.cache_config.kv_cache_size_tokens,
    }
    engine.engine_core.shutdown()
    return record


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records, a line per geometry."""
    by_key = {(r["geometry"], r["variant"]): r for r in records}
    names = list(dict.fromkeys(r["geometry"] for r in records))
    steps = {r["variant"]: r["max_num_batched_tokens"] for r in records if "max_num_batched_tokens" in r}
    lines = [
        "| geometry | a sparse layer stores | all layers dense | "
        f"S2, {_steps(steps, 's2')} | S2, {_steps(steps, 's2, short steps')} |",
        "|---|---|---|---|---|",
    ]
    for name in names:
        fraction = by_key[name, "s2"]["stored_fraction_sparse_layer"]
        cells = [_requests(by_key[name, variant]) for variant in VARIANTS]
        lines.append(f"| {name} | {fraction:.1%} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _steps(tokens: dict[str, int], variant: str) -> str:
    """What a variant's steps were; unknown when none of its engines started."""
    return f"steps of {tokens[variant]} tokens" if variant in tokens else "no engine started"


def _requests(record: dict[str, Any]) -> str:
    count = record["concurrent_requests"]
    return "not even one" if count is None else f"{count:.2f}"


if __name__ == "__main__":
    main()
