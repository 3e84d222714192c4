"""The `s2-vllm` command: what a pattern costs and how it looks. Needs no GPU, no weights and no vLLM."""

from __future__ import annotations

import argparse
import json
import re
import sys
from pathlib import Path
from typing import Any

from s2_vllm.config import KEY, S2Config, S2ConfigError, find_config
from s2_vllm.plan import CachePlan, ModelGeometry, make_plan

DTYPE_BYTES = {"float32": 4, "float16": 2, "bfloat16": 2}
# With asynchronous scheduling, its default on a GPU, vLLM has two steps in flight at a time.
STEPS_IN_FLIGHT = 2
UNITS = {"": 1, "KB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 after an error that one line explains."""
    arguments = _parser().parse_args(argv)
    try:
        arguments.run(arguments)
    except (S2ConfigError, OSError) as error:
        print(f"s2-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="s2-vllm", description="S2-Attention patterns and KV cache plans.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="the KV cache that vLLM will set up for a model")
    plan.add_argument("model", metavar="CONFIG_OR_DIR", type=Path, help="config.json, or its folder")
    plan.add_argument("--max-model-len", type=positive_int, metavar="N", help="default: the model's")
    plan.add_argument("--kv-cache-memory", type=_bytes, default=_bytes("40GiB"), metavar="SIZE")
    plan.add_argument("--tensor-parallel-size", type=positive_int, default=1, metavar="T")
    plan.add_argument("--max-num-batched-tokens", type=positive_int, default=8192, metavar="N")
    plan.add_argument("--block-size", type=positive_int, metavar="N", help="as for vllm serve")
    plan.add_argument("--dtype", choices=["auto", *DTYPE_BYTES], default="auto")
    plan.add_argument("--hf-overrides", type=_overrides, default={}, metavar="JSON")
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(run=_plan)
    show = commands.add_parser("show", help="draw the pattern, one panel per head")
    show.add_argument("model", metavar="CONFIG_OR_DIR", type=Path)
    show.add_argument("-o", "--output", type=Path, default=Path("pattern.png"), metavar="FILE")
    show.add_argument("--num-blocks", type=positive_int, metavar="N")
    show.add_argument("--hf-overrides", type=_overrides, default={}, metavar="JSON")
    show.set_defaults(run=_show)
    return parser


def _plan(arguments: argparse.Namespace) -> None:
    raw = _read(arguments.model, arguments.hf_overrides)
    config, model = _config_of(raw), _geometry_of(raw, arguments.dtype)
    plan = make_plan(config, model, arguments.tensor_parallel_size, arguments.block_size)
    if arguments.max_model_len is None and raw.get("max_position_embeddings") is None:
        raise S2ConfigError("--max-model-len: missing, expected a number (config.json names none)")
    length = arguments.max_model_len or _integer(raw, "max_position_embeddings")
    facts = describe(plan, length, arguments.kv_cache_memory, arguments.max_num_batched_tokens)
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))


def _show(arguments: argparse.Namespace) -> None:
    raw = _read(arguments.model, arguments.hf_overrides)
    model = _geometry_of(raw)
    pattern = _config_of(raw).pattern(model.num_heads, model.num_kv_heads)
    try:
        pattern.draw(arguments.output, arguments.num_blocks)
    except ValueError as error:
        raise S2ConfigError(str(error)) from error
    print(f"saved {arguments.output}")


