"""The `s2_attention` key of a model's config.json: parsing and validation.

Names are DKernel's (github.com/linxihui/dkernel). Phi-3-small's `blocksparse_*` keys map onto them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any

from s2_kernels.pattern import PatternHeads, S2Pattern

KEY = "s2_attention"

PHI3_SMALL_KEYS = {
    "blocksparse_block_size": "block_size",
    "blocksparse_num_local_blocks": "local_blocks",
    "blocksparse_vert_stride": "vert_stride",
    "blocksparse_homo_head_pattern": "homo_head",
}


class S2ConfigError(ValueError):
    """A value that names its key, what it was and what was expected."""


@dataclass(frozen=True)
class S2Config:
    """Which layers are sparse, and how.

    Attributes:
        local_blocks: blocks of the local window (L).
        vert_stride: distance in blocks between a head's strided blocks (s).
        block_size: tokens per block (b), a power of two from 16 to 128.
        homo_head: give every head the pattern of head 0.
        head_sliding_step: shift of the strided set from one pattern head to the next; None for
            max(1, vert_stride // number of query heads), as in DKernel.
        head_sliding_offset: shift of head 0.
        pattern_heads: whether KV heads or query heads have patterns of their own.
        dense_layers: indices of the layers that attend to everything.
    """

    local_blocks: int
    vert_stride: int
    block_size: int = 64
    homo_head: bool = False
    head_sliding_step: int | None = None
    head_sliding_offset: int = 0
    pattern_heads: PatternHeads = "kv"
    dense_layers: tuple[int, ...] = ()

    @classmethod
    def parse(cls, raw: object, num_layers: int) -> S2Config:
        """Validate the value of the key, for a model of `num_layers` layers.

        Raises:
            S2ConfigError: an unknown or missing key, a wrong type, or an impossible value.
        """
        if not isinstance(raw, Mapping):
            raise S2ConfigError(f"{KEY}: {raw!r}, expected an object with keys {_names()}")
        for key in raw:
            if key not in _names():
                raise S2ConfigError(f"{KEY}.{key}: unknown key, expected one of {_names()}")
        for field in fields(cls):
            if field.default is MISSING and field.name not in raw:
                raise S2ConfigError(f"{KEY}.{field.name}: missing, expected a positive integer")
        values = dict(raw)
        for key, low in (("local_blocks", 1), ("vert_stride", 1), ("block_size", 1)):
            if key in values:
                _check_int(key, values[key], low)
        if values.get("head_sliding_step") is not None:
            _check_int("head_sliding_step", values["head_sliding_step"], 0)
        _check_int("head_sliding_offset", values.get("head_sliding_offset", 0), 0)
        _check_block_size(values.get("block_size", cls.block_size))
        if not isinstance(values.get("homo_head", False), bool):
            raise S2ConfigError(f"{KEY}.homo_head: {values['homo_head']!r}, expected true or false")
        if values.get("pattern_heads", "kv") not in ("kv", "query"):
            raise S2ConfigError(f"{KEY}.pattern_heads: {values['pattern_heads']!r}, expected 'kv' or 'query'")
        values["dense_layers"] = _check_dense_layers(values.get("dense_layers", ()), num_layers)
        return cls(**values)

    def pattern(self, num_heads: int, num_kv_heads: int) -> S2Pattern:
        """The pattern of a sparse layer with these heads, all tensor-parallel ranks together."""
        try:
            return S2Pattern.build(
                num_heads,
                num_kv_heads,
                block_size=self.block_size,
                local_blocks=self.local_blocks,
                vert_stride=self.vert_stride,
                homo_head=self.homo_head,
                head_sliding_step=self.head_sliding_step,
                head_sliding_offset=self.head_sliding_offset,
                pattern_heads=self.pattern_heads,
            )
        except ValueError as error:
            raise S2ConfigError(f"{KEY}.{error}") from error


def find_config(hf_config: Mapping[str, Any], num_layers: int) -> S2Config | None:
    """The pattern that a model's config.json asks for, or None when it asks for none.

    Args:
        hf_config: the config's top-level keys.
        num_layers: decoder layers of the model.
    """
    if hf_config.get(KEY) is not None:
        return S2Config.parse(hf_config[KEY], num_layers)
    if "blocksparse_vert_stride" in hf_config:
        return _from_phi3_small(hf_config, num_layers)
    return None


def _from_phi3_small(hf_config: Mapping[str, Any], num_layers: int) -> S2Config | None:
    """Phi-3-small: patterns of query heads, shifted by one block; layer i is dense when i + 1 is a
    multiple of `dense_attention_every_n_layers` (modeling_phi3_small.py of the checkpoint), and so
    all are when it is 1."""
    every = hf_config.get("dense_attention_every_n_layers") or num_layers + 1
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise S2ConfigError(f"dense_attention_every_n_layers: {every!r}, expected a positive integer")
    if every == 1:
        return None
    values = {name: hf_config.get(key) for key, name in PHI3_SMALL_KEYS.items()}
    values |= {
        "head_sliding_offset": 1,
        "pattern_heads": "query",
        "dense_layers": [i for i in range(num_layers) if (i + 1) % every == 0],
    }
    try:
        return S2Config.parse(values, num_layers)
    except S2ConfigError as error:
        message = str(error)
        for key, name in PHI3_SMALL_KEYS.items():
            message = message.replace(f"{KEY}.{name}:", f"{key}:")
        raise S2ConfigError(message) from error


def _names() -> list[str]:
    return [field.name for field in fields(S2Config)]


def _check_int(key: str, value: object, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise S2ConfigError(f"{KEY}.{key}: {value!r}, expected an integer of at least {low}")


def _check_block_size(value: int) -> None:
    if value not in (16, 32, 64, 128):
        raise S2ConfigError(f"{KEY}.block_size: {value}, expected a power of two from 16 to 128")


def _check_dense_layers(value: object, num_layers: int) -> tuple[int, ...]:
    if not isinstance(value, (list, tuple)):
        raise S2ConfigError(f"{KEY}.dense_layers: {value!r}, expected a list of layer indices")
    for layer in value:
        if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
            raise S2ConfigError(
                f"{KEY}.dense_layers: {layer!r}, expected layer indices from 0 to {num_layers - 1}"
            )
    if len(set(value)) != len(value):
        raise S2ConfigError(f"{KEY}.dense_layers: {list(value)}, expected each layer once")
    if len(value) == num_layers:
        raise S2ConfigError(
            f"{KEY}.dense_layers: all {num_layers} layers, expected at least one sparse layer"
        )
    return tuple(sorted(value))
