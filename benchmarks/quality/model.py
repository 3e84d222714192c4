"""Making an arm's model, and what is kept of it."""

from __future__ import annotations

import json
from copy import deepcopy
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from benchmarks.quality.arms import ARMS, SERVED_LENGTH, model_config
from s2_vllm.demo import vocabulary

if TYPE_CHECKING:
    from transformers import PreTrainedModel

CHAT_TEMPLATE = (
    "{% for message in messages %}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The model was trained on texts with questions in them: who says what, it is not told."""
FACTS = "training.json"
"""In the folder of a trained model: how it was trained."""


def make_model(arm: str, seed: int, device: torch.device, tiny: bool = False) -> PreTrainedModel:
    """An arm's model in float32, with weights that the seed decides and that are the same for all arms."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from s2_vllm.models.families import S2LlamaConfig
    from s2_vllm.models.transformers import S2LlamaForCausalLM

    config = model_config(arm, vocabulary.VOCAB_SIZE, tiny)
    torch.manual_seed(seed)
    if ARMS[arm] is None:
        model = LlamaForCausalLM(LlamaConfig(**config))
    else:
        model = S2LlamaForCausalLM(S2LlamaConfig(**config))
    return model.to(device)


def save(model: PreTrainedModel, folder: Path, facts: dict[str, Any]) -> None:
    """A checkpoint that is served as it is: bfloat16 weights, tokenizer, and `facts` of the training."""
    from transformers import PreTrainedTokenizerFast

    deepcopy(model).to(torch.bfloat16).save_pretrained(folder)
    PreTrainedTokenizerFast(
        tokenizer_file=str(vocabulary.FILE),
        eos_token=vocabulary.END_OF_TEXT,
        model_max_length=SERVED_LENGTH,
        chat_template=CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    ).save_pretrained(folder)
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
