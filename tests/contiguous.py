"""Attention of one sequence over contiguous keys, with its block mask spelt out token by token."""

from __future__ import annotations

import torch

from s2_kernels.reference import masked_attention


def expected_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, blocks: torch.Tensor, block_size: int, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention with a block mask must give.

    Args:
        q: [queries, num_heads, head_size], the last tokens of the sequence.
        k, v: [keys, num_kv_heads, head_size].
        blocks: bool [heads, blocks, blocks], of as many heads as divide num_heads.
        block_size: tokens per block.
        scale: factor on the logits.

    Returns:
        [queries, num_heads, head_size] in q's dtype, and the log-sum-exp, float32 [num_heads, queries].
    """
    heads, keys = q.shape[1], len(k)
    past = keys - len(q)
    tokens = blocks.to(q.device).repeat_interleave(heads // len(blocks), dim=0)
    tokens = tokens.repeat_interleave(block_size, dim=1).repeat_interleave(block_size, dim=2)
    mask = tokens[:, past:keys, :keys].clone()
    for row in range(len(q)):
        mask[:, row, past + row + 1 :] = False
    out = masked_attention(q, k, v, mask, scale)
    out[~mask.any(dim=2).T] = 0
    every_k = k.float().repeat_interleave(heads // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q.float() * scale, every_k)
    return out, logits.where(mask, -torch.inf).logsumexp(dim=2)


def random_causal_mask(heads: int, num_blocks: int, density: float, seed: int = 0) -> torch.Tensor:
    """bool [heads, num_blocks, num_blocks]: causal, and as a rule not KV-efficient nor without empty rows."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(heads, num_blocks, num_blocks, generator=generator) < density).tril()
