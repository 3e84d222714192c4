"""Attention over contiguous keys and values: the one place that chooses between PyTorch, Triton and Hopper.

Implementations are imported when a call first needs them: a process without a GPU needs no Triton.
"""

from __future__ import annotations

from functools import lru_cache, partial
from itertools import pairwise

import torch

from s2_kernels import hopper
from s2_kernels.contiguous.sequences import Span, first_position, longest
from s2_kernels.launch import limits
from s2_kernels.launch.choice import Impl, choose
from s2_kernels.launch.cuda_graphs import hold_for_graph
from s2_kernels.layout import head_tables
from s2_kernels.masks import BlockMask, pattern_block_mask
from s2_kernels.pattern import S2Pattern


def run(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    impl: Impl | None,
) -> None:
    """Attention of the sequences at `spans`, written to `out` and `lse`.

    Args:
        others: as `s2_kernels.attention.attend` documents and checks them.
        lse: float32 [batch, num_heads, queries], contiguous, or None.

    Raises:
        ValueError: `impl` does not take the call, or on a GPU no kernel does; the message names the fact.
    """
    chosen = choose(
        impl,
        q.device,
        {
            "reference": lambda: None,
            "torch": lambda: None,
            "triton": partial(
                limits.refusal, q.device, q.dtype, q.shape[3], pattern.block_size, q=q, k=k, v=v, out=out
            ),
            "hopper": partial(_hopper_refusal, q, k, v, pattern, spans, out),
        },
    )
    if chosen == "hopper":
        assert isinstance(pattern, S2Pattern)
        _attend_on_hopper(q, k, v, pattern, spans, scale, out, lse)
        return
    if chosen == "reference":
        with _as_it_is_written(q):
            _attend_by_reference(q, k, v, pattern, spans, scale, out, lse)
        return
    mask = pattern if isinstance(pattern, BlockMask) else pattern_block_mask(pattern, longest(spans))
    if chosen == "torch":
        from s2_kernels.contiguous.torch_path import block_sparse_fwd as torch_block_sparse_fwd

        with _as_it_is_written(q):
            torch_block_sparse_fwd(q, k, v, mask, spans, scale, out, lse)
    else:
        from s2_kernels.contiguous.block_sparse import block_sparse_fwd

        block_sparse_fwd(q, k, v, mask, spans, scale, out, lse)


def run_backward(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    impl: Impl | None,
) -> None:
    """The gradients of what `run` computes, written to `dq`, `dk` and `dv`.

    Nothing is written for a token of no sequence. Two calls give the same bits.

    Args:
        q, k, v, pattern, spans, scale: of the forward pass.
        out, lse: what it gave.
        d_out: the gradient of `out`, in its shape and dtype.
        d_lse: the gradient of `lse`, likewise, contiguous; None for zeros.
        dq, dk, dv: as q, k and v.
        impl: as for `run`.

    Raises:
        ValueError: `impl` does not take the call, on a GPU no kernel does, or sequences share keys; the
            message names the fact.
    """
    _check_no_shared_keys(spans)
    strided = {"q": q, "k": k, "v": v, "out": out, "d_out": d_out, "dq": dq, "dk": dk, "dv": dv}
    chosen = choose(
        impl,
        q.device,
        {
            "reference": lambda: None,
            "torch": lambda: None,
            "triton": partial(limits.refusal, q.device, q.dtype, q.shape[3], pattern.block_size, **strided),
            "hopper": partial(_hopper_refusal, q, k, v, pattern, spans, out, dq=dq, dk=dk, dv=dv),
        },
    )
    if chosen == "hopper":
        assert isinstance(pattern, S2Pattern)
        _hopper_gradients(q, k, v, pattern, spans, scale, out, lse, d_out, d_lse, dq, dk, dv)
        return
    if chosen == "reference":
        with _as_it_is_written(q):
            _reference_gradients(q, k, v, pattern, spans, scale, d_out, d_lse, dq, dk, dv)
        return
    mask = pattern if isinstance(pattern, BlockMask) else pattern_block_mask(pattern, longest(spans))
    if chosen == "torch":
        from s2_kernels.contiguous.torch_path import block_sparse_bwd as torch_block_sparse_bwd

        with _as_it_is_written(q):
            torch_block_sparse_bwd(q, k, v, mask, spans, scale, out, lse, d_out, d_lse, dq, dk, dv)
    else:
        from s2_kernels.contiguous.block_sparse_bwd import block_sparse_bwd

        block_sparse_bwd(q, k, v, mask, spans, scale, out, lse, d_out, d_lse, dq, dk, dv)


def _as_it_is_written(tensor: torch.Tensor) -> torch.autocast:
    """PyTorch's arithmetic as it stands, in float32, whatever autocast says around a call."""
    return torch.autocast(tensor.device.type, enabled=False)


@lru_cache(maxsize=64)
def _check_no_shared_keys(spans: tuple[Span, ...]) -> None:
    """Raise ValueError when a key is of two sequences: each writes the gradients of all its keys."""
    ordered = sorted((span for span in spans if span.num_keys), key=lambda x: (x.batch, *x[-2:]))
    for before, span in pairwise(ordered):
        if span.batch == before.batch and span.key_start < before.key_start + before.num_keys:
            raise ValueError(f"spans: {before} and {span}, expected sequences without common keys")


