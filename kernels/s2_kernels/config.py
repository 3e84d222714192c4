"""The `s2_attention` key of a model's config.json: parsing and validation.

Names are DKernel's (github.com/linxihui/dkernel). Phi-3-small's `blocksparse_*` keys and RTPurbo's
`headwise_config` map onto them.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar, NamedTuple, Self

from s2_kernels.pattern import PatternHeads, S2Pattern

KEY = "s2_attention"

HEADWISE_KEY = "headwise_config"
"""RTPurbo's key, which says the same of a model's heads in its own way."""

_MODEL_KEYS = {"num_heads": "num_attention_heads", "num_kv_heads": "num_key_value_heads"}
"""Arguments of `S2Pattern.build` that come from the model's own keys."""

_LOWEST = {
    "local_blocks": 1,
    "vert_stride": 1,
    "head_sliding_step": 0,
    "head_sliding_offset": 0,
    "sink_blocks": 0,
    "num_dense_heads": 0,
}
"""Keys that are integers, and the least of each."""

_LAYER_KEYS = (*_LOWEST, "homo_head", "pattern_heads", "full_heads")
"""Keys that may differ from layer to layer."""

_FULL_KEYS = {"full_heads": (), "num_dense_heads": 0}
"""The two ways to say which heads are full, and what says of none."""

_RANGES = re.compile(r"\d+(-\d+)?(, ?\d+(-\d+)?)*", re.ASCII)


class S2ConfigError(ValueError):
    """A value that names its key, what it was and what was expected."""


class _Stated(NamedTuple):
    """A value that a layer has, and the name of the key that states it."""

    name: str
    value: Any


