"""The comparison of trained models: their data, their training, what is asked of them, what is shown."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from benchmarks import plot
from benchmarks.quality import __main__ as command
from benchmarks.quality import arms, evaluate, figures, texts, train, vocabulary
from benchmarks.quality.batches import ANSWER, CURRICULUM, UNKNOWABLE, Batches
from benchmarks.quality.model import load_facts, make_model
from s2_kernels.config import S2Config
from s2_kernels.reference import token_mask
from s2_vllm.demo import passkeys
from s2_vllm.demo import vocabulary as tokens
from s2_vllm.demo.passkeys import PassKey, Tokens

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def text() -> Tokens:
    return texts.load(held_out=True, limit=400)


def test_names_and_numbers_are_one_token_each() -> None:
    assert len(set(tokens.NAMES)) == len(tokens.NAMES)
    assert all(len(tokens.encode(f" {name}")) == 1 for name in tokens.NAMES)
    assert [len(tokens.encode(f"{number:03}")) for number in range(1000)] == [1] * 1000
    assert len(tokens.encode("The key is 1234567890")) == len(tokens.encode("The key is ")) + 4


def test_any_text_is_read_back() -> None:
    content = Path(__file__).read_text() + "\x00 żółć 漢字\t\n"
    ids = tokens.encode(content)
    assert tokens.decode(ids) == content
    assert max(ids) < tokens.VOCAB_SIZE
    assert len(ids) < len(content) / 2.2


def test_a_file_is_held_out_or_not(text: Tokens) -> None:
    held_out = [texts.is_held_out(path) for path in texts.files()]
    assert 0.02 < sum(held_out) / len(held_out) < 0.1
    parts = [set(texts.read(part, 60)) for part in (True, False)]
    assert not parts[0] & parts[1]
    assert len(text) > 1000
    assert texts.load(held_out=True, limit=400) is text


def test_a_vocabulary_is_made_of_texts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vocabulary, "REPETITIONS", 1000)
    made = vocabulary.train(["wombat " * 2000, "other text"])
    assert len(made.encode(" wombat").ids) == 1
    assert all(len(made.encode(f" {name}").ids) == 1 for name in tokens.NAMES)


def test_an_answer_is_the_question_answered() -> None:
    key = PassKey("falcon", 3999)
    assert tokens.decode(key.question + key.answer) == (
        "\nWhat is the pass key of falcon? It is falcon003999.<|endoftext|>"
    )
    for part, form in ((key.fact, passkeys.FACT), (key.answer, passkeys.ANSWER)):
        assert part == tokens.encode(form.format(name="falcon", number="003999"))
        start = key.number_in(part)
        assert tokens.decode(part[start : start + passkeys.NUMBER_TOKENS]) == "003999"
    assert key.question == tokens.encode(passkeys.QUESTION.format(name="falcon"))
    assert key.is_answered_by(key.answer)
    assert key.is_answered_by(key.answer[:-2])
    for wrong in (PassKey("falcon", 3998), PassKey("falcon", 4999), PassKey("heron", 3999)):
        assert not key.is_answered_by(wrong.answer)
    assert not key.is_answered_by(key.answer[: key.number_in(key.answer) + 1])


def test_facts_are_where_they_were_asked_for(text: Tokens) -> None:
    keys = [PassKey("falcon", 123456), PassKey("heron", 123999)]
    context = passkeys.hidden(np.random.default_rng(0), text, keys, [50, 90], 200)
    assert len(context) == 200
    for key, position in zip(keys, [50, 90], strict=True):
        start = position - key.number_in(key.fact)
        assert context[start : start + len(key.fact)] == key.fact
    for positions in ([50, 55], [2, 90], [50, 199]):
        with pytest.raises(ValueError, match=r"positions: .*expected places for facts in 200 tokens"):
            passkeys.hidden(np.random.default_rng(0), text, keys, positions, 200)


def make_batches(text: Tokens, **changed: Any) -> Batches:
    return replace(Batches(text, 3, 4096, 100), **changed)


def test_a_batch_depends_on_seed_and_step_alone(text: Tokens) -> None:
    batches = make_batches(text)
    batch = batches[7]
    assert all(np.array_equal(*pair) for pair in zip(batch, make_batches(text)[7], strict=True))
    for other in (batches[8], make_batches(text, seed=4)[7]):
        assert not np.array_equal(batch[0], other[0])


def test_sequences_grow(text: Tokens) -> None:
    batches = make_batches(text, tokens_per_step=65536)
    lengths = [batches.length(step) for step in range(100)]
    assert sorted(set(lengths)) == [length for length, _ in CURRICULUM]
    assert lengths == sorted(lengths)
    assert [batches[step][1].shape for step in (0, 40, 99)] == [(64, 256), (64, 1024), (2, 32768)]
    assert batches.tokens(100) == sum(batches[step][1].size for step in range(100))


@pytest.mark.parametrize("step", [0, 99], ids=["short", "long"])
def test_what_is_asked_has_been_told(text: Tokens, step: int) -> None:
    """And the numbers of answers, no others, are what recall is learned from."""
    sequences, roles = make_batches(text, tokens_per_step=32768)[step]
    asked = 0
    for sequence, role in zip(sequences.tolist(), roles, strict=True):
        content = tokens.decode(sequence)
        for question in content.split("What is the pass key of ")[1:]:
            name, _, rest = question.partition("?")
            answer = rest.removeprefix(" It is ")[: len(name) + 6]
            told = content.index(f"The pass key is {answer}. Remember it.")
            assert told < content.index(f"What is the pass key of {name}?")
            asked += 1
        for kind, before in ((ANSWER, " It is"), (UNKNOWABLE, "The pass key is")):
            places = np.flatnonzero(role == kind)
            assert all(tokens.decode([sequence[place + 1]]).isdigit() for place in places)
            assert len(places) % passkeys.NUMBER_TOKENS == 0
            for place in places[:: passkeys.NUMBER_TOKENS]:
                assert tokens.decode(sequence[: place + 1]).rpartition(" ")[0].endswith(before)
    assert asked > 20


def test_a_model_fits_a_package() -> None:
    for arm in arms.ARMS:
        model = make_model(arm, 0, torch.device("cpu"))
        assert 2 * sum(x.numel() for x in model.parameters()) < 14 * 2**20
        assert model.num_parameters() <= 7e6


def test_what_each_arm_attends_to() -> None:
    """On the last row of 2,048 tokens: the window, and what of the older blocks some head has."""
    blocks = {}
    for arm in arms.ARMS:
        config = arms.model_config(arm, 10)
        if "s2_attention" not in config:
            continue
        pattern = S2Config.parse(config["s2_attention"], 8).pattern(4, 4)
        last = token_mask(pattern, torch.tensor([2047]), 2048)[:, 0].view(4, 32, 64).any(dim=2)
        assert last[:, -4:].all()
        blocks[arm] = [head.nonzero()[:, 0].tolist() for head in last[:, :-4]]
    assert blocks["window"] == [[]] * 4
    assert blocks["homogeneous"] == [list(range(0, 28, 4))] * 4
    assert sorted(block for head in blocks["s2"] for block in head) == list(range(28))
    assert blocks["s2-dense"] == blocks["s2"]


def test_all_arms_begin_with_the_same_weights() -> None:
    first, *others = (make_model(arm, 5, CPU, tiny=True).state_dict() for arm in arms.ARMS)
    for other in others:
        assert all(torch.equal(weight, other[name]) for name, weight in first.items())


SETTINGS = train.Settings("s2", steps=12, tokens_per_step=192, tiny=True)


def no_report(training: train.Training) -> None:
    pass


def test_a_training_goes_on_where_it_stopped(tmp_path: Path) -> None:
    whole = train.Training(SETTINGS, tmp_path / "whole", CPU)
    whole.run(no_report)
    assert sum(whole.losses[-4:]) < sum(whole.losses[:4])

    def stop(training: train.Training) -> None:
        if training.step == 3:
            training.save()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train.Training(SETTINGS, tmp_path / "parts", CPU).run(stop)
    later = train.Training(SETTINGS, tmp_path / "parts", CPU)
    assert later.step == 3
    later.run(no_report)
    assert later.losses == whole.losses
    assert len(later.recalls) == 12
    assert all(0 <= recall < 0.2 for recall in later.recalls)
    for one, other in zip(later.model.parameters(), whole.model.parameters(), strict=True):
        assert torch.equal(one, other)
    assert later.facts()["train_tokens"] == 12 * 192
    with pytest.raises(ValueError, match=r"checkpoint\.pt: steps 12, expected 13, as asked for now"):
        train.Training(replace(SETTINGS, steps=13), tmp_path / "parts", CPU)


class FakeLLM:
    """Answers from the last `reach` tokens of a prompt, as a well trained model with a window would."""

    def __init__(self, reach: int) -> None:
        self.reach = reach

    def generate(self, prompts: list[Any], params: list[Any], use_tqdm: bool) -> list[Any]:
        return [self._output(prompt["prompt_token_ids"]) for prompt in prompts]

    def _output(self, prompt: list[int]) -> Any:
        name = tokens.decode(prompt).rpartition("What is the pass key of ")[2].rstrip("?")
        found = re.search(rf"is {name}(\d{{6}})", tokens.decode(prompt[-self.reach :]))
        answer = tokens.encode(f" It is {name}{found[1] if found else '000000'}.")
        return SimpleNamespace(outputs=[SimpleNamespace(token_ids=answer)])


SUITE = evaluate.Suite(lengths=(1024, 4096), samples=8)


@pytest.mark.parametrize("make", [evaluate.passkey_samples, evaluate.recall_samples])
@pytest.mark.parametrize("length", SUITE.lengths)
def test_samples_lie_where_they_say(make: Callable[..., Any], length: int, text: Tokens) -> None:
    samples = list(make(text, length, SUITE))
    for sample in samples:
        assert len(sample.prompt) + len(sample.key.answer) == length
        places = [n for n in range(length) if sample.prompt[n : n + 13] == sample.key.fact[:13]]
        (position,) = (place + sample.key.number_in(sample.key.fact) for place in places)
        assert position // 64 % 4 == sample.residue
        assert abs(position / length - (sample.depth + 0.5) / 10) < 0.09
    assert evaluate.ask(FakeLLM(length), samples) == [True] * len(samples)
    if make is evaluate.passkey_samples:
        assert len(samples) == 80
        counts = np.bincount([sample.residue for sample in samples])
        # Where a tenth of a context has fewer blocks than there are residues, they cannot all come up.
        assert max(counts) - min(counts) <= (2 if length == 4096 else 16)


def test_accuracies_of_a_window(text: Tokens) -> None:
    samples = list(evaluate.passkey_samples(text, 4096, SUITE))
    records = evaluate.accuracies("passkey", 4096, samples, evaluate.ask(FakeLLM(2100), samples))
    assert sum(record["samples"] for record in records) == 80
    by_depth = {d: {r["accuracy"] for r in records if r["depth"] == d} for d in range(10)}
    assert [by_depth[depth] for depth in (0, 3, 5, 9)] == [{0.0}, {0.0}, {1.0}, {1.0}]
    found = figures.cells([{"arm": "window", **r} for r in records], "window", "passkey")
    assert [found[4096, depth] for depth in (0, 3, 5, 9)] == [0.0, 0.0, 1.0, 1.0]
    assert 0 < found[4096, 4] < 1


def test_held_out_loss_is_by_position(text: Tokens) -> None:
    class Positions:
        def generate(self, prompts: list[Any], params: Any, use_tqdm: bool) -> list[Any]:
            ids = prompts[0]["prompt_token_ids"]
            by_token = [
                None,
                *({t: SimpleNamespace(logprob=-float(n)), -1: None} for n, t in enumerate(ids[1:])),
            ]
            return [SimpleNamespace(prompt_logprobs=by_token)]

    suite = evaluate.Suite(loss_samples=2, loss_length=101, loss_bins=2)
    record = evaluate.held_out_loss(Positions(), text, suite, print)
    assert record == {"task": "loss", "loss": 49.5, "loss_by_position": [24.5, 74.5]}


def test_train_evaluate_and_plot(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """From the command line, with a real engine."""
    monkeypatch.setattr(evaluate, "TINY", replace(evaluate.TINY, lengths=(96,), samples=1))
    monkeypatch.setattr(command, "TINY", evaluate.TINY)
    options = ["--tiny", "--models", str(tmp_path)]
    assert command.main(["train", "--arm", "s2", *options]) == 0
    assert "step 4 of 4" in capsys.readouterr().out
    output = tmp_path / "quality.json"
    # Other test processes may share the GPU.
    options += ["--gpu-memory-utilization", "0.1"]
    assert command.main(["evaluate", *options, "--output", str(output)]) == 0
    records = json.loads(output.read_text())["records"]
    assert {record["arm"] for record in records} == {"s2"}
    (loss,) = (record for record in records if record["task"] == "loss")
    assert loss["parameters"] == load_facts(tmp_path / "s2", "s2")["parameters"]
    assert loss["train_tokens"] == 4 * 384
    # Hardly trained: all tokens are about as likely.
    assert abs(loss["loss"] - np.log(tokens.VOCAB_SIZE)) < 0.3
    assert sum(r["samples"] for r in records if r["task"] == "passkey") == 10
    assert command.main(["speed", "--tiny", "--repeat", "2", "--output", str(output)]) == 0
    rates = {r["arm"]: r for r in json.loads(output.read_text())["records"] if r["task"] == "speed"}
    assert set(rates) == {"dense", "s2"}
    assert all(r["length"] == 192 and r["tokens_per_step"] == 384 for r in rates.values())
    assert all(r["tokens_per_second"] > 0 for r in rates.values())
    capsys.readouterr()
    assert plot.main([str(output), "--output", str(tmp_path)]) == 0
    rate = f"{rates['s2']['tokens_per_second'] / 1e3:,.0f} thousand tokens/s"
    (row,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("| s2 |"))
    assert row.startswith(f"| s2 | {loss['parameters'] / 1e6:.1f} M |")
    assert f" s | {rate} | {loss['loss']:.3f} |" in row
    assert {path.name for path in tmp_path.glob("*.svg")} == {"quality-passkey.svg", "quality-loss.svg"}


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["evaluate", "--arms", "s2"],
            "s2: expected a model from python -m benchmarks.quality train --arm s2",
        ),
        (["evaluate"], "expected a folder with trained models"),
        (["evaluate", "--lengths", "65536"], "--lengths: 65536, expected at most 65535 tokens"),
        (["evaluate", "--arms", "dense"], "dense: a model of the arm 's2', expected 'dense'"),
    ],
    ids=["not trained", "none", "too long", "another arm"],
)
def test_bad_input(
    arguments: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "training.json").write_text('{"arm": "s2"}')
    output = ["--output", str(tmp_path / "quality.json")]
    assert command.main([*arguments, "--tiny", "--models", str(tmp_path), *output]) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize("name", ["evaluate", "speed"])
def test_figures_of_a_tiny_model_are_nobodys(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        command.main([name, "--tiny"])
    assert "--output: missing, expected a file with --tiny" in capsys.readouterr().err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["train", "--arm", "s2"]) == 2
    assert "no CUDA GPU found, expected one, or --tiny" in capsys.readouterr().err
