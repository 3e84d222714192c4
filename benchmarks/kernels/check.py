"""Whether an output is right: a sample of its rows against attention in float32, for every head.

At 131072 tokens and 64 heads the whole reference is out of reach, so rows are sampled: the first and last,
those around the edges of blocks, tiles and the window, and random ones. No row may be left unwritten.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.cases import Case
from benchmarks.kernels.inputs import Inputs, TwoTierCache
from s2_kernels.pattern import S2Pattern

SAMPLED_ROWS = 64
SAMPLED_REQUESTS = 8
MAX_REL_ERR = 1e-2
"""Weights and outputs rounded to bfloat16 err by at most 2**-9 each, 4e-3 in all. With random values a block
too few or too many shows as the root of its share in the keys: about 2e-2 for one of the 2048 blocks of the
longest dense context, more wherever a query has fewer keys."""


class CheckFailed(Exception):
    """An output is wrong; the message says how."""


@dataclass(frozen=True)
class Expected:
    """Rows of an output, and what they must be.

    Attributes:
        rows: int64 [samples], tokens.
        values: float32 [samples, num_heads, head_size].
    """

    rows: torch.Tensor
    values: torch.Tensor


def sampled_positions(case: Case, samples: int = SAMPLED_ROWS) -> torch.Tensor:
    """Positions, int64 and ascending, of the queries to check in a request: `samples`, or all if fewer."""
    pattern, first, last = case.pattern, case.context_len, case.total_len - 1
    edges = [first, last]
    for tokens in (pattern.block_size, 128, pattern.window_tokens, pattern.super_block_tokens):
        for edge in (-(-(first + 1) // tokens) * tokens, last // tokens * tokens):
            edges += [edge - 1, edge]
    edges = [position for position in edges if first <= position <= last]
    others = first + torch.randperm(case.new_tokens)[: max(0, samples - len(set(edges)))]
    return torch.cat([torch.tensor(edges), others]).unique()


def expected_rows(inputs: Inputs, dense: bool) -> Expected:
    """The reference for a sample of rows: of dense causal attention, or of the case's pattern."""
    case = inputs.case
    requests = torch.linspace(0, case.batch - 1, min(case.batch, SAMPLED_REQUESTS)).long().unique().tolist()
    rows, values = [], []
    for request in requests:
        positions = sampled_positions(case).to(inputs.q.device)
        queries = request * case.new_tokens + positions - case.context_len
        keys = slice(request * case.total_len, (request + 1) * case.total_len)
        q, k, v = inputs.q[queries], inputs.k[keys], inputs.v[keys]
        rows.append(queries)
        values.append(attention_of_rows(q, k, v, positions, None if dense else case.pattern, inputs.scale))
    return Expected(torch.cat(rows), torch.cat(values))


def attention_of_rows(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    positions: torch.Tensor,
    pattern: S2Pattern | None,
    scale: float,
) -> torch.Tensor:
    """Attention in float32 of a few queries to one sequence's keys, a KV head at a time.

    Args:
        q: [rows, num_heads, head_size], the queries at `positions`.
        k, v: [keys, num_kv_heads, head_size], at positions 0 ... keys - 1.
        positions: int64 [rows].
        pattern: who attends to what; None for dense causal attention.
        scale: factor on the logits.

    Returns:
        float32 [rows, num_heads, head_size].
    """
    group = q.shape[1] // k.shape[1]
    out = torch.empty_like(q, dtype=torch.float32)
    for kv_head in range(k.shape[1]):
        key, value = k[:, kv_head].float(), v[:, kv_head].float()
        for head in range(kv_head * group, (kv_head + 1) * group):
            mask = visible_keys(positions, len(k), None if pattern is None else (pattern, head))
            logits = q[:, head].float() @ key.T * scale
            out[:, head] = logits.masked_fill(~mask, float("-inf")).softmax(dim=-1) @ value
    return out


def visible_keys(
    positions: torch.Tensor, num_keys: int, pattern_and_head: tuple[S2Pattern, int] | None
) -> torch.Tensor:
    """bool [rows, num_keys]: what queries at `positions` see, of a query head or, for None, dense."""
    keys = torch.arange(num_keys, device=positions.device)
    visible = keys <= positions[:, None]
    if pattern_and_head is None:
        return visible
    pattern, head = pattern_and_head
    query_block, key_block = positions[:, None] // pattern.block_size, keys // pattern.block_size
    in_window = query_block - key_block < pattern.local_blocks
    if head // pattern.group_size in pattern.full_heads:
        return visible
    in_shard = key_block % pattern.vert_stride == pattern.residues[head]
    return visible & (in_window | in_shard | (key_block < pattern.sink_blocks))


def check_attention(out: torch.Tensor, expected: Expected) -> float:
    """The largest relative error of a sampled row, ||out - expected|| / ||expected|| over the head size.

    Raises:
        CheckFailed: it is above MAX_REL_ERR, or some element of the output is NaN.
    """
    if out.isnan().any():
        unwritten = int(out.isnan().flatten(1).any(dim=1).sum())
        raise CheckFailed(f"NaN in {unwritten} of {out.shape[0]} rows")
    difference = (out[expected.rows].float() - expected.values).norm(dim=-1)
    error = float((difference / expected.values.norm(dim=-1)).max())
    if not error <= MAX_REL_ERR:
        raise CheckFailed(f"max_rel_err {error:.2g}, expected at most {MAX_REL_ERR}")
    return error


def check_cache(cache: TwoTierCache, inputs: Inputs) -> float:
    """0.0 when a sample of tokens is where the layout puts it, and no slot was written besides.

    Raises:
        CheckFailed: a token is not there, or the number of slots written is not that of the tokens to keep.
    """
    pattern, tokens = inputs.case.pattern, inputs.case.new_tokens
    for position in sampled_positions(inputs.case).tolist():
        key_value = torch.cat([inputs.k[position], inputs.v[position]], dim=-1)
        page, slot = cache.layout.window_slot(position)
        if not torch.equal(cache.window_cache[cache.window_table[0, page], :, slot], key_value):
            raise CheckFailed(f"token {position} is not in the window tier")
        for head in range(pattern.num_kv_heads):
            place = cache.layout.strided_index(head, position)
            if place is None:
                continue
            page, row, slot = place
            stored = cache.strided_cache[cache.strided_table[0, page], row, slot]
            if not torch.equal(stored, key_value[head]):
                raise CheckFailed(f"token {position} of KV head {head} is not in the strided tier")
    expected = round(pattern.num_kv_heads * (tokens + pattern.stored_tokens(tokens)[1]))
    pools = {id(pool): pool for pool in (cache.window_cache, cache.strided_cache)}.values()
    written = sum(int((~pool.isnan().any(dim=-1)).sum()) for pool in pools)
    if written != expected:
        raise CheckFailed(f"{written} slots written, expected {expected}")
    return 0.0