@dataclass(frozen=True)
class S2Config:
    """Which layers are sparse, and how.

    Attributes:
        local_blocks: blocks of the local window (L).
        vert_stride: distance in blocks between a head's strided blocks (s); None for no strided set, which
            makes streaming heads of all heads that are not full.
        block_size: tokens per block (b), a power of two from 16 to 128.
        homo_head: give every head the pattern of head 0.
        head_sliding_step: shift of the strided set from one pattern head to the next; None for
            max(1, vert_stride // number of query heads), as in DKernel.
        head_sliding_offset: shift of head 0.
        pattern_heads: whether KV heads or query heads have patterns of their own.
        dense_layers: indices of the layers that attend to everything.
        sink_blocks: the first blocks of a sequence, which every head attends to; at most `local_blocks`.
        full_heads: KV heads that attend to everything: those of every sparse layer, or those of some layers
            by their index.
        num_dense_heads: KV heads, the last ones of every sparse layer, that attend to everything.
        layers: keys that some layers have of their own, by the layers as config.json names them ("3",
            "0-15" or "0-3,8"). Of `full_heads` and `num_dense_heads` either replaces both.
    """

    OTHER_NAMES: ClassVar[Mapping[str, str]] = {}
    """Keys of config.json that stand for an attribute, where they are not those of `s2_attention`."""

    NULLABLE: ClassVar[frozenset[str]] = frozenset({"vert_stride", "head_sliding_step"})
    """Integers that may be null."""

    local_blocks: int
    vert_stride: int | None
    block_size: int = 64
    homo_head: bool = False
    head_sliding_step: int | None = None
    head_sliding_offset: int = 0
    pattern_heads: PatternHeads = "kv"
    dense_layers: tuple[int, ...] = ()
    sink_blocks: int = 0
    full_heads: tuple[int, ...] | Mapping[int, tuple[int, ...]] = field(default=(), hash=False)
    num_dense_heads: int = 0
    layers: Mapping[str, Mapping[str, Any]] = field(default_factory=dict, hash=False)

    @classmethod
    def parse(cls, raw: object, num_layers: int) -> Self:
        """Validate the value of the key, for a model of `num_layers` layers.

        Raises:
            S2ConfigError: an unknown or missing key, a wrong type, or an impossible value.
        """
        if not isinstance(raw, Mapping):
            raise S2ConfigError(f"{KEY}: {raw!r}, expected an object with keys {_names()}")
        for key in raw:
            if key not in _names():
                raise S2ConfigError(f"{KEY}.{key}: unknown key, expected one of {_names()}")
        for key in ("local_blocks", "vert_stride"):
            if key not in raw:
                or_null = ", or null" if key in cls.NULLABLE else ""
                raise cls.error(key, f"missing, expected a positive integer{or_null}")
        values = dict(raw)
        cls._check_block_size(values.get("block_size", cls.block_size))
        dense = cls._check_dense_layers(values.get("dense_layers", ()), num_layers)
        values["dense_layers"] = dense
        sparse = [layer for layer in range(num_layers) if layer not in dense]
        for key in (key for key in _LAYER_KEYS if key in values):
            if key == "full_heads" and isinstance(values[key], Mapping):
                values[key] = cls._check_full_heads_by_layer(values[key], num_layers, sparse)
            else:
                values[key] = cls._check_value(key, values[key], key)
        values["layers"] = cls._check_layers(values.get("layers", {}), num_layers, sparse)
        config = cls(**values)
        if config.num_dense_heads and config.full_heads:
            raise cls.error("num_dense_heads", f"{config.num_dense_heads}, expected 0 with full_heads")
        for layer in sparse:
            config._check_layer(config._of_layer(layer))
        return config

    @classmethod
    def error(cls, name: str, problem: str) -> S2ConfigError:
        """The error about `name`, by the key that a config.json has for it.

        Args:
            name: an attribute, or an argument of `S2Pattern.build`; below a key of its own kind, by dots.
            problem: the value and what was expected.
        """
        key = {**_MODEL_KEYS, **cls.OTHER_NAMES}.get(name, f"{KEY}.{name}")
        return S2ConfigError(f"{key}: {problem}")

    @classmethod
    def _check_value(cls, key: str, value: Any, name: str) -> Any:
        """The value of one of `_LAYER_KEYS`, which errors call `name`."""
        if key in _LOWEST:
            if value is not None or key not in cls.NULLABLE:
                cls._check_int(name, value, _LOWEST[key], ", or null" if key in cls.NULLABLE else "")
        elif key == "homo_head":
            if not isinstance(value, bool):
                raise cls.error(name, f"{value!r}, expected true or false")
        elif key == "pattern_heads":
            if value not in ("kv", "query"):
                raise cls.error(name, f"{value!r}, expected 'kv' or 'query'")
        else:
            return cls._check_full_heads(name, value)
        return value

    @classmethod
    def _check_int(cls, name: str, value: object, low: int, or_else: str = "") -> None:
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise cls.error(name, f"{value!r}, expected an integer of at least {low}{or_else}")

    @classmethod
    def _check_block_size(cls, value: int) -> None:
        cls._check_int("block_size", value, 1)
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

    @classmethod
    def _check_full_heads(cls, name: str, value: object) -> tuple[int, ...]:
        if not isinstance(value, (list, tuple)):
            raise cls.error(name, f"{value!r}, expected a list of KV heads")
        for head in value:
            if isinstance(head, bool) or not isinstance(head, int) or head < 0:
                raise cls.error(name, f"{head!r}, expected indices of KV heads")
        if len(set(value)) != len(value):
            raise cls.error(name, f"{list(value)}, expected each KV head once")
        return tuple(sorted(value))

    @classmethod
    def _check_full_heads_by_layer(
        cls, raw: Mapping[Any, object], num_layers: int, sparse: list[int]
    ) -> dict[int, tuple[int, ...]]:
        heads: dict[int, tuple[int, ...]] = {}
        for label, value in raw.items():
            layers = cls._check_label("full_heads", label, num_layers, sparse, heads)
            if len(layers) != 1:
                raise cls.error("full_heads", f"{label!r}, expected the index of one layer")
            heads[layers[0]] = cls._check_full_heads(f"full_heads.{label}", value)
        return heads

    @classmethod
    def _check_layers(cls, raw: object, num_layers: int, sparse: list[int]) -> dict[str, dict[str, Any]]:
        if not isinstance(raw, Mapping):
            raise cls.error("layers", f"{raw!r}, expected an object from layers to their keys")
        found: dict[str, dict[str, Any]] = {}
        named: set[int] = set()
        for label, own in raw.items():
            layers = cls._check_label("layers", label, num_layers, sparse, named)
            named.update(layers)
            found[str(label)] = cls._check_own(f"layers.{label}", own)
        return found

    @classmethod
    def _check_own(cls, name: str, own: object) -> dict[str, Any]:
        """The keys that some layers have of their own, which errors call `name`."""
        if not isinstance(own, Mapping):
            raise cls.error(name, f"{own!r}, expected an object with keys {sorted(_LAYER_KEYS)}")
        if "block_size" in own:
            raise cls.error(
                f"{name}.block_size",
                f"{own['block_size']!r}, expected none: all layers have the {KEY}.block_size of the model",
            )
        for key in own:
            if key not in _LAYER_KEYS:
                raise cls.error(f"{name}.{key}", f"unknown key, expected one of {sorted(_LAYER_KEYS)}")
        return {key: cls._check_value(key, value, f"{name}.{key}") for key, value in own.items()}

    @classmethod
    def _check_label(
        cls, name: str, label: object, num_layers: int, sparse: list[int], named: Collection[int]
    ) -> list[int]:
        """The layers that a key of the object `name` stands for: sparse ones that no other key has named."""
        if not _RANGES.fullmatch(str(label)):
            raise cls.error(name, f"{label!r}, expected layers such as '3', '0-15' or '0-3,8'")
        layers: list[int] = []
        for first, last in _ranges(str(label)):
            if last < first or last >= num_layers:
                raise cls.error(
                    name, f"{label!r}, expected layers from 0 to {num_layers - 1}, the lower one first"
                )
            layers += range(first, last + 1)
        for layer in layers:
            if layer in named or layers.count(layer) > 1:
                raise cls.error(
                    name, f"{label!r}, expected each layer once, and layer {layer} is there twice"
                )
            if layer not in sparse:
                raise cls.error(name, f"{label!r}, expected sparse layers, and {layer} is in dense_layers")
        return layers

    def _of_layer(self, layer: int) -> dict[str, _Stated]:
        """What a sparse layer has of each of `_LAYER_KEYS`."""
        stated = {key: _Stated(key, getattr(self, key)) for key in _LAYER_KEYS}
        if isinstance(self.full_heads, Mapping):
            stated["full_heads"] = _Stated(f"full_heads.{layer}", self.full_heads.get(layer, ()))
        for label, own in self.layers.items():
            if any(first <= layer <= last for first, last in _ranges(label)):
                if own.keys() & _FULL_KEYS:
                    stated |= {key: _Stated(key, none) for key, none in _FULL_KEYS.items()}
                stated |= {key: _Stated(f"layers.{label}.{key}", value) for key, value in own.items()}
        return stated

    def _check_layer(self, stated: Mapping[str, _Stated]) -> None:
        sinks, local = stated["sink_blocks"], stated["local_blocks"].value
        # What is longer than the window is a number of tokens, more often than not.
        if sinks.value > local:
            raise self.error(
                sinks.name, f"{sinks.value}, expected at most the {local} blocks of the local window"
            )
        dense = stated["num_dense_heads"]
        for other in ("homo_head", "full_heads"):
            if dense.value and stated[other].value:
                raise self.error(dense.name, f"{dense.value}, expected 0 with {other}")

    def name_of(self, key: str, layer: int) -> str:
        """By what name `error` knows the value that a sparse layer has of a key that may differ."""
        return self._of_layer(layer)[key].name

    @property
    def layers_differ(self) -> bool:
        """Whether sparse layers may have different patterns."""
        return bool(self.layers) or isinstance(self.full_heads, Mapping)

    def pattern(self, num_heads: int, num_kv_heads: int) -> S2Pattern:
        """The pattern of a sparse layer with these heads, all tensor-parallel ranks together.

        Raises:
            S2ConfigError: no such pattern for these heads, or layers differ; it names the key of the model's
                config.json.
        """
        if self.layers_differ:
            name = "layers" if self.layers else "full_heads"
            raise self.error(name, "layers that differ, expected one pattern for all of them")
        return next(iter(self.layer_patterns(num_heads, num_kv_heads, len(self.dense_layers) + 1).values()))

    def layer_patterns(self, num_heads: int, num_kv_heads: int, num_layers: int) -> dict[int, S2Pattern]:
        """The pattern of every sparse layer by its index, ascending; equal ones are the same object.

        Raises:
            S2ConfigError: no such pattern for these heads, or no head of any layer is sparse; it names the
                key of the model's config.json.
        """
        made: dict[S2Pattern, S2Pattern] = {}
        patterns: dict[int, S2Pattern] = {}
        for layer in range(num_layers):
            if layer not in self.dense_layers:
                pattern = self._pattern_of(layer, num_heads, num_kv_heads)
                patterns[layer] = made.setdefault(pattern, pattern)
        if patterns and all(len(pattern.full_heads) == num_kv_heads for pattern in made):
            stated = self._of_layer(min(patterns))
            name = stated["num_dense_heads" if stated["num_dense_heads"].value else "full_heads"].name
            raise self.error(
                name, f"all {num_kv_heads} KV heads of every sparse layer, expected one that is not full"
            )
        return patterns

    def _pattern_of(self, layer: int, num_heads: int, num_kv_heads: int) -> S2Pattern:
        stated = self._of_layer(layer)
        arguments = {key: value for key, (_, value) in stated.items() if key not in _FULL_KEYS}
        full_heads = self._full_heads_of(layer, stated, num_heads, num_kv_heads)
        try:
            return S2Pattern.build(
                num_heads, num_kv_heads, block_size=self.block_size, full_heads=full_heads, **arguments
            )
        except ValueError as error:
            # The heads are not of this key: the model's config.json has keys of its own for them.
            name, _, problem = str(error).partition(": ")
            for argument, key in _MODEL_KEYS.items():
                problem = problem.replace(argument, key)
            raise self.error(stated[name].name if name in stated else name, problem) from error

    def _full_heads_of(
        self, layer: int, stated: Mapping[str, _Stated], num_heads: int, num_kv_heads: int
    ) -> tuple[int, ...]:
        """The KV heads of a layer that attend to everything."""
        dense = stated["num_dense_heads"]
        if dense.value > num_kv_heads:
            raise self.error(dense.name, f"{dense.value}, expected at most {num_kv_heads}, the KV heads")
        last = range(num_kv_heads - dense.value, num_kv_heads)
        return tuple(last) if dense.value else stated["full_heads"].value


