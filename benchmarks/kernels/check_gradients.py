"""Whether gradients are right: a sample of rows of some heads, against their definition in float32.

A row of keys gets something from every query that attends to it, so that all queries of the sampled heads are
gone through, some at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from benchmarks.kernels.check import CheckFailed, sampled_positions, visible_keys
from benchmarks.kernels.inputs import Inputs
from s2_kernels.pattern import S2Pattern

MAX_REL_ERR = 2e-2
"""Weights and their gradients are rounded to bfloat16 before products, and the results once more."""
_QUERIES_AT_A_TIME = 1024


@dataclass(frozen=True)
class ExpectedGradients:
    """Rows of the gradients, and what they must be.

    Attributes:
        rows: int64 [samples], of queries and of keys.
        heads: query heads whose gradients are given; all of the KV heads in `kv_heads`.
        kv_heads: KV heads.
        dq: float32 [samples, len(heads), head_size].
        dq_rounding: float32 [samples, len(heads)], what the output's rounding does to a row of dq, in units
            of that rounding.
        dk, dv: float32 [samples, len(kv_heads), head_size].
    """

    rows: torch.Tensor
    heads: list[int]
    kv_heads: list[int]
    dq: torch.Tensor
    dq_rounding: torch.Tensor
    dk: torch.Tensor
    dv: torch.Tensor


def expected_gradients(inputs: Inputs, dense: bool) -> ExpectedGradients:
    """The gradients of sampled rows of the first and the last KV head, of a case with one request.

    Of dense causal attention, or of the case's pattern.
    """
    pattern = inputs.case.pattern
    rows = sampled_positions(inputs.case).to(inputs.q.device)
    kv_heads = sorted({0, pattern.num_kv_heads - 1})
    heads = [h * pattern.group_size + n for h in kv_heads for n in range(pattern.group_size)]
    dq = inputs.q.new_zeros(len(rows), len(heads), inputs.q.shape[2], dtype=torch.float32)
    dq_rounding = dq.new_zeros(dq.shape[:2])
    dk = inputs.q.new_zeros(len(rows), len(kv_heads), inputs.q.shape[2], dtype=torch.float32)
    dv = torch.zeros_like(dk)
    for n, head in enumerate(heads):
        place = n // pattern.group_size
        dq[:, n], dq_rounding[:, n], dk_of_head, dv_of_head = _gradients_of_head(
            inputs.q[:, head].float(),
            inputs.k[:, kv_heads[place]].float(),
            inputs.v[:, kv_heads[place]].float(),
            inputs.d_out[:, head].float(),
            rows,
            None if dense else (pattern, head),
            inputs.scale,
        )
        dk[:, place] += dk_of_head
        dv[:, place] += dv_of_head
    return ExpectedGradients(rows, heads, kv_heads, dq, dq_rounding, dk, dv)


def _gradients_of_head(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    d_out: torch.Tensor,
    rows: torch.Tensor,
    pattern_and_head: tuple[S2Pattern, int] | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Rows of dq, `dq_rounding`, dk and dv of one head and one sequence: q and so on [tokens, head_size].

    A backward pass has the output rounded, and each row's sum(out * d_out) from that. Its error goes into dq
    with the mean of the keys: as much as dq itself has where a row attends to few keys, nearly all to one.
    """
    dq, dk, dv = (q.new_zeros(len(rows), q.shape[1]) for _ in range(3))
    dq_rounding = q.new_zeros(len(rows))
    for positions in torch.arange(len(q), device=q.device).split(_QUERIES_AT_A_TIME):
        visible = visible_keys(positions, len(k), pattern_and_head)
        queries, gradients = q[positions], d_out[positions]
        weights = (queries @ k.T * scale).masked_fill(~visible, float("-inf")).softmax(dim=-1)
        products = weights @ v * gradients
        delta = products.sum(dim=-1, keepdim=True)
        of_keys = weights[:, rows]
        d_logits = of_keys * (gradients @ v[rows].T - delta)
        dk += scale * d_logits.T @ queries
        dv += of_keys.T @ gradients
        sampled = ((rows >= positions[0]) & (rows <= positions[-1])).nonzero()[:, 0]
        at = rows[sampled] - positions[0]
        d_logits = weights[at] * (gradients[at] @ v.T - delta[at])
        dq[sampled] = scale * d_logits @ k
        dq_rounding[sampled] = scale * products[at].abs().sum(dim=-1) * (weights[at] @ k).norm(dim=-1)
    return dq, dq_rounding, dk, dv


def check_gradients(gradients: tuple[torch.Tensor, ...], expected: ExpectedGradients) -> float:
    """The largest relative error of a sampled row of dq, dk or dv.

    Args:
        gradients: dq, dk and dv, [tokens, heads, head_size]; of keys and values perhaps for every query head.
        expected: some of their rows.

    Raises:
        CheckFailed: it is above MAX_REL_ERR, or some element is NaN.
    """
    largest = 0.0
    num_heads = gradients[0].shape[1]
    for name, gradient, reference in zip(
        ("dq", "dk", "dv"), gradients, (expected.dq, expected.dk, expected.dv), strict=True
    ):
        if gradient.isnan().any():
            raise CheckFailed(f"NaN in {name}")
        found = gradient[expected.rows].float()
        heads = expected.heads
        if name != "dq":
            heads = expected.kv_heads
            group = len(expected.heads) // len(expected.kv_heads)
            if found.shape[1] == num_heads:
                found = found.unflatten(1, (-1, group)).sum(dim=2)
        difference = (found[:, heads] - reference).norm(dim=-1)
        # A row that few queries attend to may have next to no gradient: its error counts by the usual size.
        size = reference.norm(dim=-1)
        smallest = float(size.median()) / 10
        if name == "dq":
            size = size + expected.dq_rounding * torch.finfo(gradient.dtype).eps / MAX_REL_ERR
        error = float((difference / size.clamp(min=smallest)).max())
        if not error <= MAX_REL_ERR:
            raise CheckFailed(f"max_rel_err of {name} {error:.2g}, expected at most {MAX_REL_ERR}")
        largest = max(largest, error)
    return largest
