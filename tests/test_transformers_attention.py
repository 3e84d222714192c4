"""Attention "s2" of transformers: as under a mask per head, wherever the sequences are in a batch."""

from __future__ import annotations

from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest
import torch
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForCausalLM,
    DynamicCache,
    GPT2Config,
    StaticCache,
)
from transformers.masking_utils import create_bidirectional_mask, create_causal_mask

from s2_kernels import transformers as s2_transformers
from s2_kernels.config import S2ConfigError
from s2_kernels.transformers import attention, layer_patterns, register, token_mask
from tests.engine.checkpoints import FAMILIES, random_prompts, tiny_config
from tests.masked_models import MaskedModel, Place, random_weights, token_loss

if TYPE_CHECKING:
    from collections.abc import Callable

    from transformers import LlamaForCausalLM

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "dense_layers": [1]}
QUERY_HEADS = {**S2, "pattern_heads": "query", "head_sliding_offset": 1, "dense_layers": [0, 2]}
PATTERNS = {"kv": S2, "query": QUERY_HEADS, "homo": {**S2, "homo_head": True, "dense_layers": []}}

TOKENS = 181
Inputs = dict[str, Any]


def build(s2: dict[str, Any] = S2, family: str = "llama", **shape: Any) -> LlamaForCausalLM:
    config = tiny_config(family, **shape)
    config.s2_attention = dict(s2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2")
    random_weights(model)
    return model.train()


@pytest.fixture(scope="module")
def model() -> LlamaForCausalLM:
    return build()


@pytest.fixture(scope="module")
def masked(model: LlamaForCausalLM) -> MaskedModel:
    return MaskedModel(model, S2)


def token_ids(rows: int, tokens: int = TOKENS) -> torch.Tensor:
    return torch.tensor(random_prompts([tokens] * rows, seed=3))


def mask_of(places: list[Place], rows: int) -> torch.Tensor:
    mask = torch.zeros(rows, TOKENS, dtype=torch.int64)
    for row, start, end in places:
        mask[row, start:end] = 1
    return mask


def positions_of(places: list[Place], rows: int, first: int = 0) -> torch.Tensor:
    positions = torch.zeros(rows, TOKENS, dtype=torch.int64)
    for row, start, end in places:
        positions[row, start:end] = torch.arange(first, first + end - start)
    return positions


def starts_of(places: list[Place]) -> torch.Tensor:
    return torch.tensor([0, *(end for _, _, end in places)], dtype=torch.int32)


RIGHT: list[Place] = [(0, 0, 105), (1, 0, 181), (2, 0, 1), (3, 0, 64)]
LEFT: list[Place] = [(row, TOKENS - end, TOKENS) for row, _, end in RIGHT]
PACKED: list[Place] = [(0, 0, 105), (0, 105, 106), (0, 106, 181)]
ROWS: list[Place] = [(0, 0, 100), (0, 100, 181), (1, 0, 181)]
GAPS: list[Place] = [(0, 2, 99), (0, 104, 170), (1, 0, 100), (1, 100, 150)]

LAYOUTS: dict[str, tuple[list[Place], int, Callable[[], Inputs]]] = {
    "whole": ([(0, 0, 181), (1, 0, 181)], 2, dict),
    "all ones": ([(0, 0, 181)], 1, lambda: {"attention_mask": torch.ones(1, TOKENS)}),
    "right": (RIGHT, 4, lambda: {"attention_mask": mask_of(RIGHT, 4)}),
    "left": (LEFT, 4, lambda: {"attention_mask": mask_of(LEFT, 4), "position_ids": positions_of(LEFT, 4)}),
    "empty row": ([(1, 0, 181)], 2, lambda: {"attention_mask": mask_of([(1, 0, 181)], 2)}),
    "packed": (PACKED, 1, lambda: {"position_ids": positions_of(PACKED, 1), "use_cache": False}),
    "packed, with a cache": (PACKED, 1, lambda: {"position_ids": positions_of(PACKED, 1)}),
    "packed, first position 2": (PACKED, 1, lambda: {"position_ids": positions_of(PACKED, 1, first=2)}),
    "packed rows": (ROWS, 2, lambda: {"position_ids": positions_of(ROWS, 2)}),
    "packed, padded": (
        GAPS,
        2,
        lambda: {"attention_mask": mask_of(GAPS, 2), "position_ids": positions_of(GAPS, 2)},
    ),
    "cu_seq_lens": (
        PACKED,
        1,
        lambda: {
            "position_ids": positions_of(PACKED, 1),
            "cu_seq_lens_q": starts_of(PACKED),
            "cu_seq_lens_k": starts_of(PACKED),
            "max_length_q": 105,
            "max_length_k": 105,
            "use_cache": False,
        },
    ),
}
"""The places of sequences, the rows of the batch, and how a model is told."""


@pytest.mark.parametrize("layout", LAYOUTS)
def test_logits_and_gradients(model: LlamaForCausalLM, masked: MaskedModel, layout: str) -> None:
    places, rows, inputs = LAYOUTS[layout]
    _assert_same(model, masked, token_ids(rows), places, inputs())


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("layout", ["whole", "right", "packed"])
def test_patterns(pattern: str, layout: str) -> None:
    places, rows, inputs = LAYOUTS[layout]
    model = build(PATTERNS[pattern])
    _assert_same(model, MaskedModel(model, PATTERNS[pattern]), token_ids(rows), places, inputs())


@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str) -> None:
    model = build(family=family, num_hidden_layers=2)
    _assert_same(model, MaskedModel(model, S2), token_ids(4), *LAYOUTS["right"][::2])


