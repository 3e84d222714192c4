"""The demo's checkpoints, the document with pass keys, and what is said and drawn of them."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING

import pytest
from safetensors.torch import load_file
from transformers import AutoTokenizer

from benchmarks.quality.figures import cells
from benchmarks.results_file import REPOSITORY, load_results
from s2_kernels.config import S2Config, find_config
from s2_vllm.demo.__main__ import main
from s2_vllm.demo.checkpoint import TRAINED, make_checkpoint
from s2_vllm.demo.corpus import project_text
from s2_vllm.demo.document import Document, hide
from s2_vllm.demo.passkeys import ANSWER, PassKey
from s2_vllm.demo.picture import draw_places, seeing_heads
from s2_vllm.demo.report import report_answers
from s2_vllm.demo.trained import is_right, sight
from s2_vllm.demo.vocabulary import decode, encode
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


@pytest.fixture(scope="module")
def document() -> Document:
    return hide((0.0, 0.4, 0.9), num_tokens=2500, seed=5)


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


def test_trained_checkpoint_fits_a_package_and_says_that_it_needs_the_plugin() -> None:
    raw = json.loads((TRAINED / "config.json").read_text())
    assert {name: raw[name] for name in ("architectures", "model_type")} == S2_NAMES["llama"]
    config = find_config(raw, raw["num_hidden_layers"])
    assert config is not None
    assert config.pattern(raw["num_attention_heads"], raw["num_key_value_heads"]).is_union_complete
    assert (TRAINED / WEIGHTS).stat().st_size < 14 << 20
    sizes = [weight.numel() for weight in load_file(TRAINED / WEIGHTS).values()]
    assert sum(sizes) == json.loads((TRAINED / "training.json").read_text())["parameters"]
    text = project_text()[:5000]
    assert AutoTokenizer.from_pretrained(TRAINED).encode(text) == encode(text)


def test_model_card_says_how_it_was_trained() -> None:
    card, facts = (TRAINED / "README.md").read_text(), json.loads((TRAINED / "training.json").read_text())
    assert f"{facts['parameters'] / 1e6:.1f} million parameters" in card
    assert f"{facts['train_tokens'] / 1e6:.0f} million tokens" in card
    assert f"{facts['steps']:,} steps" in card
    assert f"{facts['train_seconds']:.0f} seconds" in card


def test_model_card_says_what_was_measured() -> None:
    card = " ".join((TRAINED / "README.md").read_text().split())
    _, records = load_results(REPOSITORY / "benchmarks/results/quality.json")
    losses = {record["arm"]: record["loss"] for record in records if record["task"] == "loss"}
    assert f"is {losses['s2']:.3f} nats per token" in card
    assert f"dense attention {losses['dense']:.3f}" in card
    found = cells(records, "s2", "passkey")
    of_lengths = [record for record in records if (record["arm"], record["task"]) == ("s2", "passkey")]
    samples = sum(record["samples"] for record in of_lengths if record["length"] <= 32768)
    assert f"all of {samples:,} pass keys were found in texts of 1,024 to 32,768 tokens" in card
    assert all(share == 1 for (length, _), share in found.items() if length <= 32768)
    longest = [share for (length, _), share in found.items() if length == 65535]
    assert f"{sum(longest) / len(longest):.0%} were" in card


@pytest.mark.parametrize("options", [[], ["--random"]], ids=["trained", "random"])
def test_checkpoint_only(options: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["demo", "--checkpoint-only", str(tmp_path / "model"), *options])
    main()
    raw = json.loads((tmp_path / "model" / "config.json").read_text())
    assert (raw == json.loads((TRAINED / "config.json").read_text())) is not bool(options)
    assert (tmp_path / "model" / WEIGHTS).exists()


def test_keys_are_told_in_order_in_a_text_that_is_else_unchanged(document: Document) -> None:
    first, second, third = document.keys
    places = [document.positions(key) for key in document.keys]
    for key, place in zip(document.keys, places, strict=True):
        told = decode(document.tokens[place.start : place.stop])
        assert told == f" {key.name}{key.number:06}"
    assert places[0].start < 20
    assert places[1].start / len(document.tokens) == pytest.approx(0.4, abs=0.1)
    assert places[2].start / len(document.tokens) == pytest.approx(0.9, abs=0.1)
    rest = document.text
    for key in (first, second, third):
        rest = rest.replace(f"\nThe pass key is {key.name}{key.number:06}. Remember it.\n", "")
    assert project_text().startswith(rest)
    assert document.prompt(second) == f"{document.text}\nWhat is the pass key of {second.name}?"


def test_an_answer_is_right_up_to_its_full_stop() -> None:
    key = PassKey("falcon", 3999)
    assert key.write(ANSWER) == " It is falcon003999.<|endoftext|>"
    assert is_right(key, " It is falcon003999.")
    assert is_right(key, " It is falcon003999.\nWhat")
    for wrong in (" It is falcon003998.", " It is falcon00399", "It is falcon003999.", ""):
        assert not is_right(key, wrong)


def test_which_heads_see_a_key(document: Document) -> None:
    pattern = S2Config(block_size=16, local_blocks=4, vert_stride=4).pattern(4, 4)
    num_blocks = len(document.tokens) // 16 + 1
    for key in document.keys:
        block = document.positions(key)[-1] // 16
        (head,) = seeing_heads(pattern, block, num_blocks)
        assert block % 4 == pattern.residues[head]
        assert sight(document, key, pattern).endswith(
            f"in block {block}, which the end sees with head {head}"
        )
    assert seeing_heads(pattern, num_blocks - 4, num_blocks) == [0, 1, 2, 3]


def test_report_counts_the_right_answers() -> None:
    lines = report_answers([True, False], ["a", "b"]).splitlines()
    assert lines == ["", "1 of 2 answers are right:", "  right: a", "  WRONG: b"]


def test_places_are_drawn(tmp_path: Path) -> None:
    pattern = S2Config(block_size=16, local_blocks=2, vert_stride=4).pattern(8, 4)
    paths = [tmp_path / "one.svg", tmp_path / "other.svg"]
    for path, block in zip(paths, (3, 30), strict=True):
        draw_places(pattern, {"falcon": block}, 40, path)
    one, other = (path.read_text() for path in paths)
    assert "<!-- falcon -->" in one
    assert one != other
