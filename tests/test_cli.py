"""The `s2-vllm` command, run as a user runs it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.geometries import GEOMETRIES
from s2_vllm.cli import main

GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config())


def _save(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    return captured.err


def test_plan_counts_the_bytes_of_every_tier(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _plan(capsys, model)
    token_bytes = 8 * 2 * 128 * 2
    # The window, all of the strided super-blocks and the two dense layers, in whole pages of 8 layers.
    window = (1024 // 64 + 1) * 64 * 32
    strided = 131072 // 8 * 32
    dense = 131072 * 2
    assert facts["kv_bytes_per_request"] == pytest.approx((window + strided + dense) * token_bytes, rel=0.01)
    assert facts["kv_bytes_per_request_dense"] == 131072 * 32 * token_bytes == 16 * GIB
    assert [tier["block_size"] for tier in facts["tiers"]] == [64, 512, 512]
    assert len({tier["slots"] * tier["bytes_per_page"] for tier in facts["tiers"][:2]}) == 1
    assert facts["concurrent_requests_dense"] == pytest.approx(2.5)
    assert 7 < facts["concurrent_requests"] < 40 * GIB / facts["kv_bytes_per_request"]


def test_plan_takes_a_file_as_well_as_a_folder(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _plan(capsys, model) == _plan(capsys, model / "config.json")


def test_plan_options_change_what_they_name(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _plan(capsys, model)
    halved = _plan(capsys, model, "--tensor-parallel-size", 2)
    assert halved["kv_bytes_per_request_dense"] == facts["kv_bytes_per_request_dense"] / 2
    shorter = _plan(capsys, model, "--max-model-len", 32768)
    assert shorter["stored_fraction_sparse_layer"] > facts["stored_fraction_sparse_layer"]
    smaller = _plan(capsys, model, "--kv-cache-memory", "20GiB")
    assert smaller["concurrent_requests"] == pytest.approx(facts["concurrent_requests"] / 2, rel=0.01)
    wider = _plan(capsys, model, "--dtype", "float32")
    assert wider["kv_bytes_per_request"] == 2 * facts["kv_bytes_per_request"]
    larger = _plan(capsys, model, "--block-size", 1024)
    assert larger["tiers"][2]["block_size"] == 1024
    patched = _plan(
        capsys, model, "--hf-overrides", '{"s2_attention": {"local_blocks": 16, "vert_stride": 4}}'
    )
    assert patched["stored_fraction_sparse_layer"] == pytest.approx(0.25, rel=0.04)


def test_plan_prints_a_line_per_tier(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["tier", "window", "strided", "dense"]
    assert lines[1].split()[1:] == ["30", "64", "64", str(8 * 8 * 64 * 256 * 2), "2"]


def test_show_draws_the_pattern(model: Path, tmp_path: Path) -> None:
    output = tmp_path / "pattern.svg"
    assert main(["show", str(model), "-o", str(output)]) == 0
    assert "head 31" in output.read_text() or "head 7" in output.read_text()


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in _error(capsys, "plan", tmp_path / "nowhere")


def test_broken_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "config.json: 'utf-8' codec" in _error(capsys, "plan", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "expected JSON" in _error(capsys, "plan", tmp_path)


def test_model_without_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(sparse=False))
    assert "s2_attention: missing" in _error(capsys, "plan", tmp_path)


def test_bad_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(s2_attention={"local_blocks": 4, "vert_stride": 0}))
    message = _error(capsys, "plan", tmp_path)
    assert "s2_attention.vert_stride: 0, expected" in message


def test_missing_geometry(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(num_hidden_layers=None))
    assert "num_hidden_layers: None, expected a positive integer" in _error(capsys, "plan", tmp_path)


@pytest.mark.parametrize("length", ["x", 0, -5, True])
def test_bad_length(tmp_path: Path, length: Any, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(max_position_embeddings=length))
    message = f"max_position_embeddings: {length!r}, expected a positive integer"
    assert message in _error(capsys, "plan", tmp_path)
    assert _plan(capsys, tmp_path, "--max-model-len", 4096)["max_model_len"] == 4096


def test_heads_that_the_engine_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(head_dim=300))
    assert "head_size: 300, expected at most 256" in _error(capsys, "plan", tmp_path)


def test_unsupported_image(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ".bmp" in _error(capsys, "show", model, "-o", tmp_path / "pattern.bmp")


@pytest.mark.parametrize(
    ("option", "value"),
    [("--kv-cache-memory", "40XB"), ("--max-model-len", "0"), ("--hf-overrides", "[1]")],
)
def test_bad_option(model: Path, option: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["plan", str(model), option, value])
    assert exit_info.value.code == 2
    assert option in capsys.readouterr().err


def test_needs_neither_vllm_nor_torch(model: Path) -> None:
    """Planning must work where no GPU software is: it imports neither."""
    code = (
        "import sys\n"
        "from s2_vllm.cli import main\n"
        f"status = main(['plan', {str(model)!r}])\n"
        "sys.exit(status or ('torch' in sys.modules) or ('vllm' in sys.modules))\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
