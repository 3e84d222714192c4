"""Tiny Phi-3-small checkpoints of the real layout: tensor names, config keys and tokenizer files."""

from __future__ import annotations

import base64
import json
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_file

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

NUM_ORDINARY_TOKENS = 416
"""Of the vocabulary file; the real one has 100256."""

SPECIAL_TOKEN_OFFSETS = {
    "<|endoftext|>": 1,
    "<|system|>": 5,
    "<|user|>": 6,
    "<|assistant|>": 7,
    "<|end|>": 10,
}
"""Places of the trained ones among the 96 special ids, 100256 to 100351 in the real ones."""

CONFIG: dict[str, Any] = {
    "architectures": ["Phi3SmallForCausalLM"],
    "attention_dropout_prob": 0.0,
    "auto_map": {
        "AutoConfig": "configuration_phi3_small.Phi3SmallConfig",
        "AutoModelForCausalLM": "modeling_phi3_small.Phi3SmallForCausalLM",
        "AutoTokenizer": "tokenization_phi3_small.Phi3SmallTokenizer",
    },
    "blocksparse_block_size": 16,
    "blocksparse_homo_head_pattern": False,
    "blocksparse_num_local_blocks": 3,
    "blocksparse_triton_kernel_block_size": 16,
    "blocksparse_vert_stride": 8,
    "bos_token_id": 417,
    "dense_attention_every_n_layers": 2,
    "dummy_token_indices": [
        NUM_ORDINARY_TOKENS + i for i in range(96) if i not in SPECIAL_TOKEN_OFFSETS.values()
    ],
    "embedding_dropout_prob": 0.1,
    "eos_token_id": 417,
    "ff_dim_multiplier": None,
    "ff_intermediate_size": 192,
    "ffn_dropout_prob": 0.1,
    "gegelu_limit": 20.0,
    "gegelu_pad_to_256": True,
    "hidden_act": "gegelu",
    "hidden_size": 256,
    "initializer_range": 0.02,
    "layer_norm_epsilon": 1e-05,
    "max_position_embeddings": 4096,
    "model_type": "phi3small",
    "mup_attn_multiplier": 1.0,
    "mup_embedding_multiplier": 10.0,
    "mup_use_scaling": True,
    "mup_width_multiplier": 8.0,
    "num_attention_heads": 8,
    "num_hidden_layers": 3,
    "num_key_value_heads": 2,
    "pad_sequence_to_multiple_of_64": True,
    "reorder_and_upcast_attn": False,
    "rope_embedding_base": 1000000,
    "rope_position_scale": 1.0,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.38.1",
    "use_cache": True,
    "vocab_size": 512,
}
"""The keys of Phi-3-small-8k-instruct's config.json; 4 query heads to a KV head, stride 8.

And `dummy_token_indices`: the published code has the real vocabulary's.
"""

REAL_PATTERN = {
    "blocksparse_block_size": 64,
    "blocksparse_num_local_blocks": 16,
    "blocksparse_triton_kernel_block_size": 64,
}

ORIGINAL_LENGTH = 512

LONG_ROPE: dict[str, Any] = {
    "max_position_embeddings": 2048,
    "original_max_position_embeddings": ORIGINAL_LENGTH,
    "rope_scaling": {
        "long_factor": [1.0 + 0.5 * n for n in range(16)],
        "long_mscale": 1.3,
        "original_max_position_embeddings": ORIGINAL_LENGTH,
        "short_factor": [1.0 + 0.05 * n for n in range(16)],
        "short_mscale": 1.1,
        "type": "su",
    },
}
"""What Phi-3-small-128k-instruct's config.json has besides, in miniature."""

SPECIAL_TOKENS = {
    "bos_token": "<|endoftext|>",
    "eos_token": "<|endoftext|>",
    "pad_token": "<|endoftext|>",
}

CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}"
    "{{'<|' + message['role'] + '|>' + '\\n' + message['content'] + '<|end|>\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% else %}{{ eos_token }}{% endif %}"
)

REMOTE_CODE_RUN = "the checkpoint's own code has been run"

WORDS = ("the", "of", "and", "block", "head", "what", "is", "a", "window", "sparse", "attention", "key")


