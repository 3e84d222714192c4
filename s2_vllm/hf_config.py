"""A model's config.json, read as an engine reads it. Needs no vLLM, and no transformers.

transformers' classes know a model type's own names (GPT-2's `n_layer`), its defaults and its nested parts.
Where transformers is not installed, or does not know the type, the keys of the file are all there is, under
the names that models use for them.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from s2_kernels.config import S2Config, S2ConfigError, find_model_config
from s2_vllm.plan import ModelGeometry

_TEXT_PARTS = ("text_config", "llm_config")
"""Keys of a multi-modal model's text part, where no class says which it is."""

_NESTED = (*_TEXT_PARTS, "attn_config")
"""Keys of nested configurations."""

_ALIASES = {
    "num_hidden_layers": ("n_layer", "n_layers", "num_layers"),
    "num_attention_heads": ("n_head", "n_heads"),
    "hidden_size": ("n_embd", "d_model"),
    "rope_parameters": ("rope_scaling",),
    "dtype": ("torch_dtype",),
}
"""Other names in files, where no class maps them."""

_COUNTS = ("num_hidden_layers", "num_attention_heads", "hidden_size", "max_position_embeddings")
"""Keys that are positive integers wherever they are."""

_OPTIONAL_COUNTS = ("num_key_value_heads", "head_dim")
"""Keys that may be null or, of a head size, 0."""

# The names below are those that vLLM 0.32 looks for, in its order (transformers_utils/config.py,
# transformers_utils/model_arch_config_convertor.py and config/model.py).
_KV_HEADS = (
    "n_head_kv",
    "num_kv_heads",
    "num_key_value_heads",
    "multi_query_group_num",
    "num_attention_groups",
)
_LENGTHS = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "seq_length",
    "model_max_length",
    "max_target_positions",
    "max_sequence_length",
    "max_seq_length",
    "seq_len",
)
_FALCON_TYPES = ("falcon", "RefinedWeb", "RefinedWebModel")
_LENGTH_INCLUDES_SCALING = (
    "su",
    "longrope",
    "llama3",
    "yarn",
    "deepseek_yarn",
    "deepseek_llama_scaling",
)
"""Rotary embeddings whose factor `max_position_embeddings` has in it."""

_S2_PREFIX = "s2_"
"""Of the model types whose checkpoints require a pattern."""


