"""Block-sparse attention over contiguous keys and values in PyTorch: a right answer, not a fast one."""

from __future__ import annotations

import torch

from s2_kernels.contiguous.sequences import Span
from s2_kernels.masks import BlockMask

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
        blocks = mask.to_dense(-(-span.num_keys // mask.block_size)).repeat_interleave(mask_group, dim=0)
        key_positions = torch.arange(span.num_keys, device=q.device)
        rows_of_span = torch.arange(span.query_start, span.query_start + span.num_queries, device=q.device)
        for rows, positions in zip(
            rows_of_span.split(_QUERIES_AT_A_TIME),
            key_positions[span.num_keys - span.num_queries :].split(_QUERIES_AT_A_TIME),
            strict=True,
        ):
            visible = blocks[:, positions[:, None] // mask.block_size, key_positions // mask.block_size]
            visible = visible & (key_positions <= positions[:, None])
            logits = torch.einsum("qhd,khd->hqk", q[span.batch, rows].float() * scale, keys)
            logits = logits.masked_fill(~visible, float("-inf"))
            row_lse = logits.logsumexp(dim=2)
            # A row without keys: exp(-inf - 0) is the zero it is to get.
            weights = (logits - row_lse.nan_to_num(neginf=0.0)[..., None]).exp()
            out[span.batch, rows] = torch.einsum("hqk,khd->qhd", weights, values).to(q.dtype)
            if lse is not None:
                lse[span.batch, :, rows] = row_lse
