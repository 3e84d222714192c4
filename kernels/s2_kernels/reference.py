"""What S2-Attention means, in plain PyTorch: the specification that every kernel is tested against.

Nothing here is fast, and nothing is clever. All arithmetic is in float32 whatever the input dtype.
"""

from __future__ import annotations

import torch

from s2_kernels.layout import TierLayout
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.weighted_sum import weighted_sum


def token_mask(pattern: S2Pattern, positions: torch.Tensor, context_len: int) -> torch.Tensor:
    """Which of the first `context_len` tokens the queries at `positions` attend to.

    Args:
        pattern: the sparsity pattern.
        positions: int64 [queries], absolute positions.
        context_len: number of keys, at positions 0 ... context_len - 1.

    Returns:
        bool [num_heads, queries, context_len].
    """
    num_blocks = -(-max(context_len, int(positions.max()) + 1) // pattern.block_size)
    blocks = pattern.block_mask(num_blocks).to(positions.device)
    return block_token_mask(blocks, pattern.block_size, positions, context_len)


def block_token_mask(
    blocks: torch.Tensor, block_size: int, positions: torch.Tensor, context_len: int
) -> torch.Tensor:
    """`token_mask` of a block mask: a query attends to the tokens of its blocks that are not after it.

    Args:
        blocks: bool [heads, query blocks, key blocks].
        block_size: tokens per block.
        positions: int64 [queries], absolute positions.
        context_len: number of keys, at positions 0 ... context_len - 1.

    Returns:
        bool [heads, queries, context_len].
    """
    keys = torch.arange(context_len, device=positions.device)
    visible = blocks[:, (positions // block_size)[:, None], (keys // block_size)[None, :]]
    return visible & (keys[None, :] <= positions[:, None])


def masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor, scale: float
) -> torch.Tensor:
    """softmax(scale * q k^T) v over the keys that `mask` allows.

    Args:
        q: [queries, num_heads, head_size].
        k, v: [keys, num_kv_heads, head_size]; query head h reads KV head h // group size.
        mask: bool [num_heads, queries, keys].
        scale: factor on the logits.

    Returns:
        [queries, num_heads, head_size] in q's dtype; zeros for a query without any key.
    """
    v = v.float().repeat_interleave(q.shape[1] // v.shape[1], dim=1)
    weights = _masked_logits(q, k, mask, scale).softmax(dim=-1)
    weights = weights.masked_fill(~mask.any(dim=-1, keepdim=True), 0.0)
    return weighted_sum(weights, mask, v.transpose(0, 1)).transpose(0, 1).to(q.dtype)


def masked_log_sum_exp(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """The log-sum-exp of the same logits: float32 [num_heads, queries], -inf for a query without any key."""
    return _masked_logits(q, k, mask, scale).logsumexp(dim=-1)


def masked_attention_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: torch.Tensor,
    scale: float,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The gradients of `masked_attention` and `masked_log_sum_exp` (arXiv 2205.14135, appendix B.4).

    With the weights P = softmax(S) of a row, a change dS of its logits changes them by
    P * (dS - sum(P * dS)), and its log-sum-exp by sum(P * dS).

    Args:
        q, k, v, mask, scale: as in `masked_attention`.
        d_out: the gradient of the output, [queries, num_heads, head_size].
        d_lse: the gradient of the log-sum-exp, [num_heads, queries]; None for zeros.

    Returns:
        The gradients of q, k and v, float32 in their shapes; zeros for a query without any key.
    """
    group = q.shape[1] // k.shape[1]
    q, d_out = q.float(), d_out.float()
    keys, values = (x.float().repeat_interleave(group, dim=1) for x in (k, v))
    has_keys = mask.any(dim=-1, keepdim=True)
    weights = _masked_logits(q, k, mask, scale).softmax(dim=-1).masked_fill(~has_keys, 0.0)
    d_weights = torch.einsum("qhd,khd->hqk", d_out, values)
    change = d_weights - (weights * d_weights).sum(dim=-1, keepdim=True)
    if d_lse is not None:
        change = change + d_lse.float()[..., None]
    d_logits = (weights * change).masked_fill(~mask, 0.0)
    dq = torch.einsum("hqk,khd->qhd", d_logits, keys) * scale
    dk = torch.einsum("hqk,qhd->khd", d_logits, q) * scale
    dv = torch.einsum("hqk,qhd->khd", weights, d_out)
    dk, dv = (x.unflatten(1, (k.shape[1], group)).sum(dim=2) for x in (dk, dv))
    return dq, dk, dv


def _masked_logits(q: torch.Tensor, k: torch.Tensor, mask: torch.Tensor, scale: float) -> torch.Tensor:
    """Logits [num_heads, queries, keys], -inf where a query does not attend."""
    k = k.float().repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    logits = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    return logits.masked_fill(~mask, float("-inf"))


def attention_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern,
    scale: float,
    query_start_loc: list[int],
    key_start_loc: list[int] | None = None,
) -> torch.Tensor:
    """S2-Attention of several sequences, packed one after the other (varlen).

    The queries of a sequence are its last tokens: with fewer queries than keys, the rest is a context
    that was computed before.

    Args:
        q: [total queries, num_heads, head_size].
        k, v: [total keys, num_kv_heads, head_size].
        pattern: the sparsity pattern.
        scale: factor on the logits.
        query_start_loc: where each sequence's queries start, and the total: sequences + 1 values.
        key_start_loc: the same for keys; None when every token is also a query.

    Returns:
        [total queries, num_heads, head_size] in q's dtype.
    """
    key_start_loc = query_start_loc if key_start_loc is None else key_start_loc
    out = torch.empty_like(q)
    for n in range(len(query_start_loc) - 1):
        q0, q1 = query_start_loc[n : n + 2]
        k0, k1 = key_start_loc[n : n + 2]
        if q0 == q1:
            continue
        positions = torch.arange(k1 - k0 - (q1 - q0), k1 - k0, device=q.device)
        mask = token_mask(pattern, positions, k1 - k0)
        out[q0:q1] = masked_attention(q[q0:q1], k[k0:k1], v[k0:k1], mask, scale)
    return out


def cache_write_reference(
    key: torch.Tensor,
    value: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_slots: torch.Tensor,
    strided_slots: torch.Tensor,
    pattern: S2Pattern,
) -> None:
    """Store new tokens in both tiers, in place.

    Args:
        key, value: [tokens, num_kv_heads, head_size].
        window_cache, strided_cache: the two tiers, see `s2_kernels.layout`.
        window_slots: int64 [tokens], page * page_slots + slot.
        strided_slots: int64 [tokens], page * strided_page_tokens + position mod
            strided_page_tokens, as vLLM computes it. A token with -1 in either is padding and skipped.
        pattern: the pattern of these heads.
    """
    layout = TierLayout.of_caches(pattern, window_cache, strided_cache)
    for t, (window, strided) in enumerate(zip(window_slots.tolist(), strided_slots.tolist(), strict=True)):
        if window < 0 or strided < 0:
            continue
        page, slot = divmod(window, layout.page_slots)
        window_cache[page, :, slot] = torch.cat([key[t], value[t]], dim=-1)
        page, local_position = divmod(strided, layout.strided_page_tokens)
        for h in range(pattern.num_kv_heads):
            place = layout.strided_index(h, local_position)
            if place is not None:
                strided_cache[page, *place[1:]] = torch.cat([key[t, h], value[t, h]], dim=-1)


def paged_attention_reference(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
) -> torch.Tensor:
    """S2-Attention of a batch of requests whose keys and values are in the two paged tiers.

    Reads nothing but the tokens in a query's set: all else in the caches may be garbage.

    Args:
        q: [tokens, num_heads, head_size].
        requests: whose queries these are.
        pattern: the pattern of these heads.
        scale: factor on the logits.

    Returns:
        [tokens, num_heads, head_size] in q's dtype; zeros for tokens that belong to no request.
    """
    window_cache, strided_cache, window_table, strided_table, query_start_loc, seq_lens = requests
    layout = TierLayout.of_caches(pattern, window_cache, strided_cache)
    head_size = q.shape[-1]
    out = torch.zeros_like(q)
    starts, lens = query_start_loc.tolist(), seq_lens.tolist()
    for n, seq_len in enumerate(lens):
        num_queries = starts[n + 1] - starts[n]
        for t in range(num_queries):
            position = seq_len - num_queries + t
            block = position // pattern.block_size
            first_window_token = max(0, block - pattern.local_blocks + 1) * pattern.block_size
            for h in range(pattern.num_heads):
                kv_head = h // pattern.group_size
                kv = []
                for p in range(position + 1):
                    if p >= first_window_token or p < pattern.sink_blocks * pattern.block_size:
                        page, slot = layout.window_slot(p)
                        kv.append(window_cache[window_table[n, page], kv_head, slot])
                    elif pattern.attends(h, block, p // pattern.block_size):
                        place = layout.strided_index(kv_head, p)
                        assert place is not None
                        kv.append(strided_cache[strided_table[n, place[0]], *place[1:]])
                keys, values = torch.stack(kv).float().split(head_size, dim=-1)
                row = starts[n] + t
                weights = (keys @ q[row, h].float() * scale).softmax(dim=0)
                out[row, h] = (weights @ values).to(q.dtype)
    return out
