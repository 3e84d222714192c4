"""The reference geometries: names that plans, tests and benchmarks share."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from random import Random
from typing import TYPE_CHECKING, Any

import numpy as np

from s2_kernels.config import S2Config
from s2_vllm.heads import pattern_of_heads
from s2_vllm.plan import ModelGeometry

if TYPE_CHECKING:
    from s2_kernels.pattern import S2Pattern


@dataclass(frozen=True)
class Geometry:
    """A model's attention shape and its pattern.

    Attributes:
        num_layers, num_heads, num_kv_heads, head_size: of the model.
        config: its `s2_attention` key.
    """

    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_size: int = 128
    config: S2Config = field(default_factory=lambda: S2Config(16, 8))

    @property
    def pattern(self) -> S2Pattern:
        """The pattern of a sparse layer."""
        return self.config.pattern(self.num_heads, self.num_kv_heads)

    def model(self, dtype_bytes: int = 2) -> ModelGeometry:
        """What a cache plan needs to know of the model, in a dtype of so many bytes."""
        return ModelGeometry(self.num_layers, self.num_heads, self.num_kv_heads, self.head_size, dtype_bytes)

    def hf_config(self, sparse: bool = True, **overrides: Any) -> dict[str, Any]:
        """A Llama config.json with this attention, and hardly any other weight.

        Args:
            sparse: whether to give it the pattern.
            overrides: keys to set.
        """
        config = {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "dtype": "bfloat16",
            "num_hidden_layers": self.num_layers,
            "num_attention_heads": self.num_heads,
            "num_key_value_heads": self.num_kv_heads,
            "head_dim": self.head_size,
            "hidden_size": 256,
            "intermediate_size": 256,
            "vocab_size": 512,
            "max_position_embeddings": 131072,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        }
        if sparse:
            config["s2_attention"] = asdict(self.config)
        return {**config, **overrides}


GEOMETRIES = {
    "phi3-small": Geometry(
        32,
        32,
        8,
        config=S2Config(
            16, 8, head_sliding_offset=1, pattern_heads="query", dense_layers=tuple(range(1, 32, 2))
        ),
    ),
    "hhst-8b": Geometry(32, 32, 8, config=S2Config(16, 8, dense_layers=(0, 1))),
    "s2-1.3b": Geometry(24, 16, 16, config=S2Config(8, 8, dense_layers=(0, 1))),
    "s2-7b": Geometry(32, 32, 32, config=S2Config(8, 16, dense_layers=(0, 1))),
    "s2-70b": Geometry(80, 64, 64, config=S2Config(8, 32)),
}

SINK_TOKENS, RECENT_TOKENS = 64, 256
"""Of streaming heads, as DuoAttention (arXiv 2410.10819) deploys them."""


def random_full_heads(rng: Random, num_layers: int, num_kv_heads: int, count: int) -> list[tuple[int, ...]]:
    """`count` full heads of a model by layer, spread unevenly: a few layers have most of them."""
    weights = [rng.gammavariate(0.5, 1.0) + 1e-3 for _ in range(num_layers)]
    heads = [(layer, head) for layer in range(num_layers) for head in range(num_kv_heads)]
    drawn = sorted(heads, key=lambda layer_head: rng.random() ** (1 / weights[layer_head[0]]))[-count:]
    return [tuple(sorted(head for of, head in drawn if of == layer)) for layer in range(num_layers)]


def _pretrained(num_layers: int, num_kv_heads: int, count: int) -> Geometry:
    """A Llama of 32 query heads, of whose KV heads so many are full and the others streaming heads."""
    is_full = np.zeros((num_layers, num_kv_heads), dtype=bool)
    for layer, heads in enumerate(random_full_heads(Random(0), num_layers, num_kv_heads, count)):
        is_full[layer, list(heads)] = True
    pattern = pattern_of_heads(is_full, SINK_TOKENS, RECENT_TOKENS)
    return Geometry(num_layers, 32, num_kv_heads, config=S2Config.parse(pattern, num_layers))


PRETRAINED = {
    "llama-3.1-8b-half": _pretrained(32, 8, 128),
    "llama-2-7b-quarter": _pretrained(32, 32, 256),
}
"""Dense models with so many of their KV heads full, and streaming heads beside them."""

TRAINED = {name: geometry for name, geometry in GEOMETRIES.items() if name != "s2-70b"}
"""Models with one pattern for all sparse layers; s2-70b is for the kernels alone."""

SERVED = TRAINED | PRETRAINED
"""What an engine serves."""

_WINDOW = 1024


def _of_blocks(block_size: int, head_size: int = 128) -> Geometry:
    """hhst-8b with blocks of another size, and its window of as many tokens."""
    config = S2Config(_WINDOW // block_size, 8, block_size=block_size)
    return replace(GEOMETRIES["hhst-8b"], config=config, head_size=head_size)


VARIATIONS = {
    "head64": _of_blocks(64, 64),
    **{f"head{size}": _of_blocks(64, size) for size in (80, 96, 192, 256)},
    **{f"block{size}": _of_blocks(size) for size in (16, 32)},
    "block128-head64": _of_blocks(128, 64),
    "block128-head128": _of_blocks(128),
    "half-full": Geometry(32, 32, 8, config=S2Config(5, None, sink_blocks=1, full_heads=(1, 2, 4, 7))),
}
"""For kernels alone: other sizes of heads and blocks, most of which no Hopper kernel takes, and a layer of
llama-3.1-8b-half that has half of its heads full."""


def kernel_geometry(name: str) -> Geometry:
    """A reference geometry or a variation."""
    return GEOMETRIES[name] if name in GEOMETRIES else VARIATIONS[name]
