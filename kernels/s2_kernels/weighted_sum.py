"""Sums of values by attention weights, in PyTorch, in which a value reaches only who attends to it."""

from __future__ import annotations

import torch


def weighted_sum(weights: torch.Tensor, visible: torch.Tensor, values: torch.Tensor) -> torch.Tensor:
    """`weights @ values`, in which NaN and infinities stay with the rows that attend to them.

    In a plain product they reach every row: a weight of zero times NaN is NaN.

    Args:
        weights: [..., rows, keys], zero where not visible.
        visible: bool, of a shape that broadcasts to that of the weights.
        values: [..., keys, head_size], of the weights' dtype.

    Returns:
        [..., rows, head_size].
    """
    result = weights @ values
    if not result.isnan().any():
        return result
    result = weights @ values.masked_fill(~values.isfinite(), 0.0)
    attends = visible.expand_as(weights).to(weights.dtype)
    for infinity in (float("inf"), float("-inf")):
        # NaN is in both: the sum of the infinities.
        reaches = attends @ ((values == infinity) | values.isnan()).to(weights.dtype) > 0
        result += torch.zeros_like(result).masked_fill(reaches, infinity)
    return result
