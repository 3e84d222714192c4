"""Models of the reference geometries in full size, with dummy weights: only their config.json exists."""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks import phi3_small
from benchmarks.geometries import SERVED, Geometry
from s2_kernels.config import S2Config

VARIANTS = ("s2", "dense")
"""The pattern, and the same model with every layer dense."""

# (intermediate size, vocabulary) of the Llama models whose attention shapes these are.
LLAMA_SIZES = {
    "hhst-8b": (14336, 128256),
    "s2-1.3b": (5504, 32000),
    "s2-7b": (11008, 32000),
    "llama-3.1-8b-half": (14336, 128256),
    "llama-2-7b-quarter": (11008, 32000),
}
PHI3_SMALL = "phi3-small"
TINY_VOCABULARY = 512


def model_config(name: str, variant: str, tiny: bool = False) -> dict[str, Any]:
    """The config.json of a variant of the geometry called `name`.

    Args:
        name: a key of SERVED.
        variant: one of VARIANTS; they differ in the pattern alone.
        tiny: a model of no size, in float32, with a pattern of the same kind.
    """
    if name == PHI3_SMALL:
        config = phi3_small.TINY if tiny else phi3_small.PHI3_SMALL_128K
        return config | ({} if variant == "s2" else phi3_small.VARIANTS["every layer dense"])
    geometry = SERVED[name]
    if tiny:
        sizes = {"intermediate_size": 128, "vocab_size": TINY_VOCABULARY, "dtype": "float32"}
        geometry = _tiny(geometry)
        sizes["max_position_embeddings"] = 2048
    else:
        sizes = dict(zip(("intermediate_size", "vocab_size"), LLAMA_SIZES[name], strict=True))
    sizes["hidden_size"] = geometry.num_heads * geometry.head_size
    return geometry.hf_config(variant == "s2", **sizes)


def _tiny(geometry: Geometry) -> Geometry:
    if geometry.config.layers_differ:
        pattern = S2Config(2, None, block_size=16, sink_blocks=1, full_heads={0: (1,), 1: (0,)})
    else:
        pattern = replace(geometry.config, block_size=16, local_blocks=2, vert_stride=4, dense_layers=(0,))
    return Geometry(3, 4, 2, 32, pattern)


def write_checkpoint(name: str, variant: str, config: dict[str, Any]) -> Path:
    """What vLLM loads with `load_format="dummy"`, with a tokenizer that knows every token as a word.

    Returns:
        Its folder: always the same one, on which vLLM's cache of compiled models depends.
    """
    folder = Path(tempfile.gettempdir()) / "s2-vllm-benchmarks" / f"{name}-{variant}"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    _save_tokenizer(folder, config["vocab_size"])
    return folder


def _save_tokenizer(folder: Path, vocabulary: int) -> None:
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit

    tokenizer = Tokenizer(WordLevel({f"t{n}": n for n in range(vocabulary)}, unk_token="t0"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(
        json.dumps({"tokenizer_class": "PreTrainedTokenizerFast", "unk_token": "t0"})
    )
