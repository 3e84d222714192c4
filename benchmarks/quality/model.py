"""Making an arm's model, and what is kept of it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality import tokens
from benchmarks.quality.arms import ARMS, model_config

if TYPE_CHECKING:
    from transformers import PreTrainedModel

FACTS = "training.json"
"""In the folder of a trained model: how it was trained."""


def make_model(arm: str, seed: int, device: torch.device, tiny: bool = False) -> PreTrainedModel:
    """An arm's model in float32, with weights that the seed decides and that are the same for all arms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from s2_vllm.models.families import S2LlamaConfig
    from s2_vllm.models.transformers import S2LlamaForCausalLM

    config = model_config(arm, tokens.VOCAB_SIZE, tiny)
    torch.manual_seed(seed)
    if ARMS[arm] is None:
        model = LlamaForCausalLM(LlamaConfig(**config))
    else:
        model = S2LlamaForCausalLM(S2LlamaConfig(**config))
    return model.to(device)


def save(model: PreTrainedModel, folder: Path, facts: dict[str, Any]) -> None:
    """A checkpoint that is served as it is: bfloat16 weights, tokenizer, and `facts` of the training."""
    deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    tokens.load().save(str(folder / "tokenizer.json"), pretty=False)
    (folder / "tokenizer_config.json").write_text('{"tokenizer_class": "PreTrainedTokenizerFast"}\n')
    (folder / FACTS).write_text(json.dumps(facts, indent=2) + "\n")


def load_facts(folder: Path, arm: str) -> dict[str, Any]:
    """How the model in `folder` was trained.

    Raises:
        ValueError: there is none, or it is of another arm.
    """
    path = folder / FACTS
    if not path.exists():
        raise ValueError(f"{folder}: expected a model from python -m benchmarks.quality train --arm {arm}")
    facts: dict[str, Any] = json.loads(path.read_text())
    if facts["arm"] != arm:
        raise ValueError(f"{folder}: a model of the arm {facts['arm']!r}, expected {arm!r}")
    return facts
