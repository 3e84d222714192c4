"""Where the sequences of a call are in its tensors: batches, packed (varlen) and padded inputs alike."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from s2_kernels.masks import BlockMask
from s2_kernels.pattern import S2Pattern


class Span(NamedTuple):
    """One sequence. In causal attention its queries are the last of its tokens, the keys before them a past.

    Attributes:
        batch: index in the first dimension of q, k and v.
        query_start, num_queries: where its queries are in q's second dimension.
        key_start, num_keys: where its keys are in k's and v's second dimension.
    """

    batch: int
    query_start: int
    num_queries: int
    key_start: int
    num_keys: int


def is_causal(pattern: S2Pattern | BlockMask) -> bool:
    """Whether a token attends to no later one."""
    return isinstance(pattern, S2Pattern) or pattern.is_causal


def first_position(span: Span, mask: BlockMask) -> int:
    """The position of a sequence's first query: what decides its row of the mask.

    In causal attention the queries are the last tokens. Otherwise they start with the mask's first row; but a
    single query is the last token if the mask has as many query blocks as key blocks.
    """
    if mask.is_causal:
        return span.num_keys - span.num_queries
    is_last = span.num_queries == 1 and mask.num_query_blocks == mask.num_blocks
    return max(0, span.num_keys - 1) if is_last else 0


def batch_spans(batch: int, num_queries: int, num_keys: int, *, causal: bool = True) -> tuple[Span, ...]:
    """The spans of [batch, tokens, ...] tensors whose sequences all have the same length."""
    if causal and num_queries > num_keys:
        raise ValueError(f"q: {num_queries} queries, expected at most as many as keys ({num_keys})")
    return tuple(Span(n, 0, num_queries, 0, num_keys) for n in range(batch))


def packed_spans(
    cu_seqlens_q: torch.Tensor,
    cu_seqlens_k: torch.Tensor,
    num_queries: int,
    num_keys: int,
    *,
    causal: bool = True,
) -> tuple[Span, ...]:
    """The spans of sequences packed one after the other, in [1, tokens, ...] tensors.

    Args:
        cu_seqlens_q, cu_seqlens_k: [sequences + 1], where each starts, and the total. They are needed on the
            host: on a GPU, reading them waits for it.
        num_queries, num_keys: tokens of q, and of k and v.
        causal: whether a sequence's queries are its last tokens, and so no more than its keys.

    Raises:
        ValueError: they do not fit together or the tensors; the message names the value.
    """
    q_starts, k_starts = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    for name, starts, total in (
        ("cu_seqlens_q", q_starts, num_queries),
        ("cu_seqlens_k", k_starts, num_keys),
    ):
        if not starts or starts[0] != 0 or starts[-1] != total or starts != sorted(starts):
            raise ValueError(f"{name}: {starts}, expected ascending values from 0 to {total}")
    if len(q_starts) != len(k_starts):
        raise ValueError(f"cu_seqlens_k: {len(k_starts)} values, expected {len(q_starts)} as in cu_seqlens_q")
    spans = tuple(
        Span(0, q_starts[n], q_starts[n + 1] - q_starts[n], k_starts[n], k_starts[n + 1] - k_starts[n])
        for n in range(len(q_starts) - 1)
    )
    for n, span in enumerate(spans):
        if causal and span.num_queries > span.num_keys:
            raise ValueError(
                f"cu_seqlens_q: sequence {n} has {span.num_queries} queries, expected at most as many as "
                f"keys ({span.num_keys})"
            )
    return spans


def padded_spans(
    left_paddings: torch.Tensor | None,
    seqlens: torch.Tensor | None,
    batch: int,
    num_queries: int,
    num_keys: int,
) -> tuple[Span, ...]:
    """The spans of sequences with padding around them, one in each entry of [batch, tokens, ...] tensors.

    Args:
        left_paddings: [batch], tokens before each sequence; None for none.
        seqlens: [batch], tokens of each sequence; None for all after the left padding.
        batch: sequences.
        num_queries: tokens of q: one, the sequence's last, or as many as of k.
        num_keys: tokens of k and v.

    Raises:
        ValueError: they do not fit together or the tensors; the message names the value.
    """
    for name, values in (("left_paddings", left_paddings), ("seqlens", seqlens)):
        if values is not None and values.shape != (batch,):
            raise ValueError(f"{name}: shape {tuple(values.shape)}, expected [{batch}]")
    if num_queries not in (1, num_keys):
        raise ValueError(f"q: {num_queries} queries, expected 1 or {num_keys}, as k has, with padding")
    lefts = [0] * batch if left_paddings is None else left_paddings.tolist()
    lengths = [num_keys - left for left in lefts] if seqlens is None else seqlens.tolist()
    spans = []
    for n, (left, length) in enumerate(zip(lefts, lengths, strict=True)):
        if left < 0 or length < 0 or left + length > num_keys:
            raise ValueError(
                f"seqlens: sequence {n} has {left} tokens of left padding and {length} of its own, expected "
                f"at most {num_keys} together"
            )
        if num_queries == num_keys:
            spans.append(Span(n, left, length, left, length))
        else:
            spans.append(Span(n, 0, min(1, length), left, length))
    return tuple(spans)


def covers(lengths: Sequence[int], tensor: torch.Tensor) -> bool:
    """Whether sequences without common tokens have all tokens of `tensor` [batch, tokens, ...]."""
    return sum(lengths) == tensor.shape[0] * tensor.shape[1]


def longest(spans: tuple[Span, ...]) -> int:
    """Tokens of the longest sequence, 0 without any."""
    return max((span.num_keys for span in spans), default=0)
