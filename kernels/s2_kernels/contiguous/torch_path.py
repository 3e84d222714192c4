"""Block-sparse attention over contiguous keys and values in PyTorch: a right answer, not a fast one."""

from __future__ import annotations

import torch

from s2_kernels.contiguous.sequences import Span, first_position
from s2_kernels.masks import BlockMask
from s2_kernels.weighted_sum import weighted_sum

_QUERIES_AT_A_TIME = 256
"""Bounds the logits held in memory."""


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

    Every logit is computed, and the mask spelt out token by token.
    """
    group, mask_group = q.shape[2] // k.shape[2], q.shape[2] // mask.num_heads
    for span in spans:
        of_sequence = slice(span.key_start, span.key_start + span.num_keys)
        keys, values = (x[span.batch, of_sequence].float().repeat_interleave(group, dim=1) for x in (k, v))
        first = first_position(span, mask)
        for start in range(0, span.num_queries, _QUERIES_AT_A_TIME):
            count = min(_QUERIES_AT_A_TIME, span.num_queries - start)
            rows = slice(span.query_start + start, span.query_start + start + count)
            visible = mask.token_mask(first + start, count, span.num_keys).to(q.device)
            visible = visible.repeat_interleave(mask_group, dim=0)
            logits = torch.einsum("qhd,khd->hqk", q[span.batch, rows].float() * scale, keys)
            logits = logits.masked_fill(~visible, float("-inf"))
            row_lse = logits.logsumexp(dim=2)
            # A row without keys: exp(-inf - 0) is the zero it is to get.
            weights = (logits - row_lse.masked_fill(row_lse == float("-inf"), 0.0)[..., None]).exp()
            result = weighted_sum(weights, visible, values.transpose(0, 1))
            out[span.batch, rows] = result.transpose(0, 1).to(q.dtype)
            if lse is not None:
                lse[span.batch, :, rows] = row_lse