@pytest.mark.parametrize("kv_heads", [1, 4])
def test_grouped_heads(kv_heads: int) -> None:
    model = build({**S2, "vert_stride": 3}, num_key_value_heads=kv_heads, num_hidden_layers=2)
    _assert_same(model, MaskedModel(model, model.config.s2_attention), token_ids(1), *LAYOUTS["packed"][::2])


def test_cu_seq_lens_alone_keep_sequences_apart(model: LlamaForCausalLM, masked: MaskedModel) -> None:
    """In dense layers too, whose positions then run on: rotary embeddings see differences only."""
    starts = starts_of(PACKED)
    with torch.no_grad():
        logits = model(token_ids(1), cu_seq_lens_q=starts, cu_seq_lens_k=starts).logits
        _assert_close(logits, masked.logits(token_ids(1), PACKED), 1e-3)


def test_model_with_names_of_its_own() -> None:
    """Packed sequences of a GPT-2, whose config names no KV heads, are what each of them is alone."""
    config = GPT2Config(vocab_size=256, n_embd=64, n_layer=2, n_head=2, n_positions=TOKENS, s2_attention=S2)
    model = AutoModelForCausalLM.from_config(config, attn_implementation="s2").eval()
    random_weights(model)
    ids = token_ids(1)
    with torch.no_grad():
        for use_cache in (True, False):
            packed = model(ids, position_ids=positions_of(PACKED, 1), use_cache=use_cache).logits
            for _, start, end in PACKED:
                _assert_close(packed[:, start:end], model(ids[:, start:end]).logits, 1e-3)


def test_padding_is_zeros_and_gets_no_gradient(model: LlamaForCausalLM) -> None:
    for layer in (0, 1):
        module = model.model.layers[layer].self_attn
        q, k, v = (torch.randn(2, heads, 40, 32, requires_grad=True) for heads in (4, 2, 2))
        mask = torch.ones(2, 40, dtype=torch.bool)
        mask[0, 25:] = mask[1, :7] = False
        out, weights = attention(module, q, k, v, mask)
        assert weights is None
        assert out.shape == (2, 40, 4, 32)
        out.backward(torch.randn_like(out))
        assert torch.equal((out == 0).all(-1).all(-1), ~mask)
        # A sequence's first query sees one key: its gradient is zero but for rounding.
        first = mask & (mask.cumsum(1) == 1)
        for gradient in (q.grad, k.grad, v.grad):
            zeros = (gradient == 0).all(-1).all(1)
            assert torch.equal(zeros[~first], ~mask[~first])


