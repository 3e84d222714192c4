"""S2-Attention for Hugging Face transformers: importing this module registers the attention "s2".

`attn_implementation="s2"` makes a causal language model attend as the `s2_attention` key of its config says:
sparse layers by `s2_kernels.attention`, which is differentiable, dense layers by PyTorch's own attention. A
model takes it whose layers ask transformers for plain causal attention (Llama, Qwen, Mistral, Mixtral ...).

Where the sequences are in a batch is read on the host, once for all layers of a step: from the attention
mask, from positions that start over, or from `cu_seq_lens_q` and `cu_seq_lens_k`.
"""

from __future__ import annotations

from collections.abc import Callable
from copy import deepcopy
from itertools import pairwise
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch.nn.functional import pad, scaled_dot_product_attention
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.masking_utils import causal_mask_function

from s2_kernels.attention import attend
from s2_kernels.config import HEADWISE_KEY, KEY, S2ConfigError, find_config
from s2_kernels.contiguous.sequences import Span, packed_spans
from s2_kernels.pattern import S2Pattern

IMPLEMENTATION = "s2"
"""The name of this attention in transformers: a model's `attn_implementation`."""

_NOT_PLAIN = {
    "sliding_window": "a sliding window",
    "softcap": "soft-capped logits",
    "s_aux": "attention sinks",
    "position_bias": "position biases",
}
"""Arguments with which transformers' models ask for what S2-Attention is not."""

_EXPECTED = "expected plain causal attention"


def layer_patterns(config: Any) -> tuple[S2Pattern | None, ...]:
    """The pattern of each layer of a model, None for its dense ones.

    Args:
        config: of transformers, with the key `s2_attention` or one that stands for it.

    Raises:
        S2ConfigError: the key is missing or wrong, or there is no such pattern for the model's heads.
    """
    num_layers = config.num_hidden_layers
    found = find_config(vars(config), num_layers)
    if found is None:
        raise S2ConfigError(f"{KEY}: missing in the config, expected the pattern that it was trained with")
    num_heads = config.num_attention_heads
    num_kv_heads = getattr(config, "num_key_value_heads", None) or num_heads
    patterns = found.layer_patterns(num_heads, num_kv_heads, num_layers)
    return tuple(map(patterns.get, range(num_layers)))


@torch.compiler.disable  # it reads on the host where the sequences are
def attention(
    module: Any,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    **options: Any,
) -> tuple[torch.Tensor, None]:
    """S2-Attention as transformers calls it, for a layer of a model whose config has a pattern.

    Args:
        module: the layer, with `config` and `layer_idx`.
        query: [batch, num_heads, queries, head_size], the last tokens of the keys.
        key, value: [batch, num_kv_heads, keys, head_size].
        attention_mask: what `token_mask` returns: bool [batch, tokens], padding on either side of a sequence
            is False; None for no padding.
        scaling: factor on the logits; None for head_size ** -0.5.
        options: other arguments of transformers' attentions. `position_ids` that start over, int64
            [1 or batch, queries], or `cu_seq_lens_q` and `cu_seq_lens_k`, int [sequences + 1], tell of packed
            sequences.

    Returns:
        [batch, queries, num_heads, head_size], zeros for padding; and None for the weights.

    Raises:
        S2ConfigError: the config has no pattern or a wrong one, or the layer asks for what S2-Attention is
            not.
        ValueError: an argument that is not supported, or sequences that do not fit the tensors.
    """
    _refuse_other_attention(module, options)
    pattern = _pattern(module)
    num_tokens = _check_mask(attention_mask, query.shape[0], query.shape[2], key.shape[2])
    key, value = key[:, :, :num_tokens], value[:, :, :num_tokens]  # a static cache has room for more
    spans = _spans(
        _Step(
            attention_mask,
            options.get("position_ids"),
            options.get("cu_seq_lens_q"),
            options.get("cu_seq_lens_k"),
            query.shape[0],
            query.shape[2],
            num_tokens,
        )
    )
    if pattern is None:
        return _dense(query, key, value, spans, scaling).transpose(1, 2).contiguous(), None
    q, k, v = (x.transpose(1, 2) for x in (query, key, value))
    out, _ = attend(q, k, v, pattern, spans, scale=scaling)
    return out, None


