"""The command's options, and what is said against bad ones before anything starts."""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.engine.checkpoint import VARIANTS, model_config
from benchmarks.engine.workloads import (
    LENGTHS,
    LOADS,
    REQUEST_RATES,
    SLO,
    TINY_LENGTHS,
    WORKLOADS,
    Measurement,
    Traffic,
    latency,
    throughput,
    traffic,
)
from benchmarks.geometries import SERVED
from s2_vllm.cli import positive_int

TINY_FLAGS = {
    "dtype": "float32",
    "enforce_eager": True,
    "kv_cache_memory_bytes": 4 << 20,
    "max_num_seqs": 16,
    "max_num_batched_tokens": 256,
}
"""Of the engines of --tiny, which run on a CPU."""

OBJECTIVES = ("ttft", "tpot", "e2el")
"""What `vllm bench serve --goodput` knows."""

FLAGS = (
    "tensor_parallel_size",
    "max_model_len",
    "gpu_memory_utilization",
    "kv_cache_memory_bytes",
    "max_num_batched_tokens",
    "max_num_seqs",
    "enforce_eager",
)
"""Options that are passed on to both variants' engines."""


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """The options; ends the program with status 2 and a message where one is bad."""
    parser = _parser()
    options = parser.parse_args(arguments)
    _check(options, parser.error)
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.engine",
        description="Engines with the pattern and dense, side by side.",
        epilog="Lists are separated by commas or blanks. "
        "'python -m benchmarks.engine table FILE ...' prints result files as tables.",
    )
    parser.add_argument(
        "workloads",
        nargs="+",
        choices=WORKLOADS,
        metavar="{" + ",".join(WORKLOADS) + "}",
        help="what to measure",
    )
    lists: list[tuple[str, Callable[[str], Any], Any, str]] = [
        ("geometry", _choice(SERVED), ["hhst-8b"], f"of {', '.join(SERVED)}; default: hhst-8b"),
        ("variants", _choice(VARIANTS), list(VARIANTS), "of s2, dense; default: both"),
        ("lengths", positive_int, None, "prompt tokens of latency and throughput; default: the usual ones"),
        ("throughput-lengths", positive_int, None, "prompt tokens of throughput; default: as --lengths"),
        ("pool-lengths", positive_int, None, "of throughput with a full pool; default: as the same batch"),
        ("loads", _choice(LOADS), list(LOADS), "of throughput: the same batch, a full pool; default: both"),
        ("request-rates", _positive, list(REQUEST_RATES), "requests per second of serve; default: 1,2,4,8"),
        ("slo", _objective, list(SLO.items()), "of serve's good requests; default: ttft:3000,tpot:50 (ms)"),
    ]
    for name, kind, default, text in lists:
        parser.add_argument(f"--{name}", nargs="+", action=_Listed, kind=kind, default=default, help=text)
    parser.add_argument("--seconds", type=_positive, default=30.0, help="of arrivals per rate; default: 30")
    parser.add_argument("--repetitions", type=positive_int, default=3, help="default: 3")
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/engine-<gpu>.json")
    parser.add_argument(
        "--tiny", action="store_true", help="the same steps with models of no size, on a CPU; needs --output"
    )
    _add_engine_flags(parser.add_argument_group("flags of the engines", "vLLM's, the same for both variants"))
    return parser


def _add_engine_flags(group: Any) -> None:
    group.add_argument("--tensor-parallel-size", type=positive_int, default=1, help="default: 1")
    group.add_argument(
        "--max-model-len", type=positive_int, help="default: the model's, or what fits, if that is less"
    )
    group.add_argument("--gpu-memory-utilization", type=fraction, help="default: vLLM's")
    for name in ("kv-cache-memory-bytes", "max-num-batched-tokens", "max-num-seqs"):
        group.add_argument(f"--{name}", type=positive_int, help="default: vLLM's")
    group.add_argument("--enforce-eager", action="store_true", default=None, help="no compilation, no graphs")


class _Listed(argparse.Action):
    """Values that commas or blanks separate."""

    def __init__(self, *arguments: Any, kind: Callable[[str], Any], **options: Any) -> None:
        super().__init__(*arguments, **options)
        self._kind = kind

    def __call__(self, parser: Any, namespace: Any, values: Any, option_string: str | None = None) -> None:
        texts = [text for value in values for text in value.split(",") if text]
        try:
            found = [self._kind(text) for text in texts]
        except argparse.ArgumentTypeError as error:
            raise argparse.ArgumentError(self, str(error)) from error
        if not found:
            raise argparse.ArgumentError(self, "nothing, expected at least one value")
        setattr(namespace, self.dest, list(dict.fromkeys(found)))


