"""The gradients of S2-Attention over contiguous keys on a Hopper GPU.

First what they need of each query row, then those of keys and values, then those of queries: two walks over
the logits, seven products where five are counted. In one walk, the gradients of queries would be sums of many
programs, in an order that changes from run to run or that programs wait for.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock
from typing import Any

import torch
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2_kernels.contiguous.sequences import Span, longest
from s2_kernels.hopper import has_rows
from s2_kernels.hopper.key_gradients import key_gradients_bwd_kernel
from s2_kernels.hopper.key_items import ITEM_FIELDS, key_items
from s2_kernels.hopper.prefill import MIB, head_blocks, heads_per_section
from s2_kernels.hopper.query_gradients import query_gradients_bwd_kernel
from s2_kernels.hopper.row_statistics import prepare_row_statistics, query_blocks
from s2_kernels.hopper.schedule import TILE_M
from s2_kernels.launch.call_cache import CallCache, layouts
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.cuda_graphs import hold_for_graph
from s2_kernels.launch.device import num_multiprocessors
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E, local_blocks
from s2_kernels.layout import HeadTables
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import first_tile

ROWS_READ = ("queries", "d_out", "keys", "values")
STATISTICS = ("row_lse", "row_delta")

_CALLS: CallCache[Callable[..., None]] = CallCache()


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
    tensors = (q, k, v, out, lse, d_out, d_lse, dq, dk, dv)
    configs = key_gradients_config(q.shape[3], q.dtype), query_gradients_config(q.shape[3], q.dtype)
    key = (layouts(*tensors), pattern, spans, scale, *(tuple(config.values()) for config in configs))
    make = partial(_prepare, tensors, packed_lengths, pattern, spans, scale, tables, configs)
    _CALLS.get(key, make)(*tensors)


def _prepare(
    tensors: tuple[Any, ...],
    packed_lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    scale: float,
    tables: HeadTables,
    configs: tuple[dict[str, int], dict[str, int]],
) -> Callable[..., None]:
    """The three launches, as a function of tensors like `tensors`."""
    q, k, v, out, lse, d_out, d_lse, dq, dk, dv = tensors
    blocks, row_starts = query_blocks(spans, q.shape[1], q.device)
    items = key_items(spans, q.shape[1], k.shape[1], pattern, q.device)
    row_statistics = prepare_row_statistics(out, d_out, lse, d_lse, blocks)
    rows = tuple(head_blocks(x.flatten(0, 1)) for x in (q, d_out, k, v))
    shared = {
        **dict(zip(ROWS_READ, rows, strict=True)),
        **dict(zip(STATISTICS, row_statistics(out, d_out, lse, d_lse), strict=True)),
        "residues": tables.residue,
        "scale": scale,
        "scale_log2": scale * LOG2_E,
        "num_blocks": len(blocks),
        "GROUP_SIZE": pattern.group_size,
        "HEAD_SIZE": q.shape[3],
        "LOCAL_BLOCKS": local_blocks(pattern),
        "VERT_STRIDE": pattern.vert_stride,
    }
    launch_keys = _prepare_keys(shared, items, dk, dv, configs[0])
    lengths = (*packed_lengths, row_starts)
    launch_queries = _prepare_queries(shared, lengths, pattern, longest(spans), dq, configs[1])
    lock = Lock()  # threads share the descriptors

    def call(
        q: torch.Tensor,
        k: torch.Tensor,
        v: torch.Tensor,
        out: torch.Tensor,
        lse: torch.Tensor,
        d_out: torch.Tensor,
        d_lse: torch.Tensor | None,
        dq: torch.Tensor,
        dk: torch.Tensor,
        dv: torch.Tensor,
    ) -> None:
        hold_for_graph(blocks, row_starts, items)
        statistics = row_statistics(out, d_out, lse, d_lse)
        with lock:
            _move(rows, (q, d_out, k, v))
            if launch_keys is not None:
                launch_keys(*rows, *statistics, dk, dv)
            launch_queries(*rows, *statistics, dq)
            _move(rows, (None, None, None, None))

    _move(rows, (None, None, None, None))  # no tensor is kept alive from here
    return call


def _move(descriptors: tuple[TensorDescriptor, ...], bases: tuple[torch.Tensor | None, ...]) -> None:
    """Let them describe other tensors: what Triton checks of each new one has been checked."""
    for descriptor, base in zip(descriptors, bases, strict=True):
        descriptor.base = base


def key_gradients_config(head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Stages of queries and output gradients in shared memory."""
    return launch_config("hopper_key_gradients", shape_key(head_size, dtype), {"STAGES": 256 // head_size})


def query_gradients_config(head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Stages of keys and values in shared memory, and what a section of heads may have of strided ones."""
    defaults = {"STAGES": 4, "section_mib": 8}
    return launch_config("hopper_query_gradients", shape_key(head_size, dtype), defaults)


def _prepare_keys(
    shared: dict[str, object],
    items: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    config: dict[str, int],
) -> KernelLaunch | None:
    if len(items) == 0:
        return None
    arguments = {
        **shared,
        "items": items,
        "d_keys": dk,
        "d_values": dv,
        "num_items": len(items),
        "dk_stride_token": dk.stride(1),
        "dk_stride_head": dk.stride(2),
        "dv_stride_token": dv.stride(1),
        "dv_stride_head": dv.stride(2),
        "ITEM_FIELDS": ITEM_FIELDS,
        **config,
    }
    grid = (min(len(items), num_multiprocessors(dk.device)),)
    varying = (*ROWS_READ, *STATISTICS, "d_keys", "d_values")
    return KernelLaunch(key_gradients_bwd_kernel, grid, arguments, varying, num_warps=4)


def _prepare_queries(
    shared: dict[str, object],
    lengths: tuple[torch.Tensor, ...],
    pattern: S2Pattern,
    max_seq_len: int,
    dq: torch.Tensor,
    config: dict[str, int],
) -> KernelLaunch:
    num_heads, head_size = dq.shape[2:]
    num_requests = lengths[2].shape[0]
    num_tiles = first_tile(dq.shape[0] * dq.shape[1], num_requests, TILE_M.value)
    section_bytes = config["section_mib"] * MIB
    arguments = {
        **shared,
        **dict(zip(("query_start_loc", "key_start_loc", "seq_lens", "row_starts"), lengths, strict=True)),
        "d_queries": dq,
        "num_tiles": num_tiles,
        "num_items": num_tiles * num_heads,
        "num_requests": num_requests,
        "heads_per_section": heads_per_section(pattern, max_seq_len, head_size, section_bytes),
        "dq_stride_token": dq.stride(1),
        "dq_stride_head": dq.stride(2),
        "STAGES": config["STAGES"],
    }
    grid = (min(num_tiles * num_heads, num_multiprocessors(dq.device)),)
    varying = (*ROWS_READ, *STATISTICS, "d_queries")
    return KernelLaunch(query_gradients_bwd_kernel, grid, arguments, varying, num_warps=4)
