"""Phi-3-small's config.json, without the code in the checkpoint.

Keys and defaults are those of microsoft/Phi-3-small-8k-instruct and -128k-instruct.
"""

from __future__ import annotations

from typing import Any, ClassVar

from transformers import PreTrainedConfig

from s2_vllm.models.phi3_small_tokenizer import UNTRAINED_TOKEN_IDS

_ROPE_KEYS = {
    "rope_type",
    "rope_theta",
    "short_factor",
    "long_factor",
    "short_mscale",
    "long_mscale",
    "original_max_position_embeddings",
}


class Phi3SmallConfig(PreTrainedConfig):
    """The keys that decide what a Phi-3-small computes; what only concerns training is kept, and not read.

    Attributes:
        rope_parameters: the rotary embedding, in transformers' standard form; config.json has it as
            `rope_embedding_base` and `rope_scaling`.
        dummy_token_indices: ids whose logits are masked; by default the untrained special tokens of the
            published tokenizer, whatever `vocab_size` is: a model can have more rows than tokens.

    Raises:
        ValueError: a value that the model cannot be run with.
    """

    model_type = "phi3small"
    keys_to_ignore_at_inference = ("past_key_values",)
    ignore_keys_at_rope_validation = frozenset({"short_mscale", "long_mscale"})
    attribute_map: ClassVar[dict[str, str]] = {"rope_theta": "rope_embedding_base"}

    vocab_size: int = 100352
    hidden_size: int = 4096
    num_hidden_layers: int = 32
    num_attention_heads: int = 32
    num_key_value_heads: int = 8
    max_position_embeddings: int = 8192
    layer_norm_epsilon: float = 1e-5
    initializer_range: float = 0.02
    use_cache: bool = True
    tie_word_embeddings: bool = True
    bos_token_id: int | None = 100257
    eos_token_id: int | list[int] | None = 100257
    dummy_token_indices: list[int] | None = None

    rope_embedding_base: float = 1e6
    rope_position_scale: float = 1.0
    rope_parameters: dict[str, Any] | None = None

    hidden_act: str = "gegelu"
    gegelu_limit: float = 20.0
    gegelu_pad_to_256: bool = True
    ff_dim_multiplier: int | None = None
    ff_intermediate_size: int | None = 14336

    blocksparse_homo_head_pattern: bool = False
    blocksparse_block_size: int = 64
    blocksparse_num_local_blocks: int = 16
    blocksparse_vert_stride: int = 8
    dense_attention_every_n_layers: int | None = 2

    mup_use_scaling: bool = True
    mup_attn_multiplier: float = 1.0
    mup_embedding_multiplier: float | None = 10.0
    mup_width_multiplier: float | None = 8.0

    def __post_init__(self, **kwargs: Any) -> None:
        scaling = kwargs.pop("rope_scaling", None) or self.rope_parameters
        if scaling is not None and not isinstance(scaling, dict):
            raise ValueError(f"rope_scaling: {scaling!r}, expected an object or null")
        original_length = kwargs.pop("original_max_position_embeddings", None)
        self.rope_parameters = _rope_parameters(scaling, self.rope_embedding_base, original_length)
        if "original_max_position_embeddings" in self.rope_parameters:
            # vLLM reads it here: without --max-model-len it serves that length, with the short factors.
            self.original_max_position_embeddings = self.rope_parameters["original_max_position_embeddings"]
        if self.dummy_token_indices is None:
            self.dummy_token_indices = [i for i in UNTRAINED_TOKEN_IDS if i < self.vocab_size]
        self.check()
        super().__post_init__(**kwargs)

    @property
    def head_dim(self) -> int:
        """Size of an attention head; rotary embeddings cover all of it."""
        return self.hidden_size // self.num_attention_heads

    @property
    def intermediate_size(self) -> int:
        """Columns of an MLP's down projection; the up projection has twice as many rows.

        `gegelu_pad_to_256` rounds up what `ff_dim_multiplier` gives, and nothing else.
        """
        if self.ff_intermediate_size is not None:
            return self.ff_intermediate_size
        assert self.ff_dim_multiplier is not None
        size = self.ff_dim_multiplier * (self.hidden_size // 3) * 2
        return -(-size // 256) * 256 if self.gegelu_pad_to_256 else size

    @property
    def softmax_scale(self) -> float:
        """The factor of the attention logits: 1 / head_dim in the published models, not its root."""
        if self.mup_use_scaling:
            return self.mup_attn_multiplier / self.head_dim
        return self.head_dim**-0.5

    def check(self) -> None:
        """Refuse values that the model cannot be run with, each by name; overrides may bring new ones.

        Raises:
            ValueError: names the key, its value and what was expected.
        """
        for key in ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"):
            _check(self, key, _positive_int(getattr(self, key)), "a positive integer")
        heads, kv_heads = self.num_attention_heads, self.num_key_value_heads
        _check(self, "hidden_size", self.hidden_size % (2 * heads) == 0, f"an even multiple of {heads} heads")
        fits = _positive_int(kv_heads) and heads % kv_heads == 0
        _check(self, "num_key_value_heads", fits, f"a divisor of {heads} query heads")
        _check(self, "hidden_act", self.hidden_act == "gegelu", "'gegelu'")
        _check(self, "gegelu_limit", _positive(self.gegelu_limit), "a positive number")
        sizes = (self.ff_intermediate_size, self.ff_dim_multiplier)
        if sum(size is not None for size in sizes) != 1 or not any(map(_positive_int, sizes)):
            raise ValueError(
                f"ff_intermediate_size: {sizes[0]!r} with ff_dim_multiplier: {sizes[1]!r}, expected one of "
                "them to be a positive integer and the other null"
            )
        _check(self, "mup_attn_multiplier", _positive(self.mup_attn_multiplier), "a positive number")
        for key in ("mup_embedding_multiplier", "mup_width_multiplier"):
            value = getattr(self, key)
            _check(self, key, value is None or _positive(value), "a positive number or null")
        ids = self.dummy_token_indices
        known = ids is None or (
            isinstance(ids, list) and all(isinstance(i, int) and 0 <= i < self.vocab_size for i in ids)
        )
        _check(self, "dummy_token_indices", known, f"a list of token ids from 0 to {self.vocab_size - 1}")
        self._check_rope()

    def _check_rope(self) -> None:
        _check(self, "rope_embedding_base", _positive(self.rope_embedding_base), "a positive number")
        _check(self, "rope_position_scale", _positive(self.rope_position_scale), "a positive number")
        rope = self.rope_parameters or {}
        for key in rope:
            if key not in _ROPE_KEYS:
                raise ValueError(
                    f"rope_scaling.{key}: unknown key, expected one of {sorted(_ROPE_KEYS | {'type'})}"
                )
        if rope.get("rope_type") == "default":
            return
        if rope.get("rope_type") != "longrope":
            raise ValueError(
                f"rope_scaling.type: {rope.get('rope_type')!r}, expected 'su', 'longrope' or no rope_scaling"
            )
        for key in ("short_factor", "long_factor"):
            factors = rope.get(key)
            if not isinstance(factors, (list, tuple)) or len(factors) != self.head_dim // 2:
                raise ValueError(f"rope_scaling.{key}: {factors!r}, expected {self.head_dim // 2} numbers")
        length = rope.get("original_max_position_embeddings")
        if not _positive_int(length):
            raise ValueError(
                f"rope_scaling.original_max_position_embeddings: {length!r}, expected a positive integer"
            )


def _rope_parameters(scaling: dict[str, Any] | None, base: float, length: int | None) -> dict[str, Any]:
    """`rope_scaling` in transformers' standard form.

    The factors of cosines and sines, where they are missing or not positive: 1 for short sequences, and
    for long ones what vLLM computes by itself, sqrt(1 + ln(max / original) / ln(original)) for lengths max
    and original (positional_embedding.py of the checkpoints).
    """
    rope = dict(scaling or {})
    rope_type = rope.pop("type", None)
    rope_type = rope.pop("rope_type", rope_type) or "default"
    rope["rope_type"] = "longrope" if rope_type == "su" else rope_type
    rope["rope_theta"] = base
    if rope["rope_type"] == "longrope":
        if not _positive(rope.get("short_mscale")):
            rope["short_mscale"] = 1.0
        if not _positive(rope.get("long_mscale")):
            rope.pop("long_mscale", None)
        if length is not None:
            rope.setdefault("original_max_position_embeddings", length)
    return rope


def _check(config: Phi3SmallConfig, key: str, holds: bool, expected: str) -> None:
    if not holds:
        raise ValueError(f"{key}: {getattr(config, key)!r}, expected {expected}")


def _positive(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and value > 0


def _positive_int(value: object) -> bool:
    return isinstance(value, int) and _positive(value)
