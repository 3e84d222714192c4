"""The second step of decode: combine the partial results of a KV head whose keys are in several splits."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_wait

from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.paged.decode_schedule import head_items, item_counts, num_splits, request_ends, split_of_item
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import load_tile_where

MIN_CHUNK, MAX_CHUNK = 16, 64
ELEMENTS_PER_WARP = 2048
"""Of the partial results that are read at once: 64 registers of a thread."""


@triton.jit(do_not_specialize=["num_requests", "num_programs"])
def paged_decode_combine_kernel(
    partial,  # [programs, 2, group_size, head_size]
    lse,  # [programs, 2, group_size]
    out,  # [tokens, num_heads, head_size]
    query_start_loc,  # [requests + 1]
    seq_lens,  # [requests]
    first_kept,  # [num_kv_heads + 1]
    num_requests,
    num_programs,
    out_stride_token: tl.int64,
    out_stride_head: tl.int64,
    NUM_KV_HEADS: tl.constexpr,
    GROUP_SIZE: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    REQUESTS_PADDED: tl.constexpr,
    BLOCK_N: tl.constexpr,
    CHUNK: tl.constexpr,
    USE_PDL: tl.constexpr,
):
    """Program (n, h): the partial results for request n's query head h, weighted by their softmax sums."""
    ends = request_ends(
        query_start_loc,
        seq_lens,
        num_requests,
        first_kept,
        NUM_KV_HEADS,
        NUM_KEPT,
        REQUESTS_PADDED,
        SINK_BLOCKS,
        BLOCK_SIZE,
        LOCAL_BLOCKS,
        VERT_STRIDE,
        BLOCK_N,
    )
    request = tl.program_id(0)
    head = tl.program_id(1)
    token = tl.load(query_start_loc + request)
    has_query = tl.load(query_start_loc + request + 1) > token
    seq_len = tl.load(seq_lens + request)
    # Every program waits, even one with nothing to do: what follows this kernel relies on the first one too.
    # The lengths, read above, were there before the first one started.
    if USE_PDL:
        gdc_wait()
    if not has_query:
        return

    num_items = tl.max(ends, 0)
    splits = num_splits(num_items, num_programs)
    per_head, per_residue = item_counts(seq_len, SINK_BLOCKS, BLOCK_SIZE, LOCAL_BLOCKS, VERT_STRIDE, BLOCK_N)
    head_start, num_head_items, _, _ = head_items(
        head // GROUP_SIZE, per_head, per_residue, first_kept, NUM_KEPT
    )
    request_start = tl.max(tl.where(tl.arange(0, REQUESTS_PADDED) < request, ends, 0), 0)
    item = request_start + head_start
    first = split_of_item(item, num_items, splits)
    last = split_of_item(item + num_head_items - 1, num_items, splits)
    if first == last:
        return

    dims = tl.arange(0, HEAD_PADDED)
    acc = tl.zeros((HEAD_PADDED,), tl.float32)
    max_lse = tl.full((), -1e30, tl.float32)
    total_weight = tl.zeros((), tl.float32)
    for chunk in range(first, last + 1, CHUNK):
        programs = chunk + tl.arange(0, CHUNK)
        is_program = programs <= last
        rows = (programs.to(tl.int64) * 2 + (programs == first)) * GROUP_SIZE + head % GROUP_SIZE
        row_lse = tl.load(lse + rows, mask=is_program, other=float("-inf"))
        results = load_tile_where(partial + rows * HEAD_SIZE, is_program, HEAD_SIZE, HEAD_PADDED)
        new_max = tl.maximum(max_lse, tl.max(row_lse, 0))
        weights = tl.exp2(row_lse - new_max)
        decay = tl.exp2(max_lse - new_max)
        acc = acc * decay + tl.sum(results * weights[:, None], 0)
        total_weight = total_weight * decay + tl.sum(weights, 0)
        max_lse = new_max
    out_row = out + token.to(tl.int64) * out_stride_token + head.to(tl.int64) * out_stride_head
    tl.store(out_row + dims, (acc / total_weight).to(out.dtype.element_ty), mask=dims < HEAD_SIZE)


def chunk_size(num_programs: int, num_heads: int) -> int:
    """Partial results to read at once, a power of two: all of a KV head's where contexts are equally long.

    Args:
        num_programs: programs that share the batch.
        num_heads: KV heads of all requests together.
    """
    programs_per_head = triton.cdiv(num_programs, num_heads) + 1
    return min(MAX_CHUNK, max(MIN_CHUNK, triton.next_power_of_2(programs_per_head)))


def prepare_combine(
    partial: torch.Tensor,
    lse: torch.Tensor,
    out: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    schedule: dict[str, int],
    first_kept: torch.Tensor,
) -> KernelLaunch:
    """What fills the rows of `out`, or of one like it, that the first kernel has left to this one.

    It is called with that tensor and a `first_kept`.

    Args:
        partial, lse, out: as the kernel documents them.
        requests: of the batch.
        pattern: of the heads.
        schedule: compile-time constants of the first kernel, which must be the same here.
        first_kept: of the pattern's tables.
    """
    num_programs = partial.shape[0]
    num_requests = len(requests.seq_lens)
    chunk = chunk_size(num_programs, num_requests * pattern.num_kv_heads)
    arguments = {
        "partial": partial,
        "lse": lse,
        "out": out,
        "query_start_loc": requests.query_start_loc,
        "seq_lens": requests.seq_lens,
        "first_kept": first_kept,
        "num_requests": num_requests,
        "num_programs": num_programs,
        "out_stride_token": out.stride(0),
        "out_stride_head": out.stride(1),
        "CHUNK": chunk,
        **schedule,
    }
    return KernelLaunch(
        paged_decode_combine_kernel,
        (num_requests, pattern.num_heads),
        arguments,
        ("out", "first_kept"),
        num_warps=max(1, chunk * schedule["HEAD_PADDED"] // ELEMENTS_PER_WARP),
        **({"launch_pdl": True} if schedule["USE_PDL"] else {}),
    )
