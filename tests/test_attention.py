"""Attention without an engine against the specification, by every implementation."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from s2_kernels import hopper
from s2_kernels.attention import attend, s2_attention
from s2_kernels.contiguous.sequences import Span
from s2_kernels.hopper import prefill
from s2_kernels.launch.choice import Impl
from s2_kernels.masks import BlockMask, local_window, pattern_block_mask, sink_blocks
from s2_kernels.pattern import S2Pattern
from s2_kernels.reference import attention_reference
from tests.contiguous import expected_attention, random_causal_mask
from tests.gluon_emulator import emulated_prefill
from tests.paged import DEVICE, DTYPE_NAMES, DTYPES, TOLERANCES

PATTERN = S2Pattern.build(4, 2, block_size=16, local_blocks=2, vert_stride=3)
PER_QUERY = S2Pattern.build(
    6, 2, block_size=32, local_blocks=1, vert_stride=4, head_sliding_offset=1, pattern_heads="query"
)
PATTERNS = {"kv": PATTERN, "query": PER_QUERY}
# What the Hopper kernel does not take goes to the portable one on a GPU, and only if told to on the CPU.
PORTABLE: Impl | None = None if DEVICE == "cuda" else "triton"


@pytest.fixture(params=["triton", "torch", "reference"])
def impl(request: pytest.FixtureRequest) -> Impl:
    chosen: Impl = request.param
    return chosen


@pytest.fixture
def device(impl: Impl) -> str:
    """Where tensors are for this implementation."""
    return DEVICE if impl == "triton" else "cpu"


@pytest.fixture
def attention(impl: Impl) -> Callable[..., Any]:
    return partial(s2_attention, impl=impl)


def random_inputs(
    pattern: S2Pattern, queries: int, keys: int, device: str, dtype: torch.dtype = torch.float16
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """q, k and v of one sequence, [tokens, heads, head_size]."""
    generator = torch.Generator().manual_seed(queries)
    return tuple(
        torch.randn(tokens, heads, 24, generator=generator).to(device, dtype)
        for tokens, heads in (
            (queries, pattern.num_heads),
            (keys, pattern.num_kv_heads),
            (keys, pattern.num_kv_heads),
        )
    )


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    tolerance = TOLERANCES[expected.dtype]
    torch.testing.assert_close(actual, expected, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("dtype", DTYPES, ids=DTYPE_NAMES.get)
@pytest.mark.parametrize("name", PATTERNS)
def test_batch(name: str, dtype: torch.dtype, device: str, attention: Callable[..., Any]) -> None:
    pattern = PATTERNS[name]
    sequences = [random_inputs(pattern, queries, 141, device, dtype) for queries in (141, 141)]
    sequences[1] = tuple(x.flip(0) for x in sequences[1])
    q, k, v = (torch.stack(tensors) for tensors in zip(*sequences, strict=True))
    out, lse = attention(q, k, v, pattern, return_lse=True)
    assert out.shape == q.shape
    assert lse.shape == (2, pattern.num_heads, 141)
    blocks = pattern.block_mask(-(-141 // pattern.block_size))
    for n in range(2):
        assert_close(out[n], attention_reference(q[n], k[n], v[n], pattern, 24**-0.5, [0, 141]))
        _, expected_lse = expected_attention(q[n], k[n], v[n], blocks, pattern.block_size, 24**-0.5)
        assert_close(lse[n], expected_lse)


@pytest.mark.parametrize("name", PATTERNS)
def test_past(name: str, device: str, attention: Callable[..., Any]) -> None:
    pattern = PATTERNS[name]
    q, k, v = random_inputs(pattern, 21, 150, device)
    out = attention(q[None], k[None], v[None], pattern, scale=0.5)
    assert_close(out[0], attention_reference(q, k, v, pattern, 0.5, [0, 21], [0, 150]))


@pytest.mark.parametrize("name", PATTERNS)
def test_packed(name: str, device: str, attention: Callable[..., Any]) -> None:
    pattern = PATTERNS[name]
    starts = [0, 33, 33, 98]
    q, k, v = random_inputs(pattern, 98, 98, device)
    out, lse = attention(q, k, v, pattern, cu_seqlens_q=torch.tensor(starts), return_lse=True)
    assert_close(out, attention_reference(q, k, v, pattern, 24**-0.5, starts))
    assert lse.shape == (pattern.num_heads, 98)
    blocks = pattern.block_mask(4)
    _, expected_lse = expected_attention(q[:33], k[:33], v[:33], blocks, pattern.block_size, 24**-0.5)
    assert_close(lse[:, :33], expected_lse)


def test_packed_with_a_past(device: str, attention: Callable[..., Any]) -> None:
    q_starts, k_starts = [0, 1, 20, 20, 50], [0, 100, 119, 119, 180]
    q, k, v = random_inputs(PATTERN, 50, 180, device)
    out = attention(
        q,
        k,
        v,
        PATTERN,
        cu_seqlens_q=torch.tensor(q_starts, dtype=torch.int32, device=device),
        cu_seqlens_k=torch.tensor(k_starts, dtype=torch.int32, device=device),
    )
    assert_close(out, attention_reference(q, k, v, PATTERN, 24**-0.5, q_starts, k_starts))


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_block_mask_with_empty_rows(heads: int, device: str, attention: Callable[..., Any]) -> None:
    dense = random_causal_mask(heads, 6, 0.35, seed=heads)
    assert not dense.any(dim=2).all()
    with pytest.warns(UserWarning, match="not KV-efficient"):
        mask = BlockMask.from_dense(dense, 16)
    q, k, v = random_inputs(PATTERN, 80, 90, device)
    out, lse = attention(q[None], k[None], v[None], mask, return_lse=True)
    expected, expected_lse = expected_attention(q, k, v, dense, 16, 24**-0.5)
    assert_close(out[0], expected)
    assert_close(lse[0], expected_lse)
    assert (lse == -torch.inf).any()
    assert (out[0][(lse[0] == -torch.inf).T] == 0).all()


def test_window_over_everything_is_dense_causal_attention(device: str, attention: Callable[..., Any]) -> None:
    q, k, v = random_inputs(PATTERN, 91, 91, device, torch.float32)
    mask = BlockMask.from_dense(local_window(6, 1) | sink_blocks(6, 6), 16)
    out = attention(q[None], k[None], v[None], mask)
    q, k, v = (x.transpose(0, 1) for x in (q, k.repeat_interleave(2, 1), v.repeat_interleave(2, 1)))
    dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    assert_close(out[0].transpose(0, 1), dense)


@pytest.fixture
def on_hopper(monkeypatch: pytest.MonkeyPatch) -> list[S2Pattern]:
    """The patterns of the calls that took the Hopper path, whose kernel is emulated on the CPU."""
    kernel = prefill.contiguous_prefill_fwd
    if DEVICE == "cpu":
        monkeypatch.setattr(prefill, "prefill_fwd_kernel", emulated_prefill())
        monkeypatch.setattr(hopper, "_is_hopper", lambda device: True)
    elif not hopper._is_hopper(torch.device(DEVICE)):
        # Another GPU takes the portable kernel, which the other tests are about.
        pytest.skip("needs a Hopper GPU")
    calls: list[S2Pattern] = []

    def spy(*args: object) -> None:
        calls.append(args[4])
        kernel(*args)

    monkeypatch.setattr(prefill, "contiguous_prefill_fwd", spy)
    return calls


HOPPER_PATTERNS = {
    "ungrouped": S2Pattern.build(4, 4, local_blocks=2, vert_stride=4),
    "kv": S2Pattern.build(8, 2, local_blocks=2, vert_stride=3, head_sliding_offset=1),
    "query": S2Pattern.build(8, 2, local_blocks=1, vert_stride=4, pattern_heads="query"),
    "kinds": S2Pattern.build(8, 4, local_blocks=2, vert_stride=3, full_heads=[2], sink_blocks=1),
}
HOPPER_CASES = [
    pytest.param(pattern, head_size, dtype, id=f"{name}-{head_size}-{DTYPE_NAMES[dtype]}")
    for name, pattern in HOPPER_PATTERNS.items()
    for head_size in (64, 128)
    for dtype in (torch.float16, torch.bfloat16)
    if DEVICE == "cuda" or (head_size, dtype) == (64, torch.float16)
]


def check_spans(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    out: torch.Tensor,
    lse: torch.Tensor,
) -> None:
    blocks = pattern.block_mask(-(-max(span.num_keys for span in spans) // pattern.block_size))
    scale = q.shape[-1] ** -0.5
    for batch, q_start, q_len, k_start, k_len in spans:
        rows, keys = slice(q_start, q_start + q_len), slice(k_start, k_start + k_len)
        inputs = q[batch, rows], k[batch, keys], v[batch, keys]
        _, expected_lse = expected_attention(*inputs, blocks, pattern.block_size, scale)
        assert_close(out[batch, rows], attention_reference(*inputs, pattern, scale, [0, q_len], [0, k_len]))
        torch.testing.assert_close(lse[batch, :, rows], expected_lse, atol=1e-4, rtol=1e-4)


def check_on_hopper(
    pattern: S2Pattern,
    head_size: int,
    dtype: torch.dtype,
    batch: int,
    queries: int,
    keys: int,
    spans: tuple[Span, ...],
) -> None:
    """Keys of no sequence are NaN, and so is all of the output that is not written."""
    generator = torch.Generator().manual_seed(keys)
    heads = pattern.num_heads
    q = torch.randn(batch, queries, heads, head_size, generator=generator).to(DEVICE, dtype)
    k, v = (x for x in torch.full((2, batch, keys, pattern.num_kv_heads, head_size), torch.nan).to(q))
    for span in spans:
        of_span = slice(span.key_start, span.key_start + span.num_keys)
        for x in (k, v):
            x[span.batch, of_span] = torch.randn(x[span.batch, of_span].shape, generator=generator).to(x)
    out = torch.full_like(q, torch.nan)
    out, lse = attend(q, k, v, pattern, spans, out=out, return_lse=True, impl="hopper")
    assert lse is not None
    check_spans(q, k, v, pattern, spans, out, lse)


@pytest.mark.parametrize(("pattern", "head_size", "dtype"), HOPPER_CASES)
def test_batch_on_hopper(
    pattern: S2Pattern, head_size: int, dtype: torch.dtype, on_hopper: list[S2Pattern]
) -> None:
    lengths = [(1, 1), (63, 63), (65, 65), (129, 129), (700, 700), (1, 700), (100, 513)]
    for queries, keys in lengths:
        check_on_hopper(
            pattern, head_size, dtype, 2, queries, keys, tuple(Span(n, 0, queries, 0, keys) for n in range(2))
        )
    assert on_hopper == [pattern] * len(lengths)


@pytest.mark.parametrize(("pattern", "head_size", "dtype"), HOPPER_CASES)
def test_packed_with_a_past_on_hopper(
    pattern: S2Pattern, head_size: int, dtype: torch.dtype, on_hopper: list[S2Pattern]
) -> None:
    """Sequences one after the other in q, and with gaps between them in k and v."""
    spans, queries, keys = [], 0, 5
    for q_len, k_len in ((1, 300), (70, 513), (0, 0), (200, 200), (129, 386), (65, 65)):
        spans.append(Span(0, queries, q_len, keys, k_len))
        queries, keys = queries + q_len, keys + k_len + 3
    check_on_hopper(pattern, head_size, dtype, 1, queries, keys, tuple(spans))
    assert on_hopper == [pattern]


@pytest.mark.parametrize(("pattern", "head_size", "dtype"), HOPPER_CASES)
def test_fused_inputs_on_hopper(
    pattern: S2Pattern, head_size: int, dtype: torch.dtype, on_hopper: list[S2Pattern]
) -> None:
    """q, k and v are parts of one tensor; one that TMA cannot load takes the portable kernel."""
    heads = [pattern.num_heads, pattern.num_kv_heads, pattern.num_kv_heads]
    fused = torch.randn(2, 333, sum(heads), head_size, device=DEVICE).to(dtype)
    q, k, v = fused.split(heads, dim=2)
    spans = tuple(Span(n, 0, 333, 0, 333) for n in range(2))
    check_spans(q, k, v, pattern, spans, *s2_attention(q, k, v, pattern, return_lse=True, impl="hopper"))
    assert on_hopper == [pattern]
    k = torch.nn.functional.pad(k, (0, 8))[..., :head_size]
    check_refused(r"k: shape .* expected rows as TMA loads them", q, k, v, pattern, spans)
    assert on_hopper == [pattern]


def check_refused(
    reason: str,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    out: torch.Tensor | None = None,
) -> None:
    """The Hopper kernel says why it does not take this; the portable one does."""
    with pytest.raises(ValueError, match=reason):
        attend(q, k, v, pattern, spans, out=out, impl="hopper")
    out, lse = attend(q, k, v, pattern, spans, out=out, return_lse=True, impl=PORTABLE)
    assert lse is not None
    check_spans(q, k, v, pattern, spans, out, lse)


def test_queries_with_gaps_and_block_masks_take_the_portable_kernel(on_hopper: list[S2Pattern]) -> None:
    pattern = HOPPER_PATTERNS["kv"]
    q, k, v = (torch.randn(1, 80, heads, 64, device=DEVICE).half() for heads in (8, 2, 2))
    for span in (Span(0, 0, 79, 0, 79), Span(0, 1, 79, 0, 79)):
        check_refused(r"q: tokens between its sequences", q, k, v, pattern, (span,))
    with pytest.raises(ValueError, match=r"pattern: a block mask"):
        s2_attention(q, k, v, BlockMask.from_pattern(pattern, 2), impl="hopper")
    with pytest.raises(ValueError, match=r"^out: strides"):
        attend(q, k, v, pattern, (Span(0, 0, 80, 0, 80),), out=q.repeat(1, 1, 1, 2)[..., ::2], impl=PORTABLE)
    assert on_hopper == []


@pytest.mark.parametrize("name", ["q", "k", "v", "out"])
def test_batches_with_gaps_take_the_portable_kernel(name: str, on_hopper: list[S2Pattern]) -> None:
    """A sequence's rows do not follow those of the one before it."""
    heads = {"q": 8, "k": 2, "v": 2, "out": 8}
    tensors = {x: torch.randn(2, 70, n, 64, device=DEVICE).half() for x, n in heads.items()}
    tensors[name] = torch.nn.functional.pad(tensors[name], (0, 0, 0, 0, 0, 5))[:, :70]
    spans = tuple(Span(n, 0, 70, 0, 70) for n in range(2))
    reason = rf"{name}: strides .*, expected no gap"
    check_refused(reason, pattern=HOPPER_PATTERNS["kv"], spans=spans, **tensors)
    assert on_hopper == []


