"""A training step of a transformer, with the pattern and dense: seconds and memory.

    python -m benchmarks.training_step

A Llama of the geometry s2-1.3b, without its output layer (whose logits would be most of the memory and none
of the attention), forward and backward with activation checkpointing. The dense one runs PyTorch's attention,
by each of its fused backends. Needs a GPU; --tiny runs the same steps with a model of no size on a CPU.
"""

from __future__ import annotations

import argparse
import contextlib
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.engine.checkpoint import model_config
from benchmarks.results_file import gpu_name, write_results
from s2_vllm.cli import positive_int

GEOMETRY = "s2-1.3b"
LENGTHS = (32768, 131072)
TINY_LENGTHS = (64, 200)
BACKENDS = {"fa2": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}
"""Of the dense model."""
VARIANTS = ("s2", *BACKENDS)

Record = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    options = _parse(arguments)
    if not options.tiny and not torch.cuda.is_available():
        print("benchmarks.training_step: no CUDA GPU found, expected one, or --tiny", file=sys.stderr)
        return 2
    device = torch.device("cpu" if options.tiny else "cuda")
    output = options.output or Path(f"benchmarks/results/training-step-{gpu_name(device)}.json")
    records = []
    for length in options.lengths or (TINY_LENGTHS if options.tiny else LENGTHS):
        for variant in options.variants:
            records.append(measure(variant, length, device, options.tiny, options.repetitions))
            print(_line(records[-1]), flush=True)
            write_results(output, records)
    print(f"\n{table(records)}\n\nsaved {output}")
    return 0


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_step", description=__doc__.split("\n")[0]
    )
    parser.add_argument("--lengths", nargs="+", type=positive_int, metavar="TOKENS")
    parser.add_argument("--variants", nargs="+", choices=VARIANTS, default=list(VARIANTS))
    parser.add_argument("--repetitions", type=positive_int, default=3)
    parser.add_argument("--output", type=Path, help="default: benchmarks/results/training-step-<gpu>.json")
    parser.add_argument("--tiny", action="store_true", help="a model of no size, on a CPU; needs --output")
    options = parser.parse_args(arguments)
    if options.tiny and options.output is None:
        parser.error("--output: missing, expected a file with --tiny: its figures mean nothing")
    return options


def measure(variant: str, length: int, device: torch.device, tiny: bool, repetitions: int) -> Record:
    """The record of a variant: the median of the repetitions, after one that does not count.

    A variant that the GPU has no memory for gets the reason, and so does a backend that is not there.
    """
    facts: Record = {
        "geometry": f"tiny-{GEOMETRY}" if tiny else GEOMETRY,
        "variant": variant,
        "tokens": length,
    }
    try:
        step = training_step(variant, length, device, tiny)
        step()
        with _peak_mib(device) as peak:
            seconds = [_seconds(step, device) for _ in range(repetitions)]
    except (torch.OutOfMemoryError, RuntimeError) as error:
        if variant == "s2" and not isinstance(error, torch.OutOfMemoryError):
            raise
        return {**facts, "reason": str(error).strip().split("\n")[0][:200]}
    finally:
        gc.collect()
        torch.cuda.empty_cache()
    return {**facts, "seconds": float(f"{median(seconds):.4g}"), **peak}


def training_step(variant: str, length: int, device: torch.device, tiny: bool) -> Callable[[], None]:
    """Forward and backward of one sequence of random tokens; gradients are left in the parameters."""
    from transformers import AutoModel, LlamaConfig

    import s2_kernels.transformers  # noqa: F401  (it makes the attention "s2" known)

    torch.manual_seed(0)
    config = LlamaConfig(**model_config(GEOMETRY, "s2" if variant == "s2" else "dense", tiny))
    with torch.device(device):
        model = AutoModel.from_config(
            config,
            attn_implementation="s2" if variant == "s2" else "sdpa",
            dtype=torch.float32 if tiny else torch.bfloat16,
        )
        tokens = torch.randint(config.vocab_size, (1, length))
        gradient = torch.randn(1, length, config.hidden_size, dtype=model.dtype)
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    backend = _no_backend if variant == "s2" or tiny else (lambda: sdpa_kernel(BACKENDS[variant]))

    def step() -> None:
        model.zero_grad(set_to_none=True)
        with backend():
            model(tokens, use_cache=False).last_hidden_state.backward(gradient)

    return step


def _no_backend() -> contextlib.AbstractContextManager[None]:
    return contextlib.nullcontext()


def _seconds(step: Callable[[], None], device: torch.device) -> float:
    _synchronize(device)
    start = time.perf_counter()
    step()
    _synchronize(device)
    return time.perf_counter() - start


@contextlib.contextmanager
def _peak_mib(device: torch.device) -> Iterator[Record]:
    """An empty dict that afterwards has "peak_mib", of all that was allocated on a GPU meanwhile."""
    found: Record = {}
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    yield found
    if device.type == "cuda":
        found["peak_mib"] = round(torch.cuda.max_memory_allocated() / 2**20)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


def _line(record: Record) -> str:
    result = record.get("reason") or f"{record['seconds']} s"
    return f"{record['geometry']}, {record['variant']}, {record['tokens']:,} tokens: {result}"


def table(records: list[Record]) -> str:
    """A Markdown table: every variant's seconds and memory, and how many times faster S2 is than it."""
    lines = [
        "| geometry | tokens | attention | seconds | peak, GiB | S2 is faster by |",
        "|---|---|---|---|---|---|",
    ]
    s2 = {r["tokens"]: r["seconds"] for r in records if r["variant"] == "s2" and "seconds" in r}
    for r in records:
        what = f"| {r['geometry']} | {r['tokens']:,} | {r['variant']} "
        if "seconds" not in r:
            lines.append(f"{what}| {r['reason']} | | |")
            continue
        peak = f"{r['peak_mib'] / 1024:.1f}" if "peak_mib" in r else ""
        is_peer = r["variant"] != "s2" and r["tokens"] in s2
        gain = f"{r['seconds'] / s2[r['tokens']]:.2f}x" if is_peer else ""
        lines.append(f"{what}| {r['seconds']:.3g} | {peak} | {gain} |")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
