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
    heads, queries = q.shape[1], len(q)
    mask = spelt_out(blocks, block_size, heads, queries, len(k), causal=causal).to(q.device)
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


def spelt_out(
    blocks: torch.Tensor, block_size: int, heads: int, queries: int, keys: int, *, causal: bool = True
) -> torch.Tensor:
    """bool [heads, queries, keys]: `blocks` token by token, of a sequence as in `expected_attention`."""
    _, query_blocks, key_blocks = blocks.shape
    past = keys - queries
    first_row = past - (key_blocks - query_blocks) * block_size
    if not causal:
        first_row = keys - 1 if queries == 1 and query_blocks == key_blocks else 0
    tokens = blocks.repeat_interleave(heads // len(blocks), dim=0)
    tokens = tokens.repeat_interleave(block_size, dim=1).repeat_interleave(block_size, dim=2)
    mask = tokens[:, first_row : first_row + queries, :keys].clone()
    if causal:
        for row in range(queries):
            mask[:, row, past + row + 1 :] = False
    return mask


def expected_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
) -> tuple[torch.Tensor, torch.Tensor, tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """What attention and its gradients are, by autograd of softmax(scale * q k^T) v in float64.

    Args:
        q, d_out: [queries, num_heads, head_size].
        k, v: [keys, num_kv_heads, head_size].
        mask: bool [num_heads, queries, keys].
        scale: factor on the logits.
        d_lse: [num_heads, queries]; None for zeros.

    Returns:
        The output, its log-sum-exp [num_heads, queries] and the gradients of q, k and v, all float64.
    """
    inputs = [x.detach().double().requires_grad_() for x in (q, k, v)]
    wide_q, wide_k, wide_v = inputs
    group = q.shape[1] // k.shape[1]
    logits = torch.einsum("qhd,khd->hqk", wide_q, wide_k.repeat_interleave(group, dim=1)) * scale
    has_keys = mask.any(dim=2, keepdim=True)
    logits = logits.where(mask | ~has_keys, -torch.inf)
    weights = logits.softmax(dim=2) * has_keys
    out = torch.einsum("hqk,khd->qhd", weights, wide_v.repeat_interleave(group, dim=1))
    lse = logits.logsumexp(dim=2)
    result = (out * d_out.double()).sum()
    if d_lse is not None:
        result = result + (lse * d_lse.double()).where(has_keys[..., 0], 0).sum()
    gradients = torch.autograd.grad(result, inputs)
    return out.detach(), lse.detach().where(has_keys[..., 0], -torch.inf), gradients


def random_causal_mask(heads: int, num_blocks: int, density: float, seed: int = 0) -> torch.Tensor:
    """bool [heads, num_blocks, num_blocks]: causal, and as a rule not KV-efficient nor without empty rows."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.rand(heads, num_blocks, num_blocks, generator=generator) < density).tril()
