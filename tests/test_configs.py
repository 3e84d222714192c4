"""The tables of launch configurations: what is stored, and who gets it."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path

import pytest
import torch

from benchmarks.tune import SEARCHES
from s2_kernels.contiguous.block_sparse import block_sparse_config
from s2_kernels.contiguous.block_sparse_bwd import block_sparse_bwd_configs
from s2_kernels.hopper.gradients import key_gradients_config, query_gradients_config
from s2_kernels.hopper.prefill import hopper_prefill_config
from s2_kernels.launch import configs
from s2_kernels.launch.configs import Config, launch_config, load_table, shape_key, table_path, trial
from s2_kernels.paged.cache_write import cache_write_config
from s2_kernels.paged.decode import decode_config
from s2_kernels.paged.prefill import prefill_config

DEFAULTS = {"BLOCK_N": 64, "num_warps": 4}


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a GPU with a table of one entry: two options of op "decode" for shape "head64"."""
    monkeypatch.setattr(configs, "__file__", str(tmp_path / "__init__.py"))
    monkeypatch.setattr(configs, "current_gpu", lambda: "Some GPU")
    stored = {"decode": {"head64": {"num_warps": 2, "num_stages": 6}}}
    (tmp_path / "Some_GPU.json").write_text(json.dumps(stored))
    load_table.cache_clear()
    return "Some GPU"


def test_stored_options_replace_the_defaults(gpu: str) -> None:
    assert table_path(gpu).exists()
    assert launch_config("decode", "head64", DEFAULTS) == {"BLOCK_N": 64, "num_warps": 2, "num_stages": 6}


@pytest.mark.parametrize(("op", "shape"), [("prefill", "head64"), ("decode", "head128")])
def test_defaults_without_an_entry(gpu: str, op: str, shape: str) -> None:
    assert launch_config(op, shape, DEFAULTS) == DEFAULTS