def _choice(known: Any) -> Callable[[str], str]:
    def check(text: str) -> str:
        if text not in known:
            raise argparse.ArgumentTypeError(f"{text!r}, expected one of {', '.join(known)}")
        return text

    return check


def _positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a positive number")
    return value


def _objective(text: str) -> tuple[str, float]:
    name, _, milliseconds = text.partition(":")
    if name not in OBJECTIVES:
        raise argparse.ArgumentTypeError(f"{text!r}, expected NAME:MS with a name of {', '.join(OBJECTIVES)}")
    return name, _positive(milliseconds)


def fraction(text: str) -> float:
    """An argument's value above 0 and at most 1; anything else is a usage error."""
    try:
        value = float(text)
    except ValueError:
        value = math.nan
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text!r}, expected a number above 0 and at most 1")
    return value


def _check(options: argparse.Namespace, error: Callable[[str], NoReturn]) -> None:
    if options.tiny and options.output is None:
        error("--output: missing, expected a file with --tiny: its figures mean nothing")
    limit, needed = options.max_model_len, max((load.tokens for load in all_traffic(options)), default=0)
    if limit is not None and limit < needed:
        error(f"--max-model-len: {limit}, expected at least {needed}, serve's longest request")
    for name in options.geometry:
        config = model_config(name, "dense", options.tiny)
        longest, source = config["max_position_embeddings"], f"{name}'s max_position_embeddings"
        if options.max_model_len is not None:
            if options.max_model_len > longest:
                error(f"--max-model-len: {options.max_model_len}, expected at most {longest}, {source}")
            longest, source = options.max_model_len, "--max-model-len"
        for measurement in measurements(options):
            option, _ = _lengths(options, measurement.load)
            if option and measurement.tokens > longest:
                error(
                    f"{option}: {measurement.prompt_tokens} with {measurement.workload}'s "
                    f"{measurement.output_tokens} output tokens, expected at most {longest} in all, {source}"
                )
        ranks, heads = options.tensor_parallel_size, config["num_key_value_heads"]
        if heads % ranks:
            error(f"--tensor-parallel-size: {ranks}, expected a divisor of {name}'s {heads} KV heads")


def _lengths(options: argparse.Namespace, load: str) -> tuple[str | None, list[int]]:
    """The option that asks for a load's lengths, None where they are the usual ones; and the lengths."""
    asked = {
        "single": ("lengths",),
        "batch": ("throughput_lengths", "lengths"),
        "pool": ("pool_lengths", "throughput_lengths", "lengths"),
    }
    for name in asked[load]:
        if lengths := getattr(options, name):
            return f"--{name.replace('_', '-')}", sorted(lengths)
    usual = TINY_LENGTHS if options.tiny else LENGTHS
    return None, sorted(usual["latency" if load == "single" else "throughput"])


def measurements(options: argparse.Namespace) -> list[Measurement]:
    """What an engine is to measure offline; of the usual lengths, those below --max-model-len."""
    loads = ["single"] if "latency" in options.workloads else []
    loads += options.loads if "throughput" in options.workloads else []
    limit, found = options.max_model_len, []
    for load in loads:
        option, lengths = _lengths(options, load)
        for length in lengths:
            if load == "single":
                measurement = latency(length, options.repetitions, options.tiny)
            else:
                measurement = throughput(length, load, options.repetitions, options.tiny)
            if option or not limit or measurement.tokens <= limit:
                found.append(measurement)
    return found


def engine_flags(options: argparse.Namespace) -> dict[str, Any]:
    """The engines' flags, by vLLM's names.

    The longest request is the model's by default, and where that does not fit, the longest that does (-1).
    """
    flags: dict[str, Any] = {"max_model_len": -1, **(TINY_FLAGS if options.tiny else {})}
    for name in FLAGS:
        if getattr(options, name) is not None:
            flags[name] = getattr(options, name)
    return flags


def all_traffic(options: argparse.Namespace) -> list[Traffic]:
    """What a server is to be put under."""
    if "serve" not in options.workloads:
        return []
    slo = dict(options.slo)
    return [
        traffic(rate, options.seconds, slo, options.repetitions, options.tiny)
        for rate in sorted(options.request_rates)
    ]
