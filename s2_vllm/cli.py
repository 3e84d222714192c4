"""The `s2-vllm` command: what a pattern costs and how it looks. Needs no GPU, no weights and no vLLM."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from s2_kernels.config import HEADWISE_KEY, KEY, S2Config, S2ConfigError
from s2_kernels.pattern import S2Pattern
from s2_vllm.config_refusals import check_hf_config
from s2_vllm.hf_config import HFConfig, read_config
from s2_vllm.plan import CachePlan
from s2_vllm.planning import make_plan
from s2_vllm.refusals import check_kv_cache_dtype, kv_cache_scheme

DTYPES = {
    "bfloat16": "bfloat16",
    "float16": "float16",
    "half": "float16",
    "float32": "float32",
    "float": "float32",
}
DTYPE_BYTES = {"bfloat16": 2, "float16": 2, "float32": 4}
# With asynchronous scheduling, its default on a GPU, vLLM has two steps in flight at a time.
STEPS_IN_FLIGHT = 2
UNITS = {
    "": 1,
    # As vLLM reads them: a small letter is decimal, a capital one binary.
    **{unit: 1000**power for power, unit in enumerate("kmgt", 1)},
    **{unit: 1024**power for power, unit in enumerate("KMGT", 1)},
    **{f"{unit}B": 1000**power for power, unit in enumerate("KMGT", 1)},
    **{f"{unit}iB": 1024**power for power, unit in enumerate("KMGT", 1)},
}
MAX_LISTED_HEADS = 8


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns the exit status, 2 after an error that one line explains."""
    arguments = _parser().parse_args(_with_dashes(sys.argv[1:] if argv is None else argv))
    try:
        arguments.run(arguments)
    except (S2ConfigError, OSError) as error:
        print(f"s2-vllm: error: {error}", file=sys.stderr)
        return 2
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="s2-vllm", description="S2-Attention patterns and KV cache plans.")
    parser.add_argument("--version", action=_Version, nargs=0, help="show the version and exit")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    plan = commands.add_parser("plan", help="the KV cache that vLLM will set up for a model")
    _add_model(plan)
    plan.add_argument(
        "--max-model-len",
        type=positive_count,
        metavar="N",
        help="tokens of the longest request, e.g. 32768, 32k (32,000) or 32K (32,768) (default: the model's)",
    )
    plan.add_argument(
        "--kv-cache-memory-bytes",
        "--kv-cache-memory",
        type=_bytes,
        default="40GiB",
        metavar="SIZE",
        help="KV cache of one GPU, e.g. 40G or 40GiB (2^30 bytes each), 40g or 40GB (10^9) (default: 40GiB)",
    )
    plan.add_argument(
        "--tensor-parallel-size", "-tp", type=positive_int, default=1, metavar="T", help="GPUs (default: 1)"
    )
    plan.add_argument(
        "--max-num-batched-tokens",
        type=positive_count,
        default=8192,
        metavar="N",
        help="tokens of a step (default: 8192, that of `vllm serve` on an H100 or H200)",
    )
    plan.add_argument(
        "--block-size",
        type=positive_int,
        metavar="N",
        help="tokens per page of a dense layer (default: what the plan needs)",
    )
    plan.add_argument(
        "--dtype",
        choices=["auto", *DTYPES],
        default="auto",
        help="of the model and its KV cache (default: auto, 16 bits whatever the checkpoint has)",
    )
    plan.add_argument(
        "--kv-cache-dtype",
        default="auto",
        metavar="DTYPE",
        help="the model's dtype, for a checkpoint that declares a quantized KV cache (default: auto)",
    )
    plan.add_argument("--json", action="store_true", help="print JSON instead of a table")
    plan.set_defaults(run=_plan)
    show = commands.add_parser("show", help="draw the pattern, one panel per head")
    _add_model(show)
    show.add_argument(
        "-o",
        "--output",
        type=Path,
        default=Path("pattern.png"),
        metavar="FILE",
        help="image, PNG or SVG (default: pattern.png)",
    )
    show.add_argument(
        "--num-blocks",
        type=positive_int,
        metavar="N",
        help="blocks along each side of a panel (default: enough to see two strided blocks leave the window, "
        "64 at most)",
    )
    show.add_argument(
        "--layer",
        type=_layer_index,
        metavar="N",
        help="the layer whose pattern to draw (default: the first sparse one)",
    )
    show.set_defaults(run=_show)
    _add_heads(commands)
    return parser