@dataclass(frozen=True)
class HFConfig:
    """A model's configuration; keys are attributes.

    Attributes:
        whole: everything in config.json.
        text: the part that describes the decoder; `whole` itself, where nothing else is in the file.
    """

    whole: Any
    text: Any

    @property
    def architecture(self) -> str:
        """The name of the model's class, or its type where the file names no class."""
        names = getattr(self.whole, "architectures", None) or [str(getattr(self.whole, "model_type", None))]
        return str(names[0])

    @property
    def model_type(self) -> str:
        """The type that the file states for all of it, "" where it states none."""
        return str(getattr(self.whole, "model_type", ""))

    def pattern_config(self) -> S2Config | None:
        """The pattern that the model asks for, or None when it asks for none."""
        return find_model_config(self.whole, self.text, self._count("num_hidden_layers"))

    def geometry(self, dtype_bytes: int) -> ModelGeometry:
        """What the plan needs to know of the model, in a dtype of `dtype_bytes` bytes.

        Raises:
            S2ConfigError: a key is missing or no positive integer.
        """
        return ModelGeometry(
            num_layers=self._count("num_hidden_layers"),
            num_heads=self._count("num_attention_heads"),
            num_kv_heads=self._num_kv_heads(),
            head_size=self._head_size(),
            dtype_bytes=dtype_bytes,
        )

    def max_model_len(self, asked: int | None) -> int:
        """Tokens of the longest request, as vLLM settles them (`_get_and_verify_max_len`, vLLM 0.32).

        Args:
            asked: the length that the user asks for; None for the model's own.

        Raises:
            S2ConfigError: the model is not made for so many, or names no length and none was asked for.
        """
        lengths = {key: self._count(key) for key in _LENGTHS if getattr(self.text, key, None) is not None}
        if not lengths:
            if asked is None:
                raise S2ConfigError("--max-model-len: missing, expected a number (config.json names none)")
            return asked
        key = "model_max_length" if "model_max_length" in lengths else min(lengths, key=lambda k: lengths[k])
        length = int(lengths[key] * self._rope_factor())
        if asked is None:
            original = "original_max_position_embeddings"
            is_long = any(_rope_type(rope) == "longrope" for rope in self._ropes())
            return self._count(original) if is_long and hasattr(self.text, original) else length
        if asked > length:
            raise S2ConfigError(f"--max-model-len: {asked}, expected at most {length} (config.json, {key})")
        return asked

    def dtype_name(self) -> str:
        """The dtype of the checkpoint: float32 where the file does not say."""
        for part in (self.whole, self.text):
            if (dtype := getattr(part, "dtype", None)) is not None:
                return str(dtype).removeprefix("torch.")
        return "float32"

    def quantization(self) -> dict[str, Any] | None:
        """How the checkpoint says that it is quantized, None if it does not."""
        for part in (self.whole, self.text):
            for key in ("quantization_config", "compression_config"):
                if (found := getattr(part, key, None)) is not None:
                    return found
        return None

    def _num_kv_heads(self) -> int:
        shares_one = getattr(self.text, "multi_query", False)
        is_new = getattr(self.text, "new_decoder_architecture", False)
        if self.model_type in _FALCON_TYPES and shares_one and not is_new:
            return 1
        of_dbrx = getattr(getattr(self.text, "attn_config", None), "kv_n_heads", None)
        if self.model_type == "dbrx" and of_dbrx is not None:
            return _positive("attn_config.kv_n_heads", of_dbrx)
        for key in _KV_HEADS:
            if getattr(self.text, key, None) is not None:
                return self._count(key)
        return self._count("num_attention_heads")

    def _head_size(self) -> int:
        for key in ("head_dim", "hidden_size_per_head"):
            if getattr(self.text, key, None):
                return self._count(key)
        return self._count("hidden_size") // self._count("num_attention_heads")

    def _count(self, key: str) -> int:
        return _positive(key, getattr(self.text, key, None))

    def _ropes(self) -> Iterator[dict[str, Any]]:
        """The parameters of the rotary embedding, of each kind of layer where they differ."""
        ropes = getattr(self.text, "rope_parameters", None)
        if isinstance(ropes, dict) and ropes:
            nested = all(isinstance(value, dict) for value in ropes.values())
            yield from filter(None, ropes.values()) if nested else [ropes]

    def _rope_factor(self) -> float:
        factor = 1.0
        if "gemma3" not in str(getattr(self.text, "model_type", "")):
            for rope in self._ropes():
                if _rope_type(rope) not in _LENGTH_INCLUDES_SCALING:
                    factor = rope.get("factor", factor)
        return 1.0 if factor is None else factor


def read_config(path: Path, overrides: Mapping[str, Any]) -> HFConfig:
    """Read a config.json, and apply `overrides` as vLLM applies `--hf-overrides`.

    An object in `overrides` goes into a nested configuration (`text_config`), key by key; anything else
    replaces what was there.

    Args:
        path: the file, or its folder.
        overrides: keys to set.

    Raises:
        S2ConfigError: the file is no JSON object, or holds values that no model has.
        OSError: there is no such file.
    """
    file = path / "config.json" if path.is_dir() else path
    raw = _read_json(file)
    for part in (raw, overrides):
        _check_counts(part)
    config_class = _config_class(str(overrides.get("model_type", raw.get("model_type"))))
    if config_class is None:
        whole = _without_class(raw)
        _override(whole, overrides)
        parts = (getattr(whole, name, None) for name in _TEXT_PARTS)
        text = next((part for part in parts if isinstance(part, SimpleNamespace)), whole)
        for namespace in (whole, text):
            _fill_in(namespace)
        return HFConfig(whole, text)
    try:
        whole = config_class.from_dict(raw)
        _override(whole, overrides)
        return HFConfig(whole, whole.get_text_config())
    except Exception as error:
        # Whatever a class does not take stops the engine in the same way.
        message = " ".join(str(error).split())
        raise S2ConfigError(f"{file}: {message}, expected what {config_class.__name__} takes") from error