def _attend_by_reference(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    from s2_kernels.reference import masked_attention, masked_log_sum_exp

    for span in spans:
        mask = _token_mask(pattern, span, q.shape[2]).to(q.device)
        rows, keys = _rows_and_keys(span)
        out[rows] = masked_attention(q[rows], k[keys], v[keys], mask, scale)
        if lse is not None:
            lse[span.batch, :, rows[1]] = masked_log_sum_exp(q[rows], k[keys], mask, scale)


def _reference_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    from s2_kernels.reference import masked_attention_gradients

    for span in spans:
        mask = _token_mask(pattern, span, q.shape[2]).to(q.device)
        rows, keys = _rows_and_keys(span)
        of_span = None if d_lse is None else d_lse[span.batch, :, rows[1]]
        dq[rows], dk[keys], dv[keys] = masked_attention_gradients(
            q[rows], k[keys], v[keys], mask, scale, d_out[rows], of_span
        )


def _token_mask(pattern: S2Pattern | BlockMask, span: Span, num_heads: int) -> torch.Tensor:
    """bool [num_heads, queries, keys] of a sequence, on the CPU."""
    from s2_kernels.reference import block_token_mask

    if isinstance(pattern, BlockMask):
        mask = pattern.token_mask(first_position(span, pattern), span.num_queries, span.num_keys)
    else:
        blocks = pattern.block_mask(-(-span.num_keys // pattern.block_size))
        positions = torch.arange(span.num_keys - span.num_queries, span.num_keys, device="cpu")
        mask = block_token_mask(blocks, pattern.block_size, positions, span.num_keys)
    return mask.repeat_interleave(num_heads // mask.shape[0], dim=0)


def _rows_and_keys(span: Span) -> tuple[tuple[int, slice], tuple[int, slice]]:
    """Where a sequence is in q, and in k and v."""
    return (
        (span.batch, slice(span.query_start, span.query_start + span.num_queries)),
        (span.batch, slice(span.key_start, span.key_start + span.num_keys)),
    )


def _hopper_refusal(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern | BlockMask,
    spans: tuple[Span, ...],
    out: torch.Tensor,
    **gradients: torch.Tensor,
) -> str | None:
    """Why the Hopper kernels do not take a call: they want sequences without gaps, and rows of tokens."""
    if isinstance(pattern, BlockMask):
        return "pattern: a block mask, expected an S2Pattern"
    if q.numel() == 0:
        return f"q: shape {tuple(q.shape)}, expected at least one query"
    ends = [span.batch * q.shape[1] + span.query_start + span.num_queries for span in spans]
    starts = [end - span.num_queries for end, span in zip(ends, spans, strict=True)]
    if [*starts, q.shape[0] * q.shape[1]] != [0, *ends]:
        return "q: tokens between its sequences, expected one sequence right after the other"
    if gradients and pattern.kinds is not None:
        return pattern.kinds
    stored = {"out": out, **gradients}
    for name, tensor in stored.items():
        if not limits.has_contiguous_last_dim(tensor):
            return f"{name}: strides {tensor.stride()}, expected a contiguous last dimension"
    for name, tensor in {"q": q, "k": k, "v": v, **stored}.items():
        if tensor.shape[0] != 1 and tensor.stride(0) != tensor.shape[1] * tensor.stride(1):
            return f"{name}: strides {tensor.stride()}, expected no gap between the sequences of a batch"
    return hopper.refusal(pattern, q[0], k=k[0], v=v[0])


def _attend_on_hopper(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
) -> None:
    from s2_kernels.hopper.prefill import contiguous_prefill_fwd

    lengths = _packed_lengths(spans, q.shape[1], k.shape[1], q.device)
    hold_for_graph(*lengths)
    row_lse = None if lse is None else lse.new_empty(q.shape[0] * q.shape[1], q.shape[2])
    contiguous_prefill_fwd(
        q.flatten(0, 1),
        k.flatten(0, 1),
        v.flatten(0, 1),
        lengths,
        pattern,
        spans,
        scale,
        out.flatten(0, 1),
        row_lse,
        head_tables(pattern, q.device),
    )
    if lse is not None and row_lse is not None:
        lse.copy_(row_lse.unflatten(0, q.shape[:2]).transpose(1, 2))


def _hopper_gradients(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    from s2_kernels.hopper.gradients import contiguous_prefill_bwd

    lengths = _packed_lengths(spans, q.shape[1], k.shape[1], q.device)
    hold_for_graph(*lengths)
    tables = head_tables(pattern, q.device)
    contiguous_prefill_bwd(
        q, k, v, lengths, pattern, spans, scale, out, lse, d_out, d_lse, dq, dk, dv, tables
    )


@lru_cache(maxsize=64)
def _packed_lengths(
    spans: tuple[Span, ...], num_queries: int, num_keys: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """(query_start_loc, key_start_loc, seq_lens) of the sequences in flattened tensors."""
    query_starts = [span.batch * num_queries + span.query_start for span in spans]
    key_starts = [span.batch * num_keys + span.key_start for span in spans]
    columns = (
        [*query_starts, query_starts[-1] + spans[-1].num_queries],
        [*key_starts, key_starts[-1] + spans[-1].num_keys],
        [span.num_keys for span in spans],
    )
    query_start_loc, key_start_loc, seq_lens = (
        torch.tensor(column, dtype=torch.int32, device=device) for column in columns
    )
    return query_start_loc, key_start_loc, seq_lens