@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("queries", [1, 7, 40])
def test_scaling(model: LlamaForCausalLM, layer: int, queries: int) -> None:
    module = model.model.layers[layer].self_attn
    q, k, v = (
        torch.randn(2, heads, 40, 32)[:, :, -tokens:] for heads, tokens in ((4, queries), (2, 40), (2, 40))
    )
    _assert_close(
        attention(module, q, k, v, None, 0.5)[0], attention(module, 2 * q, k, v, None, 0.25)[0], 1e-5
    )
    by_default = attention(module, q, k, v, None)[0]
    _assert_close(attention(module, q, k, v, None, 32**-0.5)[0], by_default, 1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_cache_in_parts(model: LlamaForCausalLM, masked: MaskedModel, side: str) -> None:
    """A long prefill, a shorter one after it, and single tokens."""
    places = [(0, 0, TOKENS), (1, 37, TOKENS) if side == "left" else (1, 0, 170)]
    ids, mask, cache = token_ids(2), mask_of(places, 2), DynamicCache()
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    parts = []
    with torch.no_grad():
        for start, end in ((0, 100), (100, 178), (178, 179), (179, 180), (180, 181)):
            output = model(
                ids[:, start:end],
                attention_mask=mask[:, :end],
                position_ids=positions[:, start:end],
                past_key_values=cache,
            )
            parts.append(output.logits)
        _assert_close_in(places, torch.cat(parts, dim=1), masked.logits(ids, places))


@pytest.mark.parametrize("kind", [DynamicCache, StaticCache])
def test_parts_without_a_mask(model: LlamaForCausalLM, masked: MaskedModel, kind: type) -> None:
    ids = token_ids(2)
    cache = DynamicCache() if kind is DynamicCache else StaticCache(model.config, max_cache_len=200)
    with torch.no_grad():
        parts = [model(x, past_key_values=cache).logits for x in ids.split([90, 90, 1], dim=1)]
        _assert_close(torch.cat(parts, dim=1), masked.logits(ids, [(0, 0, TOKENS), (1, 0, TOKENS)]), 1e-3)


def test_positions_are_read_again_when_they_change(model: LlamaForCausalLM, masked: MaskedModel) -> None:
    """A loop may write each batch to the same tensors."""
    ids, positions = token_ids(1), torch.arange(TOKENS)[None].clone()
    for mode in (torch.no_grad, torch.inference_mode):
        with mode():
            kept = positions.clone()
            for places in ([(0, 0, TOKENS)], PACKED, ROWS[:2]):
                kept.copy_(positions_of(places, 1))
                logits = model(ids, position_ids=kept).logits
                _assert_close(logits, masked.logits(ids, places), 1e-3)


def test_sequences_are_read_once_for_all_layers(
    model: LlamaForCausalLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[object] = []
    original = s2_transformers._read_spans
    monkeypatch.setattr(s2_transformers, "_read_spans", lambda step: read.append(step) or original(step))
    _, rows, inputs = LAYOUTS["right"]
    model(token_ids(rows), **inputs())
    assert len(read) == 1


def test_key_is_read_again_when_it_changes() -> None:
    model = build()
    ids, places = token_ids(1), [(0, 0, TOKENS)]
    for change in ({}, {"local_blocks": 1}, {"dense_layers": [0, 2]}):
        model.config.s2_attention.update(change)
        with torch.no_grad():
            expected = MaskedModel(model, model.config.s2_attention).logits(ids, places)
            _assert_close(model(ids).logits, expected, 1e-3)


def test_compiled_by_torch() -> None:
    """With breaks in its graph, where a layer attends."""
    s2 = {**S2, "dense_layers": []}
    model = build(s2, num_hidden_layers=1)
    masked = MaskedModel(model, s2)
    model.model.compile(backend="eager")
    places, rows, inputs = LAYOUTS["right"]
    _assert_same(model, masked, token_ids(rows), places, inputs)


def test_registering_again_changes_nothing() -> None:
    before = dict(AttentionInterface._global_mapping), dict(AttentionMaskInterface._global_mapping)
    register()
    assert before == (AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping)
    assert AttentionInterface()["s2"] is attention
    assert AttentionMaskInterface()["s2"] is token_mask


def test_layer_patterns() -> None:
    patterns = layer_patterns(build(QUERY_HEADS).config)
    assert [pattern is None for pattern in patterns] == [True, False, True]
    assert patterns[1].residues == (3, 2, 1, 0)
    of_layers = {**S2, "dense_layers": [1], "layers": {"2": {"vert_stride": None, "sink_blocks": 1}}}
    patterns = layer_patterns(build(of_layers).config)
    assert [pattern and pattern.sink_blocks for pattern in patterns] == [0, None, 1]
    assert [pattern and pattern.num_virtual_heads for pattern in patterns] == [2, None, 0]


def test_rtpurbos_heads_are_read_again_when_they_change() -> None:
    model = build()
    model.config.s2_attention = None
    ids = token_ids(1, 300)
    outputs = []
    for flags in ([1, 0, 0, 0], [0, 0, 0, 0]):
        model.config.headwise_config = {"sink_token_num": 1, "swa_token_num": 1} | dict.fromkeys("012", flags)
        outputs.append(model(ids).logits[0])
    # One sink block and a window of two show the first three blocks everything.
    torch.testing.assert_close(outputs[0][:192], outputs[1][:192])
    assert (outputs[0][192:] != outputs[1][192:]).any(dim=1).all()
    assert [pattern.full_heads for pattern in layer_patterns(model.config)] == [()] * 3


BAD_CALLS: dict[str, tuple[Callable[[], Inputs], str]] = {
    "4-D mask": (
        lambda: {"attention_mask": torch.zeros(1, 1, TOKENS, TOKENS)},
        r"attention_mask: torch\.float32 \(1, 1, 181, 181\) in the layers, expected no mask or a 2-D one",
    ),
    "width": (
        lambda: {"attention_mask": torch.ones(1, TOKENS + 5)},
        r"attention_mask: shape \(1, 186\), expected \(1, 181\)",
    ),
    "hole": (
        lambda: {"attention_mask": mask_of([(0, 0, 9), (0, 12, 40)], 1)},
        r"attention_mask: row 0 leaves out tokens 9 to 11, expected padding at its ends only",
    ),
    "skipped positions": (
        lambda: {"position_ids": torch.arange(TOKENS)[None] + 5 * (torch.arange(TOKENS) > 20)},
        r"position_ids: 26 after 20 in row 0, expected 21 or a lower one, where a packed sequence starts",
    ),
    "skipped positions, without a cache": (
        lambda: {
            "position_ids": torch.arange(TOKENS)[None] + 5 * (torch.arange(TOKENS) > 20),
            "use_cache": False,
        },
        r"position_ids: 26 after 20 in row 0, expected 21 or a lower one, where a packed sequence starts",
    ),
    "packed after a cache": (
        lambda: {"position_ids": positions_of(PACKED, 1), "past_key_values": _filled_cache()},
        r"position_ids: 0 after 104 in row 0, expected 105$",
    ),
    "cu_seq_lens_k is missing": (
        lambda: {"cu_seq_lens_q": starts_of(PACKED)},
        r"cu_seq_lens_k: None, expected where each packed sequence starts",
    ),
    "cu_seq_lens_q is missing": (
        lambda: {"cu_seq_lens_k": starts_of(PACKED)},
        r"cu_seq_lens_q: None, expected where each packed sequence starts",
    ),
    "cu_seq_lens of other tokens": (
        lambda: {"cu_seq_lens_q": starts_of(PACKED), "cu_seq_lens_k": starts_of(PACKED[:2])},
        r"cu_seq_lens_k: \[0, 105, 106\], expected ascending values from 0 to 181",
    ),
    "cu_seq_lens and padding": (
        lambda: {
            "cu_seq_lens_q": starts_of(PACKED),
            "cu_seq_lens_k": starts_of(PACKED),
            "attention_mask": mask_of(RIGHT[:1], 1),
        },
        r"attention_mask: with padding beside cu_seq_lens_q, expected none",
    ),
    "output_attentions": (
        lambda: {"output_attentions": True},
        r"output_attentions: True, expected False",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_refused_calls(model: LlamaForCausalLM, case: str) -> None:
    inputs, message = BAD_CALLS[case]
    with torch.no_grad(), pytest.raises(ValueError, match=message):
        model(token_ids(1), **inputs())


def test_cu_seq_lens_are_of_one_row(model: LlamaForCausalLM) -> None:
    starts = starts_of(PACKED)
    with pytest.raises(ValueError, match="cu_seq_lens_q: with a batch of 2, expected packed sequences"):
        model(token_ids(2), cu_seq_lens_q=starts, cu_seq_lens_k=starts)


def test_dropout_is_refused_where_it_would_be_used() -> None:
    model = build(attention_dropout=0.1)
    with pytest.raises(ValueError, match=r"attention_dropout: 0\.1, expected 0"):
        model(token_ids(1))
    model.eval()(token_ids(1))


OTHER_ATTENTION = {
    "sliding window": ({"sliding_window": 64}, r"s2_attention: layer 0 has a sliding window, expected plain"),
    "softcap": ({"softcap": 30.0}, r"s2_attention: layer 0 has soft-capped logits, expected plain"),
    "sinks": ({"s_aux": torch.zeros(4)}, r"s2_attention: layer 0 has attention sinks, expected plain"),
    "bias": ({"position_bias": torch.zeros(4)}, r"s2_attention: layer 0 has position biases, expected plain"),
    "not causal": ({"is_causal": False}, r"s2_attention: layer 0 is not causal, expected plain"),
    "paged cache": ({"cache": object()}, r"cache: a paged one, expected none"),
    "positions of three axes": (
        {"position_ids": torch.zeros(3, 1, 20, dtype=torch.int64)},
        r"position_ids: shape \(3, 1, 20\), expected \[1 or 1, 20\]",
    ),
    "mask is too short": (
        {"attention_mask": torch.ones(1, 19, dtype=torch.bool)},
        r"attention_mask: 19 tokens for 20 queries and 20 keys",
    ),
    "hole, without positions": (
        {"attention_mask": torch.arange(20)[None] != 7},
        r"attention_mask: row 0 leaves out tokens 7 to 7, expected padding at its ends only",
    ),
    "mask of other rows": (
        {"attention_mask": torch.ones(2, 20, dtype=torch.bool)},
        r"attention_mask: torch\.bool \(2, 20\) in the layers",
    ),
    "scale": ({"scaling": -1.0}, r"scale: -1\.0, expected a positive number"),
}


@pytest.mark.parametrize("case", OTHER_ATTENTION)
def test_refused_layers(model: LlamaForCausalLM, case: str) -> None:
    options, message = OTHER_ATTENTION[case]
    q, k, v = (torch.zeros(1, heads, 20, 32) for heads in (4, 2, 2))
    with pytest.raises(ValueError, match=message):
        attention(model.model.layers[0].self_attn, q, k, v, **{"attention_mask": None, **options})


def test_layer_that_is_not_causal_is_refused() -> None:
    layer = SimpleNamespace(config=tiny_config("llama"), layer_idx=0, is_causal=False)
    q, k, v = (torch.zeros(1, heads, 20, 32) for heads in (4, 2, 2))
    with pytest.raises(S2ConfigError, match="layer 0 is not causal"):
        attention(layer, q, k, v, None)


def test_masks_of_a_models_own_are_refused(model: LlamaForCausalLM) -> None:
    arguments = {
        "config": model.config,
        "inputs_embeds": torch.zeros(1, 20, 128),
        "attention_mask": None,
        "past_key_values": None,
    }
    blocks = torch.full((1, 20), -1)
    blocks[0, 3:7] = 0
    message = "s2_attention: a mask of the model's own, expected plain causal attention"
    assert create_causal_mask(**arguments) is None
    assert create_causal_mask(**arguments, block_sequence_ids=torch.full((1, 20), -1)) is None
    with pytest.raises(S2ConfigError, match=message):
        create_causal_mask(**arguments, block_sequence_ids=blocks)
    with pytest.raises(S2ConfigError, match=message):
        create_causal_mask(**arguments, and_mask_function=lambda batch, head, q, k: k > 3)
    with pytest.raises(S2ConfigError, match=message):
        create_bidirectional_mask(**arguments)


def _filled_cache() -> DynamicCache:
    cache = DynamicCache()
    for layer in range(3):
        cache.update(torch.zeros(1, 2, 16, 32), torch.zeros(1, 2, 16, 32), layer)
    return cache


def _assert_same(
    model: LlamaForCausalLM, masked: MaskedModel, ids: torch.Tensor, places: list[Place], inputs: Any
) -> None:
    """Logits of the sequences, and the gradient of each parameter by their loss."""
    inputs = inputs() if callable(inputs) else inputs
    actual, expected = model(ids, **inputs).logits, masked.logits(ids, places)
    _assert_close_in(places, actual, expected)
    gradients = []
    for of_model, logits in ((model, actual), (masked.model, expected)):
        of_model.zero_grad()
        token_loss(logits, ids, places).backward()
        gradients.append([parameter.grad for parameter in of_model.parameters()])
    for gradient, wanted in zip(*gradients, strict=True):
        if wanted is None:
            assert gradient is None
        else:
            _assert_close(gradient, wanted, 1e-3)


def _assert_close_in(places: list[Place], actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.isfinite().all()
    for row, start, end in places:
        _assert_close(actual[row, start:end], expected[row, start:end], 1e-3)


def _assert_close(actual: torch.Tensor, expected: torch.Tensor, of_largest: float) -> None:
    """Equal to a fraction of the largest value."""
    bound = of_largest * float(expected.detach().abs().max())
    torch.testing.assert_close(actual, expected, atol=bound, rtol=0)
