"""The demo's checkpoint: a tokenizer that loses nothing, a valid pattern, weights that a seed decides."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import pytest
from transformers import AutoTokenizer

from s2_kernels.config import find_config
from s2_vllm.demo.checkpoint import make_checkpoint
from s2_vllm.demo.corpus import project_text
from tests.engine.checkpoints import S2_NAMES

if TYPE_CHECKING:
    from pathlib import Path

WEIGHTS = "model.safetensors"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    make_checkpoint(folder)
    return folder


@pytest.mark.parametrize(
    "text",
    [
        "",
        "  two  spaces\n\n\ttab ",
        "Größe, 世界, 😀, e\u0301",
        "def f(x: int) -> str:\r\n    ...",
        "\x00\x7f",
    ],
    ids=["empty", "whitespace", "unicode", "code", "control"],
)
def test_tokenizer_returns_the_text_it_was_given(checkpoint: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_tokenizer_has_learned_from_the_project_text(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    text = project_text()[:20_000]
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) < len(text) / 2.5


def test_chat_template_marks_every_turn_with_one_token(checkpoint: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == "<|system|>Be brief.<|endoftext|><|user|>Hello<|endoftext|><|assistant|>"
    for role in ("<|system|>", "<|user|>", "<|assistant|>"):
        assert tokenizer.encode(text).count(tokenizer.convert_tokens_to_ids(role)) == 1


def test_config_holds_a_pattern_in_which_every_head_has_its_own_shard(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    config = find_config(raw, raw["num_hidden_layers"])
    assert config is not None
    assert 0 < len(config.dense_layers) < raw["num_hidden_layers"]
    pattern = config.pattern(raw["num_attention_heads"], raw["num_key_value_heads"])
    assert pattern.is_union_complete
    assert len(set(pattern.kept_residues)) == raw["num_key_value_heads"]


def test_checkpoint_says_itself_that_it_needs_the_plugin(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    assert {name: raw[name] for name in ("architectures", "model_type")} == S2_NAMES["llama"]


def test_vocabulary_of_model_and_tokenizer_agree(checkpoint: Path) -> None:
    raw = json.loads((checkpoint / "config.json").read_text())
    assert raw["vocab_size"] == len(AutoTokenizer.from_pretrained(checkpoint))


def test_same_seed_gives_the_same_files_and_another_seed_other_weights(
    checkpoint: Path, tmp_path: Path
) -> None:
    make_checkpoint(tmp_path / "again")
    make_checkpoint(tmp_path / "other", seed=1)
    for name in (WEIGHTS, "config.json", "tokenizer.json"):
        assert (tmp_path / "again" / name).read_bytes() == (checkpoint / name).read_bytes(), name
    assert (tmp_path / "other" / WEIGHTS).read_bytes() != (checkpoint / WEIGHTS).read_bytes()