@pytest.mark.parametrize("name", ["Another GPU", None], ids=str)
def test_defaults_on_a_gpu_without_a_table(
    gpu: str, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(configs, "current_gpu", lambda: name)
    assert launch_config("decode", "head64", DEFAULTS) == DEFAULTS


@pytest.mark.parametrize(
    ("name", "tables", "taken"),
    [
        ("NVIDIA H100 80GB HBM3", ("H100", "H200"), "H100"),
        ("NVIDIA H100 PCIe", ("H100", "H200"), "H100"),
        ("NVIDIA H100 NVL", ("H100", "H200"), "H100"),
        ("NVIDIA H800", ("H100", "H200"), "H100"),
        ("NVIDIA H100 PCIe", ("H200",), "H200"),
        ("NVIDIA H200 NVL", ("H100", "H200"), "H200"),
        ("NVIDIA GH200 480GB", ("H100", "H200"), "H200"),
        ("NVIDIA H20", ("H100", "H200"), "H200"),
        ("NVIDIA A100-SXM4-80GB", ("H100", "H200"), None),
        ("NVIDIA GeForce RTX 4090", ("H100", "H200"), None),
        ("NVIDIA B200", ("H100", "H200"), None),
    ],
    ids=str,
)
def test_the_table_of_a_relative(
    gpu: str, name: str, tables: tuple[str, ...], taken: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every Hopper GPU takes a table of Hopper's chip, that of the nearest memory; others take none."""
    full_names = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
    warps = {"H100": 1, "H200": 2}
    for table in tables:
        path = table_path(full_names[table])
        path.write_text(json.dumps({"decode": {"head64": {"num_warps": warps[table]}}}))
    monkeypatch.setattr(configs, "current_gpu", lambda: name)
    expected = DEFAULTS["num_warps"] if taken is None else warps[taken]
    assert launch_config("decode", "head64", DEFAULTS)["num_warps"] == expected


def test_its_own_table_comes_first(gpu: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, warps in (("NVIDIA H100 PCIe", 8), ("NVIDIA H100 80GB HBM3", 1)):
        table_path(name).write_text(json.dumps({"decode": {"head64": {"num_warps": warps}}}))
    monkeypatch.setattr(configs, "current_gpu", lambda: "NVIDIA H100 PCIe")
    assert launch_config("decode", "head64", DEFAULTS)["num_warps"] == 8


def test_trial_overrides_one_operation_and_tells_the_shapes(gpu: str) -> None:
    with trial("decode", {"num_warps": 8}) as shapes:
        assert launch_config("decode", "head64", DEFAULTS) == {"BLOCK_N": 64, "num_warps": 8}
        assert launch_config("prefill", "head64", DEFAULTS) == DEFAULTS
    assert shapes == {"head64"}
    assert launch_config("decode", "head64", DEFAULTS)["num_warps"] == 2


def test_shape_key_spells_what_the_kernels_distinguish() -> None:
    assert shape_key(128, torch.bfloat16, kept=4) == shape_key(128, torch.float16, kept=4)
    assert shape_key(128, torch.bfloat16, kept=4) == "head128-16bit-kept4"
    assert shape_key(64, torch.float32) == "head64-32bit"


def test_stored_tables_hold_numbers_for_known_operations() -> None:
    for path in Path(configs.__file__).parent.glob("*.json"):
        table = json.loads(path.read_text())
        assert table.keys() <= SEARCHES.keys(), path.name
        for config in (config for shapes in table.values() for config in shapes.values()):
            assert config
            assert all(type(value) is int and value > 0 for value in config.values()), path.name


KERNELS: dict[str, Callable[[int, torch.dtype, int], Config]] = {
    "block_sparse": lambda head_size, dtype, kept: block_sparse_config(head_size, dtype, max_queries=1000),
    "block_sparse_bwd_dq": lambda head_size, dtype, kept: gradients_config(head_size, dtype, 0),
    "block_sparse_bwd_dkdv": lambda head_size, dtype, kept: gradients_config(head_size, dtype, 1),
    "cache_write": lambda head_size, dtype, kept: cache_write_config(head_size, dtype),
    "decode": lambda head_size, dtype, kept: decode_config(head_size, 64, kept, dtype),
    "hopper_key_gradients": lambda head_size, dtype, kept: key_gradients_config(head_size, dtype),
    "hopper_prefill": lambda head_size, dtype, kept: hopper_prefill_config(head_size, dtype),
    "hopper_query_gradients": lambda head_size, dtype, kept: query_gradients_config(head_size, dtype),
    "prefill": lambda head_size, dtype, kept: prefill_config(head_size, 64, dtype),
}
"""What each kernel launches with, by head size, type and kept residues."""


def gradients_config(head_size: int, dtype: torch.dtype, which: int) -> Config:
    """Of blocks of every size: the options are the same."""
    found = [block_sparse_bwd_configs(head_size, dtype, block_size) for block_size in (16, 32, 64, 128)]
    return found[-1][which]


def asked_for(op: str) -> dict[str, set[str]]:
    """Every shape that a kernel may look up, and the options that it launches with."""
    options: dict[str, set[str]] = {}
    for facts in product((16, 32, 64, 128, 256), (torch.bfloat16, torch.float32), range(1, 33)):
        with trial(op, {}) as shapes:
            config = KERNELS[op](*facts)
        options |= {shape: set(config) for shape in shapes}
    return options


@pytest.mark.parametrize(
    "path", sorted(Path(configs.__file__).parent.glob("*.json")), ids=lambda path: path.stem
)
def test_stored_tables_hold_what_the_kernels_ask_for(path: Path) -> None:
    """Anything else would be ignored, and the kernel launched with its defaults, without a word."""
    for op, shapes in json.loads(path.read_text()).items():
        known = asked_for(op)
        for shape, config in shapes.items():
            assert shape in known, f"{op}: {shape}"
            assert config.keys() <= known[shape], f"{op}: {shape}"