@torch.compiler.disable  # it looks at the mask's values
def token_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | torch.Tensor = 0,
    mask_function: Callable[..., torch.Tensor] = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    use_vmap: bool = False,
    device: torch.device | str = "cpu",
    **options: Any,
) -> torch.Tensor | None:
    """What transformers passes to the layers as their mask: which tokens are of a sequence.

    Args:
        batch_size, q_length, kv_length: of the call; a static cache has more keys than tokens so far.
        q_offset: tokens before the queries.
        mask_function: of (batch, head, query, key), whether they attend: causal, within packed sequences.
        attention_mask: bool [batch, tokens], False for padding.
        local_size: of a sliding window or a chunk.
        use_vmap: whether a model has added to the mask function what is its own.
        device: where the result is made.
        options: other arguments of transformers' mask functions.

    Returns:
        bool [batch, tokens], or None when all keys are tokens.

    Raises:
        S2ConfigError: the model asks for what S2-Attention is not.
        ValueError: the mask is not for these tokens.
    """
    num_tokens = int(q_offset) + q_length
    if local_size is not None:
        raise S2ConfigError(f"{KEY}: a sliding window or chunks of {local_size} tokens, {_EXPECTED}")
    if use_vmap or _sees_later_tokens(mask_function, batch_size, q_length, int(q_offset), device):
        raise S2ConfigError(f"{KEY}: a mask of the model's own, {_EXPECTED}")
    if attention_mask is None:
        has_room = kv_length > num_tokens
        return torch.ones(batch_size, num_tokens, dtype=torch.bool, device=device) if has_room else None
    if attention_mask.shape != (batch_size, num_tokens):
        raise ValueError(
            f"attention_mask: shape {tuple(attention_mask.shape)}, expected ({batch_size}, {num_tokens}): "
            "[batch, tokens], those in the cache included"
        )
    return None if kv_length == num_tokens and bool(attention_mask.all()) else attention_mask


def register() -> None:
    """Make transformers know the attention; importing this module does so."""
    AttentionInterface.register(IMPLEMENTATION, attention)
    AttentionMaskInterface.register(IMPLEMENTATION, token_mask)


_PATTERNS: WeakKeyDictionary[Any, tuple[object, S2Pattern | None]] = WeakKeyDictionary()
"""By layer: the values of the config's keys when they were read, and the layer's pattern."""


def _pattern(module: Any) -> S2Pattern | None:
    """The pattern of a layer, None for a dense one."""
    raw = tuple(getattr(module.config, key, None) for key in (KEY, HEADWISE_KEY))
    kept = _PATTERNS.get(module)
    if kept is None or kept[0] != raw:
        kept = deepcopy(raw), layer_patterns(module.config)[module.layer_idx]
        _PATTERNS[module] = kept
    return kept[1]


def _refuse_other_attention(module: Any, options: dict[str, Any]) -> None:
    for name, what in _NOT_PLAIN.items():
        if options.get(name) is not None:
            raise S2ConfigError(f"{KEY}: layer {module.layer_idx} has {what}, {_EXPECTED}")
    is_causal = options.get("is_causal")
    if not (getattr(module, "is_causal", True) if is_causal is None else is_causal):
        raise S2ConfigError(f"{KEY}: layer {module.layer_idx} is not causal, {_EXPECTED}")
    if dropout := options.get("dropout"):
        raise ValueError(f"attention_dropout: {dropout}, expected 0: S2-Attention drops no weights")
    if options.get("output_attentions"):
        raise ValueError("output_attentions: True, expected False: S2-Attention has no weights to return")
    if options.get("cache") is not None:
        raise ValueError("cache: a paged one, expected none: for continuous batching serve the model")


def _check_mask(mask: torch.Tensor | None, batch: int, num_queries: int, num_keys: int) -> int:
    """The number of tokens so far, of which the queries are the last.

    Raises:
        ValueError: it is no mask of tokens.
    """
    if mask is None:
        num_tokens = num_keys
    elif mask.dtype == torch.bool and mask.dim() == 2 and mask.shape[0] == batch:
        num_tokens = mask.shape[1]
    else:
        raise ValueError(
            f"attention_mask: {mask.dtype} {tuple(mask.shape)} in the layers, expected no mask or a 2-D one "
            "of tokens"
        )
    if not num_queries <= num_tokens <= num_keys:
        raise ValueError(
            f"attention_mask: {num_tokens} tokens for {num_queries} queries and {num_keys} keys, expected as "
            "many as keys"
        )
    return num_tokens