def tensor_shapes(config: dict[str, Any]) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint."""
    hidden = config["hidden_size"]
    head_size = hidden // config["num_attention_heads"]
    fused = (config["num_attention_heads"] + 2 * config["num_key_value_heads"]) * head_size
    inner = config["ff_intermediate_size"]
    if inner is None:
        inner = config["ff_dim_multiplier"] * (hidden // 3) * 2
        if config["gegelu_pad_to_256"]:
            inner = -(-inner // 256) * 256
    linears = {
        "self_attn.query_key_value": (fused, hidden),
        "self_attn.dense": (hidden, hidden),
        "mlp.up_proj": (2 * inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config["vocab_size"], hidden)}
    for layer in range(config["num_hidden_layers"]):
        for name, shape in linears.items():
            shapes[f"model.layers.{layer}.{name}.weight"] = shape
            shapes[f"model.layers.{layer}.{name}.bias"] = shape[:1]
    shapes["model.final_layernorm.weight"] = shapes["model.final_layernorm.bias"] = (hidden,)
    return shapes


def random_weights(config: dict[str, Any], seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights with which attention, biases and GeGELU's clamps all decide what is generated."""
    generator = torch.Generator().manual_seed(seed)
    weights: dict[str, torch.Tensor] = {}
    for name, shape in tensor_shapes(config).items():
        weight = torch.empty(shape)
        if "layernorm.weight" in name:
            weight.uniform_(1.0, 2.0, generator=generator)
        elif name.endswith("bias"):
            weight.normal_(0.0, 0.5, generator=generator)
        else:
            std = {"embed_tokens": 0.05, "down_proj": 0.01}.get(name.split(".")[-2], 0.13)
            weight.normal_(0.0, std, generator=generator)
        if ".mlp.up_proj." in name:
            # Gate and linear halves of one unit in eight go past 20, on both sides.
            weight.view(-1, 2, *shape[1:])[::8] *= 8
        weights[name] = weight
    return weights


def save_checkpoint(
    folder: Path, *, long_rope: bool = False, dtype: torch.dtype = torch.float32, **changes: Any
) -> Path:
    """Save a random model in `folder`, made if missing, and return `folder`.

    Args:
        folder: of the checkpoint.
        long_rope: add the LongRoPE keys of the 128k model.
        dtype: of the saved weights.
        changes: config values that differ from CONFIG.
    """
    config = CONFIG | (LONG_ROPE if long_rope else {}) | changes
    folder.mkdir(parents=True, exist_ok=True)
    write_config(folder, config)
    save_weights(folder, {name: weight.to(dtype) for name, weight in random_weights(config).items()})
    return folder


def write_config(folder: Path, config: dict[str, Any]) -> None:
    """Write config.json."""
    (folder / "config.json").write_text(json.dumps(config, indent=2))


def save_weights(folder: Path, weights: dict[str, torch.Tensor]) -> None:
    """Write model.safetensors."""
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def save_tokenizer(folder: Path) -> dict[bytes, int]:
    """Write tokenizer files as the real checkpoints have them; returns the rank of each token.

    The vocabulary file has a base64 token and its rank per line. The special tokens follow its last rank
    and are not in it: the checkpoints name them in their code.
    """
    ranks = {token: rank for rank, token in enumerate(_mini_vocabulary())}
    lines = [f"{base64.b64encode(token).decode()} {rank}\n" for token, rank in ranks.items()]
    (folder / "cl100k_base.tiktoken").write_text("".join(lines))
    module = "tokenization_phi3_small.Phi3SmallTokenizer"
    tokenizer_config = {
        "auto_map": {"AutoTokenizer": [module, module]},
        **SPECIAL_TOKENS,
        "chat_template": CHAT_TEMPLATE,
        "model_max_length": CONFIG["max_position_embeddings"],
        "tokenizer_class": "Phi3SmallTokenizer",
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))
    (folder / "special_tokens_map.json").write_text(json.dumps(SPECIAL_TOKENS))
    end_of_text, end = special_id("<|endoftext|>"), special_id("<|end|>")
    generation = {
        "bos_token_id": end_of_text,
        "eos_token_id": [end_of_text, end],
        "pad_token_id": end_of_text,
    }
    (folder / "generation_config.json").write_text(json.dumps(generation))
    return ranks


def save_remote_code(folder: Path) -> None:
    """Write files under the names of the checkpoint's own code, which fail when they are imported."""
    for name in ("configuration", "modeling", "tokenization"):
        (folder / f"{name}_phi3_small.py").write_text(f"raise ImportError({REMOTE_CODE_RUN!r})\n")


def special_id(token: str) -> int:
    """Id of a special token in these checkpoints."""
    return NUM_ORDINARY_TOKENS + SPECIAL_TOKEN_OFFSETS[token]


def _mini_vocabulary() -> list[bytes]:
    """The 256 bytes, some words with all their beginnings, and letter pairs up to the wanted number."""
    words = [f" {word}".encode() for word in WORDS]
    tokens = [bytes([byte]) for byte in range(256)]
    tokens += [word[:n] for word in words for n in range(2, len(word) + 1)]
    tokens += [bytes([a, b]) for a in b"aeiou" for b in b"abcdefghijklmnopqrstuvwxyz"]
    tokens = list(dict.fromkeys(tokens))[:NUM_ORDINARY_TOKENS]
    assert len(tokens) == NUM_ORDINARY_TOKENS
    return tokens


def random_prompts(lengths: Sequence[int], seed: int = 0) -> list[list[int]]:
    """A prompt of random token ids for each length; no two share a prefix by more than chance."""
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(CONFIG["vocab_size"], (n,), generator=generator).tolist() for n in lengths]
