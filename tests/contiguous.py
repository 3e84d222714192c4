"""Attention of one sequence over contiguous keys, with its block mask spelt out token by token."""

from __future__ import annotations

import torch


def expected_attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    blocks: torch.Tensor,
    block_size: int,
    scale: float,
    *,
    causal: bool = True,
) -> tuple[torch.Tensor, torch.Tensor]:
    """What attention with a block mask must give.

    Args:
        q: [queries, num_heads, head_size], the last tokens of the sequence. If not causal, of the rows from
            the first on, or of the last token's if it is one query and the mask is square.
        k, v: [keys, num_kv_heads, head_size].
        blocks: bool [heads, query blocks, key blocks], of as many heads as divide num_heads. If causal the
            query blocks are the last ones.
        block_size: tokens per block.
        scale: factor on the logits.
        causal: whether a token attends to no later one.

    Returns:
        [queries, num_heads, head_size] in q's dtype, and the log-sum-exp, float32 [num_heads, queries].
    """
    heads, keys, queries = q.shape[1], len(k), len(q)
    _, query_blocks, key_blocks = blocks.shape
    past = keys - queries
    first_row = past - (key_blocks - query_blocks) * block_size
    if not causal:
        first_row = keys - 1 if queries == 1 and query_blocks == key_blocks else 0
    tokens = blocks.to(q.device).repeat_interleave(heads // len(blocks), dim=0)
    tokens = tokens.repeat_interleave(block_size, dim=1).repeat_interleave(block_size, dim=2)
    mask = tokens[:, first_row : first_row + queries, :keys].clone()
    if causal:
        for row in range(queries):
            mask[:, row, past + row + 1 :] = False
    every_k, every_v = (x.float().repeat_interleave(heads // k.shape[1], dim=1) for x in (k, v))
    logits = torch.einsum("qhd,khd->hqk", q.float() * scale, every_k).where(mask, -torch.inf)
    out = torch.zeros_like(q)
    for head in range(heads):
        for row in range(queries):
            attended = mask[head, row].nonzero().flatten()
            if len(attended):
                weights = logits[head, row, attended].softmax(dim=0)
                out[row, head] = (weights @ every_v[attended, head]).to(q.dtype)
    return out, logits.logsumexp(dim=2)


def random_causal_mask(heads: int, num_blocks: int, density: float, seed: int = 0) -> torch.Tensor:
    """bool [heads, num_blocks, num_blocks]: causal, and as a rule not KV-efficient nor without empty rows."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(heads, num_blocks, num_blocks, generator=generator) < density).tril()
