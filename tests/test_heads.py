"""DuoAttention's files of heads, from the file to the pattern that is served."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.geometries import GEOMETRIES, Geometry
from s2_kernels.config import S2Config, S2ConfigError
from s2_vllm.cli import main
from s2_vllm.heads import full_heads, pattern_of_heads, read_scores
from s2_vllm.hf_config import read_config

SCORES = "0.9\t0.1\n1.0\t0.8\n0.2\t0.3\n"
"""Three layers of two KV heads: half of them are the second layer's and the first head."""

PATTERN = {
    "block_size": 64,
    "local_blocks": 5,
    "vert_stride": None,
    "sink_blocks": 1,
    "full_heads": {"0": [0]},
    "dense_layers": [1],
}


@pytest.fixture
def scores(tmp_path: Path) -> Path:
    file = tmp_path / "full_attention_heads.tsv"
    file.write_text(SCORES)
    return file


@pytest.fixture
def model(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(Geometry(3, 4, 2).hf_config(sparse=False)))
    return folder


def printed(capsys: pytest.CaptureFixture[str], *arguments: object) -> Any:
    assert main(["heads", *map(str, arguments)]) == 0
    return json.loads(capsys.readouterr().out)


def error(capsys: pytest.CaptureFixture[str], *arguments: object) -> str:
    assert main(["heads", *map(str, arguments)]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err.removeprefix("s2-vllm: error: ").rstrip("\n")


def test_what_is_printed(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, scores, "--sparsity", 0.5) == {"s2_attention": PATTERN}
    assert printed(capsys, scores) == {"s2_attention": PATTERN}
    more = {"full_heads": {"0": [0], "2": [1]}, "local_blocks": 9, "sink_blocks": 2}
    found = printed(capsys, scores, "--sparsity=0.3", "--sink=65", "--recent=512")
    assert found == {"s2_attention": PATTERN | more}


def test_the_pattern_is_what_the_heads_are(scores: Path) -> None:
    raw = pattern_of_heads(full_heads(read_scores(scores), 0.5), 64, 256)
    config = S2Config.parse(json.loads(json.dumps(raw)), 3)
    found = config.layer_patterns(8, 2, 3)
    assert {layer: pattern.full_heads for layer, pattern in found.items()} == {0: (0,), 2: ()}


def test_ties_are_broken_in_the_same_way_in_every_run() -> None:
    """By the noise that NumPy's global generator gives first after `numpy.random.seed(42)`."""
    ones = np.ones((4, 8))
    state = np.random.get_state()
    np.random.seed(42)
    noise = np.random.uniform(0, 1e-6, ones.shape)
    np.random.set_state(state)
    is_full = full_heads(ones, 0.5)
    assert is_full.sum() == 16
    assert noise[is_full].min() > noise[~is_full].max()
    np.testing.assert_array_equal(is_full, full_heads(ones, 0.5))


SCORE = st.sampled_from([0.0, 0.25, 0.5, 1.0]) | st.floats(0, 1)


@given(st.integers(1, 6), st.integers(2, 6), st.floats(0.01, 0.99), st.data())
def test_as_many_heads_stream_as_asked_for(
    layers: int, heads: int, sparsity: float, data: st.DataObject
) -> None:
    row = st.lists(SCORE, min_size=heads, max_size=heads)
    values = np.array(data.draw(st.lists(row, min_size=layers, max_size=layers)))
    is_full = full_heads(values, sparsity)
    assert abs((~is_full).sum() - sparsity * values.size) <= 1
    # The noise is smaller than this: no head gives way to one that needs less.
    assert values[is_full].min() >= values[~is_full].max() - 1e-6
    expected = [(layer, head) for layer, head in zip(*np.nonzero(is_full), strict=True)]
    raw = pattern_of_heads(is_full, 64, 256)
    listed = [(int(layer), head) for layer, kept in raw["full_heads"].items() for head in kept]
    dense = [(layer, head) for layer in raw["dense_layers"] for head in range(heads)]
    assert sorted(listed + dense) == expected


def test_checked_against_a_model(scores: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert printed(capsys, scores, "--model", model) == {"s2_attention": PATTERN}
    assert printed(capsys, scores, "--model", model / "config.json") == {"s2_attention": PATTERN}
    (model / "config.json").write_text(json.dumps(Geometry(3, 4, 4).hf_config()))
    expected = f"{scores}: 3 layers of 2 KV heads, expected 3 of 4, those of the model"
    assert error(capsys, scores, "--model", model) == expected
    (model / "config.json").write_text(json.dumps(Geometry(2, 4, 2).hf_config(sparse=False)))
    expected = f"{scores}: 3 layers of 2 KV heads, expected 2 of 2, those of the model"
    assert error(capsys, scores, "--model", model) == expected
    (model / "config.json").write_text(json.dumps(GEOMETRIES["hhst-8b"].hf_config(sliding_window=64)))
    assert "has a sliding window" in error(capsys, scores, "--model", model)


def test_a_copied_config(
    scores: Path, model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    original = json.loads((model / "config.json").read_text())
    headwise = {"headwise_config": {"0": [0]}, "s2_attention": {"local_blocks": 2}, "other": {"a": [1.5]}}
    (model / "config.json").write_text(json.dumps(original | headwise))
    output = tmp_path / "new" / "folder"
    assert main(["heads", str(scores), "--model", str(model), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"saved {output / 'config.json'}\n"
    copied = json.loads((output / "config.json").read_text())
    assert copied == original | {"s2_attention": PATTERN, "other": {"a": [1.5]}}
    config = read_config(output, {}).pattern_config()
    assert config == S2Config.parse(PATTERN, 3)


def test_a_text_part_with_a_pattern_of_its_own(
    scores: Path, model: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    text = Geometry(3, 4, 2).hf_config(sparse=False) | {"headwise_config": {"0": [0]}}
    nested = {"architectures": ["LlavaForConditionalGeneration"], "model_type": "llava", "text_config": text}
    nested["vision_config"] = {"model_type": "clip_vision_model"}
    (model / "config.json").write_text(json.dumps(nested))
    assert "headwise_config" in error(capsys, scores, "--model", model)


def test_no_config_is_overwritten(scores: Path, model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (model / "config.json").read_text()
    expected = f"--output: {model} has a config.json, expected a folder without one"
    assert error(capsys, scores, "--model", model, "-o", model) == expected
    assert (model / "config.json").read_text() == before
    expected = "--model: missing, expected the model whose config.json --output is to copy"
    assert error(capsys, scores, "-o", model) == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", ": empty, expected a row of numbers for each layer"),
        ("\n \n", ": empty, expected a row of numbers for each layer"),
        ("0\t1\n\n0\n", ":3: 1 values, expected 2, those of the first row"),
        ("0\t1.1\n", ":1: '1.1', expected a number from 0 to 1"),
        ("0\t1\n-0.1\t1\n", ":2: '-0.1', expected a number from 0 to 1"),
        ("0\tnan\n", ":1: 'nan', expected a number from 0 to 1"),
        ("0\thead\n", ":1: 'head', expected a number from 0 to 1"),
        ("0 1\n", ":1: '0 1', expected a number from 0 to 1"),
        ("0\t\t1\n", ":1: '', expected a number from 0 to 1"),
    ],
)
def test_wrong_files(text: str, message: str, scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores.write_text(text)
    assert error(capsys, scores) == f"{scores}{message}"


def test_what_is_no_text(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    scores.write_bytes(b"\xff")
    assert error(capsys, scores).endswith("expected tab-separated numbers")
    scores.unlink()
    assert "No such file" in error(capsys, scores)


def test_one_head_has_no_sparsity(scores: Path) -> None:
    scores.write_text("0.5\n")
    with pytest.raises(S2ConfigError, match=r"^--sparsity: no head is a streaming head"):
        pattern_of_heads(full_heads(read_scores(scores), 0.5), 64, 256)


def test_more_sinks_than_the_window_has(scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    message = error(capsys, scores, "--sink=321", "--recent=256")
    assert message == "--sink: 321, expected at most 320 with a window for 256 tokens"
    assert printed(capsys, scores, "--sink=320")["s2_attention"]["sink_blocks"] == 5
    assert printed(capsys, scores, "--sink=0")["s2_attention"]["sink_blocks"] == 0


@pytest.mark.parametrize(
    ("option", "expected"),
    [
        *(
            (f"--sparsity={share}", "a number between 0 and 1, neither of them")
            for share in ("0", "1", "-1", "nan", "half")
        ),
        *((f"--sink={tokens}", "a number of tokens") for tokens in ("-1", "x")),
        ("--recent=0", "a positive integer"),
    ],
)
def test_wrong_options(option: str, expected: str, scores: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        main(["heads", str(scores), option])
    assert exit_info.value.code == 2
    name, value = option.split("=")
    assert capsys.readouterr().err.endswith(f"{name}: {value!r}, expected {expected}\n")


def test_never_imports_vllm(scores: Path) -> None:
    code = (
        "import sys\n"
        "from s2_vllm.cli import main\n"
        f"sys.exit(main(['heads', {str(scores)!r}]) or 'vllm' in sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
