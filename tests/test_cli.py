"""The `s2-vllm` command, run as a user runs it."""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from vllm.utils.argparse_utils import human_readable_int

from benchmarks.geometries import GEOMETRIES, Geometry
from s2_kernels.pattern import S2Pattern
from s2_vllm import cli
from s2_vllm.cli import describe, main, positive_count
from s2_vllm.plan import ModelGeometry
from s2_vllm.planning import plan_for

GIB = 2**30


@pytest.fixture
def model(tmp_path: Path) -> Path:
    return _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config())


@pytest.fixture
def few_heads(tmp_path: Path) -> Path:
    """Heads are drawn one by one."""
    return _save(tmp_path, Geometry(2, 4, 2).hf_config())


def _save(folder: Path, config: dict[str, Any]) -> Path:
    (folder / "config.json").write_text(json.dumps(config))
    return folder


def _plan(capsys: pytest.CaptureFixture[str], *arguments: object) -> dict[str, Any]:
    assert main(["plan", "--json", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def _table(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["plan", *map(str, arguments)]) == 0
    return capsys.readouterr().out


def _error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main([*map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1
    assert captured.err.startswith("s2-vllm: error: ")
    return captured.err.removeprefix("s2-vllm: error: ").rstrip("\n")


def _usage_error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    with pytest.raises(SystemExit) as exit_info:
        main([*map(str, arguments)])
    assert exit_info.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def test_plan_counts_the_bytes_of_every_tier(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _plan(capsys, model)
    token_bytes = 8 * 2 * 128 * 2
    # The window, all of the strided super-blocks and the two dense layers, in whole pages of 16 layers.
    window = (1024 // 64 + 1) * 64 * 32
    strided = 131072 // 8 * 32
    dense = 131072 * 2
    assert facts["kv_bytes_per_request"] == pytest.approx((window + strided + dense) * token_bytes, rel=0.01)
    assert facts["kv_bytes_per_request_dense"] == 131072 * 32 * token_bytes == 16 * GIB
    assert [tier["block_size"] for tier in facts["tiers"]] == [64, 512, 1024]
    assert len({tier["slots"] * tier["bytes_per_page"] for tier in facts["tiers"][:2]}) == 1
    assert facts["concurrent_requests_dense"] == pytest.approx(2.5)
    assert facts["concurrent_requests_decoding"] == 40 * GIB / facts["kv_bytes_per_request"]
    assert 7 < facts["concurrent_requests"] < facts["concurrent_requests_decoding"]


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
    larger = _plan(capsys, model, "--block-size", 2048)
    assert larger["tiers"][2]["block_size"] == 2048
    patched = _plan(
        capsys, model, "--hf-overrides", '{"s2_attention": {"local_blocks": 16, "vert_stride": 4}}'
    )
    assert patched["stored_fraction_sparse_layer"] == pytest.approx(0.25, rel=0.04)


def test_json_has_a_line_per_fact(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", "--json", str(model)]) == 0
    assert capsys.readouterr().out.startswith('{\n  "max_model_len": 131072,\n  "tensor_parallel_size": 1,\n')


def test_plan_prints_a_line_per_tier(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["plan", str(model)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[:4]] == ["tier", "window", "strided", "dense"]
    assert lines[1].split()[1:] == ["30", "64", "64", str(16 * 8 * 64 * 256 * 2), "1"]


def test_show_draws_the_pattern(few_heads: Path, tmp_path: Path) -> None:
    output = tmp_path / "pattern.svg"
    assert main(["show", str(few_heads), "-o", str(output)]) == 0
    assert [f"head {head} \u00b7" in output.read_text() for head in range(5)] == [True] * 4 + [False]


def test_show_draws_the_layer_that_is_asked_for(
    few_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    output = tmp_path / "pattern.svg"
    pattern = {"local_blocks": 2, "vert_stride": None, "sink_blocks": 1, "dense_layers": [0]}
    layers = {"num_hidden_layers": 3, "s2_attention": pattern | {"full_heads": {"1": [0], "2": [1]}}}
    options = [str(few_heads), "-o", str(output), "--hf-overrides", json.dumps(layers)]
    titles = {}
    for layer in ([], ["--layer", "1"], ["--layer=2"]):
        assert main(["show", *options, *layer]) == 0
        titles[" ".join(layer)] = re.findall(r"head \d \u00b7 (\w+)", output.read_text())
    first = ["full", "full", "streaming", "streaming"]
    assert titles == {"": first, "--layer 1": first, "--layer=2": first[::-1]}
    assert "sinks" in output.read_text()
    assert "no stride" in output.read_text()
    capsys.readouterr()
    for layer, what in ((0, "a dense layer"), (3, "no layer of the model")):
        message = f"--layer: {layer}, {what}, expected one of the sparse layers 1, 2"
        assert _error(capsys, "show", *options, "--layer", layer) == message
    assert _usage_error(capsys, "show", *options, "--layer=-1").endswith("expected the index of a layer")


def test_missing_file(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert "nowhere" in _error(capsys, "plan", tmp_path / "nowhere")


def test_broken_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.json").write_bytes(b"\xff")
    assert "config.json: 'utf-8' codec" in _error(capsys, "plan", tmp_path)
    (tmp_path / "config.json").write_text("{")
    assert "expected JSON" in _error(capsys, "plan", tmp_path)


def test_model_without_a_pattern(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(sparse=False))
    expected = "s2_attention: missing, expected the key in config.json or in --hf-overrides"
    assert _error(capsys, "plan", tmp_path) == expected


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
    assert _error(capsys, "plan", tmp_path) == message
    # No engine starts on such a file, whatever length it is asked for.
    assert _error(capsys, "plan", tmp_path, "--max-model-len", 4096) == message


def test_heads_that_the_engine_refuses(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(head_dim=300))
    assert "head_size: 300, expected at most 256" in _error(capsys, "plan", tmp_path)


def test_unsupported_image(model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert ".bmp" in _error(capsys, "show", model, "-o", tmp_path / "pattern.bmp")


@pytest.mark.parametrize(
    ("option", "value", "expected"),
    [
        ("--kv-cache-memory", "40XB", "'40XB', expected a size such as 40GiB or 40G"),
        ("--kv-cache-memory", "0G", "'0G', expected a size such as 40GiB or 40G"),
        ("--kv-cache-memory", "1.5G", "'1.5G', expected a size such as 40GiB or 40G"),
        ("--kv-cache-memory", "40 g", "'40 g', expected a size such as 40GiB or 40G"),
        ("--kv-cache-memory", "-1", "'-1', expected a size such as 40GiB or 40G"),
        ("--max-model-len", "0", "'0', expected a positive integer such as 32768, 32k or 32K"),
        ("--max-model-len", "128KiB", "'128KiB', expected a positive integer such as 32768, 32k or 32K"),
        ("--max-model-len", "1.5K", "'1.5K', expected a positive integer such as 32768, 32k or 32K"),
        ("--max-model-len", "auto", "'auto', expected a positive integer such as 32768, 32k or 32K"),
        ("--max-num-batched-tokens", "many", "'many', expected a positive integer such as 32768, 32k or 32K"),
        ("--tensor-parallel-size", "0", "'0', expected a positive integer"),
        ("--tensor-parallel-size", "2k", "'2k', expected a positive integer"),
        ("--block-size", "-64", "'-64', expected a positive integer"),
        ("--dtype", "int8", "invalid choice: 'int8'"),
        ("--hf-overrides", "[1]", "'[1]', expected a JSON object"),
    ],
)
def test_bad_option(
    model: Path, option: str, value: str, expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    message = _usage_error(capsys, "plan", model, f"{option}={value}")
    assert message.startswith("s2-vllm plan: error: argument ")
    assert option in message
    assert message.endswith(f": {expected}") or (option, value) == ("--dtype", "int8")
    assert expected in message


def test_broken_overrides_are_called_so(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = _usage_error(capsys, "plan", model, "--hf-overrides", "{")
    assert re.search(r"--hf-overrides: '\{': .*: line 1 column 2 \(char 1\), expected JSON$", message)


def test_plans_without_torch_transformers_and_vllm(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Planning must work where no GPU software is."""
    code = (
        "import sys\n"
        "for name in ('torch', 'transformers', 'triton', 'vllm'):\n"
        "    sys.modules[name] = None  # importing it fails\n"
        "from s2_vllm.cli import main\n"
        f"sys.exit(main(['plan', {str(model)!r}]))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert done.stdout == _table(capsys, model)
    assert done.stderr == ""


def test_never_imports_vllm(model: Path) -> None:
    code = (
        "import sys\n"
        "from s2_vllm.cli import main\n"
        f"sys.exit(main(['plan', {str(model)!r}]) or 'vllm' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


def test_version(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["--version"])
    assert exit_info.value.code == 0
    assert capsys.readouterr().out == f"s2-vllm {importlib.metadata.version('s2-vllm')}\n"

    def fail(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", fail)
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == "s2-vllm (not installed)\n"


def test_the_shells_arguments(
    model: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = _table(capsys, model)
    monkeypatch.setattr(sys, "argv", ["s2-vllm", "plan", str(model)])
    assert main() == 0
    assert capsys.readouterr().out == expected


def test_as_a_module(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "s2_vllm.cli", "plan", str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.startswith("s2-vllm: error: [Errno 2] No such file or directory")


def test_a_command_is_required(capsys: pytest.CaptureFixture[str]) -> None:
    assert _usage_error(capsys) == "s2-vllm: error: the following arguments are required: COMMAND"


OVERRIDES_HELP = "keys of config.json to set, as for `vllm serve` (default: {})"
HELP = {
    "plan": {
        "--max-model-len N": (
            "tokens of the longest request, e.g. 32768, 32k (32,000) or 32K (32,768) (default: the model's)"
        ),
        "--kv-cache-memory-bytes SIZE, --kv-cache-memory SIZE": (
            "KV cache of one GPU, e.g. 40G or 40GiB (2^30 bytes each), 40g or 40GB (10^9) (default: 40GiB)"
        ),
        "--tensor-parallel-size T, -tp T": "GPUs (default: 1)",
        "--max-num-batched-tokens N": (
            "tokens of a step (default: 8192, that of `vllm serve` on an H100 or H200)"
        ),
        "--block-size N": "tokens per page of a dense layer (default: what the plan needs)",
        "--dtype {auto,bfloat16,float16,half,float32,float}": (
            "of the model and its KV cache (default: auto, 16 bits whatever the checkpoint has)"
        ),
        "--kv-cache-dtype DTYPE": (
            "the model's dtype, for a checkpoint that declares a quantized KV cache (default: auto)"
        ),
        "--hf-overrides JSON": OVERRIDES_HELP,
        "--json": "print JSON instead of a table",
    },
    "show": {
        "-o FILE, --output FILE": "image, PNG or SVG (default: pattern.png)",
        "--num-blocks N": (
            "blocks along each side of a panel (default: enough to see two strided blocks leave the window, "
            "64 at most)"
        ),
        "--layer N": "the layer whose pattern to draw (default: the first sparse one)",
        "--hf-overrides JSON": OVERRIDES_HELP,
    },
    "heads": {
        "--sparsity S": ("share of the KV heads that become streaming heads, between 0 and 1 (default: 0.5)"),
        "--sink N": "tokens at the start that every head attends to, in whole blocks of 64 (default: 64)",
        "--recent N": (
            "tokens before the query that every head attends to, in whole blocks of 64 (default: 256)"
        ),
        "--model CONFIG_OR_DIR": (
            "config.json of the model, or its folder: the heads are checked against it (default: none)"
        ),
        "-o DIR, --output DIR": (
            "write the model's config.json with the pattern into this folder (default: print the pattern)"
        ),
    },
}


@pytest.mark.parametrize("command", HELP)
def test_every_option_has_its_help_and_default(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "400")
    with pytest.raises(SystemExit) as exit_info:
        main([command, "--help"])
    assert exit_info.value.code == 0
    text = capsys.readouterr().out.split("options:\n")[1]
    found = re.findall(r"^  (-\S.*?)(?:  +|\n +)(.*)$", text, re.MULTILINE)
    options = dict(found)
    # From Python 3.13 on a value is named once.
    short = {
        re.sub(r"(\S+) (\S+), (\S+) \2", r"\1, \3 \2", option): text for option, text in HELP[command].items()
    }
    del options["-h, --help"]
    assert options.keys() in (HELP[command].keys(), short.keys())
    for option, text in (HELP[command] | short).items():
        assert options.get(option, text) == text
    for text in options.values():
        assert "default: " in text or text == "print JSON instead of a table"


def test_the_commands_say_what_they_do(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["--help"])
    text = capsys.readouterr().out
    assert "S2-Attention patterns and KV cache plans." in text.splitlines()
    assert text.startswith("usage: s2-vllm [-h] [--version] COMMAND ...\n")
    assert re.search(r"plan +the KV cache that vLLM will set up for a model\n", text)
    assert re.search(r"show +draw the pattern, one panel per head\n", text)
    assert re.search(r"heads +the pattern of a dense model whose retrieval heads are known\n", text)
    assert re.search(r"--version +show the version and exit\n", text)
    for command in HELP:
        with pytest.raises(SystemExit):
            main([command, "--help"])
        model = r"CONFIG_OR_DIR +config.json, or its folder\n"
        scores = r"TSV +DuoAttention's full_attention_heads.tsv of the model\n"
        assert re.search(scores if command == "heads" else model, capsys.readouterr().out)


def test_defaults_are_what_the_help_says(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    defaults = (
        "--max-model-len=131072 --kv-cache-memory-bytes=40GiB --tensor-parallel-size=1 "
        "--max-num-batched-tokens=8192 --block-size=1024 --dtype=auto --kv-cache-dtype=auto --hf-overrides={}"
    )
    facts = _plan(capsys, model)
    assert facts == _plan(capsys, model, *defaults.split())
    assert facts["kv_cache_memory"] == 40 * GIB
    assert facts["max_num_batched_tokens"] == 8192
    assert facts["max_model_len"] == 131072
    assert facts["tensor_parallel_size"] == 1


@pytest.mark.parametrize(
    ("size", "expected"),
    [
        ("1", 1),
        ("123456789", 123456789),
        ("1k", 1000),
        ("2m", 2 * 10**6),
        ("3g", 3 * 10**9),
        ("4t", 4 * 10**12),
        ("1.5g", 1_500_000_000),
        ("1K", 1024),
        ("2M", 2 * 2**20),
        ("40G", 40 * 2**30),
        ("4T", 4 * 2**40),
        ("1KB", 1000),
        ("2MB", 2 * 10**6),
        ("40GB", 40 * 10**9),
        ("4TB", 4 * 10**12),
        ("1KiB", 1024),
        ("2MiB", 2 * 2**20),
        ("40 GiB", 40 * 2**30),
        ("1.5GiB", 3 * 2**29),
        ("4TiB", 4 * 2**40),
        (" 40G ", 40 * 2**30),
        # No float.
        ("9007199254740993", 2**53 + 1),
    ],
)
@pytest.mark.parametrize(
    "option", ["--kv-cache-memory", "--kv-cache-memory-bytes", "--kv_cache_memory_bytes"]
)
def test_sizes(
    model: Path, option: str, size: str, expected: int, capsys: pytest.CaptureFixture[str]
) -> None:
    assert _plan(capsys, model, f"{option}={size}")["kv_cache_memory"] == expected


@given(
    number=st.integers(0, 10**6) | st.decimals(0, 10**6, places=3),
    suffix=st.sampled_from(["", *"kKmMgGtT"]),
)
def test_counts_are_read_as_vllm_reads_them(number: Any, suffix: str) -> None:
    text = f"{number}{suffix}"
    try:
        expected = human_readable_int(text)
    except (ValueError, argparse.ArgumentTypeError):
        expected = 0
    if expected > 0:
        assert positive_count(text) == expected
    else:
        with pytest.raises(argparse.ArgumentTypeError):
            positive_count(text)


def test_counts_of_tokens(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _plan(capsys, model, "--max-model-len", "128k", "--max-num-batched-tokens", "16K")
    assert (facts["max_model_len"], facts["max_num_batched_tokens"]) == (128000, 16384)
    assert _plan(capsys, model, "--max_model_len", "128K")["max_model_len"] == 131072
    overrides = '{"max_position_embeddings": 5000}'
    assert _plan(capsys, model, f"--hf_overrides={overrides}")["max_model_len"] == 5000


@pytest.mark.parametrize("option", ["-tp", "--tensor-parallel-size"])
def test_tensor_parallel(model: Path, option: str, capsys: pytest.CaptureFixture[str]) -> None:
    facts = _plan(capsys, model, option, "4")
    assert facts["tensor_parallel_size"] == 4
    assert facts["kv_bytes_per_request_dense"] == 4 * GIB


BYTES = {"auto": 2, "half": 2, "float16": 2, "bfloat16": 2, "float": 4, "float32": 4}


@pytest.mark.parametrize("stored", ["float32", "float16", "bfloat16"])
@pytest.mark.parametrize(("dtype", "size"), BYTES.items())
def test_bytes_of_every_dtype(
    tmp_path: Path, dtype: str, size: int, stored: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """What a checkpoint is stored in does not matter: by default vLLM runs float32 in 16 bits."""
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(dtype=stored))
    facts = _plan(capsys, tmp_path, "--dtype", dtype)
    assert facts["kv_bytes_per_request_dense"] == 131072 * 32 * 8 * 2 * 128 * size
    assert facts["tiers"][0]["bytes_per_page"] == 16 * 8 * 64 * 2 * 128 * size


def test_a_dtype_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(dtype="float8_e4m3fn"))
    assert _error(capsys, "plan", tmp_path) == (
        "dtype: float8_e4m3fn, expected one of ['bfloat16', 'float', 'float16', 'float32', 'half']"
    )


QUANTIZED = {"quant_method": "compressed-tensors", "kv_cache_scheme": {"num_bits": 8, "type": "float"}}


@pytest.mark.parametrize(
    ("config", "arguments", "message"),
    [
        ({}, "--kv-cache-dtype fp8", "fp8, expected auto or bfloat16"),
        ({"dtype": "float16"}, "--kv-cache-dtype bfloat16", "bfloat16, expected auto or float16"),
        ({}, "--kv-cache-dtype bfloat16 --dtype half", "bfloat16, expected auto or float16"),
        ({}, "--kv-cache-dtype bfloat16 --dtype float", "bfloat16, expected auto"),
        (
            {"quantization_config": QUANTIZED},
            "",
            "auto (the checkpoint declares a quantized one), expected bfloat16",
        ),
        (
            {"quantization_config": QUANTIZED, "dtype": "float32"},
            "",
            "auto (the checkpoint declares a quantized one), expected bfloat16",
        ),
    ],
)
def test_kv_cache_dtypes_that_no_engine_takes(
    tmp_path: Path,
    config: dict[str, Any],
    arguments: str,
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(**config))
    expected = f"kv_cache_dtype: {message} for a model with 's2_attention'"
    assert _error(capsys, "plan", tmp_path, *arguments.split()) == expected


def test_kv_cache_dtypes_that_engines_take(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    plain = _plan(capsys, _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config()))
    assert _plan(capsys, tmp_path, "--kv-cache-dtype", "bfloat16") == plain
    assert _plan(capsys, tmp_path, "--kv-cache-dtype", "float16", "--dtype", "half") == plain
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(quantization_config=QUANTIZED))
    assert _plan(capsys, tmp_path, "--kv-cache-dtype", "bfloat16") == plain


def test_facts(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def tier(name: str, layers: int, block_size: int, slots: int, groups: int) -> dict[str, Any]:
        return {
            "tier": name,
            "layers": layers,
            "block_size": block_size,
            "slots": slots,
            "bytes_per_page": 4194304,
            "groups": groups,
        }

    # A block is two pages of 4 MiB. A request takes 256 of the strided group and 128 of the dense one, and of
    # the window group those of the window, or of the window and two steps.
    blocks = 40 * GIB // (2 * 2**22)
    assert _plan(capsys, model) == {
        "max_model_len": 131072,
        "tensor_parallel_size": 1,
        "layers_per_entry": 16,
        "tiers": [
            tier("window", 30, 64, 64, 1),
            tier("strided", 30, 512, 64, 1),
            tier("dense", 2, 1024, 1024, 1),
        ],
        "residues": [[0], [7], [6], [5], [4], [3], [2], [1]],
        "vert_stride": 8,
        "heads": {"full": 0, "streaming": 0, "strided": 240},
        "mixed": False,
        "sink_blocks": 0,
        "patterns": [
            {
                "layers": list(range(2, 32)),
                "block_size": 64,
                "local_blocks": 16,
                "vert_stride": 8,
                "residues": [[0], [7], [6], [5], [4], [3], [2], [1]],
                "full_heads": [],
                "sink_blocks": 0,
            }
        ],
        "kv_cache_groups": 3,
        "padding": pytest.approx(2 / 30),
        "padding_by_tier": {"window": pytest.approx(2 / 30), "strided": pytest.approx(2 / 30), "dense": 0},
        "padding_for_ranks": 0,
        "prefix_hit_tokens": 1024,
        "union_complete": True,
        "layers_not_union_complete": 0,
        "stored_fraction_sparse_layer": (1024 - 64 + 131072 / 8) / 131072,
        "kv_bytes_per_request": (17 + 256 + 128) * 2 * 2**22,
        "kv_bytes_per_request_dense": 16 * GIB,
        "kv_cache_memory": 40 * GIB,
        "max_num_batched_tokens": 8192,
        "concurrent_requests": blocks / (273 + 256 + 128),
        "concurrent_requests_decoding": blocks / (17 + 256 + 128),
        "concurrent_requests_dense": 2.5,
    }


def test_table_of_a_pattern_with_gaps(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Few heads leave blocks that no head keeps, and many heads are not all listed."""
    s2 = {"local_blocks": 2, "vert_stride": 16, "head_sliding_step": 2}
    config = GEOMETRIES["s2-1.3b"].hf_config(s2_attention=s2, max_position_embeddings=4096, head_dim=64)
    arguments = ["--kv-cache-memory", "700MiB", "-tp", "2", "--max-num-batched-tokens", "512"]
    assert _table(capsys, _save(tmp_path, config), *arguments) == (
        "tier     layers  block_size  slots  bytes_per_page  groups\n"
        "window       24          64     64          131072       1\n"
        "strided      24        1024     64          131072       1\n"
        "\n"
        "KV cache groups         2 (1 sparse layers an entry, padding 0.0%)\n"
        "prefix-cache hits       on multiples of 1024 tokens\n"
        "residues by KV head     0 14 12 10 8 6 4 2 ... (16 heads), modulo 16\n"
        "old blocks              some in NO head's set\n"
        "request                 4096 tokens, per rank of 2\n"
        "  a sparse layer stores 7.8% of a dense one\n"
        "  KV cache              21.00 MiB (10.9% of 192.00 MiB if all layers were dense)\n"
        "  fit in 700.00 MiB     33.29 while they decode (3.65 if all layers were dense)\n"
        "  by vLLM's count       10.13, with 2 steps of 512 tokens in flight of every request\n"
    )


def test_heads_of_several_kinds() -> None:
    """Two full heads, one strided and one streaming in layer 0, none but streaming ones in layer 1."""
    window = {"local_blocks": 4, "sink_blocks": 1}
    patterns = {
        0: S2Pattern(64, 4, 2, (-1, -1, 1, -1), 4, 1, (0, 1)),
        1: S2Pattern.build(4, 4, vert_stride=None, **window),
    }
    plan = plan_for(patterns, ModelGeometry(2, 4, 4, 128, 2), 2)
    facts = describe(plan, 4096, GIB, 512)
    assert facts["heads"] == {"full": 2, "streaming": 5, "strided": 1}
    assert (facts["residues"], facts["vert_stride"]) == (None, None)
    assert (facts["mixed"], facts["sink_blocks"]) == (True, 1)
    assert facts["patterns"] == [
        {
            "layers": [0],
            "block_size": 64,
            "local_blocks": 4,
            "vert_stride": 2,
            "residues": ((0, 1), (0, 1), (1,), ()),
            "full_heads": (0, 1),
            "sink_blocks": 1,
        },
        {
            "layers": [1],
            "block_size": 64,
            "local_blocks": 4,
            "vert_stride": 1,
            "residues": ((),) * 4,
            "full_heads": (),
            "sink_blocks": 1,
        },
    ]
    assert (facts["union_complete"], facts["layers_not_union_complete"]) == (False, 1)
    # Rank 0 has both full heads, four rows of five, rank 1 the strided one.
    assert facts["padding_by_tier"] == {"window": 0, "strided": pytest.approx(2 * 4 / 5 - 1)}
    assert facts["padding_for_ranks"] == pytest.approx(2 * 4 / 5 - 1)
    lines = cli._table(facts).splitlines()
    assert "KV heads                2 full, 5 streaming, 1 strided in 2 sparse layers" in lines
    assert "sinks                   1 x 64 tokens" in lines
    assert "padding by tier         window 0.0%, strided 60.0%; for less full ranks 60.0%" in lines
    assert "old blocks              some in NO head's set, in 1 of 2 sparse layers" in lines


def test_streaming_heads_alone() -> None:
    pattern = S2Pattern.build(4, 4, vert_stride=None, sink_blocks=2)
    plan = plan_for({0: pattern}, ModelGeometry(1, 4, 4, 128, 2))
    lines = cli._table(describe(plan, 4096, GIB, 512)).splitlines()
    assert "KV heads                0 full, 4 streaming, 0 strided in 1 sparse layers" in lines
    assert "sinks                   2 x 64 tokens" in lines
    assert "padding by tier         window 0.0%; for less full ranks 0.0%" in lines
    assert "old blocks              some in NO head's set" in lines


def test_residues_of_query_heads(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    table = _table(capsys, _save(tmp_path, GEOMETRIES["phi3-small"].hf_config()))
    listed = " ".join(["4,5,6,7 0,1,2,3"] * 4)
    assert f"\nresidues by KV head     {listed}, modulo 8\n" in table
    assert "\nold blocks              each in some head's set\n" in table


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (1, "1 B"),
        (1023, "1023 B"),
        (1024, "1.00 KiB"),
        (1536, "1.50 KiB"),
        (2**20 - 1, "1024.00 KiB"),
        (2**20, "1.00 MiB"),
        (2**30 - 2**20, "1023.00 MiB"),
        (2**30, "1.00 GiB"),
        (5 * 2**40, "5120.00 GiB"),
    ],
)
def test_sizes_are_shown_in_binary_units(
    model: Path, count: int, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    label = f"  fit in {text}".ljust(24)
    assert f"\n{label}" in _table(capsys, model, "--kv-cache-memory", count)


GPT2 = {
    "architectures": ["GPT2LMHeadModel"],
    "model_type": "gpt2",
    "n_layer": 12,
    "n_head": 12,
    "n_embd": 768,
    "n_positions": 1024,
    "s2_attention": {"local_blocks": 2, "vert_stride": 4},
}


@pytest.mark.parametrize("transformers", [True, False], ids=["transformers", "plain"])
def test_models_with_names_of_their_own(
    tmp_path: Path, transformers: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)
    facts = _plan(capsys, _save(tmp_path, GPT2))
    assert facts["max_model_len"] == 1024
    assert facts["tiers"][0]["layers"] == 12
    assert facts["kv_bytes_per_request_dense"] == 1024 * 12 * 768 * 2 * 2


@pytest.mark.parametrize("transformers", [True, False], ids=["transformers", "plain"])
def test_a_model_whose_text_part_is_nested(
    tmp_path: Path, transformers: bool, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not transformers:
        monkeypatch.setitem(sys.modules, "transformers", None)
    text = GEOMETRIES["hhst-8b"].hf_config()
    _save(tmp_path, text)
    expected = _plan(capsys, tmp_path)
    nested = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    nested["vision_config"] = {"model_type": "clip_vision_model"}
    _save(tmp_path, nested)
    assert _plan(capsys, tmp_path) == expected
    # An object goes into the text part, key by key.
    overrides = {"text_config": {"num_hidden_layers": 16, "s2_attention": {"local_blocks": 4}}}
    changed = _plan(capsys, tmp_path, "--hf-overrides", json.dumps(overrides))
    assert changed["kv_bytes_per_request_dense"] == 8 * GIB
    assert changed["vert_stride"] == 8
    assert changed["stored_fraction_sparse_layer"] == pytest.approx((4 * 64 - 64 + 131072 / 8) / 131072)


@pytest.mark.parametrize("command", ["plan", "show"])
def test_a_model_that_no_engine_serves(
    tmp_path: Path, command: str, capsys: pytest.CaptureFixture[str]
) -> None:
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(sliding_window=4096))
    assert _error(capsys, command, tmp_path) == (
        "s2_attention: LlamaForCausalLM has a sliding window (4096 tokens), expected a causal decoder-only "
        "model whose layers are vLLM's Attention"
    )


def test_a_length_that_the_model_is_not_made_for(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert _error(capsys, "plan", model, "--max-model-len", "132000") == (
        "--max-model-len: 132000, expected at most 131072 (config.json, max_position_embeddings)"
    )


def test_heads_that_do_not_divide(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The engine's words, without a key that `s2_attention` does not have."""
    _save(tmp_path, GEOMETRIES["hhst-8b"].hf_config(num_key_value_heads=3))
    message = "num_attention_heads: 32, expected a multiple of num_key_value_heads (3)"
    assert _error(capsys, "plan", tmp_path) == message
    assert _error(capsys, "show", tmp_path) == message


def test_show_options(
    few_heads: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with torch.device("meta"):
        assert main(["show", str(few_heads), "--num-blocks", "5"]) == 0
    assert capsys.readouterr().out == "saved pattern.png\n"
    Geometry(2, 4, 2).pattern.draw(tmp_path / "expected.png", 5)
    assert (tmp_path / "pattern.png").read_bytes() == (tmp_path / "expected.png").read_bytes()
    overrides = '{"s2_attention": {"local_blocks": 4, "vert_stride": 32}}'
    assert main(["show", str(few_heads), "--hf-overrides", overrides, "--output", "x.svg"]) == 0
    assert "stride 32" in (tmp_path / "x.svg").read_text()
    assert _usage_error(capsys, "show", few_heads, "--num-blocks", "0").endswith(
        "expected a positive integer"
    )
