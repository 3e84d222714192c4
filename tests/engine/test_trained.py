"""From training to serving: vLLM says of a trained checkpoint what the module that was trained says."""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from s2_vllm.models.families import S2LlamaConfig
from s2_vllm.models.transformers import S2LlamaForCausalLM
from tests.engine.checkpoints import random_prompts, tiny_config
from tests.engine.engines import assert_all_pages_free, attention_layers, engine, greedy
from tests.masked_models import random_weights

if TYPE_CHECKING:
    from pathlib import Path

    from transformers import PreTrainedConfig

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}
EXAMPLES = torch.tensor(random_prompts([192] * 4, seed=21))
PROMPTS = random_prompts([3, 33, 105, 181], seed=11)
NUM_TOKENS = 12


@pytest.mark.parametrize("model_class", [S2LlamaForCausalLM, LlamaForCausalLM])
def test_served_as_trained(tmp_path: Path, model_class: type[LlamaForCausalLM]) -> None:
    config = _config(model_class)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2")
    assert type(model) is model_class
    random_weights(model)
    before = _generate(model)
    _train(model)
    model.save_pretrained(tmp_path)
    if model_class is LlamaForCausalLM:  # under its family's names it would be dense elsewhere
        S2LlamaForCausalLM.from_pretrained(tmp_path).save_pretrained(tmp_path)
    expected = _generate(model)
    assert expected != before
    assert expected != _generate(
        LlamaForCausalLM.from_pretrained(tmp_path, config=tiny_config("llama"))
    )  # dense
    with engine(tmp_path, max_num_batched_tokens=53) as llm:
        assert llm.llm_engine.model_config.architectures == ["S2LlamaForCausalLM"]
        kinds = [kind for name, kind in attention_layers(llm).items() if name.endswith("self_attn.attn")]
        assert kinds == ["S2Attention", "Attention", "S2Attention"]
        assert greedy(llm, PROMPTS, NUM_TOKENS) == expected
        assert_all_pages_free(llm)


def _config(model_class: type[LlamaForCausalLM]) -> PreTrainedConfig:
    config = tiny_config("llama")
    if model_class is S2LlamaForCausalLM:
        keys = {name: value for name, value in config.to_dict().items() if name != "model_type"}
        config = S2LlamaConfig(**keys)
    config.s2_attention = S2
    return config


def _train(model: LlamaForCausalLM) -> None:
    """Some steps, the loss lower after them."""
    optimizer = torch.optim.AdamW(model.train().parameters(), lr=1e-2)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = model(EXAMPLES, labels=EXAMPLES).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0]


def _generate(model: LlamaForCausalLM) -> list[list[int]]:
    """What follows each prompt, by the module's own `generate`."""
    continuations = []
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        options = {"max_new_tokens": NUM_TOKENS, "do_sample": False, "pad_token_id": 0}
        tokens = model.eval().generate(ids, attention_mask=torch.ones_like(ids), **options)
        continuations.append(tokens[0, len(prompt) :].tolist())
    return continuations
