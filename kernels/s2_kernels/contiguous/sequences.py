"""Where the sequences of a call are in its tensors: batches, packed (varlen) and padded inputs alike."""

from __future__ import annotations

from typing import NamedTuple

import torch

from s2_kernels.masks import BlockMask


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


def longest(spans: tuple[Span, ...]) -> int:
    """Tokens of the longest sequence, 0 without any."""
    return max((span.num_keys for span in spans), default=0)
