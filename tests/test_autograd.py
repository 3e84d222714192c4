"""Attention under autograd: its operators, and what people put around it in training."""

from __future__ import annotations

import gc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import checkpoint

from s2_kernels.attention import attend, s2_attention
from s2_kernels.contiguous import operators
from s2_kernels.contiguous.sequences import Span
from s2_kernels.dkernel import LocalStrideSparseAttention, SparseAttention
from s2_kernels.launch.choice import Impl
from s2_kernels.masks import BlockMask, pattern_block_mask
from s2_kernels.pattern import S2Pattern
from tests.contiguous import expected_gradients, random_causal_mask, spelt_out
from tests.paged import DEVICE
from tests.test_backward import TOLERANCES, block_mask

HEADS, KV_HEADS, HEAD_SIZE = 4, 2, 16
PATTERN = S2Pattern.build(HEADS, KV_HEADS, block_size=16, local_blocks=1, vert_stride=3)
IMPLS: list[Impl] = ["triton", "torch", "reference"]
KINDS = S2Pattern.build(
    HEADS, KV_HEADS, block_size=16, local_blocks=1, vert_stride=None, sink_blocks=1, full_heads=[1]
)
ALONG = {"s2": PATTERN, "kinds": KINDS, "mask": block_mask(random_causal_mask(KV_HEADS, 5, 0.5), 16)}


