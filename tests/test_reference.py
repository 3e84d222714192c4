"""The specification against PyTorch's dense attention with the mask written out token by token."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import attention_reference, paged_attention_reference, token_mask
from tests.paged import Geometry, PoolKind, build_batch

PATTERNS = [
    S2Pattern.build(3, 3, block_size=4, local_blocks=2, vert_stride=3),
    S2Pattern.build(4, 2, block_size=4, local_blocks=1, vert_stride=4),
    S2Pattern.build(8, 2, block_size=2, local_blocks=3, head_sliding_offset=1, pattern_heads="query"),
]
SCALE = 0.3


def pattern_id(p: S2Pattern) -> str:
    return f"heads{p.num_heads}of{p.num_kv_heads}-block{p.block_size}-local{p.local_blocks}-kept{p.num_kept}"


def random_states(pattern: S2Pattern, length: int, head_size: int = 8) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(length)
    heads = (pattern.num_heads, pattern.num_kv_heads, pattern.num_kv_heads)
    q, k, v = (torch.randn(length, n, head_size, generator=generator) for n in heads)
    return q, k, v


def attended(pattern: S2Pattern, head: int, query: int, key: int) -> bool:
    i, j = query // pattern.block_size, key // pattern.block_size
    strided = j % pattern.vert_stride == pattern.residues[head]
    return key <= query and (i - j < pattern.local_blocks or strided)


def torch_attention(
    pattern: S2Pattern, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor
) -> torch.Tensor:
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    out = scaled_dot_product_attention(q, k, v, attn_mask=mask[None], scale=SCALE, enable_gqa=True)
    return out[0].transpose(0, 1)


@pytest.mark.parametrize("num_queries", [57, 20, 1])
@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
def test_equals_dense_attention_with_the_mask(pattern: S2Pattern, num_queries: int) -> None:
    length = 57
    q, k, v = random_states(pattern, length)
    q = q[-num_queries:]
    rows = range(length - num_queries, length)
    mask = torch.tensor(
        [
            [[attended(pattern, h, i, j) for j in range(length)] for i in rows]
            for h in range(pattern.num_heads)
        ]
    )
    assert torch.equal(token_mask(pattern, torch.tensor(rows), length), mask)
    out = attention_reference(q, k, v, pattern, SCALE, [0, num_queries], [0, length])
    torch.testing.assert_close(out, torch_attention(pattern, q, k, v, mask))


def test_a_window_over_everything_is_dense_causal_attention() -> None:
    pattern = S2Pattern.build(4, 2, block_size=4, local_blocks=10, vert_stride=4)
    q, k, v = random_states(pattern, 40)
    causal = torch.ones(40, 40, dtype=torch.bool).tril().expand(4, 40, 40)
    out = attention_reference(q, k, v, pattern, SCALE, [0, 40])
    torch.testing.assert_close(out, torch_attention(pattern, q, k, v, causal))


@pytest.mark.parametrize("pattern", PATTERNS, ids=pattern_id)
def test_chunks_make_up_the_whole(pattern: S2Pattern) -> None:
    q, k, v = random_states(pattern, 50)
    whole = attention_reference(q, k, v, pattern, SCALE, [0, 50])
    edges = [0, 7, 8, 31, 50]
    chunks = [
        attention_reference(q[start:end], k[:end], v[:end], pattern, SCALE, [0, end - start], [0, end])
        for start, end in pairwise(edges)
    ]
    torch.testing.assert_close(torch.cat(chunks), whole)


def test_sequences_do_not_see_each_other() -> None:
    pattern = PATTERNS[0]
    q, k, v = random_states(pattern, 60)
    starts = [0, 25, 25, 26, 60]
    packed = attention_reference(q, k, v, pattern, SCALE, starts)
    for start, end in pairwise(starts):
        rows = slice(start, end)
        alone = attention_reference(q[rows], k[rows], v[rows], pattern, SCALE, [0, end - start])
        torch.testing.assert_close(packed[rows], alone)


PAGED_GEOMETRIES = [
    *(Geometry(pattern, head_size=8) for pattern in PATTERNS),
    Geometry(PATTERNS[0], head_size=5, page_slots=12),
    Geometry(PATTERNS[2], head_size=8, page_slots=16),
]


@pytest.mark.parametrize("pool", ["shared", "token-major"])
@pytest.mark.parametrize("geometry", PAGED_GEOMETRIES, ids=str)
def test_paged_equals_contiguous(geometry: Geometry, pool: PoolKind) -> None:
    requests = [(0, 21), (40, 1), (0, 0), (33, 9)]
    batch = build_batch(geometry, requests, pool=pool, padding_tokens=2)
    out = paged_attention_reference(batch.q, batch.requests, batch.pattern, batch.scale)
    assert (out[batch.query_start_loc[-1] :] == 0).all()
    expected = attention_reference(
        batch.q[: batch.query_start_loc[-1]],
        batch.k,
        batch.v,
        batch.pattern,
        batch.scale,
        batch.query_start_loc,
        batch.key_start_loc,
    )
    torch.testing.assert_close(out[: len(expected)], expected)
