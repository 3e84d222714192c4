"""Launch configurations, stored per GPU: `python -m benchmarks.tune` finds them, nothing is tuned in use.

The table of a GPU is a JSON file beside this module, named after it: {operation: {shape: {option: value}}}.
What it does not hold keeps the operation's own defaults.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path

import torch

Config = dict[str, int]
Table = dict[str, dict[str, Config]]

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
    """The table of the GPU of that name; empty if nobody has tuned for it."""
    if gpu is None or not table_path(gpu).exists():
        return {}
    table: Table = json.loads(table_path(gpu).read_text())
    return table


@contextmanager
def trial(op: str, config: Config) -> Iterator[set[str]]:
    """Within it, `op` runs with `config` whatever the table says; yields the shapes it is asked for."""
    shapes: set[str] = set()
    _trials[op] = config, shapes
    try:
        yield shapes
    finally:
        del _trials[op]