def _sees_later_tokens(
    mask_function: Callable[..., torch.Tensor],
    batch: int,
    num_queries: int,
    offset: int,
    device: torch.device | str,
) -> bool:
    if mask_function is causal_mask_function:
        return False
    queries = torch.arange(offset, offset + num_queries - 1, device=device)
    rows = torch.arange(batch, device=device)[:, None]
    return bool(mask_function(rows, 0, queries[None], queries[None] + 1).any())


class _Step(NamedTuple):
    """All that says where the sequences of a call are; the layers of a step have the same."""

    mask: torch.Tensor | None
    position_ids: torch.Tensor | None
    cu_seq_lens_q: torch.Tensor | None
    cu_seq_lens_k: torch.Tensor | None
    batch: int
    num_queries: int
    num_keys: int

    @property
    def tensors(self) -> tuple[torch.Tensor, ...]:
        return tuple(x for x in self if isinstance(x, torch.Tensor))

    def is_same(self, other: _Step) -> bool:
        return all(
            a is b if isinstance(a, torch.Tensor) else a == b for a, b in zip(self, other, strict=True)
        )


_last_read: tuple[_Step, list[int], tuple[Span, ...] | None] | None = None
"""The step that was read last, the versions of its tensors, and its sequences."""


def _spans(step: _Step) -> tuple[Span, ...] | None:
    """The sequences of a step, None for one in each entry of the batch; read once for all its layers."""
    global _last_read
    if any(x.is_inference() for x in step.tensors):  # nothing tells whether such a tensor has changed
        return _read_spans(step)
    versions, last = [x._version for x in step.tensors], _last_read
    if last is None or not last[0].is_same(step) or last[1] != versions:
        last = _last_read = step, versions, _read_spans(step)
    return last[2]


def _read_spans(step: _Step) -> tuple[Span, ...] | None:
    if step.cu_seq_lens_q is not None or step.cu_seq_lens_k is not None:
        return _read_packed(step)
    if step.mask is None and (step.position_ids is None or step.num_queries == 1):
        return None
    mask, position_ids = _on_host(step)
    runs, past = _runs(mask, position_ids), step.num_keys - step.num_queries
    for before, run in pairwise(runs):
        if before.row == run.row:
            _check_start_over(before, run, position_ids, past)
    is_whole = runs == [_Run(row, 0, step.num_keys) for row in range(step.batch)]
    return None if is_whole else tuple(run.span(past) for run in runs)


def _read_packed(step: _Step) -> tuple[Span, ...]:
    """The sequences that `cu_seq_lens_q` and `cu_seq_lens_k` tell of."""
    starts_q, starts_k = step.cu_seq_lens_q, step.cu_seq_lens_k
    if starts_q is None or starts_k is None:
        missing = "cu_seq_lens_q" if starts_q is None else "cu_seq_lens_k"
        raise ValueError(f"{missing}: None, expected where each packed sequence starts, as the other says")
    if step.batch != 1:
        raise ValueError(f"cu_seq_lens_q: with a batch of {step.batch}, expected packed sequences in one row")
    if step.mask is not None:
        raise ValueError("attention_mask: with padding beside cu_seq_lens_q, expected none")
    try:
        return packed_spans(starts_q, starts_k, step.num_queries, step.num_keys)
    except ValueError as error:
        raise ValueError(str(error).replace("cu_seqlens", "cu_seq_lens")) from error


class _Run(NamedTuple):
    """Tokens of one sequence, one after the other in the keys of a batch's row."""

    row: int
    start: int
    end: int

    def span(self, past: int) -> Span:
        """Its keys, and those of its tokens that are queries: which begin after `past` tokens."""
        first = max(self.start, past)
        num_queries = max(0, self.end - first)
        return Span(self.row, first - past, num_queries, self.start, self.end - self.start)