def _read_json(file: Path) -> dict[str, Any]:
    try:
        raw = json.loads(file.read_text(), object_hook=_special_float)
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise S2ConfigError(f"{file}: {error}, expected JSON") from error
    if not isinstance(raw, dict):
        raise S2ConfigError(f"{file}: {type(raw).__name__}, expected a JSON object")
    return raw


def _special_float(pairs: dict[str, Any]) -> Any:
    """transformers writes infinity as an object."""
    return float(pairs["__float__"]) if pairs.keys() == {"__float__"} else pairs


def _config_class(model_type: str) -> Any:
    """transformers' class for a model type, or the one that we register; None where there is none."""
    try:
        from transformers import CONFIG_MAPPING
    except ImportError:
        return None
    if model_type == "phi3small" or model_type.startswith(_S2_PREFIX):
        from s2_vllm.models.families import CONFIG_CLASSES
        from s2_vllm.models.phi3_small_config import Phi3SmallConfig

        classes: tuple[Any, ...] = (*CONFIG_CLASSES, Phi3SmallConfig)
        return next((ours for ours in classes if ours.model_type == model_type), None)
    # A lazy mapping, whose `get` would load every class.
    known = model_type in CONFIG_MAPPING
    return CONFIG_MAPPING[model_type] if known else None


def _check_counts(part: Mapping[str, Any]) -> None:
    """Refuse what is no count by its key, before a class says the same in words of its own."""
    for key, value in part.items():
        if key in _COUNTS or (key in _OPTIONAL_COUNTS and value not in (None, 0)):
            _positive(key, value)
        if key in _TEXT_PARTS and isinstance(value, dict):
            _check_counts(value)


def _positive(key: str, value: object) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise S2ConfigError(f"{key}: {value!r}, expected a positive integer")
    return value


def _without_class(raw: dict[str, Any]) -> SimpleNamespace:
    """The file's keys as attributes, those of a nested configuration as attributes of it."""
    return SimpleNamespace(
        **{
            key: SimpleNamespace(**value) if key in _NESTED and isinstance(value, dict) else value
            for key, value in raw.items()
        }
    )


def _fill_in(part: SimpleNamespace) -> None:
    """What a class would make of the file's keys: their common names, and whether a window is in use."""
    keys = vars(part)
    for name, others in _ALIASES.items():
        for other in others:
            if keys.get(name) is None and other in keys:
                keys[name] = keys[other]
    is_qwen = str(keys.get("model_type")).removeprefix(_S2_PREFIX).startswith("qwen")
    first_layer, num_layers = keys.get("max_window_layers"), keys.get("num_hidden_layers")
    in_no_layer = isinstance(first_layer, int) and isinstance(num_layers, int) and first_layer >= num_layers
    if in_no_layer or not keys.get("use_sliding_window", not is_qwen):
        keys["sliding_window"] = None


def _override(config: Any, overrides: Mapping[str, Any]) -> None:
    """Set keys as vLLM's `ModelConfig` does (`_apply_dict_overrides` of vllm/config/model.py, vLLM 0.32)."""
    for key, value in overrides.items():
        nested = getattr(config, key, None)
        if isinstance(value, dict) and nested is not None and hasattr(nested, "__dict__"):
            _update(nested, value)
        else:
            setattr(config, key, value)


def _update(config: Any, updates: Mapping[str, Any]) -> None:
    """Set the keys of a nested configuration, and of what is nested in it."""
    for key, value in updates.items():
        is_dict = isinstance(config, dict)
        nested = config.get(key) if is_dict else getattr(config, key, None)
        if isinstance(value, dict) and (isinstance(nested, dict) or hasattr(nested, "__dict__")):
            _update(nested, value)
        elif is_dict:
            config[key] = value
        else:
            setattr(config, key, value)


def _rope_type(rope: Mapping[str, Any]) -> str:
    name = rope.get("rope_type", rope.get("type", "default"))
    return "longrope" if name == "su" else str(name)
