"""How many long requests fit: the KV cache that vLLM sets up, with and without the pattern.

    python -m benchmarks.kv_capacity

For each reference geometry, with the same KV cache memory: every layer dense, the pattern, and the pattern
with shorter steps. Groups, blocks and the requests of the longest length that fit are by vLLM's own
functions, on the configuration of an engine and the specs of its layers. vLLM's count has window pages for
the tokens of all steps in flight of every request, so shorter steps let it count more; how many fit while
they decode is the plan's. Needs no GPU.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from typing import Any

from benchmarks.geometries import SERVED, Geometry
from benchmarks.results_file import write_results

MAX_MODEL_LEN = 131072
GIB = 2**30

VARIANTS: dict[str, tuple[bool, int]] = {
    "dense": (False, 16384),
    "s2": (True, 16384),
    "s2, short steps": (True, 2048),
}
"""Name, whether it has the pattern, and max_num_batched_tokens: the `LLM` class's on an H200, or less."""


def main() -> None:
    parser = argparse.ArgumentParser(description="KV cache capacity of the reference geometries")
    parser.add_argument("--geometries", nargs="+", choices=list(SERVED), default=list(SERVED))
    parser.add_argument("--kv-cache-gib", type=_positive, default=40)
    parser.add_argument("--output", type=Path, default=Path("benchmarks/results/kv-capacity.json"))
    arguments = parser.parse_args()
    records = []
    for name in arguments.geometries:
        for variant in VARIANTS:
            record = measure(SERVED[name], variant, int(arguments.kv_cache_gib * GIB))
            records.append({"geometry": name, "variant": variant, **record})
            print(json.dumps(records[-1]), flush=True)
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
    """What vLLM sets up, or why an engine would not start.

    Args:
        geometry: the model's attention.
        variant: a key of VARIANTS.
        memory: KV cache bytes.
    """
    from vllm.v1.core.kv_cache_utils import get_kv_cache_capacity

    from benchmarks.engine_cache import cache_config, engine_config
    from s2_vllm.plan import plan_of

    sparse, batched_tokens = VARIANTS[variant]
    config = engine_config(
        geometry, sparse, max_model_len=MAX_MODEL_LEN, max_num_batched_tokens=batched_tokens
    )
    plan = plan_of(config)
    facts = {
        "max_model_len": MAX_MODEL_LEN,
        "max_num_batched_tokens": batched_tokens,
        "kv_cache_bytes": memory,
        "stored_fraction_sparse_layer": plan.stored_fraction(MAX_MODEL_LEN) if plan else 1.0,
    }
    try:
        cache = cache_config(config, geometry, memory)
    except ValueError as error:
        return facts | {"concurrent_requests": None, "reason": str(error).split(" Based on")[0]}
    tokens, requests = get_kv_cache_capacity(config, cache)
    decoding = cache.num_blocks / plan.blocks_per_request(MAX_MODEL_LEN) if plan else requests
    return facts | {
        "kv_cache_groups": len(cache.kv_cache_groups),
        "concurrent_requests": requests,
        "concurrent_requests_decoding": decoding,
        "kv_cache_tokens": tokens,
    }


def table(records: list[dict[str, Any]]) -> str:
    """A Markdown table of the records, a line per geometry."""
    by_key = {(r["geometry"], r["variant"]): r for r in records}
    names = list(dict.fromkeys(r["geometry"] for r in records))
    steps, short = (VARIANTS[variant][1] for variant in ("s2", "s2, short steps"))
    lines = [
        "| geometry | KV cache groups | a sparse layer stores | all layers dense | S2, while they decode | "
        f"S2, vLLM's count, steps of {steps} tokens | of {short} |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        s2 = by_key[name, "s2"]
        cells = [
            str(s2.get("kv_cache_groups", "")),
            f"{s2['stored_fraction_sparse_layer']:.1%}",
            _requests(by_key[name, "dense"]),
            _requests(s2, "concurrent_requests_decoding"),
            _requests(s2),
            _requests(by_key[name, "s2, short steps"]),
        ]
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _requests(record: dict[str, Any], key: str = "concurrent_requests") -> str:
    return "not even one" if record.get(key) is None else f"{record[key]:.2f}"


if __name__ == "__main__":
    main()
