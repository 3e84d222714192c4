"""Training with transformers: plain loops and `Trainer` end at the parameters that masks per head lead to."""

from __future__ import annotations

import json
import re
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch.optim import SGD
from torch.optim.lr_scheduler import LambdaLR
from transformers import (
    AutoModelForCausalLM,
    DataCollatorWithFlattening,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

import s2_vllm.models.transformers  # noqa: F401 (transformers knows the types)
from s2_vllm.models.families import S2LlamaConfig
from tests.engine.checkpoints import S2_NAMES, random_prompts, tiny_config
from tests.masked_models import MaskedModel, Place, random_weights, token_loss

if TYPE_CHECKING:
    from collections.abc import Sequence

    from transformers import LlamaForCausalLM

README = Path(__file__).parent.parent / "README.md"
S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}
LENGTHS = [105, 181, 40, 96, 17, 150]
BATCH, LEARNING_RATE = 2, 0.05
EXAMPLES = random_prompts(LENGTHS, seed=5)
Parameters = dict[str, torch.Tensor]
ALLOWED = 1e-3
"""Of the way that training takes a parameter, how much may be rounding."""
BATCHES = [EXAMPLES[i : i + BATCH] for i in range(0, len(EXAMPLES), BATCH)]


@pytest.fixture
def model() -> LlamaForCausalLM:
    return _initial_model()


@pytest.fixture(scope="module")
def expected() -> Parameters:
    """What the model's parameters are after a pass over the examples."""
    return _train_masked(S2)


@pytest.mark.parametrize("layout", ["padded", "packed"])
@pytest.mark.parametrize("checkpointing", [None, {"use_reentrant": False}, {"use_reentrant": True}], ids=str)
def test_plain_loop(
    model: LlamaForCausalLM, expected: Parameters, layout: str, checkpointing: dict[str, bool] | None
) -> None:
    if checkpointing is not None:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=checkpointing)
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    collate = DataCollatorWithFlattening(return_flash_attn_kwargs=True)
    for examples in BATCHES:
        batch = collate(_features(examples)) if layout == "packed" else _padded(examples)[0]
        optimizer.zero_grad()
        model(**batch).loss.backward()
        optimizer.step()
    _assert_trained(model, expected)


@pytest.mark.parametrize("layout", ["padded", "packed"])
def test_trainer(model: LlamaForCausalLM, expected: Parameters, tmp_path: Path, layout: str) -> None:
    optimizer = SGD(model.parameters(), lr=LEARNING_RATE)
    losses = _Losses()
    trainer = Trainer(
        model=model,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            per_device_train_batch_size=BATCH,
            num_train_epochs=1,
            train_sampling_strategy="sequential",
            gradient_checkpointing=True,
            max_grad_norm=0.0,
            logging_steps=1,
            save_strategy="no",
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=_features(EXAMPLES),
        data_collator=DataCollatorWithFlattening() if layout == "packed" else _collate,
        optimizers=(optimizer, LambdaLR(optimizer, lambda step: 1.0)),
        callbacks=[losses],
    )
    trainer.train()
    _assert_trained(model, expected)
    assert len(losses.values) == len(BATCHES)
    trainer.save_model(str(tmp_path / "saved"))
    keys = json.loads((tmp_path / "saved" / "config.json").read_text())
    assert {**S2_NAMES["llama"], "s2_attention": S2}.items() <= keys.items()
    assert not [key for key in keys if "attn_implementation" in key]


def test_autocast(model: LlamaForCausalLM) -> None:
    """Gradients in float32 of a forward pass in bfloat16, near those without autocast."""
    batch, _ = _padded(BATCHES[0])
    gradients = []
    for context in (nullcontext(), torch.autocast("cpu", dtype=torch.bfloat16)):
        model.zero_grad()
        with context:
            output = model(**batch)
        output.loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert output.logits.dtype == torch.bfloat16
    for name, exact in gradients[0].items():
        rounded = gradients[1][name]
        assert rounded.dtype == torch.float32
        assert torch.nn.functional.cosine_similarity(exact.flatten(), rounded.flatten(), dim=0) > 0.99


def test_dense_training_ends_elsewhere(expected: Parameters) -> None:
    dense = _train_masked({**S2, "dense_layers": [0, 1, 2]})
    assert min(_differences(dense, expected).values()) > 100 * ALLOWED


def test_examples_of_the_readme(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They run as they stand, the second from what the first has saved; and leave checkpoints to publish."""
    section = README.read_text().split("\n## Train\n")[1].split("\n## ")[0]
    first, second = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(first, names)
    exec(second.replace("DIR", "trained"), names)
    names["model"].save_pretrained("adapted")
    for folder, s2 in (("trained", {"dense_layers": [0]}), ("adapted", {"dense_layers": [0, 1]})):
        keys = json.loads((tmp_path / folder / "config.json").read_text())
        assert S2_NAMES["llama"].items() <= keys.items()
        assert s2.items() <= keys["s2_attention"].items()


class _Losses(TrainerCallback):
    def __init__(self) -> None:
        self.values: list[float] = []

    def on_log(self, *arguments: Any, logs: dict[str, float], **options: Any) -> None:
        if "loss" in logs:
            self.values.append(logs["loss"])


def _initial_model() -> LlamaForCausalLM:
    keys = {name: value for name, value in tiny_config("llama").to_dict().items() if name != "model_type"}
    config = S2LlamaConfig(**keys, s2_attention=S2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2")
    random_weights(model, weight_std=0.08)
    return model.train()


def _train_masked(s2: dict[str, Any]) -> Parameters:
    llama = AutoModelForCausalLM.from_config(tiny_config("llama"))
    llama.load_state_dict(_initial_model().state_dict())
    masked = MaskedModel(llama, s2)
    optimizer = SGD(masked.model.parameters(), lr=LEARNING_RATE)
    for examples in BATCHES:
        batch, places = _padded(examples)
        optimizer.zero_grad()
        token_loss(masked.logits(batch["input_ids"], places), batch["input_ids"], places).backward()
        optimizer.step()
    return dict(masked.model.named_parameters())


def _features(examples: Sequence[Sequence[int]]) -> list[dict[str, list[int]]]:
    return [{"input_ids": list(ids), "labels": list(ids)} for ids in examples]


def _padded(examples: Sequence[Sequence[int]]) -> tuple[dict[str, torch.Tensor], list[Place]]:
    """A batch with padding on the right, and where its sequences are."""
    longest = max(map(len, examples))
    shape = len(examples), longest
    batch = {
        "input_ids": torch.zeros(shape, dtype=torch.int64),
        "attention_mask": torch.zeros(shape, dtype=torch.int64),
        "labels": torch.full(shape, -100),
    }
    for row, ids in enumerate(examples):
        batch["input_ids"][row, : len(ids)] = batch["labels"][row, : len(ids)] = torch.tensor(ids)
        batch["attention_mask"][row, : len(ids)] = 1
    return batch, [(row, 0, len(ids)) for row, ids in enumerate(examples)]


def _collate(features: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    return _padded([feature["input_ids"] for feature in features])[0]


def _assert_trained(model: LlamaForCausalLM, expected: Parameters) -> None:
    assert max(_differences(dict(model.named_parameters()), expected).values()) < ALLOWED


@torch.no_grad()
def _differences(actual: Parameters, expected: Parameters) -> dict[str, float]:
    """Between two ends of training, as a fraction of the way to the expected one; by parameter."""
    start = dict(_initial_model().named_parameters())
    return {
        name: float((actual[name] - wanted).norm() / (wanted - start[name]).norm())
        for name, wanted in expected.items()
    }
