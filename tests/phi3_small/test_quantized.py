"""A checkpoint with int8 linear layers (compressed-tensors), read as vLLM reads those of other models."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import pytest
import torch

from tests.engine.engines import engine, generate, greedy_params
from tests.phi3_small.checkpoints import CONFIG, random_prompts, random_weights, save_weights, write_config
from tests.phi3_small.oracle import Oracle

if TYPE_CHECKING:
    from pathlib import Path

Weights = dict[str, torch.Tensor]

LINEARS = ("query_key_value", "dense", "up_proj", "down_proj")
INT8 = {"num_bits": 8, "type": "int", "symmetric": True}
QUANTIZATION: dict[str, Any] = {
    "quant_method": "compressed-tensors",
    "format": "int-quantized",
    "quantization_status": "compressed",
    "ignore": ["lm_head"],
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {**INT8, "strategy": "channel"},
            "input_activations": {**INT8, "strategy": "token", "dynamic": True},
        }
    },
}


def quantize(weights: Weights) -> tuple[Weights, Weights]:
    """The tensors of a quantized checkpoint, and the weights that they stand for.

    A row of a linear layer's weight is an int8 vector times a scale of its own.
    """
    stored, meant = {}, {}
    for name, weight in weights.items():
        module, _, kind = name.rpartition(".")
        if kind == "weight" and module.endswith(LINEARS):
            scale = (weight.abs().amax(1, keepdim=True) / 127).bfloat16()
            integers = (weight / scale.float()).round().clamp(-128, 127)
            stored[name], stored[f"{module}.weight_scale"] = integers.to(torch.int8), scale
            meant[name] = integers * scale.float()
        else:
            stored[name] = weight.bfloat16()
            meant[name] = stored[name].float()
    return stored, meant


def save(folder: Path, config: dict[str, Any], weights: Weights) -> Path:
    folder.mkdir(exist_ok=True)
    write_config(folder, config)
    save_weights(folder, weights)
    return folder


def prompt_log_probs(logits: torch.Tensor, prompt: list[int]) -> torch.Tensor:
    """Log-probability of each token of the prompt but the first."""
    following = torch.tensor(prompt[1:])[:, None]
    return logits.log_softmax(-1)[:-1].gather(1, following)[:, 0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU kernels for int8")
def test_int8_weights_are_read_in_their_order(tmp_path: Path) -> None:
    """Near the weights they stand for, and far from those with the heads of fused QKV in another order."""
    stored, meant = quantize(random_weights(CONFIG))
    folder = save(tmp_path / "int8", {**CONFIG, "quantization_config": QUANTIZATION}, stored)
    right = Oracle(save(tmp_path / "meant", CONFIG, meant))
    rolled = {n: w.roll(32, 0) if "query_key_value" in n else w for n, w in meant.items()}
    wrong = Oracle(save(tmp_path / "wrong", CONFIG, rolled))
    prompt = random_prompts([300], seed=5)[0]
    with engine(folder, dtype="bfloat16") as llm:
        output = generate(llm, [prompt], greedy_params(1, prompt_logprobs=0))[0]
    log_probs = output.prompt_logprobs[1:]
    ours = torch.tensor([found[token].logprob for token, found in zip(prompt[1:], log_probs, strict=True)])
    expected, misread = (prompt_log_probs(o.logits(prompt), prompt) for o in (right, wrong))
    # Tokens that the model never learned have no probability, here and there.
    learned = expected.isfinite()
    assert (ours.isfinite() == learned).all()
    error, wrong_order = ((other - expected)[learned].abs().mean() for other in (ours, misread))
    assert error < 0.1 * wrong_order


@pytest.mark.skipif(torch.cuda.is_available(), reason="runs vLLM's CPU kernels for int8")
def test_missing_quantized_layer_is_named(tmp_path: Path) -> None:
    stored, _ = quantize(random_weights(CONFIG))
    module = "model.layers.1.self_attn.dense"
    del stored[f"{module}.weight"], stored[f"{module}.weight_scale"]
    folder = save(tmp_path / "int8", {**CONFIG, "quantization_config": QUANTIZATION}, stored)
    with pytest.raises(ValueError, match=re.escape(module)), engine(folder, dtype="bfloat16"):
        pass
