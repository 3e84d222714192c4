"""What the gradients need of each query row: its log-sum-exp, and the mean of its weights' gradients."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache

import torch
import triton
import triton.language as tl

from s2_kernels.contiguous.sequences import Span
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E

ROWS = 64
"""Of a block of queries, by position, as the kernels load them."""
BLOCK_FIELDS = 3

RowStatistics = Callable[..., tuple[torch.Tensor, torch.Tensor]]


@lru_cache(maxsize=16)
def query_blocks(
    spans: tuple[Span, ...], num_queries: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(the query blocks of all sequences, where each sequence's start among them).

    Args:
        spans: the sequences.
        num_queries: tokens of q's second dimension.
        device: where the tables are to be.

    Returns:
        int32 [blocks, BLOCK_FIELDS]: the row of flattened q of a block's first position, which may be before
        the sequence's first query; the rows of its first query and of the one after its last. And int32
        [sequences].
    """
    blocks: list[tuple[int, int, int]] = []
    starts: list[int] = []
    for span in spans:
        starts.append(len(blocks))
        first_row = span.batch * num_queries + span.query_start
        past = span.num_keys - span.num_queries
        end = first_row + span.num_queries
        if span.num_queries:
            for row in range(first_row - past % ROWS, end, ROWS):
                blocks.append((row, max(row, first_row), min(row + ROWS, end)))
    return (
        torch.tensor(blocks, dtype=torch.int32, device=device).view(-1, BLOCK_FIELDS),
        torch.tensor(starts, dtype=torch.int32, device=device),
    )


@triton.jit
def row_statistics_bwd_kernel(
    out,  # [tokens, num_heads, head_size]
    d_out,  # as out
    lse,  # [batch, num_heads, queries]
    d_lse,  # as lse, or None
    blocks,  # [blocks, BLOCK_FIELDS]
    row_lse,  # [num_heads, blocks * ROWS]
    row_delta,  # as row_lse
    num_queries,
    num_rows,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    d_out_stride_token: tl.int64,
    d_out_stride_head: tl.int64,
    NUM_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    BLOCK_FIELDS: tl.constexpr,
    ROWS: tl.constexpr,
    LOG2_E: tl.constexpr,
):
    """Program (b, h): block b of the table, query head h."""
    block, head = tl.program_id(0), tl.program_id(1)
    first_row = tl.load(blocks + block * BLOCK_FIELDS)
    first, end = tl.load(blocks + block * BLOCK_FIELDS + 1), tl.load(blocks + block * BLOCK_FIELDS + 2)
    rows = first_row + tl.arange(0, ROWS)
    is_row = (rows >= first) & (rows < end)
    dims = tl.arange(0, HEAD_SIZE)
    rows_64 = rows.to(tl.int64)
    out += head * out_stride_head + rows_64[:, None] * out_stride_token + dims[None, :]
    d_out += head * d_out_stride_head + rows_64[:, None] * d_out_stride_token + dims[None, :]
    outputs = tl.load(out, mask=is_row[:, None], other=0.0).to(tl.float32)
    gradients = tl.load(d_out, mask=is_row[:, None], other=0.0).to(tl.float32)
    delta = tl.sum(outputs * gradients, 1)
    batch = rows_64 // num_queries
    at = (batch * NUM_HEADS + head) * num_queries + rows_64 % num_queries
    if d_lse is not None:
        delta -= tl.load(d_lse + at, mask=is_row, other=0.0)
    value = tl.load(lse + at, mask=is_row, other=float("inf")) * LOG2_E
    to = head.to(tl.int64) * num_rows + block * ROWS + tl.arange(0, ROWS)
    tl.store(row_lse + to, value)
    tl.store(row_delta + to, delta)


def prepare_row_statistics(
    out: torch.Tensor,
    d_out: torch.Tensor,
    lse: torch.Tensor,
    d_lse: torch.Tensor | None,
    blocks: torch.Tensor,
) -> RowStatistics:
    """A call that gives (log-sum-exp in base 2, delta) of the query rows of `blocks`.

    With delta = sum(out * d_out) - d_lse, the gradient of a logit is weight * (d_weight - delta): equation 4
    of FlashAttention-2 (arXiv 2307.08691, section 3.1.2), with the gradient of the log-sum-exp added.

    Args:
        out, d_out: [batch, queries, num_heads, head_size], whose first two dimensions can be flattened.
        lse, d_lse: float32 [batch, num_heads, queries], contiguous.
        blocks: from `query_blocks`, aligned to blocks of positions.

    Returns:
        A function of tensors like the first four, to float32 [num_heads, blocks * ROWS] twice; rows of no
        query have an infinite log-sum-exp, which makes weights of zero.
    """
    num_queries, num_heads, head_size = out.shape[1:]
    shape = 2, num_heads, len(blocks) * ROWS
    row_lse, row_delta = out.new_empty(shape, dtype=torch.float32)
    arguments = {
        "out": out,
        "d_out": d_out,
        "lse": lse,
        "d_lse": d_lse,
        "blocks": blocks,
        "row_lse": row_lse,
        "row_delta": row_delta,
        "num_queries": num_queries,
        "num_rows": shape[2],
        "out_stride_token": out.stride(1),
        "out_stride_head": out.stride(2),
        "d_out_stride_token": d_out.stride(1),
        "d_out_stride_head": d_out.stride(2),
        "NUM_HEADS": num_heads,
        "HEAD_SIZE": head_size,
        "BLOCK_FIELDS": BLOCK_FIELDS,
        "ROWS": ROWS,
        "LOG2_E": LOG2_E,
    }
    varying = ("out", "d_out", "lse", "d_lse", "row_lse", "row_delta")
    launch = KernelLaunch(row_statistics_bwd_kernel, (len(blocks), num_heads), arguments, varying)

    def row_statistics(
        out: torch.Tensor, d_out: torch.Tensor, lse: torch.Tensor, d_lse: torch.Tensor | None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        row_lse, row_delta = out.new_empty(shape, dtype=torch.float32)
        launch(out, d_out, lse, d_lse, row_lse, row_delta)
        return row_lse, row_delta

    return row_statistics