def test_tables_that_a_cuda_graph_reads_are_kept(
    on_hopper: list[S2Pattern], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The caches of tables forget; a graph would go on reading their memory."""
    held: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr("s2_kernels.launch.cuda_graphs._HELD", held)
    q, k, v = (x.new_ones(1, 70, 4, 64) for x in random_inputs(PATTERN, 1, 1, DEVICE))
    s2_pattern = S2Pattern.build(4, 4, local_blocks=2, vert_stride=3)
    calls: list[tuple[S2Pattern | BlockMask, Impl, int]] = [
        (s2_pattern, "hopper", 3),
        (pattern_block_mask(s2_pattern, 70), "triton", 5),
    ]
    for pattern, impl, tables in calls:
        s2_attention(q, k, v, pattern, impl=impl)
        assert not held
        with monkeypatch.context() as capture:
            capture.setattr(torch.cuda, "is_initialized", lambda: True)
            capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
            s2_attention(q, k, v, pattern, impl=impl)
        assert [len(kept) for kept in held] == [tables]
        held.clear()
    assert on_hopper == 2 * [s2_pattern]


def test_any_strides(device: str, attention: Callable[..., Any]) -> None:
    fused = torch.randn(2, 8, 2, 70, 24, device=device, dtype=torch.float16)
    q, k, v = (x.flatten(1, 2).transpose(1, 2) for x in fused.split([4, 2, 2], dim=1))
    q, k, v = q[:, :, ::2], k[:, :, ::2], v[:, :, ::2]
    assert not q.is_contiguous()
    out = attention(q, k, v, PATTERN)
    for n in range(2):
        assert_close(out[n], attention_reference(q[n], k[n], v[n], PATTERN, 24**-0.5, [0, 70]))


def test_out_is_written_where_there_are_sequences(device: str, impl: Impl) -> None:
    q, k, v = (x[None] for x in random_inputs(PATTERN, 40, 50, device))
    out = torch.full_like(q, torch.nan)
    mask = BlockMask.from_pattern(PATTERN, 4)
    result, lse = attend(q, k, v, mask, (Span(0, 5, 30, 10, 40),), out=out, return_lse=True, impl=impl)
    assert result is out
    assert out[:, :5].isnan().all()
    assert out[:, 35:].isnan().all()
    expected = attention_reference(q[0, 5:35], k[0, 10:], v[0, 10:], PATTERN, 24**-0.5, [0, 30], [0, 40])
    assert_close(out[0, 5:35], expected)
    assert lse is not None
    assert lse[0, :, :5].isinf().all()
    assert lse[0, :, 5:35].isfinite().all()


@pytest.mark.parametrize("shape", [(0, 7), (2, 0)], ids=str)
def test_no_queries(shape: tuple[int, int], device: str, attention: Callable[..., Any]) -> None:
    q, k = (torch.randn(*shape, heads, 24, device=device) for heads in (4, 2))
    assert attention(q, k, k, PATTERN).shape == q.shape


def test_wrong_arguments_are_named(device: str, impl: Impl, attention: Callable[..., Any]) -> None:
    packed = random_inputs(PATTERN, 20, 20, device)
    q, k, v = (x[None] for x in packed)
    starts = torch.tensor([0, 20])
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: None"):
        attention(*packed, PATTERN)
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: \[0, 21\], expected .* 0 to 20"):
        attention(*packed, PATTERN, cu_seqlens_q=torch.tensor([0, 21]))
    with pytest.raises(ValueError, match=r"^cu_seqlens_k: 3 values, expected 2"):
        attention(*packed, PATTERN, cu_seqlens_q=starts, cu_seqlens_k=torch.tensor([0, 5, 20]))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: sequence 1 has 15 queries"):
        attention(
            *packed, PATTERN, cu_seqlens_q=torch.tensor([0, 5, 20]), cu_seqlens_k=torch.tensor([0, 6, 20])
        )
    with pytest.raises(ValueError, match=r"^q: shape .* with cu_seqlens"):
        attention(q, k, v, PATTERN, cu_seqlens_q=starts)
    with pytest.raises(ValueError, match=r"^q: 20 queries, expected at most .* \(12\)"):
        attention(q, k[:, :12], v[:, :12], PATTERN)
    with pytest.raises(ValueError, match=r"^pattern: of 6 query"):
        attention(q, k, v, PER_QUERY)
    with pytest.raises(ValueError, match=r"^k: shape"):
        attention(q, k[..., :8], v, PATTERN)
    with pytest.raises(ValueError, match=r"^q: shape"):
        attention(q[..., :0], k[..., :0], v[..., :0], PATTERN)
    with pytest.raises(ValueError, match=r"^k: 2 heads, expected a divisor of q's 3"):
        attention(q[:, :, :3], k, v, PATTERN)
    with pytest.raises(ValueError, match=r"^v: shape"):
        attention(q, k, v[:, :9], PATTERN)
    with pytest.raises(ValueError, match=r"^v: torch.float32"):
        attention(q, k, v.float(), PATTERN)
    with pytest.raises(ValueError, match=r"^scale: -1"):
        attention(q, k, v, PATTERN, scale=-1.0)
    with pytest.raises(ValueError, match=r"^mask: covers 16 tokens, expected at least 20"):
        attention(q, k, v, BlockMask.from_pattern(PATTERN, 1))
    with pytest.raises(ValueError, match=r"^mask: 3 heads, expected 1, 2 \(KV heads\) or 4"):
        attention(q, k, v, BlockMask.from_dense(local_window(2, 1).repeat(3, 1, 1), 16))
    mask = BlockMask.from_pattern(PATTERN, 2)
    with pytest.raises(ValueError, match=r"^out: "):
        attend(q, k, v, mask, (Span(0, 0, 20, 0, 20),), out=q[:, :3], impl=impl)


def test_cpu_path_needs_no_triton() -> None:
    script = """
import sys
sys.modules["triton"] = None
import torch
from s2_kernels.dkernel import LocalStrideSparseAttention
q = torch.randn(1, 40, 2, 8)
assert LocalStrideSparseAttention(2, 64, 16, 1, 2)(q, q, q).isfinite().all()
"""
    environment = {"PYTHONPATH": ":".join(sys.path)}
    done = subprocess.run(
        [sys.executable, "-c", script], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