def positive_int(text: str) -> int:
    """`text` as a positive integer: a type of command-line arguments.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer")
    return int(text)


def describe(plan: CachePlan, length: int, memory: int, batched_tokens: int) -> dict[str, Any]:
    """The plan in numbers, per tensor-parallel rank.

    Args:
        plan: the plan.
        length: tokens of a request (max_model_len).
        memory: KV cache bytes of one rank.
        batched_tokens: the most tokens of a step (max_num_batched_tokens); vLLM reserves window pages for
            those in flight when it counts the requests that fit.
    """
    blocks = memory // plan.block_bytes
    dense_bytes = plan.dense_bytes_per_request(length)
    return {
        "max_model_len": length,
        "tensor_parallel_size": plan.tensor_parallel_size,
        "layers_per_entry": plan.layers_per_entry,
        "tiers": [
            {
                "tier": tier.name,
                "layers": tier.num_layers,
                "block_size": tier.block_size,
                "slots": tier.page_slots,
                "bytes_per_page": plan.page_bytes,
                "groups": plan.num_groups(tier),
            }
            for tier in plan.tiers
        ],
        "kv_cache_groups": sum(map(plan.num_groups, plan.tiers)),
        "prefix_hit_tokens": plan.hit_alignment,
        "union_complete": plan.pattern.is_union_complete,
        "stored_fraction_sparse_layer": plan.pattern.stored_fraction(length),
        "kv_bytes_per_request": plan.bytes_per_request(length),
        "kv_bytes_per_request_dense": dense_bytes,
        "kv_cache_memory": memory,
        "concurrent_requests": blocks / plan.blocks_per_request(length, STEPS_IN_FLIGHT * batched_tokens),
        "concurrent_requests_dense": memory / dense_bytes,
    }


def _table(facts: dict[str, Any]) -> str:
    columns = ("tier", "layers", "block_size", "slots", "bytes_per_page", "groups")
    rows = [columns, *(tuple(str(tier[c]) for c in columns) for tier in facts["tiers"])]
    widths = [max(len(row[i]) for row in rows) for i in range(len(columns))]
    lines = [
        "  ".join([row[0].ljust(widths[0]), *(row[i].rjust(widths[i]) for i in range(1, len(columns)))])
        for row in rows
    ]
    sparse, dense = facts["kv_bytes_per_request"], facts["kv_bytes_per_request_dense"]
    notes = {
        "KV cache groups": f"{facts['kv_cache_groups']} ({facts['layers_per_entry']} sparse layers an entry)",
        "prefix-cache hits": f"on multiples of {facts['prefix_hit_tokens']} tokens",
        "old blocks": "each in some head's set" if facts["union_complete"] else "some in NO head's set",
        "request": f"{facts['max_model_len']} tokens, per rank of {facts['tensor_parallel_size']}",
        "  a sparse layer stores": f"{facts['stored_fraction_sparse_layer']:.1%} of a dense one",
        "  KV cache": f"{_size(sparse)} ({sparse / dense:.1%} of {_size(dense)} if all layers were dense)",
        f"  fit in {_size(facts['kv_cache_memory'])}": f"{facts['concurrent_requests']:.2f} "
        f"({facts['concurrent_requests_dense']:.2f} if all layers were dense)",
    }
    lines += ["", *(f"{name:<24}{text}" for name, text in notes.items())]
    return "\n".join(lines)


def _read(path: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    file = path / "config.json" if path.is_dir() else path
    try:
        raw = json.loads(file.read_text())
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise S2ConfigError(f"{file}: {error}, expected JSON") from error
    if not isinstance(raw, dict):
        raise S2ConfigError(f"{file}: {type(raw).__name__}, expected a JSON object")
    return {**raw, **overrides}


def _config_of(raw: dict[str, Any]) -> S2Config:
    config = find_config(raw, _integer(raw, "num_hidden_layers"))
    if config is None:
        raise S2ConfigError(f"{KEY}: missing, expected the key in config.json or in --hf-overrides")
    return config


def _geometry_of(raw: dict[str, Any], dtype: str = "auto") -> ModelGeometry:
    heads = _integer(raw, "num_attention_heads")
    head_size = raw.get("head_dim")
    return ModelGeometry(
        num_layers=_integer(raw, "num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=_integer(raw, "num_key_value_heads", heads),
        head_size=_integer(raw, "hidden_size") // heads if head_size is None else _integer(raw, "head_dim"),
        dtype_bytes=_dtype_bytes(raw, dtype),
    )


def _dtype_bytes(raw: dict[str, Any], dtype: str) -> int:
    if dtype != "auto":
        return DTYPE_BYTES[dtype]
    stored = str(raw.get("dtype") or raw.get("torch_dtype") or "bfloat16")
    if stored not in DTYPE_BYTES:
        raise S2ConfigError(f"dtype: {stored}, expected one of {sorted(DTYPE_BYTES)}")
    # vLLM's "auto" runs float32 checkpoints in 16 bits.
    return 2 if stored == "float32" else DTYPE_BYTES[stored]


def _integer(raw: dict[str, Any], key: str, default: int | None = None) -> int:
    value = raw.get(key)
    value = default if value is None else value
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise S2ConfigError(f"{key}: {value!r}, expected a positive integer")
    return value


def _bytes(text: str) -> int:
    match = re.fullmatch(r"(\d+(?:\.\d+)?) ?([KMG]i?B)?", text)
    if match is None or float(match[1]) == 0:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a size such as 40GiB")
    return int(float(match[1]) * UNITS[match[2] or ""])


def _overrides(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except json.JSONDecodeError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}, expected JSON") from error
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"{text!r}, expected a JSON object")
    return value


def _size(count: float) -> str:
    for unit in ("GiB", "MiB", "KiB"):
        if count >= UNITS[unit]:
            return f"{count / UNITS[unit]:.2f} {unit}"
    return f"{count:.0f} B"


if __name__ == "__main__":
    raise SystemExit(main())
