"""What config.json alone shows of that which an engine will refuse. Needs no vLLM.

An engine asks vLLM about the model and looks at each layer that is made (`s2_vllm.refusals`). Without one,
keys of the file and the names of architectures decide.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from s2_vllm.refusals import check_kind, refuse_model

if TYPE_CHECKING:
    from s2_vllm.hf_config import HFConfig

_POOLING_SUFFIXES = (
    "ForTextEncoding",
    "ForSequenceClassification",
    "ForTokenClassification",
    "ForAudioClassification",
    "ForImageClassification",
    "ForVideoClassification",
    "ForRewardModeling",
    "Model",
)
"""Ends of the names of architectures that vLLM runs as pooling models (vllm/config/model.py, vLLM 0.32)."""

_GENERATING_MODELS = frozenset(
    {"ChatGLMModel", "MiDashengLMModel", "MossAudioModel", "Qwen2_5OmniModel", "UltravoxModel"}
)
"""Architectures that generate, although their names end with "Model" and not "ChatModel" or "LMHeadModel"."""

_RECURRENT_LAYERS = frozenset(
    {"linear_attention", "mamba", "mamba2", "conv", "recurrent", "hybrid", "hybrid_sliding"}
)
"""Values of `layer_types` that stand for a recurrent state."""

_LAYER_TYPES = _RECURRENT_LAYERS | {
    "attention",
    "full_attention",
    "sliding_attention",
    "dense",
    "sparse",
    "moe",
}
"""Values that stand for those, for attention that can be refused by its window, or for the layer's MLP."""

_RECURRENT_ARCHITECTURES = frozenset(
    {
        "AliceAIForCausalLM",
        "BailingMoeV2_5ForCausalLM",
        "BailingMoeV3ForCausalLM",
        "BailingMoeV3VLForConditionalGeneration",
        "FalconH1ForCausalLM",
        "FalconMambaForCausalLM",
        "Glm5NextForCausalLM",
        "Glm5NextForConditionalGeneration",
        "GraniteMoeHybridForCausalLM",
        "InternS2MobiusForConditionalGeneration",
        "InternS2PreviewForConditionalGeneration",
        "JambaForCausalLM",
        "KimiK3ForConditionalGeneration",
        "KimiLinearForCausalLM",
        "Lfm2ForCausalLM",
        "Lfm2MoeForCausalLM",
        "Lfm2VlForConditionalGeneration",
        "Mamba2ForCausalLM",
        "MambaForCausalLM",
        "MiniCPMOcrForConditionalGeneration",
        "MiniCPMV4_6ForConditionalGeneration",
        "MiniCPMV4_7ForConditionalGeneration",
        "NemotronHForCausalLM",
        "NemotronHPuzzleForCausalLM",
        "NemotronH_Nano_Omni_Reasoning_V3",
        "NemotronH_Nano_VL_V2",
        "NemotronH_Omni_Reasoning_V3",
        "NemotronH_Super_Omni_Reasoning_V3",
        "OlmoHybridForCausalLM",
        "Qwen3NextForCausalLM",
        "Qwen3_5ForCausalLM",
        "Qwen3_5ForConditionalGeneration",
        "Qwen3_5MoeForCausalLM",
        "Qwen3_5MoeForConditionalGeneration",
        "Qwen4ExpForCausalLM",
        "Qwen4ExpForConditionalGeneration",
        "Zamba2ForCausalLM",
    }
)
"""Those that vLLM 0.32 or 0.33 knows as hybrid or free of attention, and that generate."""

_BIDIRECTIONAL_IMAGES = ("bagel", "gemma3", "molmo2", "moondream3", "paligemma")
"""Types of models whose image tokens see one another, where no `is_mm_prefix_lm` says so."""


def check_hf_config(config: HFConfig) -> None:
    """Refuse a model by its config.json: first for what an engine asks vLLM, then for what layers say.

    Raises:
        S2ConfigError: an engine would refuse the model.
    """
    whole, text = config.whole, config.text

    def value(key: str) -> Any:
        return getattr(text, key, None)

    def either(key: str) -> bool:
        return any(getattr(part, key, False) for part in (whole, text))

    check_kind(
        config.architecture,
        (whole, text),
        uses_mla=bool(value("kv_lora_rank") or value("compress_ratios")),
        is_encoder_decoder=either("is_encoder_decoder"),
        is_recurrent=_is_recurrent(config),
        runner_type="pooling" if _is_pooling(config.architecture) else "generate",
        is_mm_prefix_lm=getattr(whole, "is_mm_prefix_lm", config.model_type in _BIDIRECTIONAL_IMAGES)
        or value("use_bidirectional_attention") == "vision",
        is_diffusion=getattr(whole, "canvas_length", None) is not None,
    )
    window = _sliding_window(text)
    other_layer = min(set(value("layer_types") or ()) - _LAYER_TYPES, default=None)
    refuse_model(
        config.architecture,
        {
            "has layers of several shapes": either("is_heterogeneous") or value("block_configs"),
            f"has layers of type {other_layer} (layer_types)": other_layer,
            "shares a layer's KV cache with others (num_kv_shared_layers)": value("num_kv_shared_layers"),
            "attends in chunks (attention_chunk_size)": value("attention_chunk_size"),
            "attends in chunks (dual_chunk_attention_config)": value("dual_chunk_attention_config"),
            "uses ALiBi": value("alibi") or value("model_type") in ("bloom", "step1"),
            "soft-caps its logits (attn_logit_softcapping)": value("attn_logit_softcapping"),
            "has attention sinks": value("attention_sinks") or value("model_type") == "gpt_oss",
            f"has a sliding window ({window} tokens)": window,
        },
    )


def _sliding_window(text: Any) -> int | None:
    """Tokens of the sliding window that some layer has, None if none has one."""
    layer_types = getattr(text, "layer_types", None)
    if layer_types is not None and "sliding_attention" not in layer_types:
        return None
    return getattr(text, "sliding_window", None) or None


def _is_recurrent(config: HFConfig) -> bool:
    if config.architecture in _RECURRENT_ARCHITECTURES:
        # Such a model can be one of attention layers alone; vLLM looks here, not into the text part.
        layer_types = getattr(config.whole, "layer_types", None)
        return layer_types is None or not {"attention", "full_attention"}.issuperset(layer_types)
    return not _RECURRENT_LAYERS.isdisjoint(getattr(config.text, "layer_types", None) or ())


def _is_pooling(architecture: str) -> bool:
    generates = architecture in _GENERATING_MODELS or architecture.endswith(("ChatModel", "LMHeadModel"))
    return not generates and architecture.endswith(_POOLING_SUFFIXES)
