"""The work that a case requires: FLOP and bytes, counted from the pattern.

A sparse implementation is credited with the attended blocks only, a dense one with all earlier blocks; both
count a block on the diagonal as half. Bytes are those that must cross the memory bus once: K and V of every
token that some query of a KV head's group sees, and the queries and outputs.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection

from benchmarks.kernels.cases import GRADIENT_OPS, Case
from s2_kernels.pattern import NO_RESIDUE, S2Pattern

BYTES_PER_ELEMENT = 2
FLOP_PER_PAIR_AND_DIM = 2
"""A multiplication and an addition."""
PRODUCTS = {"backward": 5, "forward_backward": 7}
"""Matrix products of an operation; 2 of any other. A backward pass computes the logits again."""


def attended_pairs(pattern: S2Pattern, context_len: int, new_tokens: int) -> float:
    """(query, key) pairs of all query heads, for the queries at context_len ... + new_tokens - 1."""
    b, end = pattern.block_size, context_len + new_tokens
    pairs = 0.0
    kinds = ((h // pattern.group_size in pattern.full_heads, r) for h, r in enumerate(pattern.residues))
    for (is_full, residue), heads in Counter(kinds).items():
        for block in range(context_len // b, -(-end // b)):
            first = max(context_len, block * b)
            queries = min(end, (block + 1) * b) - first
            older = max(0, block - pattern.local_blocks + 1)
            kept = older if is_full else _kept_blocks(pattern, older, {residue})
            diagonal = first - block * b + queries / 2
            pairs += heads * queries * ((block - older + kept) * b + diagonal)
    return pairs


def _kept_blocks(pattern: S2Pattern, end: int, residues: Collection[int]) -> int:
    """Of the blocks before `end`, those of these residues and the sinks."""
    sinks = min(end, pattern.sink_blocks)
    others = sum(block % pattern.vert_stride not in residues for block in range(sinks))
    return others + sum(
        len(range(residue, end, pattern.vert_stride)) for residue in residues if residue != NO_RESIDUE
    )


def dense_pairs(num_heads: int, context_len: int, new_tokens: int) -> float:
    """The same for dense causal attention."""
    return num_heads * new_tokens * (context_len + new_tokens / 2)


def visible_tokens(pattern: S2Pattern, context_len: int, new_tokens: int) -> int:
    """Tokens that some query of a KV head's group sees, summed over KV heads."""
    b = pattern.block_size
    first_window_block = max(0, context_len // b - pattern.local_blocks + 1)
    window = context_len + new_tokens - first_window_block * b
    kept_blocks = sum(_kept_blocks(pattern, first_window_block, kept) for kept in pattern.kept_residues)
    return pattern.num_kv_heads * window + kept_blocks * b


def flop(case: Case, dense: bool) -> float:
    """Floating-point operations of an attention case; 0 for cache_write."""
    if case.op == "cache_write":
        return 0.0
    if dense:
        pairs = dense_pairs(case.pattern.num_heads, case.context_len, case.new_tokens)
    else:
        pairs = attended_pairs(case.pattern, case.context_len, case.new_tokens)
    products = PRODUCTS.get(case.op, 2)
    return FLOP_PER_PAIR_AND_DIM * products * case.shape.head_size * case.batch * pairs


def required_bytes(case: Case, dense: bool) -> float:
    """Bytes read and written, each once."""
    pattern = case.pattern
    if case.op == "cache_write":
        tokens_read = pattern.num_kv_heads * case.new_tokens
        _, strided = pattern.stored_tokens(case.new_tokens)
        key_value_tokens = 2 * tokens_read + strided * pattern.num_kv_heads
        query_tokens = 0
    else:
        if dense:
            key_value_tokens = pattern.num_kv_heads * case.total_len
        else:
            key_value_tokens = visible_tokens(pattern, case.context_len, case.new_tokens)
        query_tokens = pattern.num_heads * case.new_tokens
    rows = 2 * key_value_tokens + 2 * query_tokens
    return case.batch * rows * case.shape.head_size * BYTES_PER_ELEMENT


def rate(case: Case, dense: bool, ms: float) -> dict[str, float]:
    """{"tflops": ...} of a compute-bound case or {"gbps": ...} of a memory-bound one that took `ms`."""
    if case.op in ("prefill", "chunked_prefill", *GRADIENT_OPS):
        return {"tflops": round(flop(case, dense) / ms / 1e9, 1)}
    return {"gbps": round(required_bytes(case, dense) / ms / 1e6, 1)}
