"""An independent S2-Attention for training: eager attention of transformers under one mask per head.

Beside `tests.engine.oracle`, which runs one sequence without gradients: here are several in a batch, and
gradients.
"""

from __future__ import annotations

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoModelForCausalLM

from tests.engine.oracle import sparse_mask

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

Place = tuple[int, int, int]
"""Where a sequence is: its row, its first token, and where it ends."""


class MaskedModel:
    """A copy of a model, with its attention by masks.

    Args:
        model: of transformers, with S2-Attention or any other.
        s2: the `s2_attention` key of a config, by which it shall attend.
    """

    def __init__(self, model: torch.nn.Module, s2: Mapping[str, Any]) -> None:
        config = deepcopy(model.config)
        self.model = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        self.model.load_state_dict(model.state_dict())
        self._s2 = s2
        self._masks: dict[bool, torch.Tensor] = {}
        for index, layer in enumerate(self.model.model.layers):
            is_sparse = index not in s2.get("dense_layers", [])
            layer.self_attn.register_forward_pre_hook(self._hook(is_sparse), with_kwargs=True)

    def logits(self, ids: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
        """Logits [batch, tokens, vocabulary] of token ids [batch, tokens]; what is in no place is padding."""
        config = self.model.config
        heads = config.num_attention_heads, config.num_key_value_heads
        positions = torch.zeros_like(ids)
        # Finite, for a row of padding to give no NaN.
        masks = {
            kind: torch.full((ids.shape[0], heads[0], *[ids.shape[1]] * 2), -1e9) for kind in (True, False)
        }
        for row, start, end in places:
            own = torch.arange(end - start)
            positions[row, start:end] = own
            allowed = {True: sparse_mask(self._s2, *heads, own, len(own)), False: own <= own[:, None]}
            for kind, mask in allowed.items():
                masks[kind][row, :, start:end, start:end].masked_fill_(mask, 0.0)
        self._masks = masks
        return self.model(input_ids=ids, position_ids=positions, use_cache=False).logits

    def _hook(self, is_sparse: bool) -> Any:
        def give_mask(module: Any, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
            assert "attention_mask" in kwargs, "this transformers passes the mask in another way"
            return args, {**kwargs, "attention_mask": self._masks[is_sparse]}

        return give_mask


def token_loss(logits: torch.Tensor, ids: torch.Tensor, places: Sequence[Place]) -> torch.Tensor:
    """The mean cross entropy of each sequence's next tokens."""
    losses = [
        torch.nn.functional.cross_entropy(
            logits[row, start : end - 1].float(), ids[row, start + 1 : end], reduction="none"
        )
        for row, start, end in places
        if end - start > 1
    ]
    return torch.cat(losses).mean()


def random_weights(model: torch.nn.Module, weight_std: float = 0.13) -> None:
    """Weights by which attention decides what comes out, as those of `tests.engine.checkpoints`."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.data.uniform_(1.0, 2.0, generator=generator)
        else:
            parameter.data.normal_(0.0, weight_std, generator=generator)