def random_inputs(
    *shapes: tuple[int, ...], dtype: torch.dtype = torch.float16, device: str = DEVICE
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(len(shapes))
    return [torch.randn(shape, generator=generator).to(device, dtype).requires_grad_() for shape in shapes]


def batch(batch: int, queries: int, keys: int, **kind: Any) -> list[torch.Tensor]:
    """q, k and v."""
    kv = (batch, keys, KV_HEADS, HEAD_SIZE)
    return random_inputs((batch, queries, HEADS, HEAD_SIZE), kv, kv, **kind)


def masked(pattern: S2Pattern | BlockMask, queries: int, keys: int) -> torch.Tensor:
    """bool [HEADS, queries, keys]."""
    mask = pattern if isinstance(pattern, BlockMask) else pattern_block_mask(pattern, keys)
    return spelt_out(mask.to_dense(), 16, HEADS, keys, keys)[:, keys - queries :].to(DEVICE)


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    tolerance = TOLERANCES[actual.dtype]
    torch.testing.assert_close(actual.double(), expected.double(), atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ALONG)
def test_gradients_of_a_batch(name: str, impl: Impl) -> None:
    """q, k and v are parts of one tensor, and both results are used."""
    pattern = ALONG[name]
    (fused,) = random_inputs((2, 40, HEADS + 2 * KV_HEADS, HEAD_SIZE))
    q, k, v = fused.split([HEADS, KV_HEADS, KV_HEADS], dim=2)
    q = q[:, 7:]
    out, lse = s2_attention(q, k, v, pattern, return_lse=True, impl=impl)
    d_out, d_lse = (torch.randn_like(x) for x in (out, lse))
    lse = lse.where(lse > -torch.inf, 0)
    ((out * d_out).sum() + (lse * d_lse).sum()).backward()
    assert fused.grad is not None
    mask, scale = masked(pattern, 33, 40), HEAD_SIZE**-0.5
    for n in range(2):
        inputs = (q[n], k[n], v[n])
        expected, _, (dq, dk, dv) = expected_gradients(*inputs, mask, scale, d_out[n], d_lse[n])
        assert_close(out[n], expected)
        dq = torch.nn.functional.pad(dq, (0, 0, 0, 0, 7, 0))
        assert_close(fused.grad[n], torch.cat([dq, dk, dv], dim=1))


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients_of_packed_sequences(impl: Impl) -> None:
    q_starts, k_starts = [0, 1, 20, 20, 45], [0, 33, 52, 60, 110]
    q, k, v = (x[0].detach().requires_grad_() for x in batch(1, 45, 110))
    starts = [torch.tensor(x, dtype=torch.int32, device=DEVICE) for x in (q_starts, k_starts)]
    out = s2_attention(q, k, v, PATTERN, scale=0.4, cu_seqlens_q=starts[0], cu_seqlens_k=starts[1], impl=impl)
    d_out = torch.randn_like(out)
    out.backward(d_out)
    for n in range(4):
        rows, keys = slice(*q_starts[n : n + 2]), slice(*k_starts[n : n + 2])
        mask = masked(PATTERN, rows.stop - rows.start, keys.stop - keys.start)
        _, _, expected = expected_gradients(q[rows], k[keys], v[keys], mask, 0.4, d_out[rows], None)
        for tensor, of_sequence, gradient in zip((q, k, v), (rows, keys, keys), expected, strict=True):
            assert_close(tensor.grad[of_sequence], gradient)


@pytest.mark.parametrize("seq_dim", [1, 2])
@pytest.mark.parametrize("mixed", [False, True], ids=["pattern", "mask"])
def test_gradients_of_padded_sequences(mixed: bool, seq_dim: int) -> None:
    """DKernel's layout: padding holds NaN, and its gradients are zeros."""
    attn = LocalStrideSparseAttention(
        HEADS, 80, 16, 1, 3, num_kv_heads=KV_HEADS, seq_dim=seq_dim, num_dense_heads=int(mixed)
    )
    lefts, lengths = [20, 0], [13, 41]
    inputs = [x.detach() for x in batch(2, 50, 50)]
    for x in inputs:
        for n, (left, length) in enumerate(zip(lefts, lengths, strict=True)):
            x[n, :left] = x[n, left + length :] = torch.nan
    leaves = [(x.transpose(1, 2) if seq_dim == 2 else x).requires_grad_() for x in inputs]
    out, lse = attn(
        *leaves, left_paddings=torch.tensor(lefts), seqlens=torch.tensor(lengths), return_lse=True
    )
    out = out.transpose(1, 2) if seq_dim == 2 else out
    d_out, d_lse = torch.randn_like(out), torch.randn_like(lse)
    ((out * d_out).sum() + (lse.where(lse > -torch.inf, 0) * d_lse).sum()).backward()
    gradients = [x.grad.transpose(1, 2) if seq_dim == 2 else x.grad for x in leaves]
    for n, (left, length) in enumerate(zip(lefts, lengths, strict=True)):
        rows = slice(left, left + length)
        mask = masked(attn.mask, length, length)
        some = [x[n, rows] for x in inputs]
        of_rows = (d_out[n, rows], d_lse[n, :, rows])
        _, _, expected = expected_gradients(*some, mask, HEAD_SIZE**-0.5, *of_rows)
        for actual, gradient in zip(gradients, expected, strict=True):
            assert_close(actual[n, rows], gradient)
            actual[n, rows] = 0
    assert all((actual == 0).all() for actual in gradients)


def test_gradients_of_one_input_or_of_one_result() -> None:
    q, k, v = (x.detach() for x in batch(1, 20, 20))
    mask = masked(PATTERN, 20, 20)
    out, lse = s2_attention(q, k, v.requires_grad_(), PATTERN, return_lse=True)
    out.sum().backward()
    _, _, (_, _, expected) = expected_gradients(q[0], k[0], v[0], mask, 0.25, torch.ones_like(q[0]), None)
    assert_close(v.grad[0], expected)
    lse = s2_attention(q.requires_grad_(), k, v.detach(), PATTERN, return_lse=True)[1]
    (dq,) = torch.autograd.grad(lse.sum(), q)
    _, _, (expected, _, _) = expected_gradients(
        q[0], k[0], v[0], mask, 0.25, torch.zeros_like(q[0]), torch.ones_like(lse[0])
    )
    assert_close(dq[0], expected)


GRADCHECKED: dict[str, Callable[..., Any]] = {
    "past": lambda q, k, v: s2_attention(q[None], k[None], v[None], TINY, return_lse=True),
    "packed": lambda q, k, v: s2_attention(
        q, k, v, TINY, cu_seqlens_q=torch.tensor([0, 3, 7]), cu_seqlens_k=torch.tensor([0, 4, 9]), scale=0.9
    ),
    "both-ways": lambda q, k, v: s2_attention(q[None], k[None], v[None], BOTH_WAYS),
    "homogeneous": lambda q, k, v: SparseAttention(16, torch.ones(1, 1))(q[None], k[None], v[None]),
}
TINY = S2Pattern.build(2, 1, block_size=2, local_blocks=1, vert_stride=2, pattern_heads="query")
BOTH_WAYS = BlockMask.from_dense(torch.tensor([[[0, 1, 1], [0, 0, 0]]]).bool(), 4, causal=False)


@pytest.mark.parametrize("name", GRADCHECKED)
def test_gradcheck(name: str) -> None:
    inputs = random_inputs((7, 2, 3), (9, 1, 3), (9, 1, 3), dtype=torch.float64, device="cpu")
    assert torch.autograd.gradcheck(GRADCHECKED[name], inputs)


def test_opcheck() -> None:
    """PyTorch's own checks of an operator: its schema, its stand-in without data, its derivative, dynamic
    shapes."""
    q, k, v = batch(2, 19, 21)
    for pattern, spans in (
        (PATTERN, None),
        (ALONG["mask"], torch.tensor([[0, 0, 9, 3, 12], [1, 2, 17, 0, 21]])),
    ):
        arguments = (q, k, v, spans, pattern.handle, None, None)
        torch.library.opcheck(torch.ops.s2.attention, arguments)
    out, lse = torch.ops.s2.attention(*arguments)
    tensors = [x.detach() for x in (q, k, v, out, lse, torch.ones_like(out))]
    for d_lse in (None, torch.ones_like(lse).detach()):
        torch.library.opcheck(torch.ops.s2.attention_backward, (*tensors, d_lse, *arguments[3:]))
    starts = torch.tensor([0, 5, 19])
    torch.library.opcheck(torch.ops.s2.packed_spans, (starts, starts + 0, 19, 19, True))
    torch.library.opcheck(torch.ops.s2.padded_spans, (torch.tensor([1, 0]), None, 2, 19, 19))


class Layouts(torch.nn.Module):
    """Every layout in one function, with other work around it."""

    def __init__(self) -> None:
        super().__init__()
        self.padded = LocalStrideSparseAttention(HEADS, 64, 16, 1, 3, num_kv_heads=KV_HEADS)

    def forward(
        self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, starts: torch.Tensor, lengths: torch.Tensor
    ) -> torch.Tensor:
        out, lse = s2_attention(2 * q, k, v, PATTERN, return_lse=True)
        result = (out * out).sum() + lse.sum()
        for pattern in ALONG.values():
            packed = s2_attention(q[0], k[0], v[0], pattern, scale=0.3, cu_seqlens_q=starts)
            result = result + packed.cos().sum()
        padded = self.padded(q, k, v, seqlens=lengths, left_paddings=lengths // 7)
        packed = self.padded(q[0], k[0], v[0], cu_seqlen_k=starts)
        return result + padded.sin().sum() + packed.sin().sum()


@pytest.mark.parametrize("dynamic", [False, True])
def test_compiles_as_a_whole(dynamic: bool) -> None:
    torch._dynamo.reset()
    layouts = Layouts()
    compiled = torch.compile(layouts, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for tokens in (33, 40) if dynamic else (33,):
        inputs = batch(2, tokens, tokens)
        lengths = (torch.tensor([0, 10, tokens]), torch.tensor([tokens - 5, 21]))
        results = [function(*inputs, *lengths) for function in (layouts, compiled)]
        assert torch.equal(*results)
        gradients = [torch.autograd.grad(result, inputs) for result in results]
        for eager, other in zip(*gradients, strict=True):
            assert torch.equal(eager, other)


def test_compiled_calls_follow_their_pattern() -> None:
    torch._dynamo.reset()
    q, k, v = (x.detach() for x in batch(1, 40, 40))
    compiled = torch.compile(s2_attention, backend="aot_eager", fullgraph=True)
    masks = [block_mask(random_causal_mask(1, 3, 0.5, seed=n), 16) for n in range(2)]
    for pattern in (PATTERN, S2Pattern.build(HEADS, KV_HEADS, block_size=16), *masks, masks[0]):
        assert torch.equal(compiled(q, k, v, pattern), s2_attention(q, k, v, pattern))


def test_a_traced_graph_keeps_its_mask() -> None:
    """It has no more of it than a handle."""
    q, k, v = (x.detach() for x in batch(1, 40, 40))
    mask = block_mask(random_causal_mask(1, 3, 0.5), 16)
    expected, handle = s2_attention(q, k, v, mask), mask.handle

    def call(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return torch.ops.s2.attention(q, k, v, None, handle, None, None)[0]

    graph = make_fx(call, tracing_mode="fake")(q, k, v)
    del mask
    gc.collect()
    assert torch.equal(graph(q, k, v), expected)


def test_a_mask_may_go_before_its_gradient_is_asked_for() -> None:
    q, k, v = batch(1, 40, 40)
    out = s2_attention(q, k, v, block_mask(random_causal_mask(1, 3, 0.5), 16))
    gc.collect()
    out.sum().backward()
    assert v.grad is not None
    assert v.grad.any()


@pytest.mark.parametrize("use_reentrant", [True, False])
def test_activation_checkpointing(use_reentrant: bool) -> None:
    inputs = batch(1, 40, 40)

    def block(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return s2_attention(q.sin(), k, v, PATTERN).cos()

    expected = torch.autograd.grad(block(*inputs).sum(), inputs)
    checkpoint(block, *inputs, use_reentrant=use_reentrant).sum().backward()
    for x, gradient in zip(inputs, expected, strict=True):
        assert torch.equal(x.grad, gradient)


def test_autocast() -> None:
    """Inputs in autocast's type, as PyTorch's own attention gets them; gradients in their own."""
    dtype = torch.bfloat16
    q, k, v = batch(1, 40, 40, dtype=torch.float32)
    k = k.detach().to(dtype).requires_grad_()
    impl: Impl | None = "torch" if DEVICE == "cpu" else None
    with torch.autocast(DEVICE, dtype=dtype):
        out = s2_attention(q, k, v, PATTERN, impl=impl)
        with torch.no_grad():
            assert torch.equal(s2_attention(q, k, v, PATTERN, impl=impl), out)
        torch_out = torch.nn.functional.scaled_dot_product_attention(*(x.transpose(1, 2) for x in (q, q, q)))
        assert s2_attention(*(x.double() for x in (q, k, v)), PATTERN, impl="torch").dtype == torch.float64
    assert out.dtype == torch_out.dtype == dtype
    cast = [x.detach().to(dtype).requires_grad_() for x in (q, k, v)]
    expected = s2_attention(*cast, PATTERN, impl=impl)
    assert torch.equal(out, expected)
    with torch.autocast(DEVICE, dtype=dtype):
        out.backward(torch.ones_like(out))
    expected.backward(torch.ones_like(out))
    for x, of_cast in zip((q, k, v), cast, strict=True):
        assert x.grad.dtype == x.dtype
        assert torch.equal(x.grad, of_cast.grad.to(x.dtype))


def test_what_is_kept_for_the_backward_pass() -> None:
    inputs = batch(1, 40, 40)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x) or x, lambda x: x):
        out, lse = s2_attention(*inputs, PATTERN, return_lse=True)
    assert {x.data_ptr() for x in kept} == {x.data_ptr() for x in (*inputs, out, lse)}


def test_calls_without_gradients_take_no_operator(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = batch(1, 20, 20)
    monkeypatch.setattr(operators, "_as_tensor", None)
    monkeypatch.setattr(torch.ops.s2, "attention", None)
    with torch.no_grad():
        assert s2_attention(q, k, v, PATTERN).isfinite().all()
    with pytest.raises(TypeError):
        s2_attention(q, k, v, PATTERN)


def test_results_without_gradients_are_those_with() -> None:
    q, k, v = batch(2, 33, 40)
    for impl in IMPLS:
        results = s2_attention(q, k, v, PATTERN, return_lse=True, impl=impl)
        with torch.no_grad():
            others = s2_attention(q, k, v, PATTERN, return_lse=True, impl=impl)
        assert all(map(torch.equal, results, others))
        assert results[0].requires_grad
        assert results[1].requires_grad


def test_what_has_no_gradient_is_named() -> None:
    q, k, v = batch(1, 20, 20)
    with pytest.raises(NotImplementedError, match=r"^s2_attention: the gradient of its gradient"):
        torch.autograd.grad(s2_attention(q, k, v, PATTERN).sum(), q, create_graph=True)[0].sum().backward()
    with pytest.raises(ValueError, match=r"^out: shape \(1, 20, 4, 16\), expected None where an input requ"):
        attend(q, k, v, PATTERN, None, out=torch.empty_like(q))
    attn = LocalStrideSparseAttention(HEADS, 64, 16, 1, 3, num_kv_heads=KV_HEADS, out=torch.empty_like(q))
    with pytest.raises(ValueError, match=r"^out: shape"):
        attn(q, k, v)
    spans = (Span(0, 0, 10, 0, 10), Span(0, 10, 10, 0, 20))
    out, _ = attend(q, k, v, PATTERN, spans)
    with pytest.raises(ValueError, match=r"^spans: .* expected sequences without common keys"):
        out.sum().backward()


def test_mistakes_are_named_through_operators() -> None:
    q, k, v = batch(1, 20, 20)
    with pytest.raises(ValueError, match=r"^k: shape"):
        s2_attention(q, k[..., :8], v, PATTERN)
    with pytest.raises(ValueError, match=r"^pattern: of 6 query"):
        s2_attention(q, k, v, S2Pattern.build(6, 2))
    with pytest.raises(ValueError, match=r"^v: torch.float32"):
        s2_attention(q, k, v.float(), PATTERN)
    with pytest.raises(ValueError, match=r"^scale: -1"):
        s2_attention(q, k, v, PATTERN, scale=-1.0)
    with pytest.raises(ValueError, match=r"^mask: covers 16 tokens, expected at least 20"):
        s2_attention(q, k, v, BlockMask.from_pattern(PATTERN, 1))
    with pytest.raises(ValueError, match=r"^cu_seqlens_q: \[0, 21\]"):
        s2_attention(q[0], k[0], v[0], PATTERN, cu_seqlens_q=torch.tensor([0, 21]))


def test_tables_that_a_cuda_graph_reads_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr("s2_kernels.launch.cuda_graphs._HELD", held)
    q, k, v = batch(1, 20, 20)
    out = s2_attention(q, k, v, PATTERN, impl="triton")
    out.sum().backward()
    assert not held
    out = s2_attention(q, k, v, PATTERN, impl="triton")
    with monkeypatch.context() as capture:
        capture.setattr(torch.cuda, "is_initialized", lambda: True)
        capture.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        out.sum().backward()
    assert [len(kept) for kept in held] == [5, 7]


@pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
def test_a_training_step_can_be_captured() -> None:
    inputs = batch(2, 100, 100)

    def step() -> list[torch.Tensor]:
        return [*torch.autograd.grad(s2_attention(*inputs, PATTERN).square().sum(), inputs)]

    expected = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        gradients = step()
    for gradient in gradients:
        gradient.fill_(torch.nan)
    graph.replay()
    for gradient, other in zip(gradients, expected, strict=True):
        assert torch.equal(gradient, other)
