"""The gradients of S2-Attention over contiguous keys on a Hopper GPU.

First what they need of each query row, then those of keys and values, then those of queries: two walks over
the logits, seven products where five are counted. In one walk, the gradients of queries would be sums of many
programs, in an order that changes from run to run or that programs wait for.
"""

from __future__ import annotations

import torch

from s2_kernels.contiguous.sequences import Span, longest
from s2_kernels.hopper import has_rows
from s2_kernels.hopper.key_gradients import key_gradients_bwd_kernel
from s2_kernels.hopper.key_items import ITEM_FIELDS, key_items
from s2_kernels.hopper.prefill import MIB, head_blocks, heads_per_section
from s2_kernels.hopper.query_gradients import query_gradients_bwd_kernel
from s2_kernels.hopper.row_statistics import ROWS, query_blocks, row_statistics
from s2_kernels.hopper.schedule import TILE_M
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.cuda_graphs import hold_for_graph
from s2_kernels.launch.device import num_multiprocessors
from s2_kernels.launch.limits import LOG2_E, local_blocks
from s2_kernels.layout import HeadTables
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import first_tile


def contiguous_prefill_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed_lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
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
    tables: HeadTables,
) -> None:
    """Gradients of S2-Attention, of tensors that `refusal` has nothing against.

    Args:
        q, out, d_out, dq: [batch, queries, num_heads, head_size].
        k, v, dk, dv: [batch, keys, num_kv_heads, head_size].
        packed_lengths: as `contiguous_prefill_fwd` takes them.
        pattern: of the heads.
        spans: the sequences, one right after the other.
        scale: factor on the logits, positive.
        lse, d_lse: float32 [batch, num_heads, queries], contiguous.
        tables: of the pattern.
    """
    if not has_rows(d_out.flatten(0, 1)):  # as autograd broadcasts them
        d_out = d_out.contiguous()
    blocks, row_starts = query_blocks(spans, q.shape[1], q.device)
    items = key_items(spans, q.shape[1], k.shape[1], pattern, q.device)
    hold_for_graph(blocks, row_starts, items)
    statistics = row_statistics(out, d_out, lse, d_lse, blocks)
    q, k, v, d_out, dq, dk, dv = (x.flatten(0, 1) for x in (q, k, v, d_out, dq, dk, dv))
    rows = (head_blocks(q), head_blocks(d_out), head_blocks(k), head_blocks(v))
    _key_gradients(rows, items, pattern, scale, statistics, dk, dv, tables)
    lengths = (*packed_lengths, row_starts)
    _query_gradients(rows, lengths, pattern, longest(spans), scale, statistics, dq, tables)


def key_gradients_config(head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Stages of queries and output gradients in shared memory."""
    return launch_config("hopper_key_gradients", shape_key(head_size, dtype), {"STAGES": 256 // head_size})


def query_gradients_config(head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Stages of keys and values in shared memory, and what a section of heads may have of strided ones."""
    defaults = {"STAGES": 4, "section_mib": 8}
    return launch_config("hopper_query_gradients", shape_key(head_size, dtype), defaults)


def _key_gradients(
    rows: tuple[object, ...],
    items: torch.Tensor,
    pattern: S2Pattern,
    scale: float,
    statistics: tuple[torch.Tensor, torch.Tensor],
    dk: torch.Tensor,
    dv: torch.Tensor,
    tables: HeadTables,
) -> None:
    if len(items) == 0:
        return
    head_size = dk.shape[2]
    grid = (min(len(items), num_multiprocessors(dk.device)),)
    key_gradients_bwd_kernel[grid](
        *rows,
        items,
        tables.residue,
        *statistics,
        dk,
        dv,
        scale,
        scale * LOG2_E,
        len(items),
        statistics[0].shape[1] // ROWS,
        dk.stride(0),
        dk.stride(1),
        dv.stride(0),
        dv.stride(1),
        GROUP_SIZE=pattern.group_size,
        HEAD_SIZE=head_size,
        LOCAL_BLOCKS=local_blocks(pattern),
        VERT_STRIDE=pattern.vert_stride,
        ITEM_FIELDS=ITEM_FIELDS,
        num_warps=4,
        **key_gradients_config(head_size, dk.dtype),
    )


def _query_gradients(
    rows: tuple[object, ...],
    lengths: tuple[torch.Tensor, ...],
    pattern: S2Pattern,
    max_seq_len: int,
    scale: float,
    statistics: tuple[torch.Tensor, torch.Tensor],
    dq: torch.Tensor,
    tables: HeadTables,
) -> None:
    num_tokens, num_heads, head_size = dq.shape
    num_requests = lengths[2].shape[0]
    num_tiles = first_tile(num_tokens, num_requests, TILE_M.value)
    config = query_gradients_config(head_size, dq.dtype)
    section_bytes = config.pop("section_mib") * MIB
    grid = (min(num_tiles * num_heads, num_multiprocessors(dq.device)),)
    query_gradients_bwd_kernel[grid](
        *rows,
        *lengths,
        tables.residue,
        *statistics,
        dq,
        scale,
        scale * LOG2_E,
        num_tiles,
        num_tiles * num_heads,
        num_requests,
        heads_per_section(pattern, max_seq_len, head_size, section_bytes),
        statistics[0].shape[1] // ROWS,
        dq.stride(0),
        dq.stride(1),
        GROUP_SIZE=pattern.group_size,
        HEAD_SIZE=head_size,
        LOCAL_BLOCKS=local_blocks(pattern),
        VERT_STRIDE=pattern.vert_stride,
        num_warps=4,
        **config,
    )