def _add_heads(commands: Any) -> None:
    heads = commands.add_parser("heads", help="the pattern of a dense model whose retrieval heads are known")
    heads.add_argument(
        "scores", metavar="TSV", type=Path, help="DuoAttention's full_attention_heads.tsv of the model"
    )
    heads.add_argument(
        "--sparsity",
        type=_share,
        default=0.5,
        metavar="S",
        help="share of the KV heads that become streaming heads, between 0 and 1 (default: 0.5)",
    )
    heads.add_argument(
        "--sink",
        type=_token_count,
        default=64,
        metavar="N",
        help="tokens at the start that every head attends to, in whole blocks of 64 (default: 64)",
    )
    heads.add_argument(
        "--recent",
        type=positive_int,
        default=256,
        metavar="N",
        help="tokens before the query that every head attends to, in whole blocks of 64 (default: 256)",
    )
    heads.add_argument(
        "--model",
        type=Path,
        metavar="CONFIG_OR_DIR",
        help="config.json of the model, or its folder: the heads are checked against it (default: none)",
    )
    heads.add_argument(
        "-o",
        "--output",
        type=Path,
        metavar="DIR",
        help="write the model's config.json with the pattern into this folder (default: print the pattern)",
    )
    heads.set_defaults(run=_heads)


def _add_model(command: argparse.ArgumentParser) -> None:
    command.add_argument("model", metavar="CONFIG_OR_DIR", type=Path, help="config.json, or its folder")
    command.add_argument(
        "--hf-overrides",
        type=_overrides,
        default={},
        metavar="JSON",
        help="keys of config.json to set, as for `vllm serve` (default: {})",
    )


class _Version(argparse.Action):
    """Look the version up only when it is asked for: the command works from a clone as well."""

    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        try:
            version = importlib.metadata.version("s2-vllm")
        except importlib.metadata.PackageNotFoundError:
            version = "(not installed)"
        print(f"s2-vllm {version}")
        parser.exit()


def _with_dashes(arguments: list[str]) -> list[str]:
    """Options with dashes where they may have underscores, which vLLM takes as well."""
    return [re.sub(r"^--[^=]+", lambda name: name[0].replace("_", "-"), argument) for argument in arguments]


def _plan(arguments: argparse.Namespace) -> None:
    config, pattern_config = _model(arguments)
    dtype = _dtype(config.dtype_name(), arguments.dtype)
    check_kv_cache_dtype(arguments.kv_cache_dtype, dtype, kv_cache_scheme(config.quantization()))
    plan = make_plan(
        pattern_config,
        config.geometry(DTYPE_BYTES[dtype]),
        arguments.tensor_parallel_size,
        arguments.block_size,
    )
    length = config.max_model_len(arguments.max_model_len)
    facts = describe(plan, length, arguments.kv_cache_memory_bytes, arguments.max_num_batched_tokens)
    print(json.dumps(facts, indent=2) if arguments.json else _table(facts))


def _show(arguments: argparse.Namespace) -> None:
    config, pattern_config = _model(arguments)
    model = config.geometry(DTYPE_BYTES["bfloat16"])
    patterns = pattern_config.layer_patterns(model.num_heads, model.num_kv_heads, model.num_layers)
    layer = min(patterns) if arguments.layer is None else arguments.layer
    if layer not in patterns:
        what = "a dense layer" if layer < model.num_layers else "no layer of the model"
        listed = ", ".join(map(str, patterns))
        raise S2ConfigError(f"--layer: {layer}, {what}, expected one of the sparse layers {listed}")
    try:
        patterns[layer].draw(arguments.output, arguments.num_blocks)
    except ValueError as error:
        raise S2ConfigError(str(error)) from error
    print(f"saved {arguments.output}")


