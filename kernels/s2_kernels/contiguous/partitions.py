"""Attention over parts of the keys, put together: what ring attention and split key-value caches need."""

from __future__ import annotations

import torch

from s2_kernels.contiguous.torch_path import wide_dtype


def combine_attn_partitions(*x: tuple[torch.Tensor, torch.Tensor], hdim: int = 1) -> torch.Tensor:
    """Attention over all keys, from the attention of the same queries over disjoint parts of them.

    As in DKernel (github.com/linxihui/dkernel). A part in which a query attends to nothing has a log-sum-exp
    of -inf and does not count; a query without keys in any part gets zeros. Differentiable in the outputs and
    the log-sum-exps.

    Args:
        x: (output, log-sum-exp) of each part: [batch, heads, queries, head_size] or [batch, queries, heads,
            head_size], or either without the batch; float32 [batch, heads, queries], natural logarithm.
        hdim: the dimension of the heads in an output, 1 or 2 (without a batch 0 or 1).

    Returns:
        As one output, in its dtype; the sum is in float32.

    Raises:
        ValueError: there is no part, or one has a wrong shape; the message names it.
    """
    if not x:
        raise ValueError("x: no parts, expected at least one (output, log-sum-exp)")
    shape = x[0][0].shape
    dimensions = len(shape)
    if dimensions not in (3, 4) or hdim not in (dimensions - 3, dimensions - 2):
        raise ValueError(
            f"hdim: {hdim}, expected {dimensions - 3} or {dimensions - 2} for outputs of shape {tuple(shape)}"
        )
    tokens_first = hdim == dimensions - 2
    rows = (*shape[:-3], shape[-2], shape[-3]) if tokens_first else shape[:-1]
    for n, (output, lse) in enumerate(x):
        if output.shape != shape or lse.shape != rows:
            raise ValueError(
                f"x: part {n} has shapes {tuple(output.shape)} and {tuple(lse.shape)}, expected "
                f"{tuple(shape)} and {tuple(rows)}"
            )
    lses = torch.stack([lse.to(wide_dtype(lse.dtype)) for _, lse in x])
    # Without keys in any part the total is taken for finite: exp(-inf - finite) is the weight of zero that
    # each part is to get, and no gradient is NaN.
    total = lses.masked_fill((lses == -torch.inf).all(dim=0), 0.0).logsumexp(dim=0)
    weights = (lses - total).exp()
    result = torch.zeros(shape, dtype=weights.dtype, device=weights.device)
    for (output, _), weight in zip(x, weights, strict=True):
        weight = (weight.transpose(-1, -2) if tokens_first else weight)[..., None]
        result = result + output.masked_fill(weight == 0, 0.0) * weight
    return result.to(x[0][0].dtype)
