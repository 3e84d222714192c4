"""The `s2_attention` key for a dense model whose retrieval heads DuoAttention has found. Needs no vLLM.

DuoAttention (arXiv 2410.10819; github.com/mit-han-lab/duo-attention) publishes a value from 0 to 1 for each
KV head of a model, in a file `full_attention_heads.tsv` of layers by KV heads: how much the head needs to
attend to everything. Below a quantile heads are streaming heads, with a window and sinks.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from s2_kernels.config import HEADWISE_KEY, KEY, S2Config, S2ConfigError, local_blocks_of, sink_blocks_of
from s2_vllm.hf_config import HFConfig

_SEED = 42
_NOISE = 1e-6


def read_scores(file: Path) -> npt.NDArray[np.float64]:
    """The values of a `full_attention_heads.tsv`: [layers, KV heads].

    Raises:
        S2ConfigError: it is empty, its rows differ in length, or a value is no number from 0 to 1.
        OSError: there is no such file.
    """
    try:
        lines = file.read_text().splitlines()
    except UnicodeDecodeError as error:
        raise S2ConfigError(f"{file}: {error}, expected tab-separated numbers") from error
    rows: list[list[float]] = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        row = [_score(text, f"{file}:{number}") for text in line.strip().split("\t")]
        if rows and len(row) != len(rows[0]):
            raise S2ConfigError(
                f"{file}:{number}: {len(row)} values, expected {len(rows[0])}, those of the first row"
            )
        rows.append(row)
    if not rows:
        raise S2ConfigError(f"{file}: empty, expected a row of numbers for each layer")
    return np.array(rows)


def _score(text: str, where: str) -> float:
    try:
        score = float(text)
    except ValueError:
        score = -1.0
    if not 0 <= score <= 1:
        raise S2ConfigError(f"{where}: {text!r}, expected a number from 0 to 1")
    return score


def full_heads(scores: npt.NDArray[np.float64], sparsity: float) -> npt.NDArray[np.bool_]:
    """Which heads attend to everything: those whose score is at least the quantile `sparsity` of all scores.

    The rule is that of `sparsify_attention_heads` in DuoAttention's duo_attn/utils.py. It breaks ties, of
    which published files have many, by uniform noise below 1e-6. The noise here is the first that NumPy's
    global generator gives with the seed 42, which DuoAttention's evaluation on LongBench sets
    (eval/LongBench/pred.py), and is the same in every run.

    Args:
        scores: [layers, KV heads].
        sparsity: in (0, 1), the share of streaming heads.

    Returns:
        [layers, KV heads].
    """
    noisy = scores + np.random.RandomState(_SEED).uniform(0, _NOISE, scores.shape)
    return noisy >= np.quantile(noisy, sparsity)


def pattern_of_heads(is_full: npt.NDArray[np.bool_], sink: int, recent: int) -> dict[str, Any]:
    """The value of `s2_attention` for these heads, in blocks of the default size.

    A layer all of whose heads are full is a dense layer.

    Args:
        is_full: [layers, KV heads].
        sink: tokens at the start that every head attends to.
        recent: tokens before the query that every head attends to.

    Raises:
        S2ConfigError: there are more sinks than the window has blocks, or no head is a streaming head.
    """
    block_size = S2Config.block_size
    sinks, window = sink_blocks_of(sink, block_size), local_blocks_of(recent, block_size)
    if sinks > window:
        raise S2ConfigError(
            f"--sink: {sink}, expected at most {window * block_size} with a window for {recent} tokens"
        )
    dense = [layer for layer, heads in enumerate(is_full) if heads.all()]
    if len(dense) == len(is_full):
        raise S2ConfigError("--sparsity: no head is a streaming head, expected a larger value")
    return {
        "block_size": block_size,
        "local_blocks": window,
        "vert_stride": None,
        "sink_blocks": sinks,
        "full_heads": {
            str(layer): np.flatnonzero(heads).tolist()
            for layer, heads in enumerate(is_full)
            if heads.any() and not heads.all()
        },
        "dense_layers": dense,
    }


def check_shape(shape: tuple[int, ...], config: HFConfig, file: Path) -> None:
    """Refuse scores of another model.

    Args:
        shape: layers and KV heads of the scores.
        config: of the model.
        file: what the scores are from.

    Raises:
        S2ConfigError: the model has other numbers of layers or KV heads.
    """
    model = config.geometry(dtype_bytes=2)
    expected = model.num_layers, model.num_kv_heads
    if shape != expected:
        raise S2ConfigError(
            f"{file}: {shape[0]} layers of {shape[1]} KV heads, expected {expected[0]} of {expected[1]}, "
            "those of the model"
        )


def write_config(source: Path, folder: Path, pattern: dict[str, Any]) -> Path:
    """Copy a model's config.json into a folder, with the pattern, and return the copy's path.

    RTPurbo's key, which would contradict the pattern, is not copied.

    Args:
        source: the file, or its folder.
        folder: made where there is none.
        pattern: the value of `s2_attention`.

    Raises:
        S2ConfigError: the folder has a config.json.
        OSError: a file cannot be read or written.
    """
    file = source / "config.json" if source.is_dir() else source
    copied = {key: value for key, value in json.loads(file.read_text()).items() if key != HEADWISE_KEY}
    target = folder / "config.json"
    if target.exists():
        raise S2ConfigError(f"--output: {folder} has a config.json, expected a folder without one")
    folder.mkdir(parents=True, exist_ok=True)
    target.write_text(json.dumps(copied | {KEY: pattern}, indent=2) + "\n")
    return target