def _heads(arguments: argparse.Namespace) -> None:
    from s2_vllm import heads

    scores = heads.read_scores(arguments.scores)
    is_full = heads.full_heads(scores, arguments.sparsity)
    pattern = heads.pattern_of_heads(is_full, arguments.sink, arguments.recent)
    if arguments.model is None:
        if arguments.output is not None:
            raise S2ConfigError("--model: missing, expected the model whose config.json --output is to copy")
    else:
        # A pattern that the file has goes: it would be replaced.
        config = read_config(arguments.model, {KEY: pattern, HEADWISE_KEY: None})
        check_hf_config(config)
        heads.check_shape(scores.shape, config, arguments.scores)
        config.pattern_config()
    if arguments.output is None:
        print(json.dumps({KEY: pattern}))
    else:
        print(f"saved {heads.write_config(arguments.model, arguments.output, pattern)}")


def _model(arguments: argparse.Namespace) -> tuple[HFConfig, S2Config]:
    config = read_config(arguments.model, arguments.hf_overrides)
    check_hf_config(config)
    pattern_config = config.pattern_config()
    if pattern_config is None:
        raise S2ConfigError(f"{KEY}: missing, expected the key in config.json or in --hf-overrides")
    return config, pattern_config


def positive_int(text: str) -> int:
    """`text` as a positive integer: a type of command-line arguments.

    Raises:
        ArgumentTypeError: it is none.
    """
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer")
    return int(text)


def _layer_index(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected the index of a layer")
    return int(text)


def _token_count(text: str) -> int:
    if not text.isdecimal():
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number of tokens")
    return int(text)


def _share(text: str) -> float:
    try:
        share = float(text)
    except ValueError:
        share = 0.0
    if not 0 < share < 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number between 0 and 1, neither of them")
    return share


def positive_count(text: str) -> int:
    """`text` as a positive integer with or without one of vLLM's suffixes: 1k is 1000, 1K is 1024.

    Raises:
        ArgumentTypeError: it is none.
    """
    number = _with_unit(text, "[kmgtKMGT]?")
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive integer such as 32768, 32k or 32K")
    return number


def describe(plan: CachePlan, length: int, memory: int, batched_tokens: int) -> dict[str, Any]:
    """The plan in numbers, per tensor-parallel rank.

    Args:
        plan: the plan.
        length: tokens of a request (max_model_len).
        memory: KV cache bytes of one rank.
        batched_tokens: the most tokens of a step (max_num_batched_tokens); when it counts the requests that
            fit, vLLM has window pages for those in flight in each.
    """
    # Of a model whose sparse layers all have one.
    pattern = plan.patterns[0] if len(set(plan.patterns)) == 1 else None
    blocks = memory // plan.block_bytes
    in_flight = STEPS_IN_FLIGHT * batched_tokens
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
        "residues": None if pattern is None else pattern.kept_residues,
        "vert_stride": None if pattern is None else pattern.vert_stride,
        "heads": plan.heads,
        "mixed": plan.is_mixed,
        "sink_blocks": plan.sink_blocks,
        "patterns": [_pattern_facts(plan, pattern) for pattern in dict.fromkeys(plan.patterns)],
        "kv_cache_groups": plan.total_groups,
        "padding": float(plan.padding),
        "padding_by_tier": {tier.name: float(plan.padding_of(tier)) for tier in plan.tiers},
        "padding_for_ranks": float(plan.rank_padding),
        "prefix_hit_tokens": plan.hit_alignment,
        "union_complete": plan.num_incomplete_layers == 0,
        "layers_not_union_complete": plan.num_incomplete_layers,
        "stored_fraction_sparse_layer": plan.stored_fraction(length),
        "kv_bytes_per_request": plan.bytes_per_request(length),
        "kv_bytes_per_request_dense": dense_bytes,
        "kv_cache_memory": memory,
        "max_num_batched_tokens": batched_tokens,
        "concurrent_requests": blocks / plan.blocks_per_request(length, in_flight),
        "concurrent_requests_decoding": blocks / plan.blocks_per_request(length),
        "concurrent_requests_dense": memory / dense_bytes,
    }


