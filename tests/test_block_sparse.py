"""The block-sparse kernel against masked attention, for every kind of mask."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from dataclasses import replace
from functools import partial

import pytest
import torch

from s2_kernels.attention import s2_attention
from s2_kernels.contiguous.block_sparse import block_sparse_fwd
from s2_kernels.contiguous.sequences import Span
from s2_kernels.contiguous.visits import Visits, merge_rows
from s2_kernels.masks import (
    BlockMask,
    dense_heads,
    local_window,
    pattern_block_mask,
    range_strides,
    sink_blocks,
)
from s2_kernels.pattern import S2Pattern
from tests.contiguous import expected_attention, random_causal_mask
from tests.paged import DEVICE, DTYPE_NAMES, DTYPES, TOLERANCES

HEADS, KV_HEADS = 4, 2
BLOCKS = 20
WINDOW = local_window(BLOCKS, 2)
PATTERN = S2Pattern.build(HEADS, KV_HEADS, block_size=16, local_blocks=2, vert_stride=3)
BY_QUERY = S2Pattern.build(
    HEADS, KV_HEADS, local_blocks=2, vert_stride=4, head_sliding_offset=1, pattern_heads="query"
)
KINDS = {
    "s2": PATTERN.block_mask(BLOCKS),
    "s2-by-query-head": BY_QUERY.block_mask(BLOCKS),
    "dense-heads": PATTERN.block_mask(BLOCKS) | dense_heads(HEADS, BLOCKS, 1, num_kv_heads=KV_HEADS),
    "sinks-of-all-heads": WINDOW | sink_blocks(BLOCKS, 2),
    "ranges-of-kv-heads": WINDOW | range_strides(KV_HEADS, BLOCKS, ((6, 2), (None, 4))),
    "arbitrary": random_causal_mask(HEADS, BLOCKS, 0.3),
    "nothing-or-itself": torch.eye(BLOCKS, dtype=torch.bool)[None] & (torch.arange(BLOCKS) % 3 > 0),
}
# Wide heads take most of a GPU's shared memory; the interpreter has no such limit, and little time.
HEAD_SIZES_OF_DECODE = [24, 128, 256] if DEVICE == "cuda" else [24]
BLOCK_SIZES_OF_HEADS = [16, 32, 64, 128] if DEVICE == "cuda" else [16, 64]
# (past, queries) of each sequence, for blocks of 16 tokens.
PROMPTS = [(0, 1), (0, 135)]
CHUNKS = [(150, 45), (37, 20), (96, 16), (5, 0)]


def block_mask(dense: torch.Tensor, block_size: int, *, causal: bool = True) -> BlockMask:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return BlockMask.from_dense(dense, block_size, causal=causal)


def random_mask(heads: int, query_blocks: int, key_blocks: int, density: float = 0.5) -> torch.Tensor:
    """bool [heads, query_blocks, key_blocks], of attention that is not causal."""
    generator = torch.Generator().manual_seed(query_blocks)
    return torch.rand(heads, query_blocks, key_blocks, generator=generator) < density


VISITED = {
    "arbitrary": block_mask(
        random_causal_mask(3, BLOCKS, 0.6) | torch.ones(BLOCKS, BLOCKS).tril(-9).bool(), 16
    ),
    "s2": BlockMask.from_pattern(PATTERN, BLOCKS),
    "s2-and-dense": BlockMask.of_heads(
        [BlockMask.from_pattern(pattern, BLOCKS) for pattern in (PATTERN, S2Pattern(16, BLOCKS, 1, (0,), 1))]
    ).select([4, 2, 1]),
    "chunk": block_mask(random_causal_mask(2, BLOCKS, 0.9)[:, 7:], 16),
    "both-ways": block_mask(random_mask(2, 13, BLOCKS), 16, causal=False),
}


def run_and_check(
    dense: torch.Tensor,
    block_size: int,
    sequences: list[tuple[int, int]],
    dtype: torch.dtype,
    *,
    heads: int = HEADS,
    kv_heads: int = KV_HEADS,
    head_size: int = 24,
    with_lse: bool = True,
    causal: bool = True,
) -> None:
    """Sequences are packed with a gap after each; all memory of the gaps is NaN, and must stay so."""
    generator = torch.Generator().manual_seed(0)
    gap = 3
    spans, queries, keys = [], 0, 0
    for past, count in sequences:
        spans.append(Span(0, queries, count, keys, past + count))
        queries, keys = queries + count + gap, keys + past + count + gap
    q, k, v = (
        torch.full((1, tokens, n, head_size), torch.nan, dtype=dtype, device=DEVICE)
        for tokens, n in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )
    for span in spans:
        for tensor, start, count in (
            (q, span.query_start, span.num_queries),
            (k, span.key_start, span.num_keys),
            (v, span.key_start, span.num_keys),
        ):
            tensor[0, start : start + count] = torch.randn(
                count, tensor.shape[2], head_size, generator=generator
            )
    out = q.new_full((1, queries, heads + 1, head_size), torch.nan)[:, :, :heads]
    lse = torch.full((1, heads, queries), torch.nan, device=DEVICE) if with_lse else None
    scale = 0.3

    block_sparse_fwd(q, k, v, block_mask(dense, block_size, causal=causal), tuple(spans), scale, out, lse)

    tolerance = TOLERANCES[dtype]
    is_gap = torch.ones(queries, dtype=torch.bool)
    for span in spans:
        rows = slice(span.query_start, span.query_start + span.num_queries)
        of_span = slice(span.key_start, span.key_start + span.num_keys)
        expected, expected_lse = expected_attention(
            q[0, rows], k[0, of_span], v[0, of_span], dense, block_size, scale, causal=causal
        )
        torch.testing.assert_close(out[0, rows], expected, atol=tolerance, rtol=tolerance)
        if lse is not None:
            torch.testing.assert_close(lse[0, :, rows], expected_lse, atol=2e-5, rtol=2e-5)
        is_gap[rows] = False
    assert out[0, is_gap].isnan().all(), "rows of no sequence were written"
    assert lse is None or lse[0, :, is_gap].isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("sequences", [PROMPTS, CHUNKS], ids=["prompts", "chunks"])
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_of_mask(kind: str, sequences: list[tuple[int, int]], dtype: torch.dtype) -> None:
    run_and_check(KINDS[kind], 16, sequences, dtype)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("block_size", [16, 32, 64, 128, 256])
def test_tiles_of_several_rows_and_several_tiles_in_a_row(block_size: int, dtype: torch.dtype) -> None:
    """Merge-Q from both sides, with masks in which dropped blocks return."""
    blocks = 1 + 320 // block_size
    dense = random_causal_mask(2, blocks, 0.5, seed=block_size)
    run_and_check(dense, block_size, [(0, 150), (131, 40), (3, 2)], dtype, heads=2, kv_heads=2)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("block_size", [16, 64, 128])
def test_fewer_query_blocks_than_key_blocks(block_size: int, dtype: torch.dtype) -> None:
    """The rows are the last ones of a square mask, whose first ones are not known."""
    dense = random_causal_mask(2, 9, 0.6, seed=block_size)[:, 5:]
    first = 5 * block_size
    sequences = [(first, 2 * block_size - 3), (first + block_size + 5, 1), (first, 4 * block_size)]
    run_and_check(dense, block_size, sequences, dtype, heads=2, kv_heads=1)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("block_size", [16, 64, 128])
@pytest.mark.parametrize("blocks", [(5, 5), (5, 3), (2, 6)], ids=["square", "tall", "wide"])
def test_not_causal(blocks: tuple[int, int], block_size: int, dtype: torch.dtype) -> None:
    """Any number of queries, from the first on, and keys; one query of a square mask is the last token."""
    query_blocks, key_blocks = blocks
    dense = random_mask(2, query_blocks, key_blocks)
    most_queries, most_keys = query_blocks * block_size, key_blocks * block_size
    sequences = [
        (keys - queries, queries)
        for queries, keys in (
            (most_queries, most_keys),
            (most_queries - 7, most_keys - 5),
            (1, most_keys - 3),
        )
    ]
    run_and_check(dense, block_size, sequences, dtype, heads=2, kv_heads=1, causal=False)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("block_size", [16, 64])
@pytest.mark.parametrize("head_size", HEAD_SIZES_OF_DECODE)
def test_decode(head_size: int, block_size: int, dtype: torch.dtype) -> None:
    sequences = [(0, 1), (130, 1), (47, 1), (48, 1), (255, 1)]
    dense = random_causal_mask(HEADS, BLOCKS, 0.5)
    run_and_check(dense, block_size, sequences, dtype, head_size=head_size)


@pytest.mark.parametrize("block_size", BLOCK_SIZES_OF_HEADS)
@pytest.mark.parametrize("head_size", [16, 17, 80, 128, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
def test_head_sizes(head_size: int, block_size: int, dtype: torch.dtype) -> None:
    run_and_check(
        KINDS["arbitrary"][:3],
        block_size,
        [(20, 60)],
        dtype,
        heads=3,
        kv_heads=1,
        head_size=head_size,
        with_lse=False,
    )


def test_blocks_that_no_row_of_the_tile_attends_to_are_not_read() -> None:
    dense = local_window(BLOCKS, 2) | sink_blocks(BLOCKS, 2) & (torch.arange(BLOCKS) == 1)
    first, end = 16 * 16, BLOCKS * 16
    q, k, v = torch.randn(3, 1, end, 1, 16, device=DEVICE).half()
    unread = torch.cat([torch.arange(16), torch.arange(32, first - 16)])
    k[:, unread] = v[:, unread] = torch.nan
    out = torch.full_like(q, torch.nan)
    block_sparse_fwd(q, k, v, block_mask(dense, 16), (Span(0, first, end - first, 0, end),), 0.25, out, None)
    k[:, unread] = v[:, unread] = 0
    expected, _ = expected_attention(q[0, first:], k[0], v[0], dense, 16, 0.25)
    torch.testing.assert_close(out[0, first:], expected, atol=2e-3, rtol=2e-3)


def visits_of_groups(visits: Visits) -> Iterator[tuple[int, int, list[tuple[int, int]], int]]:
    """(mask, group, (first token, row bits) of each visit, how many of them need no mask)."""
    for n, (run_0, size_0, run_1, size_1, own, num_unmasked, num_own) in enumerate(visits.groups.tolist()):
        shared = [*range(run_0, run_0 + size_0), *range(run_1, run_1 + size_1)]
        its_visits = [(int(visits.starts[place]), -1) for place in shared]
        for place in range(own, own + num_own):
            its_visits.append((int(visits.starts[place]), int(visits.row_bits[place])))
        yield *divmod(n, visits.num_groups), its_visits, len(shared) + num_unmasked


@pytest.mark.parametrize("visits_per_step", [1, 4])
@pytest.mark.parametrize("rows", [1, 2, 8])
@pytest.mark.parametrize("kind", ["arbitrary", "s2", "s2-and-dense", "chunk", "both-ways"])
def test_visits_are_the_union_of_the_rows(kind: str, rows: int, visits_per_step: int) -> None:
    mask = VISITED[kind]
    visits = merge_rows(mask, rows, visits_per_step, torch.device("cpu"))
    distinct = replace(mask, mask_of_head=tuple(range(len(mask.runs))))
    dense = distinct.dense_rows(0, mask.num_query_blocks)
    assert visits.mask_of_head.tolist() == list(mask.mask_of_head)
    assert visits.num_groups == -(-mask.num_query_blocks // rows)
    assert len(visits.groups) == len(mask.runs) * visits.num_groups
    any_unmasked = False
    for head, group, its_visits, num_unmasked in visits_of_groups(visits):
        blocks = [first_token // 16 for first_token, _ in its_visits]
        assert [first_token for first_token, _ in its_visits] == [block * 16 for block in blocks]
        assert len(set(blocks)) == len(blocks)
        of_rows = dense[head, group * rows : (group + 1) * rows]
        assert sorted(blocks) == of_rows.any(dim=0).nonzero().flatten().tolist()
        for place, (block, (_, bits)) in enumerate(zip(blocks, its_visits, strict=True)):
            attends = [*of_rows[:, block].tolist(), *[False] * (rows - len(of_rows))]
            assert [bool(bits >> r & 1) for r in range(rows)] == attends
            if mask.is_causal:
                assert (place < num_unmasked) == (all(attends) and block < group * rows)
                any_unmasked |= place < num_unmasked
    assert any_unmasked == mask.is_causal
    assert (visits.groups[:, 1:4:2] % visits_per_step == 0).all()


def test_visits_of_a_pattern_are_few() -> None:
    """A million tokens: 268 million block pairs for each residue, of which nothing is listed."""
    pattern = S2Pattern.build(8, 2, block_size=16, local_blocks=64, pattern_heads="query")
    mask = pattern_block_mask(pattern, 1 << 20)
    visits = merge_rows(mask, 4, 4, torch.device("cpu"))
    num_blocks = 1 << 16
    assert sum(len(x.flatten()) for x in (mask.lists, mask.runs)) < 50 * num_blocks
    assert sum(len(x.flatten()) for x in visits[:4]) < 100 * num_blocks
    first, length = visits.groups[-1, :2].tolist()
    of_last_residue = torch.arange(7, num_blocks - 3 - 64, 8)
    assert length == len(of_last_residue) // 4 * 4
    assert torch.equal(visits.starts[first : first + length], of_last_residue[:length] * 16)


def test_places_in_the_table_may_pass_32_bits() -> None:
    assert merge_rows(VISITED["s2"], 1, 1, torch.device("cpu")).groups.dtype == torch.int64


def test_what_the_kernel_does_not_take_is_named() -> None:
    q, k, v = torch.randn(3, 1, 20, 2, 16, device=DEVICE)
    attend = partial(s2_attention, pattern=block_mask(local_window(4, 2), 16), impl="triton")
    with pytest.raises(ValueError, match=r"^q: head size 288, expected 1 to 256"):
        attend(*(x.repeat(1, 1, 1, 18) for x in (q, k, v)))
    with pytest.raises(ValueError, match=r"^q: dtype torch.float64"):
        attend(q.double(), k.double(), v.double())
    with pytest.raises(ValueError, match=r"^block_size: 8, expected at least 16"):
        attend(q, k, v, pattern=block_mask(local_window(4, 2), 8))
    with pytest.raises(ValueError, match=r"^v: strides"):
        attend(q, k, v.transpose(2, 3).contiguous().transpose(2, 3))
