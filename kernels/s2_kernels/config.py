"""The `s2_attention` key of a model's config.json: parsing and validation.

Names are DKernel's (github.com/linxihui/dkernel). Phi-3-small's `blocksparse_*` keys map onto them.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, dataclass, fields
from typing import Any, ClassVar

from s2_kernels.pattern import PatternHeads, S2Pattern

KEY = "s2_attention"

_MODEL_KEYS = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
"""Arguments of `S2Pattern.build` that come from the model's own keys."""


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

    OTHER_NAMES: ClassVar[Mapping[str, str]] = {}
    """Keys of config.json that stand for an attribute, where they are not those of `s2_attention`."""

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
                raise cls.error(field.name, "missing, expected a positive integer")
        values = dict(raw)
        lowest = {"local_blocks": 1, "vert_stride": 1, "block_size": 1, "head_sliding_offset": 0}
        for key, low in lowest.items():
            if key in values:
                cls._check_int(key, values[key], low)
        if values.get("head_sliding_step") is not None:
            cls._check_int("head_sliding_step", values["head_sliding_step"], 0)
        cls._check_block_size(values.get("block_size", cls.block_size))
        if "homo_head" in values and not isinstance(values["homo_head"], bool):
            raise cls.error("homo_head", f"{values['homo_head']!r}, expected true or false")
        if values.get("pattern_heads", "kv") not in ("kv", "query"):
            raise cls.error("pattern_heads", f"{values['pattern_heads']!r}, expected 'kv' or 'query'")
        values["dense_layers"] = cls._check_dense_layers(values.get("dense_layers", ()), num_layers)
        return cls(**values)

    @classmethod
    def error(cls, name: str, problem: str) -> S2ConfigError:
        """The error about `name`, by the key that a config.json has for it.

        Args:
            name: an attribute, or an argument of `S2Pattern.build`.
            problem: the value and what was expected.
        """
        key = {**_MODEL_KEYS, **cls.OTHER_NAMES}.get(name, f"{KEY}.{name}")
        return S2ConfigError(f"{key}: {problem}")

    @classmethod
    def _check_int(cls, name: str, value: object, low: int) -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise cls.error(name, f"{value!r}, expected an integer of at least {low}")

    @classmethod
    def _check_block_size(cls, value: int) -> None:
        if value not in (16, 32, 64, 128):
            raise cls.error("block_size", f"{value}, expected a power of two from 16 to 128")

    @classmethod
    def _check_dense_layers(cls, value: object, num_layers: int) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)):
            raise cls.error("dense_layers", f"{value!r}, expected a list of layer indices")
        for layer in value:
            if isinstance(layer, bool) or not isinstance(layer, int) or not 0 <= layer < num_layers:
                raise cls.error(
                    "dense_layers", f"{layer!r}, expected layer indices from 0 to {num_layers - 1}"
                )
        if len(set(value)) != len(value):
            raise cls.error("dense_layers", f"{list(value)}, expected each layer once")
        if len(value) == num_layers:
            raise cls.error("dense_layers", f"all {num_layers} layers, expected at least one sparse layer")
        return tuple(sorted(value))

    def pattern(self, num_heads: int, num_kv_heads: int) -> S2Pattern:
        """The pattern of a sparse layer with these heads, all tensor-parallel ranks together.

        Raises:
            S2ConfigError: no such pattern for these heads; it names the key of the model's config.json.
        """
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
            # The heads are not of this key: the model's config.json has keys of its own for them.
            name, _, problem = str(error).partition(": ")
            for argument, key in _MODEL_KEYS.items():
                problem = problem.replace(argument, key)
            raise self.error(name, problem) from error

    def layer_patterns(self, num_heads: int, num_kv_heads: int, num_layers: int) -> dict[int, S2Pattern]:
        """The pattern of every sparse layer by its index, ascending.

        Raises:
            S2ConfigError: as `pattern`.
        """
        pattern = self.pattern(num_heads, num_kv_heads)
        return {layer: pattern for layer in range(num_layers) if layer not in self.dense_layers}


class Phi3SmallPattern(S2Config):
    """A pattern that config.json describes by Phi-3-small's keys."""

    OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "block_size": "blocksparse_block_size",
        "local_blocks": "blocksparse_num_local_blocks",
        "vert_stride": "blocksparse_vert_stride",
        "homo_head": "blocksparse_homo_head_pattern",
    }


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


def find_model_config(hf_config: object, hf_text_config: object, num_layers: int) -> S2Config | None:
    """`find_config` in the whole of a model's configuration, then in its text part.

    Args:
        hf_config, hf_text_config: with the keys of config.json as attributes; may be the same.
        num_layers: decoder layers of the model.
    """
    for part in (hf_config, hf_text_config):
        if (found := find_config(vars(part), num_layers)) is not None:
            return found
    return None


def _from_phi3_small(hf_config: Mapping[str, Any], num_layers: int) -> S2Config | None:
    """Phi-3-small: patterns of query heads, shifted by one block; layer i is dense when i + 1 is a
    multiple of `dense_attention_every_n_layers` (modeling_phi3_small.py of the checkpoint), and so
    all are when it is 1."""
    every = hf_config.get("dense_attention_every_n_layers") or 0
    if isinstance(every, bool) or not isinstance(every, int) or every < 0:
        raise S2ConfigError(f"dense_attention_every_n_layers: {every!r}, expected a positive integer")
    if every == 1:
        return None
    values = {name: hf_config.get(key) for name, key in Phi3SmallPattern.OTHER_NAMES.items()}
    values |= {
        "head_sliding_offset": 1,
        "pattern_heads": "query",
        "dense_layers": [i for i in range(num_layers) if every and (i + 1) % every == 0],
    }
    return Phi3SmallPattern.parse(values, num_layers)


def _names() -> list[str]:
    return [field.name for field in fields(S2Config)]
