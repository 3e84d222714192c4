"""Block-sparse attention over contiguous keys and values in PyTorch: a right answer, not a fast one.

Every logit is computed, and the mask spelt out token by token, for some queries at a time. The arithmetic is
in float32, of float64 inputs in float64.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

from s2_kernels.contiguous.sequences import Span, first_position
from s2_kernels.masks import BlockMask
from s2_kernels.weighted_sum import weighted_sum

_QUERIES_AT_A_TIME = 256
"""Bounds the logits held in memory."""


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """What is summed in, and what a log-sum-exp has, for inputs of a dtype."""
    return torch.promote_types(dtype, torch.float32)


def block_sparse_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    """As `s2_kernels.contiguous.block_sparse.block_sparse_fwd`, on any device.

    float64 is taken as well; its log-sum-exp is float64.
    """
    wide, group = wide_dtype(q.dtype), q.shape[2] // k.shape[2]
    for span in spans:
        of_sequence = slice(span.key_start, span.key_start + span.num_keys)
        keys, values = (x[span.batch, of_sequence].to(wide).repeat_interleave(group, dim=1) for x in (k, v))
        for rows, visible in _query_chunks(span, mask, q.shape[2], q.device):
            logits = torch.einsum("qhd,khd->hqk", q[span.batch, rows].to(wide) * scale, keys)
            logits = logits.masked_fill(~visible, float("-inf"))
            row_lse = logits.logsumexp(dim=2)
            weights = _weights(logits, row_lse)
            result = weighted_sum(weights, visible, values.transpose(0, 1))
            out[span.batch, rows] = result.transpose(0, 1).to(q.dtype)
            if lse is not None:
                lse[span.batch, :, rows] = row_lse


def block_sparse_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """As `s2_kernels.contiguous.block_sparse_bwd.block_sparse_bwd`, on any device.

    float64 is taken as well.
    """
    wide, kv_heads = wide_dtype(q.dtype), k.shape[2]
    for span in spans:
        of_sequence = slice(span.key_start, span.key_start + span.num_keys)
        keys, values = (x[span.batch, of_sequence].to(wide).transpose(0, 1) for x in (k, v))
        d_keys, d_values = torch.zeros_like(keys), torch.zeros_like(values)
        for rows, visible in _query_chunks(span, mask, q.shape[2], q.device):
            visible = visible.unflatten(0, (kv_heads, -1)).flatten(1, 2)
            queries, d_rows = (_by_kv_head(x[span.batch, rows].to(wide), kv_heads) for x in (q, d_out))
            delta = (out[span.batch, rows].to(wide) * d_out[span.batch, rows].to(wide)).sum(dim=2).T
            if d_lse is not None:
                delta = delta - d_lse[span.batch, :, rows].to(wide)
            row_lse, delta = (x.reshape(kv_heads, -1) for x in (lse[span.batch, :, rows].to(wide), delta))
            logits = (queries * scale) @ keys.transpose(1, 2)
            # A row may be NaN: its weights then are, but only those of the keys that it attends to.
            weights = _weights(logits, row_lse).masked_fill(~visible, 0.0)
            d_values += weighted_sum(weights.mT, visible.mT, d_rows)
            d_logits = scale * weights * (d_rows @ values.mT - delta[..., None])
            d_logits = d_logits.masked_fill(~visible, 0.0)  # values may be NaN as well
            d_keys += weighted_sum(d_logits.mT, visible.mT, queries)
            d_queries = weighted_sum(d_logits, visible, keys)
            of_heads = d_queries.unflatten(1, (-1, rows.stop - rows.start)).flatten(0, 1)
            dq[span.batch, rows] = of_heads.transpose(0, 1).to(dq.dtype)
        dk[span.batch, of_sequence] = d_keys.transpose(0, 1).to(dk.dtype)
        dv[span.batch, of_sequence] = d_values.transpose(0, 1).to(dv.dtype)


def _query_chunks(
    span: Span, mask: BlockMask, num_heads: int, device: torch.device
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Yield rows of q, and what they attend to: bool [num_heads, rows, keys of the sequence]."""
    first = first_position(span, mask)
    for start in range(0, span.num_queries, _QUERIES_AT_A_TIME):
        count = min(_QUERIES_AT_A_TIME, span.num_queries - start)
        visible = mask.token_mask(first + start, count, span.num_keys).to(device)
        rows = slice(span.query_start + start, span.query_start + start + count)
        yield rows, visible.repeat_interleave(num_heads // mask.num_heads, dim=0)


def _weights(logits: torch.Tensor, lse: torch.Tensor) -> torch.Tensor:
    """Attention weights [heads, rows, keys]; zeros for a row without keys, whose log-sum-exp is -inf."""
    return (logits - lse.masked_fill(lse == float("-inf"), 0.0)[..., None]).exp()


def _by_kv_head(x: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """[kv_heads, query heads of one * rows, head_size] of [rows, query heads, head_size]."""
    return x.transpose(0, 1).unflatten(0, (kv_heads, -1)).flatten(1, 2)
