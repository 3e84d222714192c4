"""DKernel's interface: its patterns from its formula, its inputs sequence by sequence."""

from __future__ import annotations

import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from s2_kernels import dkernel
from s2_kernels.attention import attend
from s2_kernels.dkernel import (
    LocalStrideSparseAttention,
    SparseAttention,
    combine_attn_partitions,
    get_sparse_attn_mask,
)
from tests.contiguous import expected_attention, expected_gradients, random_causal_mask, spelt_out
from tests.paged import DEVICE, TOLERANCES

README = Path(__file__).parent.parent / "README.md"
HEADS, KV_HEADS, HEAD_SIZE, BLOCK = 4, 2, 24, 16
DTYPE = torch.float16
SCALE = HEAD_SIZE**-0.5


def local_stride(**changes: object) -> LocalStrideSparseAttention:
    arguments = {"num_kv_heads": KV_HEADS, **changes}
    return LocalStrideSparseAttention(HEADS, 160, BLOCK, 2, 3, **arguments)


def random_batch(
    batch: int, queries: int, keys: int, heads: int = HEADS, kv_heads: int = KV_HEADS
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """[batch, tokens, heads, head_size] each."""
    generator = torch.Generator().manual_seed(queries + keys)
    return tuple(
        torch.randn(batch, tokens, n, HEAD_SIZE, generator=generator).to(DEVICE, DTYPE)
        for tokens, n in ((queries, heads), (keys, kv_heads), (keys, kv_heads))
    )


def check_sequence(
    attn: SparseAttention,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor | None = None,
    scale: float = SCALE,
) -> None:
    """One sequence: [tokens, heads, head_size], lse [heads, tokens]."""
    expected, expected_lse = expected_attention(
        q, k, v, attn.mask.to_dense(), BLOCK, scale, causal=attn.mask.is_causal
    )
    torch.testing.assert_close(out, expected, atol=TOLERANCES[DTYPE], rtol=TOLERANCES[DTYPE])
    if lse is not None:
        torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "vert_stride", "dense", "offset", "homo", "active"),
    [
        (4, None, 3, 0, 0, False, None),
        (4, 2, 3, 1, 1, False, None),
        (8, 2, 8, 0, 0, False, None),
        (2, 2, 9, 0, 2, False, None),
        (4, 4, 8, 2, 0, False, (1, 4)),
        (6, 3, 4, 1, 1, False, (3, 5)),
        (4, 2, 4, 0, 1, True, (0, 2)),
        (2, 1, 1, 0, 0, False, None),
    ],
)
def test_local_stride_pattern(
    heads: int,
    kv_heads: int | None,
    vert_stride: int,
    dense: int,
    offset: int,
    homo: bool,
    active: tuple[int, int] | None,
) -> None:
    attn = LocalStrideSparseAttention(
        heads,
        200,
        BLOCK,
        2,
        vert_stride,
        homo_head=homo,
        num_dense_heads=dense,
        num_kv_heads=kv_heads,
        active_head_range=active,
        head_sliding_offset=offset,
    )
    assert attn.max_seq_len == attn.max_seqlen == 256
    mask = attn.mask.to_dense()
    num_kv = kv_heads or heads
    step = max(1, int(vert_stride / heads))
    active_heads = [0] if homo else list(range(*(active or (0, heads))))
    assert mask.shape == (len(active_heads), 16, 16)
    for row, head in enumerate(active_heads):
        kv_head = head // (heads // num_kv)
        for i in range(16):
            for j in range(16):
                attends = i - j < 2 or (j + kv_head * step + offset) % vert_stride == 0
                attends = attends or kv_head >= num_kv - dense
                assert mask[row, i, j] == (j <= i and attends)


def test_max_seq_len_is_a_multiple_of_every_block() -> None:
    assert local_stride(block_m=128).max_seq_len == 256
    assert LocalStrideSparseAttention(4, 100, 128, 1, 2).max_seq_len == 128
    assert LocalStrideSparseAttention(4, 1, 16, 1, 2).max_seq_len == 64


@pytest.mark.parametrize("seq_dim", [None, 1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(141, 141), (1, 141), (37, 141)])
def test_batch(seq_dim: int | None, queries: int, keys: int) -> None:
    attn = local_stride(seq_dim=seq_dim)
    q, k, v = random_batch(2, queries, keys)
    inputs = [x.transpose(1, 2).contiguous() if seq_dim == 2 else x for x in (q, k, v)]
    out, lse = attn(*inputs, return_lse=True)
    assert out.shape == inputs[0].shape
    assert lse.shape == (2, HEADS, queries)
    for n in range(2):
        of_sequence = out[n].transpose(0, 1) if seq_dim == 2 else out[n]
        check_sequence(attn, q[n], k[n], v[n], of_sequence, lse[n])


