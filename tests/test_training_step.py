"""The benchmark of a training step: what it runs, what it says, and what it says of bad options."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from benchmarks import training_step
from benchmarks.results_file import load_results


def test_tiny_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "steps.json"
    arguments = ["--tiny", "--output", str(path), "--repetitions", "1"]
    assert training_step.main(arguments) == 0
    _, records = load_results(path)
    assert [(r["tokens"], r["variant"]) for r in records] == [
        (length, variant) for length in training_step.TINY_LENGTHS for variant in training_step.VARIANTS
    ]
    assert all(r["seconds"] > 0 for r in records)
    assert training_step.table(records) in capsys.readouterr().out


def test_variants_differ_in_the_attention_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step leaves gradients; within the window, where the pattern leaves nothing out, they are the same."""
    found = {}
    for length in (30, 200):
        for variant in ("s2", "fa2"):
            models = []
            monkeypatch.setattr(torch.nn.Module, "train", lambda self, mode=True, m=models: m.append(self))
            training_step.training_step(variant, length, torch.device("cpu"), tiny=True)()
            found[length, variant] = models[0].layers[1].self_attn.k_proj.weight.grad
    torch.testing.assert_close(found[30, "s2"], found[30, "fa2"], rtol=1e-3, atol=1e-5)
    assert not torch.allclose(found[200, "s2"], found[200, "fa2"], rtol=1e-3, atol=1e-5)


def test_what_does_not_fit_has_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise torch.OutOfMemoryError("tried to allocate a lot\nand more")

    monkeypatch.setattr(training_step, "training_step", fail)
    record = training_step.measure("cudnn", 64, torch.device("cpu"), True, 1)
    assert record == {
        "geometry": "tiny-s2-1.3b",
        "variant": "cudnn",
        "tokens": 64,
        "reason": "tried to allocate a lot",
    }
    assert "| tried to allocate a lot |" in training_step.table([record])


def test_ours_that_fails_is_no_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: object) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(training_step, "training_step", fail)
    with pytest.raises(RuntimeError, match="broken"):
        training_step.measure("s2", 64, torch.device("cpu"), True, 1)


def test_bad_options(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        training_step.main(["--tiny"])
    assert "--output: missing, expected a file with --tiny" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert training_step.main([]) == 2
    assert "no CUDA GPU found, expected one, or --tiny" in capsys.readouterr().err
