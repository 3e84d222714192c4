"""Phi-3-small (microsoft/Phi-3-small-8k-instruct and -128k-instruct), dense and sparse layers alike.

After modeling_phi3_small.py of the checkpoints. Which layers are sparse is not decided here: each asks for
vLLM's `Attention`, and the plan makes it a sparse one.

LongRoPE (the 128k model): the original takes the short factors while a sequence is no longer than 8192
tokens and the long ones from then on, so that keys cached before stay rotated by other angles. In vLLM
the engine's `max_model_len` decides once for all its sequences: short factors up to 8192, long ones above.
That is what keeps a cached prefix valid for any request, whatever its length.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import CacheConfig, VllmConfig
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import ColumnParallelLinear, QKVParallelLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.quantization import QuantizationConfig
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead, VocabParallelEmbedding
from vllm.model_executor.models.interfaces import SupportsQuant
from vllm.model_executor.models.utils import AutoWeightsLoader, make_layers, maybe_prefix
from vllm.sequence import IntermediateTensors

from s2_vllm.models.phi3_small_config import Phi3SmallConfig

LM_HEAD = "lm_head.weight"


def gegelu(x: torch.Tensor, limit: float) -> torch.Tensor:
    """GeGELU over interleaved halves: quick_gelu(even columns) * (odd columns + 1), both clamped.

    Args:
        x: [..., 2 * intermediate_size].
        limit: bound of the gelu half from above, and of the linear half on both sides.

    Returns:
        [..., intermediate_size]
    """
    gate = x[..., ::2].clamp(max=limit)
    linear = x[..., 1::2].clamp(-limit, limit)
    return gate * torch.sigmoid(1.702 * gate) * (linear + 1)


class Phi3SmallMLP(nn.Module):
    """Up projection, GeGELU, down projection. A gelu row and its linear row stay on one rank."""

    def __init__(self, config: Phi3SmallConfig, quant_config: QuantizationConfig | None, prefix: str) -> None:
        super().__init__()
        self.limit = config.gegelu_limit
        self.up_proj = ColumnParallelLinear(
            config.hidden_size,
            2 * config.intermediate_size,
            quant_config=quant_config,
            prefix=f"{prefix}.up_proj",
        )
        self.down_proj = RowParallelLinear(
            config.intermediate_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=f"{prefix}.down_proj",
        )

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        x, _ = self.up_proj(hidden_states)
        x, _ = self.down_proj(gegelu(x, self.limit))
        return x


class GroupedQKVParallelLinear(QKVParallelLinear):
    """A QKV projection whose checkpoint has, for each KV head, its query heads, its key and its value.

    The rows of a fused tensor (one without a shard id) are put into vLLM's order, all queries, keys, values,
    and vLLM's own loaders do the rest: tensor parallelism, packed weights, scales per channel or block.
    """

    def weight_loader(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | None = None
    ) -> None:
        if loaded_shard_id is None:
            loaded_weight = self._ungroup(param, loaded_weight)
        super().weight_loader(param, loaded_weight, loaded_shard_id)

    def weight_loader_v2(
        self, param: nn.Parameter, loaded_weight: torch.Tensor, loaded_shard_id: str | None = None
    ) -> None:
        if loaded_shard_id is None:
            loaded_weight = self._ungroup(param, loaded_weight)
        super().weight_loader_v2(param, loaded_weight, loaded_shard_id)

    def _ungroup(self, param: nn.Parameter, weight: torch.Tensor) -> torch.Tensor:
        dim = getattr(param, "output_dim", None)
        if dim is None or weight.dim() == 0:
            return weight
        group = self.total_num_heads // self.total_num_kv_heads + 2
        heads = self.total_num_kv_heads * group
        if weight.shape[dim] % heads:
            raise ValueError(
                f"{self.prefix}: a tensor of shape {list(weight.shape)}, expected {heads} heads of equal "
                f"size in dimension {dim}"
            )
        by_head = weight.unflatten(dim, (self.total_num_kv_heads, group, -1))
        parts = by_head.split([group - 2, 1, 1], dim + 1)
        return torch.cat([part.flatten(dim, dim + 2) for part in parts], dim)


class Phi3SmallAttention(nn.Module):
    """Self-attention with rotary embeddings on whole heads."""

    def __init__(
        self,
        config: Phi3SmallConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.query_key_value = GroupedQKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            quant_config=quant_config,
            prefix=f"{prefix}.query_key_value",
        )
        self.dense = RowParallelLinear(
            config.hidden_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=f"{prefix}.dense",
        )
        self.rotary_emb = _rotary_embedding(config)
        heads, kv_heads = self.query_key_value.num_heads, self.query_key_value.num_kv_heads
        self.sizes = [n * config.head_dim for n in (heads, kv_heads, kv_heads)]
        self.attn = Attention(
            heads,
            config.head_dim,
            config.softmax_scale,
            num_kv_heads=kv_heads,
            cache_config=cache_config,
            quant_config=quant_config,
            prefix=f"{prefix}.attn",
        )

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        qkv, _ = self.query_key_value(hidden_states)
        q, k, v = qkv.split(self.sizes, dim=-1)
        q, k = self.rotary_emb(positions, q, k)
        output, _ = self.dense(self.attn(q, k, v))
        return output


def _rotary_embedding(config: Phi3SmallConfig) -> nn.Module:
    """LongRoPE where the config has it; else plain, at positions times `rope_position_scale`."""
    rope, length, scale = config.rope_parameters, config.max_position_embeddings, config.rope_position_scale
    assert rope is not None
    if rope["rope_type"] == "default" and scale != 1:
        # vLLM divides positions by its factor, and makes a table for that many times the length.
        rope = {"rope_type": "linear", "factor": 1 / scale, "rope_theta": config.rope_embedding_base}
        length = -int(-length * scale // 1)
    return get_rope(config.head_dim, length, rope_parameters=rope)


class Phi3SmallDecoderLayer(nn.Module):
    """Attention and MLP, each after a LayerNorm and around a residual."""

    def __init__(
        self,
        config: Phi3SmallConfig,
        cache_config: CacheConfig | None,
        quant_config: QuantizationConfig | None,
        prefix: str,
    ) -> None:
        super().__init__()
        self.input_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.self_attn = Phi3SmallAttention(config, cache_config, quant_config, f"{prefix}.self_attn")
        self.post_attention_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)
        self.mlp = Phi3SmallMLP(config, quant_config, f"{prefix}.mlp")

    def forward(self, positions: torch.Tensor, hidden_states: torch.Tensor) -> torch.Tensor:
        hidden_states = hidden_states + self.self_attn(positions, self.input_layernorm(hidden_states))
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": 0, "intermediate_tensors": 0, "inputs_embeds": 0}
)
class Phi3SmallModel(nn.Module):
    """The decoder: scaled embeddings, layers, a last LayerNorm."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config, quant_config = vllm_config.model_config.hf_config, vllm_config.quant_config
        config.check()
        self.embedding_multiplier = config.mup_embedding_multiplier or 1.0
        self.embed_tokens = VocabParallelEmbedding(
            config.vocab_size,
            config.hidden_size,
            quant_config=quant_config,
            prefix=f"{prefix}.embed_tokens",
        )
        _, _, self.layers = make_layers(
            config.num_hidden_layers,
            lambda prefix: Phi3SmallDecoderLayer(config, vllm_config.cache_config, quant_config, prefix),
            prefix=f"{prefix}.layers",
        )
        self.final_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_epsilon)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.embed_tokens(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        if inputs_embeds is None:
            assert input_ids is not None
            inputs_embeds = self.embed_input_ids(input_ids)
        hidden_states = inputs_embeds * self.embedding_multiplier
        for layer in self.layers:
            hidden_states = layer(positions, hidden_states)
        return self.final_layernorm(hidden_states)


class Phi3SmallForCausalLM(nn.Module, SupportsQuant):
    """Phi-3-small with its language model head, as vLLM runs it.

    Raises:
        ValueError: the config has a value that this model cannot be run with.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        self.config: Phi3SmallConfig = vllm_config.model_config.hf_config
        config = self.config
        self.model = Phi3SmallModel(vllm_config=vllm_config, prefix=maybe_prefix(prefix, "model"))
        # Tied, it is the same module: two modules of one parameter can each keep a packed copy of it, and
        # vLLM renews one of them when it loads new weights.
        self.lm_head: VocabParallelEmbedding = self.model.embed_tokens
        if not config.tie_word_embeddings:
            self.lm_head = ParallelLMHead(
                config.vocab_size,
                config.hidden_size,
                quant_config=vllm_config.quant_config,
                prefix=maybe_prefix(prefix, "lm_head"),
            )
        self.logits_processor = LogitsProcessor(
            config.vocab_size, scale=1 / (config.mup_width_multiplier or 1.0)
        )
        masked = torch.tensor(config.dummy_token_indices or [], dtype=torch.long)
        self.register_buffer("masked_token_ids", masked, persistent=False)
        self._is_loaded = False

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model.embed_input_ids(input_ids)

    def forward(
        self,
        input_ids: torch.Tensor | None,
        positions: torch.Tensor,
        intermediate_tensors: IntermediateTensors | None = None,
        inputs_embeds: torch.Tensor | None = None,
    ) -> torch.Tensor:
        return self.model(input_ids, positions, intermediate_tensors, inputs_embeds)

    def compute_logits(self, hidden_states: torch.Tensor) -> torch.Tensor | None:
        """[tokens, vocab_size], -inf for tokens the model never learned; None where another rank has them."""
        logits = self.logits_processor(self.lm_head, hidden_states)
        if logits is not None:
            logits.index_fill_(-1, self.masked_token_ids, float("-inf"))
        return logits

    def process_weights_after_loading(self) -> None:
        """vLLM calls it when the weights that the model starts with are in place, dummy ones included."""
        self._is_loaded = True

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load tensors under their original names: a whole checkpoint at start, any of them later.

        Trainers push new weights into a running model, one tensor or bucket to a call. vLLM itself cuts a
        tensor that is too large, and does not miss one of a linear layer.

        Raises:
            ValueError: a tensor is unknown or of another shape, or missing at start; the message names it.
        """
        shapes = checkpoint_shapes(self.config)
        # Tied, the head is the embeddings; vLLM's loader would then expect both in the same call.
        tied = {LM_HEAD} if self.config.tie_word_embeddings else set()
        checked = _checked(weights, shapes, self.quant_config is not None)
        loaded = AutoWeightsLoader(self).load_weights((n, tensor) for n, tensor in checked if n not in tied)
        if not self._is_loaded:
            self._check_complete(loaded, shapes.keys() - tied)
        return loaded

    def _check_complete(self, loaded: set[str], expected: set[str]) -> None:
        missing = expected - loaded
        if self.quant_config is not None:
            modules = {name.rpartition(".")[0] for name in loaded if not name.endswith(".bias")}
            missing = {n for n in missing if not (_is_linear(n) and n.rpartition(".")[0] in modules)}
        if missing:
            raise ValueError(f"tensors missing in the checkpoint: {sorted(missing)}")


def checkpoint_shapes(config: Phi3SmallConfig) -> dict[str, tuple[int, ...]]:
    """The shape of every tensor of an unquantized checkpoint, by its name."""
    hidden, intermediate = config.hidden_size, config.intermediate_size
    qkv = (config.num_attention_heads + 2 * config.num_key_value_heads) * config.head_dim
    linears = {
        "self_attn.query_key_value": (qkv, hidden),
        "self_attn.dense": (hidden, hidden),
        "mlp.up_proj": (2 * intermediate, hidden),
        "mlp.down_proj": (hidden, intermediate),
    }
    norms = {"input_layernorm": (hidden,), "post_attention_layernorm": (hidden,)}
    modules: dict[str, tuple[int, ...]] = {"model.final_layernorm": (hidden,)}
    for i in range(config.num_hidden_layers):
        modules |= {f"model.layers.{i}.{name}": shape for name, shape in {**linears, **norms}.items()}
    shapes: dict[str, tuple[int, ...]] = {
        "model.embed_tokens.weight": (config.vocab_size, hidden),
        LM_HEAD: (config.vocab_size, hidden),
    }
    for name, shape in modules.items():
        shapes[f"{name}.weight"] = shape
        shapes[f"{name}.bias"] = shape[:1]
    return shapes


def _is_linear(name: str) -> bool:
    """Whether it is the weight of a linear layer: others replace it in a quantized checkpoint."""
    return name.endswith(("query_key_value.weight", "dense.weight", "_proj.weight"))


def _checked(
    weights: Iterable[tuple[str, torch.Tensor]], shapes: dict[str, tuple[int, ...]], quantized: bool
) -> Iterator[tuple[str, torch.Tensor]]:
    """The weights, each once its name and shape are seen to be right; vLLM checks those of its quantizers."""
    for name, tensor in weights:
        if ".rotary_emb." in name:
            continue
        expected = None if quantized and _is_linear(name) else shapes.get(name)
        if name not in shapes and not quantized:
            raise ValueError(f"{name}: unknown tensor in the checkpoint, expected those of Phi-3-small")
        if expected is not None and tuple(tensor.shape) != expected:
            raise ValueError(f"{name}: shape {list(tensor.shape)}, expected {list(expected)}")
        yield name, tensor
