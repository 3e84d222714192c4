"""S2-Attention models in transformers: generation as the oracle's, checkpoints, and no other attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForCausalLM, LlamaForCausalLM

from s2_kernels.config import S2ConfigError
from s2_vllm.models.transformers import S2LlamaForCausalLM
from tests.engine.checkpoints import FAMILIES, S2_NAMES, random_prompts, save_checkpoint, tiny_config
from tests.engine.oracle import Oracle
from tests.programs import run_python

if TYPE_CHECKING:
    from pathlib import Path

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}
SHORT, LONG = random_prompts([105, 181], seed=12)
NUM_TOKENS = 12


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_checkpoint(tmp_path_factory.mktemp("llama"), "llama", S2, names=S2_NAMES["llama"])


@pytest.fixture(scope="module")
def oracle(folder: Path) -> Oracle:
    return Oracle(folder)


@pytest.fixture
def model(folder: Path) -> LlamaForCausalLM:
    return _load(folder)


@pytest.mark.parametrize("options", [{}, {"use_cache": False}, {"cache_implementation": "static"}], ids=str)
def test_generate(model: LlamaForCausalLM, oracle: Oracle, options: dict[str, Any]) -> None:
    ids = torch.tensor([LONG])
    tokens = model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NUM_TOKENS,
        do_sample=False,
        pad_token_id=0,
        **options,
    )
    assert tokens[0, len(LONG) :].tolist() == oracle.greedy(LONG, NUM_TOKENS)[0]


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_takes_no_place(model: LlamaForCausalLM, oracle: Oracle, side: str) -> None:
    padding = len(LONG) - len(SHORT)
    before, after = (padding, 0) if side == "left" else (0, padding)
    is_token = torch.tensor([[0] * before + [1] * len(SHORT) + [0] * after, [1] * len(LONG)])
    with torch.no_grad():
        logits = model(
            torch.tensor([[0] * before + SHORT + [0] * after, LONG]),
            attention_mask=is_token,
            position_ids=(is_token.cumsum(-1) - 1).clamp(min=0),
        ).logits
    assert logits.isfinite().all()
    _assert_close(logits[0, before : before + len(SHORT)], oracle.logits(SHORT))
    _assert_close(logits[1], oracle.logits(LONG))


def test_packed_sequences(model: LlamaForCausalLM, oracle: Oracle) -> None:
    """As training code has them: one row, positions that start over."""
    positions = torch.cat([torch.arange(len(SHORT)), torch.arange(len(LONG))])
    with torch.no_grad():
        logits = model(torch.tensor([SHORT + LONG]), position_ids=positions[None], use_cache=False).logits
    _assert_close(logits[0], torch.cat([oracle.logits(SHORT), oracle.logits(LONG)]))


@pytest.mark.parametrize("family", FAMILIES)
def test_saved_is_what_was_loaded(tmp_path: Path, family: str) -> None:
    """Names of tensors too, which for Mixtral are not those of the model's parameters."""
    old = save_checkpoint(tmp_path / "old", family, S2, names=S2_NAMES[family])
    _load(old).save_pretrained(tmp_path / "new")
    config = AutoModelForCausalLM.from_pretrained(tmp_path / "new").config
    assert {"architectures": config.architectures, "model_type": config.model_type} == S2_NAMES[family]
    assert config.s2_attention == S2
    before, after = (load_file(path / "model.safetensors") for path in (old, tmp_path / "new"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_checkpoint_under_ordinary_names(tmp_path: Path, oracle: Oracle) -> None:
    """transformers reads one as a dense model, unless it is told what to do."""
    folder = save_checkpoint(tmp_path, "llama", S2)
    ids = torch.tensor([LONG])
    dense = AutoModelForCausalLM.from_pretrained(folder)
    told = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="s2")
    with torch.no_grad():
        _assert_close(dense(ids).logits[0], Oracle(folder, {}).logits(LONG))
        _assert_close(told(ids).logits[0], oracle.logits(LONG))
        _assert_close(S2LlamaForCausalLM.from_pretrained(folder)(ids).logits[0], oracle.logits(LONG))


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_another_attention_is_refused(folder: Path, model: LlamaForCausalLM, implementation: str) -> None:
    message = f"attn_implementation: '{implementation}', expected 's2'"
    with pytest.raises(S2ConfigError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation=implementation)
    model.model.set_attn_implementation(implementation)
    with pytest.raises(S2ConfigError, match=message):
        model(torch.tensor([SHORT]))


def test_pattern_is_required() -> None:
    with pytest.raises(S2ConfigError, match=r"s2_attention: missing in the config, expected"):
        S2LlamaForCausalLM(S2LlamaForCausalLM.config_class())
    dense = LlamaForCausalLM._from_config(tiny_config("llama"), attn_implementation="s2")
    with pytest.raises(S2ConfigError, match=r"s2_attention: missing in the config, expected"):
        dense(torch.tensor([SHORT]))


def test_impossible_pattern_is_named() -> None:
    config = S2LlamaForCausalLM.config_class(s2_attention={**S2, "vert_stride": 0})
    with pytest.raises(S2ConfigError, match=r"s2_attention\.vert_stride: 0, expected"):
        S2LlamaForCausalLM(config)


def test_sliding_window_is_refused(tmp_path: Path) -> None:
    folder = save_checkpoint(tmp_path, "mistral", S2, names=S2_NAMES["mistral"], sliding_window=64)
    with pytest.raises(S2ConfigError, match="a sliding window or chunks of 64 tokens, expected plain"):
        _load(folder)(torch.tensor([SHORT]))


def test_without_the_package_transformers_stops_and_with_it_needs_no_vllm(folder: Path) -> None:
    script = """
import sys
from transformers import AutoModelForCausalLM
try:
    AutoModelForCausalLM.from_pretrained(sys.argv[1])
except ValueError as error:
    print(error)
sys.modules["vllm"] = None
import s2_kernels.transformers
print("s2_vllm" in sys.modules)
import s2_vllm.models.transformers
print(type(AutoModelForCausalLM.from_pretrained(sys.argv[1])).__name__)
"""
    *message, has_plugin, name = run_python("-c", script, str(folder), without="VLLM_PLUGINS").splitlines()
    assert "s2_llama" in " ".join(message)
    assert (has_plugin, name) == ("False", "S2LlamaForCausalLM")


def test_no_model_but_the_one_for_causal_language(folder: Path) -> None:
    with pytest.raises(ValueError, match="S2LlamaConfig"):
        AutoModel.from_pretrained(folder)


def _load(folder: Path) -> LlamaForCausalLM:
    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def _assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=0)
