"""DKernel's interface: its patterns from its formula, its inputs sequence by sequence."""

from __future__ import annotations

import pytest
import torch

from s2_kernels import dkernel
from s2_kernels.attention import attend
from s2_kernels.dkernel import LocalStrideSparseAttention, SparseAttention
from tests.contiguous import expected_attention, random_causal_mask
from tests.paged import DEVICE, TOLERANCES

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
    expected, expected_lse = expected_attention(q, k, v, attn.mask.to_dense(), BLOCK, scale)
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


def test_other_patterns_stay_masks() -> None:
    assert local_stride(num_dense_heads=1).pattern is None
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


def test_non_causal_attention_is_refused_by_name() -> None:
    with pytest.raises(NotImplementedError, match=r"^causal: False"):
        local_stride(causal=False)
    with pytest.raises(NotImplementedError, match=r"^causal: False"):
        SparseAttention(BLOCK, torch.ones(4, 4), causal=False)


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
    with pytest.raises(ValueError, match=r"^sparse_pattern: shape \(4, 5\)"):
        SparseAttention(16, torch.ones(4, 5))
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
