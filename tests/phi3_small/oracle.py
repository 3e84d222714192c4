"""An independent Phi-3-small in plain PyTorch, with a dense mask per head; it shares no code with the plugin.

Facts, from microsoft/Phi-3-small-8k-instruct and -128k-instruct (modeling_phi3_small.py,
positional_embedding.py, triton_flash_blocksparse_attn.py, tokenization_phi3_small.py).
"""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file
from torch.nn import functional as F

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

# The special ids are 100256 to 100351. All are dummies, except these: <|endoftext|>, <|system|>, <|user|>,
# <|assistant|> and <|end|>.
SPECIAL_IDS = range(100256, 100352)
TRAINED_SPECIAL_IDS = {100257, 100261, 100262, 100263, 100266}
DUMMY_IDS = [i for i in SPECIAL_IDS if i not in TRAINED_SPECIAL_IDS]

Cache = list[tuple[torch.Tensor, torch.Tensor]]


def allowed_keys(config: dict[str, Any], queries: torch.Tensor, num_keys: int) -> torch.Tensor:
    """Which keys the queries of a sparse layer attend to: bool [heads, queries, num_keys].

    Args:
        config: of the model.
        queries: int64 [queries], absolute positions.
        num_keys: keys at positions 0 ... num_keys - 1.
    """
    heads, stride = config["num_attention_heads"], config["blocksparse_vert_stride"]
    step = 0 if config["blocksparse_homo_head_pattern"] else max(1, stride // heads)
    keys = torch.arange(num_keys)
    i = (queries // config["blocksparse_block_size"])[None, :, None]
    j = (keys // config["blocksparse_block_size"])[None, None, :]
    h = torch.arange(heads)[:, None, None]
    local = i - j < config["blocksparse_num_local_blocks"]
    strided = (j + h * step + 1) % stride == 0
    return (local | strided) & (keys[None, None, :] <= queries[None, :, None])


def gegelu(x: torch.Tensor, limit: float) -> torch.Tensor:
    """GeGELU of interleaved halves, [..., 2 * n] -> [..., n]."""
    gate, linear = x[..., 0::2].clamp(max=limit), x[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (linear + 1)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Rotate the halves of every head: x [tokens, heads, size], cos and sin [tokens, size / 2]."""
    first, second = x.chunk(2, dim=-1)
    cos, sin = cos[:, None], sin[:, None]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


class Oracle:
    """A Phi-3-small checkpoint in float32.

    Args:
        checkpoint: folder with config.json and model.safetensors.
        rope_length: LongRoPE uses its long factors when this exceeds the original length. The original
            model takes the length of the sequence so far; vLLM takes max_model_len, for a key that is
            once rotated stays in the cache.
        changes: config values that stand in for those of config.json.
    """

    def __init__(self, checkpoint: Path, rope_length: int = 0, **changes: Any) -> None:
        self.config: dict[str, Any] = json.loads((checkpoint / "config.json").read_text()) | changes
        self.weights = load_file(checkpoint / "model.safetensors")
        self.weights = {name: weight.float() for name, weight in self.weights.items()}
        self.rope_length = rope_length
        self.head_size = self.config["hidden_size"] // self.config["num_attention_heads"]
        ids = self.config.get("dummy_token_indices")
        self.masked_ids: list[int] = DUMMY_IDS if ids is None else ids

    def is_sparse(self, layer: int) -> bool:
        """Whether the layer has the pattern; every `dense_attention_every_n_layers`-th has not."""
        every = self.config["dense_attention_every_n_layers"]
        return not every or (layer + 1) % every != 0

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Teacher-forced logits, float32 [len(ids), vocabulary]: row t predicts token t + 1."""
        return self._forward(ids, self._empty_cache())

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """The greedy continuation of `prompt`, and the top-1 margin (top logit minus second) of each step."""
        cache = self._empty_cache()
        tokens: list[int] = []
        margins: list[float] = []
        step = list(prompt)
        for _ in range(num_tokens):
            top = self._forward(step, cache, last_only=True)[-1].topk(2)
            tokens.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
            step = tokens[-1:]
        return tokens, margins

    def _empty_cache(self) -> Cache:
        nothing = torch.empty(0, self.config["num_key_value_heads"], self.head_size)
        return [(nothing, nothing)] * self.config["num_hidden_layers"]

    @torch.no_grad()
    def _forward(self, ids: Sequence[int], cache: Cache, last_only: bool = False) -> torch.Tensor:
        """Logits of the tokens that follow those in `cache`, to which their K and V are added."""
        config, past = self.config, len(cache[0][0])
        positions = torch.arange(past, past + len(ids))
        rotation = self._cos_sin(positions)
        causal = torch.arange(past + len(ids))[None, None, :] <= positions[None, :, None]
        masks = {False: causal, True: allowed_keys(config, positions, past + len(ids))}
        x = self.weights["model.embed_tokens.weight"][torch.tensor(list(ids))]
        if config["mup_embedding_multiplier"]:
            x = x * config["mup_embedding_multiplier"]
        for layer in range(config["num_hidden_layers"]):
            name = f"model.layers.{layer}."
            normed = self._layer_norm(x, name + "input_layernorm")
            attended, cache[layer] = self._attention(
                normed, name + "self_attn.", rotation, masks[self.is_sparse(layer)], cache[layer]
            )
            x = x + attended
            normed = self._layer_norm(x, name + "post_attention_layernorm")
            up = self._linear(normed, name + "mlp.up_proj")
            x = x + self._linear(gegelu(up, config["gegelu_limit"]), name + "mlp.down_proj")
        x = self._layer_norm(x[-1:] if last_only else x, "model.final_layernorm")
        logits = x @ self.weights["model.embed_tokens.weight"].T
        if config["mup_width_multiplier"]:
            logits = logits / config["mup_width_multiplier"]
        logits[:, self.masked_ids] = float("-inf")
        return logits

    def _attention(
        self,
        x: torch.Tensor,
        name: str,
        rotation: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
        past: tuple[torch.Tensor, torch.Tensor],
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, torch.Tensor]]:
        """The layer's attention output [tokens, hidden], and its K and V with the new tokens'."""
        heads, kv_heads = self.config["num_attention_heads"], self.config["num_key_value_heads"]
        group = heads // kv_heads
        fused = self._linear(x, name + "query_key_value").view(len(x), kv_heads, group + 2, self.head_size)
        query = rotate(fused[:, :, :group].reshape(len(x), heads, self.head_size), *rotation)
        key = torch.cat([past[0], rotate(fused[:, :, group], *rotation)])
        value = torch.cat([past[1], fused[:, :, group + 1]])
        if self.config["mup_use_scaling"]:
            scale = self.config["mup_attn_multiplier"] / self.head_size
        else:
            scale = 1 / math.sqrt(self.head_size)
        outputs = []
        for head in range(heads):
            scores = query[:, head] @ key[:, head // group].T * scale
            allowed = mask[head if len(mask) > 1 else 0]
            weights = scores.masked_fill(~allowed, float("-inf")).softmax(dim=-1)
            outputs.append(weights @ value[:, head // group])
        return self._linear(torch.cat(outputs, dim=-1), name + "dense"), (key, value)

    def _cos_sin(self, positions: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Cosines and sines, each [tokens, head size / 2]."""
        config = self.config
        exponents = torch.arange(0, self.head_size, 2).float() / self.head_size
        wavelengths = config["rope_embedding_base"] ** exponents
        rope = config.get("rope_scaling")
        if rope is None:
            angles = positions[:, None].float() * config["rope_position_scale"] / wavelengths
            return angles.cos(), angles.sin()
        original = rope["original_max_position_embeddings"]
        if self.rope_length > original:
            factors, magnitude = rope["long_factor"], rope.get("long_mscale", -1)
            if magnitude <= 0:
                ratio = config["max_position_embeddings"] / original
                magnitude = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 else 1.0
        else:
            factors, magnitude = rope["short_factor"], rope.get("short_mscale", -1)
            if magnitude <= 0:
                magnitude = 1.0
        angles = positions[:, None].float() / (torch.tensor(factors) * wavelengths)
        return angles.cos() * magnitude, angles.sin() * magnitude

    def _linear(self, x: torch.Tensor, name: str) -> torch.Tensor:
        return F.linear(x, self.weights[name + ".weight"], self.weights[name + ".bias"])

    def _layer_norm(self, x: torch.Tensor, name: str) -> torch.Tensor:
        weight, bias = self.weights[name + ".weight"], self.weights[name + ".bias"]
        return F.layer_norm(x, weight.shape, weight, bias, self.config["layer_norm_epsilon"])