class Phi3SmallPattern(S2Config):
    """A pattern that config.json describes by Phi-3-small's keys."""

    OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "block_size": "blocksparse_block_size",
        "local_blocks": "blocksparse_num_local_blocks",
        "vert_stride": "blocksparse_vert_stride",
        "homo_head": "blocksparse_homo_head_pattern",
    }
    NULLABLE: ClassVar[frozenset[str]] = frozenset()


@dataclass(frozen=True)
class HeadwisePattern(S2Config):
    """A pattern that config.json describes by RTPurbo's key.

    Attributes:
        retrieval: for the sparse layers, whether each query head attends to everything. A KV head is full
            when any of its query heads does.
    """

    OTHER_NAMES: ClassVar[Mapping[str, str]] = {
        "sink_blocks": f"{HEADWISE_KEY}.sink_token_num",
        "dense_layers": HEADWISE_KEY,
        "full_heads": HEADWISE_KEY,
    }

    retrieval: Mapping[int, tuple[bool, ...]] = field(default_factory=dict, hash=False)

    @property
    def layers_differ(self) -> bool:
        return True

    def _full_heads_of(
        self, layer: int, stated: Mapping[str, _Stated], num_heads: int, num_kv_heads: int
    ) -> tuple[int, ...]:
        flags = self.retrieval[layer]
        if len(flags) != num_heads:
            raise S2ConfigError(
                f"{HEADWISE_KEY}.{layer}: {len(flags)} values, expected one for each of the {num_heads} "
                "query heads"
            )
        group = max(1, num_heads // max(1, num_kv_heads))
        return tuple(sorted({head // group for head, is_full in enumerate(flags) if is_full}))


def find_config(hf_config: Mapping[str, Any], num_layers: int) -> S2Config | None:
    """The pattern that a model's config.json asks for, or None when it asks for none.

    Args:
        hf_config: the config's top-level keys.
        num_layers: decoder layers of the model.

    Raises:
        S2ConfigError: a wrong value, or two keys that both state a pattern.
    """
    _refuse_two_statements([hf_config])
    if hf_config.get(KEY) is not None:
        return S2Config.parse(hf_config[KEY], num_layers)
    if hf_config.get(HEADWISE_KEY) is not None:
        return _from_headwise(hf_config[HEADWISE_KEY], num_layers)
    if "blocksparse_vert_stride" in hf_config:
        return _from_phi3_small(hf_config, num_layers)
    return None


def find_model_config(hf_config: object, hf_text_config: object, num_layers: int) -> S2Config | None:
    """`find_config` in the whole of a model's configuration, then in its text part.

    Args:
        hf_config, hf_text_config: with the keys of config.json as attributes; may be the same.
        num_layers: decoder layers of the model.

    Raises:
        S2ConfigError: as `find_config`, of both parts together.
    """
    parts = (vars(hf_config), vars(hf_text_config))
    _refuse_two_statements(parts)
    for part in parts:
        if (found := find_config(part, num_layers)) is not None:
            return found
    return None


def states_pattern(config: object) -> bool:
    """Whether a configuration has a key of any model that states a pattern.

    Args:
        config: with the keys of config.json as attributes; of a model, or None.
    """
    return any(getattr(config, key, None) is not None for key in (KEY, HEADWISE_KEY))


def sink_blocks_of(tokens: int, block_size: int) -> int:
    """The fewest blocks that hold the first `tokens` tokens."""
    return -(-tokens // block_size)


def local_blocks_of(tokens: int, block_size: int) -> int:
    """The smallest local window in which every query has the `tokens` tokens before it.

    A query that is the first of its block has nothing before it there, and so needs as many whole blocks
    as hold the tokens.
    """
    return -(-tokens // block_size) + 1


def _refuse_two_statements(parts: Sequence[Mapping[str, Any]]) -> None:
    stated = [key for key in (KEY, HEADWISE_KEY) if any(part.get(key) is not None for part in parts)]
    if len(stated) > 1:
        raise S2ConfigError(
            f"{KEY}: given beside {HEADWISE_KEY}, expected one of the two: set the other to null"
        )


def _from_headwise(raw: object, num_layers: int) -> HeadwisePattern:
    """RTPurbo (arXiv 2605.16928), as RTP-LLM reads its key (github.com/alibaba/rtp-llm, cuda_impl/headwise.py
    of rtp_llm/models_py/modules/factory/attention).

    For a layer's index there is a list with a value for each query head: 1 for a retrieval head, which
    attends to everything, 0 for one with `sink_token_num` sinks (4 by default) and `swa_token_num` tokens
    before the query (8,192). A layer without a list has retrieval heads only. RTP-LLM looks at no other
    keys but `seqlen_threshold`, below which it attends densely. A cache that has freed blocks cannot follow
    it there: the pattern is that of every length.
    """
    if not isinstance(raw, Mapping):
        raise S2ConfigError(f"{HEADWISE_KEY}: {raw!r}, expected an object with a list for each layer")
    block_size = S2Config.block_size
    tokens = {"sink_token_num": (4, 0), "swa_token_num": (8192, 1)}
    for key, (default, low) in tokens.items():
        value = raw.get(key, default)
        if isinstance(value, bool) or not isinstance(value, int) or value < low:
            raise S2ConfigError(f"{HEADWISE_KEY}.{key}: {value!r}, expected an integer of at least {low}")
    retrieval = _retrieval_heads(raw, num_layers)
    sinks, recent = (raw.get(key, default) for key, (default, _) in tokens.items())
    values = {
        "local_blocks": local_blocks_of(recent, block_size),
        "vert_stride": None,
        "sink_blocks": sink_blocks_of(sinks, block_size),
        "dense_layers": [layer for layer in range(num_layers) if layer not in retrieval],
    }
    return replace(HeadwisePattern.parse(values, num_layers), retrieval=retrieval)


def _retrieval_heads(raw: Mapping[Any, Any], num_layers: int) -> dict[int, tuple[bool, ...]]:
    """By layer, whether each query head is a retrieval head; only of layers that have others as well."""
    found = {}
    for key, flags in raw.items():
        if not str(key).isdecimal():
            continue
        name = f"{HEADWISE_KEY}.{key}"
        if int(key) >= num_layers:
            raise S2ConfigError(f"{name}: no such layer, expected layers from 0 to {num_layers - 1}")
        if not isinstance(flags, (list, tuple)) or not flags:
            raise S2ConfigError(f"{name}: {flags!r}, expected a list with 0 or 1 for each query head")
        for flag in flags:
            if isinstance(flag, bool) or flag not in (0, 1):
                raise S2ConfigError(f"{name}: {flag!r}, expected 0 or 1 for each query head")
        if not all(flags):
            found[int(key)] = tuple(map(bool, flags))
    return found


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


def _ranges(label: str) -> Iterator[tuple[int, int]]:
    """The first and the last layer of each range in a key such as "0-3,8"."""
    for part in label.split(","):
        first, _, last = part.partition("-")
        yield int(first), int(last or first)


def _names() -> list[str]:
    return [field.name for field in fields(S2Config)]