def _on_host(step: _Step) -> tuple[torch.Tensor, torch.Tensor | None]:
    """The mask, bool [batch, keys], and the position of each query, int64 [batch, queries], on the CPU."""
    shape = step.batch, step.num_keys
    mask = torch.ones(shape, dtype=torch.bool, device="cpu") if step.mask is None else step.mask.cpu()
    given = step.position_ids
    if given is None:
        return mask, None
    if given.dim() != 2 or given.shape[0] not in (1, step.batch) or given.shape[1] != step.num_queries:
        raise ValueError(
            f"position_ids: shape {tuple(given.shape)}, expected [1 or {step.batch}, {step.num_queries}]"
        )
    return mask, given.cpu().expand(step.batch, -1)


def _runs(mask: torch.Tensor, position_ids: torch.Tensor | None) -> list[_Run]:
    """The tokens that are not padding, cut where positions do not go on; in the order of the batch."""
    goes_on = mask[:, 1:] & mask[:, :-1]
    if position_ids is not None:
        goes_on[:, mask.shape[1] - position_ids.shape[1] :] &= position_ids.diff() == 1
    starts = (mask & ~pad(goes_on, (1, 0))).nonzero().tolist()
    ends = (mask & ~pad(goes_on, (0, 1))).nonzero().tolist()
    return [_Run(row, start, end + 1) for (row, start), (_, end) in zip(starts, ends, strict=True)]


def _check_start_over(before: _Run, run: _Run, position_ids: torch.Tensor | None, past: int) -> None:
    """Raise ValueError unless `run` is a packed sequence after `before` in its row, and nothing is cached."""
    last, first = -1, 0  # it is none, as far as is known
    if position_ids is not None and before.end > past:
        last, first = position_ids[run.row, [before.end - 1 - past, run.start - past]].tolist()
    if not past and first <= last:
        return
    if run.start > before.end:
        raise ValueError(
            f"attention_mask: row {run.row} leaves out tokens {before.end} to {run.start - 1}, expected "
            "padding at its ends only"
        )
    other = "" if past else " or a lower one, where a packed sequence starts"
    raise ValueError(f"position_ids: {first} after {last} in row {run.row}, expected {last + 1}{other}")


def _dense(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    spans: tuple[Span, ...] | None,
    scale: float | None,
) -> torch.Tensor:
    """Dense causal attention of the sequences at `spans`, by PyTorch; zeros elsewhere.

    Args:
        q: [batch, num_heads, queries, head_size].
        k, v: [batch, num_kv_heads, keys, head_size].
        spans: in the order of their tokens; None for one in each entry of the batch.
        scale: factor on the logits; None for head_size ** -0.5.

    Returns:
        As q.
    """
    if spans is None:
        return _causal(q, k, v, scale)
    rows = []
    for row, (q_row, k_row, v_row) in enumerate(zip(q.split(1), k.split(1), v.split(1), strict=True)):
        of_row = [span for span in spans if span.batch == row]
        keys = [(span.key_start, span.num_keys) for span in of_row]
        parts = _parts(q_row, [(span.query_start, span.num_queries) for span in of_row])
        pieces = [torch.zeros_like(x) for x in parts]
        of_sequences = zip(parts[1::2], _parts(k_row, keys)[1::2], _parts(v_row, keys)[1::2], strict=True)
        pieces[1::2] = [_causal(*of_sequence, scale) for of_sequence in of_sequences]
        rows.append(torch.cat(pieces, dim=2))
    return torch.cat(rows)


def _parts(x: torch.Tensor, places: list[tuple[int, int]]) -> tuple[torch.Tensor, ...]:
    """What is at each (start, length) of dimension 2, and between them: every second part is at a place."""
    sizes, end = [], 0
    for start, length in places:
        sizes += [start - end, length]
        end = start + length
    return x.split([*sizes, x.shape[2] - end], dim=2)


def _causal(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float | None) -> torch.Tensor:
    """PyTorch's attention of one sequence's last tokens, [batch, heads, tokens, head_size]."""
    num_queries, num_keys = q.shape[2], k.shape[2]
    mask = None
    if 1 < num_queries < num_keys:
        mask = torch.ones(num_queries, num_keys, dtype=torch.bool, device=q.device).tril(
            num_keys - num_queries
        )
    is_causal = mask is None and num_queries > 1
    return scaled_dot_product_attention(
        q, k, v, attn_mask=mask, is_causal=is_causal, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )


register()
