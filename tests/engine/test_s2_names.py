"""Checkpoints that say themselves that they need S2-Attention: served like any, and never as dense models."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import AutoModelForCausalLM
from vllm.model_executor.models import ModelRegistry

import s2_vllm.models.transformers  # noqa: F401 (transformers knows the names)
from tests.engine.checkpoints import FAMILIES, S2_NAMES, random_prompts, tiny_config
from tests.engine.engines import assert_all_pages_free, attention_layers, engine, greedy
from tests.engine.oracle import Oracle
from tests.programs import run_python

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}
PROMPTS = random_prompts([3, 33, 105, 181], seed=11)
NUM_TOKENS = 12

ORDINARY = {"architectures": ["LlamaForCausalLM"], "model_type": "llama"}
ARCHITECTURE_ALONE = {"architectures": ["S2LlamaForCausalLM"], "model_type": "llama"}

START = """
import json, sys
from vllm import LLM
for folder in sys.argv[1:]:
    try:
        LLM(
            folder,
            skip_tokenizer_init=True,
            max_model_len=256,
            kv_cache_memory_bytes=1 << 26,
            gpu_memory_utilization=0.1,
        )
    except Exception as error:
        print("RESULT", json.dumps(str(error)))
"""


@pytest.mark.parametrize("family", FAMILIES)
def test_engine_and_transformers_generate_what_the_oracle_does(
    checkpoint: Callable[..., Path], family: str
) -> None:
    folder = checkpoint(family, S2, names=S2_NAMES[family])
    oracle, dense = Oracle(folder), Oracle(folder, {})
    expected = [oracle.greedy(prompt, NUM_TOKENS)[0] for prompt in PROMPTS]
    assert dense.greedy(PROMPTS[-1], NUM_TOKENS)[0] != expected[-1]
    with engine(folder, max_num_batched_tokens=53) as llm:
        kinds = [kind for name, kind in attention_layers(llm).items() if name.endswith("self_attn.attn")]
        assert kinds == ["S2Attention", "Attention", "S2Attention"]
        assert greedy(llm, PROMPTS, NUM_TOKENS) == expected
        assert_all_pages_free(llm)
    assert _generate_with_transformers(folder) == expected


def test_architecture_under_vllms_model_type(checkpoint: Callable[..., Path]) -> None:
    folder = checkpoint("llama", S2, names=ARCHITECTURE_ALONE)
    oracle = Oracle(folder)
    with engine(folder, max_num_batched_tokens=53) as llm:
        assert greedy(llm, PROMPTS, NUM_TOKENS) == [oracle.greedy(p, NUM_TOKENS)[0] for p in PROMPTS]


@pytest.mark.parametrize("family", FAMILIES)
def test_models_are_vllms_own(family: str) -> None:
    (name,) = S2_NAMES[family]["architectures"]
    assert ModelRegistry.models[name] == ModelRegistry.models[name.removeprefix("S2")]


@pytest.mark.parametrize("case", [*FAMILIES, "architecture_alone"])
def test_pattern_is_required(tmp_path: Path, case: str) -> None:
    names = S2_NAMES.get(case, ARCHITECTURE_ALONE)
    _write_config(tmp_path, case if case in FAMILIES else "llama", names)
    message = rf"s2_attention: missing, expected the pattern .*{names['architectures'][0]} .*--hf-overrides"
    with pytest.raises(ValueError, match=message), engine(tmp_path, max_model_len=256):
        pass


def test_required_pattern_may_come_with_the_command(tmp_path: Path) -> None:
    _write_config(tmp_path, "llama", S2_NAMES["llama"])
    with (
        pytest.raises(RuntimeError, match="Cannot find any model weights"),
        engine(tmp_path, max_model_len=256, hf_overrides={"s2_attention": S2}),
    ):
        pass


def test_vllm_without_the_plugin_stops(tmp_path: Path) -> None:
    """None of them has weights: the ordinary one goes on until it needs them, and would be served dense."""
    starts = {"ordinary": ORDINARY, "architecture": ARCHITECTURE_ALONE, "both": S2_NAMES["llama"]}
    for name, names in starts.items():
        _write_config(tmp_path / name, "llama", {**names, "s2_attention": S2})
    output = run_python(
        "-c",
        START,
        *(str(tmp_path / name) for name in starts),
        without="VLLM_PLUGINS",
        VLLM_PLUGINS="lora_filesystem_resolver",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
    )
    results = [json.loads(line.removeprefix("RESULT")) for line in output.splitlines() if "RESULT" in line]
    ordinary, architecture, both = results
    assert "Cannot find any model weights" in ordinary
    assert "S2LlamaForCausalLM" in architecture
    assert "not supported" in architecture
    assert "s2_llama" in both


def _generate_with_transformers(folder: Path) -> list[list[int]]:
    """One batch, padded on the left."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    longest = max(map(len, PROMPTS))
    ids = torch.tensor([[0] * (longest - len(prompt)) + prompt for prompt in PROMPTS])
    is_token = torch.tensor([[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in PROMPTS])
    tokens = model.generate(
        ids, attention_mask=is_token, max_new_tokens=NUM_TOKENS, do_sample=False, pad_token_id=0
    )
    return tokens[:, longest:].tolist()


def _write_config(folder: Path, family: str, keys: dict[str, Any]) -> None:
    """A checkpoint without weights."""
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps({**tiny_config(family).to_dict(), **keys}))
