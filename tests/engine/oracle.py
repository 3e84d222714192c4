"""An independent S2-Attention: a Hugging Face model run with one additive mask per head and layer.

It knows the pattern from its definition alone and shares no code with the plugin or its kernels. Every
layer's mask is [1, heads, queries, keys], added to the logits of transformers' eager attention.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, DynamicCache, PreTrainedConfig

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence
    from pathlib import Path


def sparse_mask(
    s2: Mapping[str, Any], num_heads: int, num_kv_heads: int, queries: torch.Tensor, num_keys: int
) -> torch.Tensor:
    """Which keys each query attends to.

    Args:
        s2: what a layer has of the `s2_attention` key of a config, block_size, local_blocks and vert_stride
            included.
        num_heads, num_kv_heads: of the whole model.
        queries: int64 [queries], absolute positions.
        num_keys: keys at positions 0 ... num_keys - 1.

    Returns:
        bool [num_heads, queries, keys].
    """
    group = num_heads // num_kv_heads
    full = [*s2.get("full_heads", ()), *range(num_kv_heads - s2.get("num_dense_heads", 0), num_kv_heads)]
    is_full = torch.tensor([head // group in full for head in range(num_heads)])
    keys = torch.arange(num_keys)
    i, j = queries[:, None] // s2["block_size"], keys[None, :] // s2["block_size"]
    near = (i - j < s2["local_blocks"]) | (j < s2.get("sink_blocks", 0))
    older = is_full[:, None, None] | _strided_blocks(s2, num_heads, num_kv_heads, j)[:, None]
    return (near | older) & (keys[None, :] <= queries[:, None])


def _strided_blocks(
    s2: Mapping[str, Any], num_heads: int, num_kv_heads: int, blocks: torch.Tensor
) -> torch.Tensor:
    """Which of `blocks`, [1, keys], are in the strided set of each head: bool [num_heads, keys]."""
    stride = s2["vert_stride"]
    if stride is None:
        return torch.zeros(num_heads, blocks.shape[1], dtype=torch.bool)
    num_pattern_heads = num_heads if s2.get("pattern_heads", "kv") == "query" else num_kv_heads
    step = s2.get("head_sliding_step")
    if step is None:
        step = max(1, stride // num_heads)
    if s2.get("homo_head", False):
        step = 0
    pattern_head = torch.arange(num_heads) // (num_heads // num_pattern_heads)
    shift = pattern_head * step + s2.get("head_sliding_offset", 0)
    return (blocks + shift[:, None]) % stride == 0


def keys_of_layer(s2: Mapping[str, Any], layer: int) -> dict[str, Any]:
    """What a layer has of the `s2_attention` key, nothing if it is dense."""
    if not s2 or layer in s2.get("dense_layers", ()):
        return {}
    keys = {name: value for name, value in s2.items() if name not in ("dense_layers", "layers")}
    if isinstance(keys.get("full_heads"), dict):
        keys["full_heads"] = keys["full_heads"].get(str(layer), [])
    for label, own in s2.get("layers", {}).items():
        ranges = [part.split("-") for part in label.split(",")]
        if any(int(ends[0]) <= layer <= int(ends[-1]) for ends in ranges):
            if {"full_heads", "num_dense_heads"} & own.keys():
                keys |= {"full_heads": [], "num_dense_heads": 0}
            keys |= own
    return keys


@dataclass(frozen=True)
class Agreement:
    """How the tokens that an engine chose compare with the oracle's, given the engine's own prefix.

    Attributes:
        total: tokens compared.
        decided: tokens for which the oracle's top-1 margin exceeds the error bound.
        mismatches: (index, engine's token, oracle's token, margin) of the decided ones that differ.
    """

    total: int
    decided: int
    mismatches: list[tuple[int, int, int, float]]


class Oracle:
    """A checkpoint run by transformers in float32, sparse where its config says so.

    Args:
        checkpoint: folder of the checkpoint.
        s2: stands in for the config's `s2_attention` key; an empty mapping makes every layer dense.
    """

    def __init__(self, checkpoint: Path, s2: Mapping[str, Any] | None = None) -> None:
        keys, _ = PreTrainedConfig.get_config_dict(checkpoint)
        family = keys["model_type"].removeprefix("s2_")
        self.model = AutoModelForCausalLM.from_pretrained(
            checkpoint,
            config=CONFIG_MAPPING[family].from_dict({**keys, "model_type": family}),
            dtype=torch.float32,
            attn_implementation="eager",
        ).eval()
        config = self.model.config
        self._heads = config.num_attention_heads, config.num_key_value_heads
        self._s2 = getattr(config, "s2_attention", {}) if s2 is None else s2
        self._layers = [keys_of_layer(self._s2, index) for index in range(len(self.model.model.layers))]
        self._masks: list[torch.Tensor] = []
        for index, layer in enumerate(self.model.model.layers):
            layer.self_attn.register_forward_pre_hook(_MaskHook(self._masks, index), with_kwargs=True)

    @torch.no_grad()
    def _forward(self, ids: Sequence[int], cache: DynamicCache) -> torch.Tensor:
        """Logits [len(ids), vocabulary] of the tokens that follow those in `cache`."""
        past = cache.get_seq_length()
        queries, num_keys = torch.arange(past, past + len(ids)), past + len(ids)
        made: dict[str, torch.Tensor] = {}
        for keys in self._layers:
            if repr(keys) not in made:
                made[repr(keys)] = self._additive_mask(keys, queries, num_keys)
        self._masks[:] = [made[repr(keys)] for keys in self._layers]
        output = self.model(
            input_ids=torch.tensor([list(ids)]),
            position_ids=queries[None],
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits[0]

    def _additive_mask(self, keys: Mapping[str, Any], queries: torch.Tensor, num_keys: int) -> torch.Tensor:
        """That of a layer, by what it has of the `s2_attention` key: [1, heads or 1, queries, keys]."""
        mask = torch.arange(num_keys)[None, None, :] <= queries[None, :, None]
        if keys:
            mask = sparse_mask(keys, *self._heads, queries, num_keys)
        return torch.zeros(mask.shape).masked_fill(~mask, float("-inf"))[None]

    def logits(self, ids: Sequence[int]) -> torch.Tensor:
        """Teacher-forced logits, float32 [len(ids), vocabulary]: row t predicts token t + 1."""
        return self._forward(ids, DynamicCache())

    def greedy(self, prompt: Sequence[int], num_tokens: int) -> tuple[list[int], list[float]]:
        """The greedy continuation of `prompt`, and the top-1 margin (top logit minus second) of each step."""
        cache = DynamicCache()
        tokens: list[int] = []
        margins: list[float] = []
        step = list(prompt)
        for _ in range(num_tokens):
            top = self._forward(step, cache)[-1].topk(2)
            tokens.append(int(top.indices[0]))
            margins.append(float(top.values[0] - top.values[1]))
            step = tokens[-1:]
        return tokens, margins

    def agreement(self, prompt: Sequence[int], tokens: Sequence[int], error_bound: float) -> Agreement:
        """Compare an engine's greedy `tokens` with the oracle's top-1 after the same prefix.

        A near-tie, a margin of `error_bound` or less, decides nothing: there both choices are right.

        Args:
            prompt: the engine's prompt.
            tokens: what the engine generated.
            error_bound: the largest difference of two logits that the engine's dtype explains.
        """
        predictions = self.logits([*prompt, *tokens])[len(prompt) - 1 : -1]
        top = predictions.topk(2)
        margins = top.values[:, 0] - top.values[:, 1]
        decided = margins > error_bound
        mismatches = [
            (t, token, int(top.indices[t, 0]), float(margins[t]))
            for t, token in enumerate(tokens)
            if decided[t] and token != int(top.indices[t, 0])
        ]
        return Agreement(len(tokens), int(decided.sum()), mismatches)


class _MaskHook:
    """Gives an attention layer its mask of the forward pass under way."""

    def __init__(self, masks: list[torch.Tensor], index: int) -> None:
        self.masks, self.index = masks, index

    def __call__(
        self, module: torch.nn.Module, args: Any, kwargs: dict[str, Any]
    ) -> tuple[Any, dict[str, Any]]:
        assert "attention_mask" in kwargs, "this transformers passes the mask in another way"
        return args, {**kwargs, "attention_mask": self.masks[self.index]}
