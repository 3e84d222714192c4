"""The models that are compared: one size, one vocabulary, different attention."""

from __future__ import annotations

from typing import Any

MAX_LENGTH = 32768
"""Tokens of the longest training sequences."""
SERVED_LENGTH = 2 * MAX_LENGTH
BLOCK_SIZE = 64
VERT_STRIDE = 4
_PATTERN = {"block_size": BLOCK_SIZE, "local_blocks": 4, "vert_stride": VERT_STRIDE}

# A strided set that begins beyond any context.
_NEVER = {"vert_stride": 4096, "homo_head": True, "head_sliding_offset": 2048}

ARMS: dict[str, dict[str, Any] | None] = {
    "dense": None,
    "s2": _PATTERN,
    "s2-dense": {**_PATTERN, "dense_layers": [0, 1]},
    "homogeneous": {**_PATTERN, "homo_head": True},
    "window": {**_PATTERN, **_NEVER},
}
"""The `s2_attention` key of each arm: none of it, in all layers, in all but the first two, one shard for all
heads, and the window alone."""

_SIZES = {
    "hidden_size": 256,
    "intermediate_size": 608,
    "num_hidden_layers": 8,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 64,
}
_TINY_SIZES = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 32,
}
_TINY_PATTERN = {"block_size": 16, "local_blocks": 2}


def model_config(arm: str, vocab_size: int, tiny: bool = False) -> dict[str, Any]:
    """The keys of an arm's config.json.

    Args:
        arm: a key of ARMS.
        vocab_size: of the tokenizer.
        tiny: a model of no size, for a CPU.
    """
    pattern = ARMS[arm]
    config = {
        **(_TINY_SIZES if tiny else _SIZES),
        "vocab_size": vocab_size,
        "max_position_embeddings": SERVED_LENGTH,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "tie_word_embeddings": True,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": None,
    }
    if pattern is not None:
        config["s2_attention"] = {**pattern, **(_TINY_PATTERN if tiny else {})}
    return config
