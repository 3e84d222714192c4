"""The tables of launch configurations: what is stored, and who gets it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.tune import SEARCHES
from s2_kernels.launch import configs
from s2_kernels.launch.configs import launch_config, load_table, shape_key, table_path, trial

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