def starts(lengths: tuple[int, ...]) -> torch.Tensor:
    return torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()


@pytest.mark.parametrize(
    ("q_lens", "k_lens", "say_q_lens"),
    [
        ((50, 1, 31), (50, 1, 31), False),
        ((1, 1, 1), (50, 1, 131), False),
        ((50, 1, 31), (50, 101, 31), True),
        ((7, 1, 30), (50, 1, 90), True),
    ],
    ids=["prompts", "decode", "mixed", "chunks"],
)
def test_packed(q_lens: tuple[int, ...], k_lens: tuple[int, ...], say_q_lens: bool) -> None:
    attn = local_stride()
    (q,), (k,), (v,) = random_batch(1, sum(q_lens), sum(k_lens))
    cu_seqlen_q = starts(q_lens) if say_q_lens else None
    out, lse = attn(q, k, v, 0.4, cu_seqlen_k=starts(k_lens), cu_seqlen_q=cu_seqlen_q, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (HEADS, len(q))
    q_start = k_start = 0
    for q_len, k_len in zip(q_lens, k_lens, strict=True):
        rows, keys = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
        check_sequence(attn, q[rows], k[keys], v[keys], out[rows], lse[:, rows], 0.4)
        q_start, k_start = rows.stop, keys.stop


@pytest.mark.parametrize("seq_dim", [1, 2])
@pytest.mark.parametrize("decode", [False, True], ids=["prompt", "decode"])
@pytest.mark.parametrize("padding", ["left", "right", "both"])
def test_padded(padding: str, decode: bool, seq_dim: int) -> None:
    """Padding holds NaN: it must not be read, and its output is zero."""
    attn = local_stride(seq_dim=seq_dim)
    keys = 100
    lefts = [0, 0, 0] if padding == "right" else [37, 0, 5]
    lengths = [keys - left for left in lefts] if padding == "left" else [50, 1, 95]
    q, k, v = random_batch(3, 1 if decode else keys, keys)
    for n, (left, length) in enumerate(zip(lefts, lengths, strict=True)):
        for x in (k, v) if decode else (q, k, v):
            x[n, :left] = x[n, left + length :] = torch.nan
    inputs = [x.transpose(1, 2) if seq_dim == 2 else x for x in (q, k, v)]
    out, lse = attn(
        *inputs,
        left_paddings=None if padding == "right" else torch.tensor(lefts, device=DEVICE),
        seqlens=None if padding == "left" else torch.tensor(lengths, device=DEVICE),
        return_lse=True,
    )
    assert out.shape == inputs[0].shape
    out = out.transpose(1, 2) if seq_dim == 2 else out
    for n, (left, length) in enumerate(zip(lefts, lengths, strict=True)):
        of_sequence = slice(left, left + length)
        rows = slice(0, 1) if decode else of_sequence
        check_sequence(attn, q[n, rows], k[n, of_sequence], v[n, of_sequence], out[n, rows], lse[n, :, rows])
        is_padding = torch.ones(q.shape[1], dtype=torch.bool)
        is_padding[rows] = False
        assert (out[n, is_padding] == 0).all()
        assert (lse[n, :, is_padding] == -torch.inf).all()


@pytest.mark.parametrize("heads", [None, 1, KV_HEADS, HEADS])
def test_arbitrary_pattern(heads: int | None) -> None:
    pattern = random_causal_mask(heads or 1, 8, 0.5)
    pattern[:, range(8), range(8)] = True
    if heads is None:
        pattern = pattern[0]
    with pytest.warns(UserWarning, match="not KV-efficient"):
        attn = SparseAttention(BLOCK, pattern.to(torch.uint8))
    assert attn.max_seqlen == 128
    q, k, v = random_batch(1, 117, 117)
    out = attn(q, k, v)
    expected, _ = expected_attention(q[0], k[0], v[0], pattern if heads else pattern[None], BLOCK, SCALE)
    torch.testing.assert_close(out[0], expected, atol=2e-3, rtol=2e-3)


def test_homogeneous_heads_and_dense_heads() -> None:
    for attn in (local_stride(homo_head=True), local_stride(num_dense_heads=1)):
        q, k, v = random_batch(1, 90, 90)
        check_sequence(attn, q[0], k[0], v[0], attn(q, k, v)[0])


def test_output_tensor_and_fused_inputs() -> None:
    q, k, v = random_batch(1, 60, 60, kv_heads=HEADS)
    expected = local_stride()(q, k, v)
    out = torch.full_like(q, torch.nan)
    attn = local_stride(out=out)
    result = attn(torch.cat([q, k, v], dim=2), split_qkv=lambda x: x.chunk(3, dim=2))
    assert result.data_ptr() == out.data_ptr()
    assert torch.equal(out, expected)
    out.fill_(torch.nan)
    attn(q, torch.cat([k, v], dim=2), split_qkv=lambda x: x.chunk(2, dim=2))
    assert torch.equal(out, expected)
    out.fill_(torch.nan)
    attn(q, k, v, seqlens=torch.tensor([33]))
    assert (out[:, 33:] == 0).all()
    torch.testing.assert_close(out[:, :33], expected[:, :33], atol=2e-3, rtol=2e-3)


def test_modules_of_one_pattern_share_its_mask() -> None:
    assert local_stride().mask is local_stride(seq_dim=2).mask
    assert local_stride().mask is not local_stride(head_sliding_offset=1).mask


@pytest.mark.parametrize(
    ("changes", "num_kv_heads"),
    [({}, 2), ({"num_kv_heads": None}, 4), ({"homo_head": True}, 2), ({"active_head_range": (2, 4)}, 1)],
    ids=["grouped", "ungrouped", "homogeneous", "one-rank"],
)
def test_a_pattern_without_dense_heads_is_handed_over_as_such(
    changes: dict[str, object], num_kv_heads: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    attn = local_stride(head_sliding_offset=1, **changes)
    handed_over = []
    monkeypatch.setattr(
        dkernel, "attend", lambda *args, **kwargs: handed_over.append(args[3]) or attend(*args, **kwargs)
    )
    num_heads = attn.pattern.num_heads
    assert attn.pattern.num_kv_heads == num_kv_heads
    masks = attn.mask.to_dense()
    assert torch.equal(attn.pattern.block_mask(len(masks[0])), masks.expand(num_heads, -1, -1))
    q, k, v = random_batch(2, 70, 110, num_heads, num_kv_heads)
    out = attn(q, k, v)
    expected = SparseAttention(BLOCK, attn.mask)(q, k, v)
    torch.testing.assert_close(out, expected, atol=TOLERANCES[DTYPE], rtol=TOLERANCES[DTYPE])
    repeated = attn(q, *(x.repeat_interleave(num_heads // num_kv_heads, 2) for x in (k, v)))
    torch.testing.assert_close(repeated, expected, atol=TOLERANCES[DTYPE], rtol=TOLERANCES[DTYPE])
    as_it_is = num_kv_heads == num_heads
    assert handed_over == [attn.pattern, attn.mask, attn.pattern if as_it_is else attn.mask]


@pytest.mark.parametrize("num_dense", [1, 2])
def test_dense_heads_are_full_heads(num_dense: int) -> None:
    attn = local_stride(num_dense_heads=num_dense)
    assert attn.pattern is not None
    assert attn.pattern.full_heads == ((1,) if num_dense == 1 else (0, 1))
    assert torch.equal(attn.pattern.block_mask(attn.mask.num_blocks), attn.mask.to_dense())


def test_other_patterns_stay_masks() -> None:
    assert local_stride(active_head_range=(1, 4)).pattern is None
    assert local_stride(active_head_range=(0, 3)).pattern is None


def test_the_pattern_and_its_mask_give_the_same() -> None:
    """Blocks, heads and dtype that the fastest kernel takes, where there is one."""
    attn = LocalStrideSparseAttention(4, 320, 64, 1, 3, num_kv_heads=2, head_sliding_offset=2)
    by_mask = SparseAttention(64, attn.mask)
    q, k, v = (x.repeat(1, 1, 1, 3)[..., :64].contiguous() for x in random_batch(2, 260, 260))
    lefts, lengths = torch.tensor([41, 0]), torch.tensor([170, 99])
    for inputs, arguments in (
        ((q[:, :90].contiguous(), k, v), {}),
        ((q, k, v), {"left_paddings": lefts}),
        ((q[:, :1].contiguous(), k, v), {"left_paddings": lefts, "seqlens": lengths}),
        ((q[0], k[0], v[0]), {"cu_seqlen_k": torch.tensor([0, 101, 260])}),
    ):
        out, lse = attn(*inputs, return_lse=True, **arguments)
        expected, expected_lse = by_mask(*inputs, return_lse=True, **arguments)
        torch.testing.assert_close(out, expected, atol=TOLERANCES[DTYPE], rtol=TOLERANCES[DTYPE])
        torch.testing.assert_close(lse, expected_lse, atol=2e-5, rtol=2e-5)


def local_stride_attends(
    i: int, j: int, head: int, step: int, offset: int, stride: int, window: tuple[int, int]
) -> bool:
    """Whether query block i of KV head `head` attends to key block j, whatever causality says."""
    return (-window[1] < i - j < window[0]) or (j + head * step + offset) % stride == 0


def steps_outside(i: int, j: int, window: tuple[int, int]) -> int:
    return max(0, i - j - window[0] + 1, j - i - window[1] + 1)


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_sparse_attn_mask(data: st.DataObject) -> None:
    """All three forms of the mask, block by block and token by token."""
    draw = data.draw
    block_size = draw(st.sampled_from([1, 3, 16]), "block_size")
    causal, homo = draw(st.booleans(), "causal"), draw(st.booleans(), "homo_head")
    num_kv, group = draw(st.integers(1, 3), "num_kv_heads"), draw(st.integers(1, 3), "group")
    num_dense = 0 if homo else draw(st.integers(0, num_kv), "num_dense_heads")
    stride = draw(st.sampled_from([1, 2, 3, 7]), "vert_stride")
    local: int | tuple[int, int] = draw(st.integers(1, 4), "local_blocks")
    if not causal and draw(st.booleans(), "two sides"):
        local = (local, draw(st.integers(1, 4), "after"))
    step, offset = draw(st.sampled_from([None, 1, 2]), "step"), draw(st.integers(0, 4), "offset")
    relative = draw(st.sampled_from([None, False, True]), "relative")
    queries, keys = draw(st.integers(1, 7 * block_size)), draw(st.integers(1, 7 * block_size))
    past, q_start, k_start = 0, None, None
    if draw(st.booleans(), "chunks"):
        q_start, k_start = (draw(st.integers(0, 4)) * block_size for _ in range(2))
    else:
        past = draw(st.integers(0, queries), "past_len")

    (crow, col), blocks, tokens = get_sparse_attn_mask(
        num_kv * group,
        queries,
        block_size,
        local,
        stride,
        homo,
        num_kv,
        past,
        torch.float16,
        "cpu",
        True,
        step,
        offset,
        num_dense,
        keys,
        q_start,
        k_start,
        {None: None, False: "absolute", True: "relative"}[relative],
        causal,
    )

    relative = not causal if relative is None else relative
    window = (local, 1) if causal else (local, local) if isinstance(local, int) else local
    num_heads = 1 if homo else num_kv * group
    used_step = max(1, stride // num_heads) if step is None else step
    heads = 1 if relative and num_dense in (0, num_kv) else num_heads
    first_query, first_key = (q_start or 0) // block_size, (k_start or 0) // block_size
    query_blocks, key_blocks = (-(-n // block_size) for n in (queries, keys))

    def attends(head: int, row: int, column: int) -> bool:
        i, j = first_query + row, first_key + column
        kv_head = 0 if homo else head // group
        if causal and j > i:
            return False
        if not homo and kv_head >= num_kv - num_dense:
            return True
        if relative:
            return steps_outside(i, j, window) % stride == 0
        return local_stride_attends(i, j, kv_head, used_step, offset, stride, window)

    expected = torch.tensor(
        [
            [[attends(head, i, j) for j in range(key_blocks)] for i in range(query_blocks)]
            for head in range(heads)
        ]
    )
    known = expected[:, -(-past // block_size) :]
    assert blocks.dtype == tokens.dtype == torch.float16
    assert torch.equal(blocks, known.half())
    assert crow.dtype == col.dtype == torch.int32
    for head in range(heads):
        for row in range(known.shape[1]):
            of_row = col[head, crow[head, row] : crow[head, row + 1]]
            assert of_row.tolist() == known[head, row].nonzero().flatten().tolist()
        assert (col[head, crow[head, -1] :] == -1).all()
    assert tokens.shape == (heads, queries - past, keys)
    for i in range(past, queries):
        for j in range(keys):
            is_later = first_key * block_size + j > first_query * block_size + i
            of_heads = expected[:, i // block_size, j // block_size]
            assert (
                tokens[:, i - past, j].tolist() == (of_heads & (not causal or not is_later)).half().tolist()
            )


def test_sparse_attn_mask_by_default() -> None:
    (crow, col), blocks, tokens = get_sparse_attn_mask(2, 200)
    assert tokens is None
    assert blocks.dtype == torch.bfloat16
    assert blocks.shape == (2, 4, 4)
    assert crow.device.type == col.device.type == blocks.device.type == DEVICE


def both_ways(seq_dim: int | None = None, **changes: object) -> LocalStrideSparseAttention:
    return LocalStrideSparseAttention(HEADS, 160, BLOCK, 2, 3, causal=False, seq_dim=seq_dim, **changes)


@pytest.mark.parametrize(
    "changes",
    [{}, {"num_dense_heads": 1}, {"homo_head": True}, {"num_kv_heads": 2, "active_head_range": (1, 3)}],
    ids=["plain", "dense", "homogeneous", "one-rank"],
)
def test_local_stride_pattern_both_ways(changes: dict[str, object]) -> None:
    mask = both_ways(**changes).mask
    assert not mask.is_causal
    dense = mask.to_dense()
    assert dense.shape[1:] == (12, 12)
    for head, of_head in enumerate(dense):
        is_dense = "num_dense_heads" in changes and head == HEADS - 1
        for i in range(12):
            for j in range(12):
                assert of_head[i, j] == (is_dense or steps_outside(i, j, (2, 2)) % 3 == 0)


@pytest.mark.parametrize("seq_dim", [1, 2])
@pytest.mark.parametrize(("queries", "keys"), [(141, 141), (1, 141), (37, 141), (90, 40)])
def test_batch_both_ways(queries: int, keys: int, seq_dim: int) -> None:
    attn = both_ways(seq_dim, num_kv_heads=KV_HEADS, num_dense_heads=1)
    q, k, v = random_batch(2, queries, keys)
    inputs = [x.transpose(1, 2).contiguous() if seq_dim == 2 else x for x in (q, k, v)]
    out, lse = attn(*inputs, return_lse=True)
    for n in range(2):
        of_sequence = out[n].transpose(0, 1) if seq_dim == 2 else out[n]
        check_sequence(attn, q[n], k[n], v[n], of_sequence, lse[n])


def test_packed_and_padded_both_ways() -> None:
    attn = both_ways(num_kv_heads=KV_HEADS)
    q, k, v = random_batch(2, 80, 80)
    out, lse = attn(q[0], k[0], v[0], cu_seqlen_k=starts((33, 47)), return_lse=True)
    padded, padded_lse = attn(q, k, v, left_paddings=torch.tensor([33, 0]), return_lse=True)
    for rows in (slice(0, 33), slice(33, 80)):
        check_sequence(attn, q[0, rows], k[0, rows], v[0, rows], out[rows], lse[:, rows])
    check_sequence(attn, q[0, 33:], k[0, 33:], v[0, 33:], padded[0, 33:], padded_lse[0, :, 33:])
    check_sequence(attn, q[1], k[1], v[1], padded[1], padded_lse[1])
    assert (padded[0, :33] == 0).all()
    more_queries = attn(
        q[0], k[0, :30], v[0, :30], cu_seqlen_k=starts((10, 20)), cu_seqlen_q=starts((60, 20))
    )
    check_sequence(attn, q[0, :60], k[0, :10], v[0, :10], more_queries[:60])


def test_a_chunk_of_queries_with_all_keys_before_it() -> None:
    """The pattern's rows are the last ones; other rows are not known, and asking for them is an error."""
    _, blocks, _ = get_sparse_attn_mask(
        HEADS, 4 * BLOCK, BLOCK, 2, 3, q_start_position=5 * BLOCK, kv_seqlen=9 * BLOCK
    )
    attn = SparseAttention(BLOCK, blocks)
    assert attn.max_seqlen == 9 * BLOCK
    q, k, v = random_batch(1, 4 * BLOCK - 3, 9 * BLOCK - 3, kv_heads=HEADS)
    out, lse = attn(q, k, v, return_lse=True)
    check_sequence(attn, q[0], k[0], v[0], out[0], lse[0])
    last = attn(q[:, -1:], k, v)
    torch.testing.assert_close(last, out[:, -1:], atol=2e-3, rtol=2e-3)
    with pytest.raises(ValueError, match=r"^mask: its query blocks are of tokens 80 to 143, .* 79 to 140"):
        attn(torch.cat([q, q[:, :1]], dim=1), k, v)


@pytest.mark.parametrize("homo_head", [False, True], ids=["heads", "homogeneous"])
@pytest.mark.parametrize("seq_dim", [1, 2])
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "two-parts"])
def test_parts_of_the_keys_combine_to_the_whole(ring: bool, seq_dim: int, homo_head: bool) -> None:
    """Sequence parallelism: a chunk of queries meets the keys in parts, of which only the last is causal."""
    chunk, chunks = 3 * BLOCK, 3
    q, k, v = random_batch(2, chunk * chunks, chunk * chunks, kv_heads=HEADS)
    results, any_empty = [], False
    for n in range(chunks):
        q_start = n * chunk
        edges = [m * chunk for m in range(n + 2)] if ring else sorted({0, q_start, q_start + chunk})
        parts = []
        for first, end in pairwise(edges):
            _, blocks, _ = get_sparse_attn_mask(
                HEADS,
                chunk,
                BLOCK,
                1,
                4,
                homo_head=homo_head,
                q_start_position=q_start,
                kv_start_position=first,
                kv_seqlen=end - first,
            )
            attn = SparseAttention(BLOCK, blocks, seq_dim=seq_dim, causal=end == q_start + chunk)
            inputs = (q[:, q_start : q_start + chunk], k[:, first:end], v[:, first:end])
            if seq_dim == 2:
                inputs = tuple(x.transpose(1, 2) for x in inputs)
            parts.append(attn(*inputs, return_lse=True))
            any_empty |= bool((parts[-1][1] == -torch.inf).any())
        results.append(combine_attn_partitions(*parts, hdim=3 - seq_dim))
    result = torch.cat(results, dim=seq_dim)
    result = result if seq_dim == 1 else result.transpose(1, 2)
    assert result.dtype == DTYPE
    whole = LocalStrideSparseAttention(HEADS, chunk * chunks, BLOCK, 1, 4, homo_head=homo_head)
    for n in range(2):
        check_sequence(whole, q[n], k[n], v[n], result[n])
    assert any_empty != homo_head, "a part in which some query attends to nothing"


@pytest.mark.parametrize("homo_head", [False, True], ids=["heads", "homogeneous"])
@pytest.mark.parametrize("ring", [True, False], ids=["ring", "two-parts"])
def test_gradients_of_parts_are_those_of_the_whole(ring: bool, homo_head: bool) -> None:
    """Context parallelism, by DKernel's recipe: through the parts' outputs and their log-sum-exps.

    Every rank has a chunk of the queries, and meets the keys before it chunk by chunk, or as its own and the
    rest. What its gradients of keys and values are is summed over the ranks.
    """
    chunk, chunks, vert_stride = 2 * BLOCK, 3, 4
    tokens = chunk * chunks
    q, k, v = (x.float().requires_grad_() for x in random_batch(1, tokens, tokens))
    d_out = torch.randn_like(q)
    for rank in range(chunks):
        start = rank * chunk
        edges = [n * chunk for n in range(rank + 2)] if ring else sorted({0, start, start + chunk})
        parts = []
        for first, end in pairwise(edges):
            _, blocks, _ = get_sparse_attn_mask(
                HEADS,
                chunk,
                BLOCK,
                1,
                vert_stride,
                num_kv_heads=KV_HEADS,
                homo_head=homo_head,
                q_start_position=start,
                kv_start_position=first,
                kv_seqlen=end - first,
            )
            attn = SparseAttention(BLOCK, blocks, causal=first == start)
            parts.append(attn(q[:, start : start + chunk], k[:, first:end], v[:, first:end], return_lse=True))
        out = combine_attn_partitions(*parts, hdim=2)
        out.backward(d_out[:, start : start + chunk])
    whole = LocalStrideSparseAttention(
        HEADS, tokens, BLOCK, 1, vert_stride, num_kv_heads=KV_HEADS, homo_head=homo_head
    )
    mask = spelt_out(whole.mask.to_dense(), BLOCK, HEADS, tokens, tokens).to(DEVICE)
    _, _, expected = expected_gradients(q[0], k[0], v[0], mask, SCALE, d_out[0], None)
    for x, gradient in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad[0].double(), gradient, atol=3e-5, rtol=3e-5)


def test_a_query_without_keys_in_any_part_gets_zeros() -> None:
    out = torch.full((1, 3, 2, 4), torch.nan, requires_grad=True)
    lse = torch.full((1, 3, 2), -torch.inf, requires_grad=True)
    other, other_lse = torch.ones(1, 3, 2, 4), lse.detach().clone()
    other_lse[:, 1] = 0.5
    other, other_lse = other.requires_grad_(), other_lse.requires_grad_()
    combined = combine_attn_partitions((out, lse), (other, other_lse))
    assert (combined[:, 1] == 1).all()
    assert (combined[:, [0, 2]] == 0).all()
    combined.sum().backward()
    assert (other.grad[:, 1] == 1).all()
    assert (other.grad[:, [0, 2]] == 0).all()
    for x in (out, lse, other_lse):
        assert (x.grad == 0).all(), "none is NaN"


@pytest.mark.parametrize(("hdim", "rows"), [(0, (3, 2)), (1, (3, 2))], ids=["heads-first", "tokens-first"])
def test_parts_without_a_batch(hdim: int, rows: tuple[int, int]) -> None:
    outputs = torch.randn(2, 3, 2, 4)
    lses = torch.randn(2, *rows)
    parts = [
        (output if hdim == 0 else output.transpose(0, 1), lse)
        for output, lse in zip(outputs, lses, strict=True)
    ]
    combined = combine_attn_partitions(*parts, hdim=hdim)
    weights = lses.softmax(dim=0)[..., None]
    expected = (outputs * weights).sum(dim=0)
    torch.testing.assert_close(combined, expected if hdim == 0 else expected.transpose(0, 1))


def test_wrong_parts_are_named() -> None:
    out, lse = torch.zeros(1, 3, 2, 4), torch.zeros(1, 3, 2)
    with pytest.raises(ValueError, match=r"^x: no parts"):
        combine_attn_partitions()
    with pytest.raises(ValueError, match=r"^hdim: 3, expected 1 or 2 for outputs of shape \(1, 3, 2, 4\)"):
        combine_attn_partitions((out, lse), hdim=3)
    with pytest.raises(
        ValueError, match=r"^x: part 1 has shapes .* and \(1, 2, 3\), expected .* and \(1, 3, 2\)"
    ):
        combine_attn_partitions((out, lse), (out, lse.transpose(1, 2)))
    with pytest.raises(ValueError, match=r"^x: part 1 has shapes \(1, 3, 2, 5\)"):
        combine_attn_partitions((out, lse), (torch.zeros(1, 3, 2, 5), lse))


def test_the_names_that_dkernel_exports() -> None:
    names = {
        "SparseAttention",
        "LocalStrideSparseAttention",
        "get_sparse_attn_mask",
        "combine_attn_partitions",
    }
    assert set(dkernel.__all__) == names
    assert all(hasattr(dkernel, name) for name in names)


def test_examples_of_dkernels_readme() -> None:
    """At a sixteenth of their size."""
    num_heads, max_seq_len, block_size = 4, 512, 16
    q, k, v = (torch.rand(2, 512, num_heads, 32, device=DEVICE, dtype=DTYPE) for _ in range(3))
    attn = LocalStrideSparseAttention(num_heads, max_seq_len, block_size, 8, 8, seq_dim=1)
    attn.to(DEVICE)
    output, lse = attn(q, k, v, return_lse=True)
    for n in range(2):
        check_sequence(attn, q[n, 480:], k[n], v[n], output[n, 480:], lse[n, :, 480:], 32**-0.5)

    num_blocks = max_seq_len // block_size
    pattern = torch.rand((num_heads, num_blocks, num_blocks)) > 0.8
    for of_head in pattern:
        of_head.diagonal()[:] = True
    pattern *= torch.tril(torch.ones_like(pattern[0]))
    with pytest.warns(UserWarning, match="not KV-efficient"):
        attn = SparseAttention(block_size, pattern)
    attn.to(DEVICE)
    output = attn(q, k, v, sm_scale=0.008)
    check_sequence(attn, q[1, 470:], k[1], v[1], output[1, 470:], scale=0.008)


def test_library_examples_of_our_readme() -> None:
    """They run as they stand; the last one computes, in two parts, what the first pattern gives at once."""
    section = README.read_text().split("## Without vLLM")[1].split("\n## ")[0]
    examples = re.findall(r"```python\n(.*?)```", section, flags=re.DOTALL)
    names: dict[str, Any] = {}
    for example in examples:
        exec(example, names)
    whole = names["s2_attention"](*(names[name] for name in ("q", "k", "v", "pattern")))
    tolerance = TOLERANCES[torch.float32]
    torch.testing.assert_close(names["out"], whole[:, 768:], atol=tolerance, rtol=tolerance)
    assert len(examples) == 5
    assert all(x.grad.any() for x in names["inputs"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_heads": 0}, "num_heads: 0"),
        ({"seqlen": 0}, "seqlen: 0"),
        ({"block_size": 0}, "block_size: 0"),
        ({"vert_stride": 0}, "vert_stride: 0"),
        ({"kv_seqlen": 0}, "kv_seqlen: 0"),
        ({"local_blocks": 0}, "local_blocks: 0"),
        ({"local_blocks": (1, 2)}, r"local_blocks: \(1, 2\), expected a positive integer"),
        ({"local_blocks": -1, "causal": False}, "local_blocks: -1"),
        ({"local_blocks": (1, 0), "causal": False}, r"local_blocks: \(1, 0\), expected two"),
        ({"num_kv_heads": 3}, r"num_kv_heads: 3, expected a divisor of num_heads \(4\)"),
        ({"num_dense_heads": 5}, r"num_dense_heads: 5, expected a value in \[0, 4\]"),
        ({"num_dense_heads": 1, "homo_head": True}, "num_dense_heads: 1, expected 0 with homo_head"),
        ({"past_len": 101}, r"past_len: 101, expected a value in \[0, 100\]"),
        ({"past_len": 5, "q_start_position": 16}, "past_len: 5, expected none with q_start_position"),
        ({"q_start_position": 8}, r"q_start_position: 8, expected a multiple of block_size \(16\)"),
        ({"kv_start_position": -16}, "kv_start_position: -16"),
        ({"vert_position_type": "other"}, "vert_position_type: 'other'"),
    ],
    ids=lambda value: value[:24] if isinstance(value, str) else "",
)
def test_wrong_arguments_of_a_mask_are_named(changes: dict[str, object], message: str) -> None:
    arguments = {"num_heads": 4, "seqlen": 100, "block_size": 16, **changes}
    with pytest.raises(ValueError, match=f"^{message}"):
        get_sparse_attn_mask(**arguments)


def test_wrong_arguments_are_named() -> None:
    attn = local_stride()
    q, k, v = random_batch(2, 60, 60)
    lengths = torch.tensor([60, 60])
    for name in ("block_m", "block_n"):
        with pytest.raises(ValueError, match=rf"^{name}: 24"):
            local_stride(**{name: 24})
    with pytest.raises(ValueError, match=r"^block_size: 0"):
        LocalStrideSparseAttention(4, 100, 0, 1, 2)
    with pytest.raises(ValueError, match=r"^max_seq_len: 0"):
        LocalStrideSparseAttention(4, 0, 16, 1, 2)
    with pytest.raises(ValueError, match=r"^block_size: 8"):
        SparseAttention(8, torch.eye(4))
    with pytest.raises(ValueError, match=r"^block_size: 32, expected 16"):
        SparseAttention(32, attn.mask)
    with pytest.raises(ValueError, match=r"^sparse_pattern: shape \(5, 4\), .* at most as many query blocks"):
        SparseAttention(16, torch.ones(5, 4))
    with pytest.raises(
        ValueError, match=r"^sparse_pattern: shape \(4,\), expected \[query blocks, key blocks\]"
    ):
        SparseAttention(16, torch.ones(4), causal=False)
    with pytest.raises(ValueError, match=r"^mask: query block 1 of head 0 attends to the later key block 2"):
        SparseAttention(16, torch.ones(4, 5))
    with pytest.raises(ValueError, match=r"^causal: False, expected True as in sparse_pattern"):
        SparseAttention(16, attn.mask, causal=False)
    with pytest.raises(ValueError, match=r"^seq_dim: 3"):
        local_stride(seq_dim=3)
    with pytest.raises(ValueError, match=r"^num_dense_heads: 1"):
        local_stride(homo_head=True, num_dense_heads=1)
    with pytest.raises(ValueError, match=r"^num_kv_heads: 3"):
        local_stride(num_kv_heads=3)
    with pytest.raises(ValueError, match=r"^active_head_range: \(2, 5\)"):
        local_stride(active_head_range=[2, 5])
    with pytest.raises(ValueError, match=r"^active_head_range: \(0, 1, 2\)"):
        local_stride(active_head_range=(0, 1, 2))
    with pytest.raises(ValueError, match=r"^k: None, expected keys with v"):
        attn(q, None, v, split_qkv=lambda x: (x, x, x))
    with pytest.raises(ValueError, match=r"^split_qkv: None"):
        attn(q)
    with pytest.raises(ValueError, match=r"^cu_seqlen_k: None"):
        attn(q[0], k[0], v[0])
    with pytest.raises(ValueError, match=r"^cu_seqlen_q: None, .*: 60 queries .* 2 sequences .* \(50\)"):
        attn(q[0], k[0, :50], v[0, :50], cu_seqlen_k=torch.tensor([0, 20, 50]))
    with pytest.raises(ValueError, match=r"^q: shape .* expected 3 dimensions"):
        attn(q, k, v, cu_seqlen_k=torch.tensor([0, 60]))
    with pytest.raises(ValueError, match=r"^q: shape .* expected 4 dimensions"):
        attn(q[0], k[0], v[0], seqlens=lengths)
    with pytest.raises(ValueError, match=r"^q: 7 queries, expected 1 or 60"):
        attn(q[:, :7], k, v, seqlens=lengths)
    with pytest.raises(ValueError, match=r"^seqlens: sequence 1 has 1 tokens of left padding and 60"):
        attn(q, k, v, seqlens=lengths, left_paddings=torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=r"^left_paddings: shape \(1,\), expected \[2\]"):
        attn(q, k, v, left_paddings=torch.tensor([0]))
    with pytest.raises(ValueError, match=r"^k: a sequence of 200 tokens, expected at most 192"):
        attn(*random_batch(1, 200, 200))