def _pattern_facts(plan: CachePlan, pattern: S2Pattern) -> dict[str, Any]:
    """A pattern, and the layers that have it."""
    return {
        "layers": [
            layer for layer, own in zip(plan.sparse_layers, plan.patterns, strict=True) if own == pattern
        ],
        "block_size": pattern.block_size,
        "local_blocks": pattern.local_blocks,
        "vert_stride": pattern.vert_stride,
        "residues": pattern.kept_residues,
        "full_heads": pattern.full_heads,
        "sink_blocks": pattern.sink_blocks,
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
        "KV cache groups": f"{facts['kv_cache_groups']} ({facts['layers_per_entry']} sparse layers an entry, "
        f"padding {facts['padding']:.1%})",
        "prefix-cache hits": f"on multiples of {facts['prefix_hit_tokens']} tokens",
        **_heads_lines(facts),
        "old blocks": _old_blocks(facts),
        "request": f"{facts['max_model_len']} tokens, per rank of {facts['tensor_parallel_size']}",
        "  a sparse layer stores": f"{facts['stored_fraction_sparse_layer']:.1%} of a dense one",
        "  KV cache": f"{_size(sparse)} ({sparse / dense:.1%} of {_size(dense)} if all layers were dense)",
        f"  fit in {_size(facts['kv_cache_memory'])}": f"{facts['concurrent_requests_decoding']:.2f} "
        f"while they decode ({facts['concurrent_requests_dense']:.2f} if all layers were dense)",
        "  by vLLM's count": f"{facts['concurrent_requests']:.2f}, with {STEPS_IN_FLIGHT} steps of "
        f"{facts['max_num_batched_tokens']} tokens in flight of every request",
    }
    lines += ["", *(f"{name:<24}{text}" for name, text in notes.items())]
    return "\n".join(lines)


def _heads_lines(facts: dict[str, Any]) -> dict[str, str]:
    """Lines about the heads: their residues where all layers have one, their kinds where not."""
    if not facts["mixed"]:
        return {"residues by KV head": f"{_residues(facts['residues'])}, modulo {facts['vert_stride']}"}
    padding = ", ".join(f"{tier} {share:.1%}" for tier, share in facts["padding_by_tier"].items())
    return {
        "KV heads": ", ".join(f"{count} {kind}" for kind, count in facts["heads"].items())
        + f" in {sum(len(pattern['layers']) for pattern in facts['patterns'])} sparse layers",
        "sinks": f"{facts['sink_blocks']} x {facts['patterns'][0]['block_size']} tokens",
        "padding by tier": f"{padding}; for less full ranks {facts['padding_for_ranks']:.1%}",
    }


def _old_blocks(facts: dict[str, Any]) -> str:
    incomplete = facts["layers_not_union_complete"]
    if incomplete == 0:
        return "each in some head's set"
    layers = sum(len(pattern["layers"]) for pattern in facts["patterns"])
    of_layers = "" if incomplete == layers else f", in {incomplete} of {layers} sparse layers"
    return f"some in NO head's set{of_layers}"


def _residues(by_head: Sequence[Sequence[int]]) -> str:
    """The residues that each KV head keeps, of the first heads where there are many."""
    heads = [",".join(map(str, kept)) for kept in by_head]
    listed = " ".join(heads[:MAX_LISTED_HEADS])
    return listed if len(heads) <= MAX_LISTED_HEADS else f"{listed} ... ({len(heads)} heads)"


def _dtype(stored: str, asked: str) -> str:
    """The name of the dtype that the model runs in.

    Args:
        stored: the dtype of the checkpoint.
        asked: what the engine is asked for.
    """
    if stored not in DTYPES:
        raise S2ConfigError(f"dtype: {stored}, expected one of {sorted(DTYPES)}")
    if asked != "auto":
        return DTYPES[asked]
    # vLLM runs float32 checkpoints in 16 bits unless it is asked not to.
    return "bfloat16" if DTYPES[stored] == "float32" else DTYPES[stored]


def _bytes(text: str) -> int:
    number = _with_unit(text, "[kmgt]| ?[KMGT](?:i?B)?|")
    if number is None:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a size such as 40GiB or 40G")
    return number


def _with_unit(text: str, units: str) -> int | None:
    """`text`, a number and a unit that matches `units`, as a positive integer; None if it is none.

    Like vLLM, take no fraction of a bare binary unit: 1.5G may be meant to be 1.5g.
    """
    match = re.fullmatch(rf"(\d+(?:\.\d+)?)({units})", text.strip())
    if match is None:
        return None
    number, unit = match[1], match[2].strip()
    if "." in number and unit in ("", *"KMGT"):
        return None
    factor = float(number) if "." in number else int(number)
    return int(factor * UNITS[unit]) or None


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
