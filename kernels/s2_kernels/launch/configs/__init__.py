"""Launch configurations, stored per GPU: `python -m benchmarks.tune` finds them, nothing is tuned in use.

The table of a GPU is a JSON file beside this module, named after it: {operation: {shape: {option: value}}}.
A GPU without one takes that of a relative. What a table does not hold keeps the operation's own defaults.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

Config = dict[str, int]
Table = dict[str, dict[str, Config]]

RELATIVES = (
    (r"\bH[18]00\b", "NVIDIA H100 80GB HBM3"),
    (r"\bG?H20{1,2}\b", "NVIDIA H200"),
)
"""Whose table GPUs take that have none: those of Hopper's chip with the same kind of memory."""
ANY_HOPPER = "NVIDIA H200"

_trials: dict[str, tuple[Config, set[str]]] = {}


def launch_config(op: str, shape: str, defaults: Config) -> Config:
    """`defaults`, but for the options that the current GPU's table gives for `op` and `shape`."""
    if op in _trials:
        config, shapes = _trials[op]
        shapes.add(shape)
    else:
        config = load_table(current_gpu()).get(op, {}).get(shape, {})
    return defaults | config


def shape_key(head_size: int, dtype: torch.dtype, **facts: int) -> str:
    """What a configuration is stored under: "head128-16bit-kept4" for head size 128, bfloat16, kept=4."""
    return "-".join([f"head{head_size}", f"{dtype.itemsize * 8}bit", *(f"{k}{v}" for k, v in facts.items())])


def current_gpu() -> str | None:
    """The name of the GPU that kernels are launched on, None without one."""
    return _gpu_name(torch.cuda.current_device()) if torch.cuda.is_available() else None


@lru_cache
def _gpu_name(index: int) -> str:
    return torch.cuda.get_device_name(index)


def table_path(gpu: str) -> Path:
    """Where the table of the GPU of that name is, or belongs."""
    return Path(__file__).parent / f"{gpu.replace(' ', '_')}.json"


@lru_cache
def load_table(gpu: str | None) -> Table:
    """The table of the GPU of that name or of a relative; empty if nobody has tuned for any."""
    path = None if gpu is None else next(filter(Path.exists, map(table_path, _candidates(gpu))), None)
    if path is None:
        return {}
    table: Table = json.loads(path.read_text())
    return table


def _candidates(gpu: str) -> list[str]:
    """The GPUs whose table the GPU of that name can take, the best first."""
    relatives = [relative for names, relative in RELATIVES if re.search(names, gpu)]
    return [gpu, *relatives, *([ANY_HOPPER] if relatives else [])]


@contextmanager
def trial(op: str, config: Config) -> Iterator[set[str]]:
    """Within it, `op` runs with `config` whatever the table says; yields the shapes it is asked for."""
    shapes: set[str] = set()
    _trials[op] = config, shapes
    try:
        yield shapes
    finally:
        del _trials[op]
