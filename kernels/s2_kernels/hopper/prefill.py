"""S2-Attention of many queries per request on a Hopper GPU: TMA loads, wgmma, specialized warps.

One warp loads (the producer) and two warpgroups multiply (the consumers), 64 queries of a tile each. A step
takes two blocks of keys, 128 tokens, wherever they lie. The overlap of products and softmax is that of
FlashAttention-3 (arXiv 2407.08608, section 3.2) within a warpgroup; across the two the hardware does it.
Programs are persistent, so that the loads for a tile begin while the one before is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from threading import Lock

import torch
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from s2_kernels.contiguous.sequences import Span
from s2_kernels.hopper.consumer import BLOCK_N, consume
from s2_kernels.hopper.gluon_api import reinterpret
from s2_kernels.hopper.producer import PANEL, produce
from s2_kernels.hopper.schedule import TILE_M, UNIT
from s2_kernels.launch.call_cache import CallCache, layouts
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.device import num_multiprocessors
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E, local_blocks
from s2_kernels.layout import HeadTables
from s2_kernels.paged.calls import AttendCall
from s2_kernels.paged.requests import UNALIGNED, PagedRequests
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import first_tile

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
MIB = 2**20
VARYING = (
    "queries",
    "window_keys",
    "window_values",
    "strided_keys",
    "strided_values",
    "out",
    "residues",
    "ranks",
    "lse",
)
"""The arguments that a launch is repeated with."""

_CONTIGUOUS_CALLS: CallCache[Callable[..., None]] = CallCache()


@gluon.jit(
    do_not_specialize=[
        "num_tiles",
        "num_items",
        "num_requests",
        "heads_per_section",
        "window_table_stride",
        "strided_table_stride",
    ],
    do_not_specialize_on_alignment=[*UNALIGNED, "key_start_loc"],
)
def prefill_fwd_kernel(
    queries,  # TMA descriptors: [tokens, num_heads * head_size]
    window_keys,  # [rows, columns], the rows of a tier's pages or of contiguous tokens
    window_values,
    strided_keys,
    strided_values,
    window_table,  # [requests, pages]
    strided_table,
    query_start_loc,  # [requests + 1]
    key_start_loc,  # [requests + 1], where keys are contiguous
    seq_lens,  # [requests]
    residues,  # [num_heads]
    ranks,  # [num_heads]
    out,  # [tokens, num_heads, head_size]
    lse,  # [tokens, num_heads] or None
    scale_log2,
    num_tiles,
    num_items,
    num_requests,
    heads_per_section,
    window_table_stride,
    strided_table_stride,
    window_page_rows,
    strided_page_rows,
    window_head_rows,
    strided_head_rows,
    out_stride_token: gl.int64,
    out_stride_head: gl.int64,
    lse_stride_token: gl.int64,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    PAGE_SLOTS: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    NUM_KEPT: gl.constexpr,
    HALF_START: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A program works on one tile per wave: `item_of_wave`, `locate_tile`."""
    dtype: gl.constexpr = queries.dtype
    LAYOUT: gl.constexpr = queries.layout
    PIECES: gl.constexpr = STAGES * (HEAD_SIZE // PANEL) * 2
    q_smem = gl.allocate_shared_memory(dtype, [2, TILE_M // 2, HEAD_SIZE], LAYOUT)
    # TMA fills pieces of 64 rows by 128 bytes; one after the other, they are a tile as wgmma reads it.
    k_pieces = gl.allocate_shared_memory(dtype, [PIECES, UNIT, PANEL], LAYOUT)
    v_pieces = gl.allocate_shared_memory(dtype, [PIECES, UNIT, PANEL], LAYOUT)
    k_smem = reinterpret(k_pieces, dtype, [STAGES, BLOCK_N, HEAD_SIZE], LAYOUT)
    v_smem = reinterpret(v_pieces, dtype, [STAGES, BLOCK_N, HEAD_SIZE], LAYOUT)

    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    q_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    q_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    k_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    k_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    v_empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(q_ready, count=1)
    mbarrier.init(q_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(k_ready.index(stage), count=1)
        mbarrier.init(k_empty.index(stage), count=2)
        mbarrier.init(v_ready.index(stage), count=1)
        mbarrier.init(v_empty.index(stage), count=2)
    fence_async_shared()

    # Tuples without compile-time constants: Triton 3.6 takes those out of a tuple that has a name.
    work = (num_tiles, num_items, num_requests, heads_per_section)
    barriers = (q_ready, q_empty, k_ready, k_empty, v_ready, v_empty)
    window = (
        window_keys,
        window_values,
        window_table,
        window_table_stride,
        window_page_rows,
        window_head_rows,
    )
    strided = (
        strided_keys,
        strided_values,
        strided_table,
        strided_table_stride,
        strided_page_rows,
        strided_head_rows,
    )
    tiles = (q_smem, k_smem, v_smem, v_pieces)
    heads = (residues, ranks)
    lengths = (query_start_loc, key_start_loc, seq_lens)
    out_rows = (out, out_stride_token, out_stride_head)
    gl.warp_specialize(
        [
            (
                consume,
                (
                    gl.constexpr(0),
                    tiles,
                    barriers,
                    work,
                    lengths,
                    residues,
                    out_rows,
                    lse,
                    lse_stride_token,
                    scale_log2,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    HALF_START,
                    STAGES,
                ),
            ),
            (
                consume,
                (
                    gl.constexpr(1),
                    tiles,
                    barriers,
                    work,
                    lengths,
                    residues,
                    out_rows,
                    lse,
                    lse_stride_token,
                    scale_log2,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    HALF_START,
                    STAGES,
                ),
            ),
            (
                produce,
                (
                    queries,
                    window,
                    strided,
                    q_smem,
                    k_pieces,
                    v_pieces,
                    barriers,
                    work,
                    lengths,
                    heads,
                    GROUP_SIZE,
                    HEAD_SIZE,
                    PAGE_SLOTS,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    NUM_KEPT,
                    HALF_START,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )


def prepare_prefill(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    tables: HeadTables,
    max_seq_len: int | None,
) -> AttendCall:
    """`s2_kernels.paged.attend` of tensors that `refusal` has nothing against, after its checks."""
    window_cache, strided_cache, window_table, strided_table, query_start_loc, seq_lens = requests
    page_slots, columns = window_cache.shape[2:]
    queries = head_blocks(q)
    window, strided = _rows(window_cache, columns), _rows(strided_cache, columns)
    launch = _prepare(
        queries,
        (window, window, strided, strided),
        (window_table, strided_table),
        tables,
        (query_start_loc, query_start_loc, seq_lens),
        pattern,
        scale,
        out,
        lse=None,
        page_slots=page_slots,
        page_rows=(
            window_cache.stride(0) // window_cache.stride(2),
            strided_cache.stride(0) // strided_cache.stride(2),
        ),
        head_rows=(
            window_cache.stride(1) // window_cache.stride(2),
            strided_cache.stride(1) // strided_cache.stride(2),
        ),
        max_seq_len=max_seq_len
        or strided_table.shape[1] * page_slots * pattern.vert_stride // pattern.num_kept,
    )

    def attend(
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        # The descriptors of the launch, moved: what Triton checks of each new one has been checked.
        queries.base, window.base, strided.base = q, window_cache, strided_cache
        launch(queries, window, window, strided, strided, out, tables.residue, tables.rank, None)
        # No tensor is kept alive from here.
        queries.base = window.base = strided.base = None

    queries.base = window.base = strided.base = None
    return attend


def contiguous_prefill_fwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed_lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pattern: S2Pattern,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tables: HeadTables,
) -> None:
    """S2-Attention over packed keys and values, of tensors that `refusal` has nothing against.

    Args:
        q, out: [tokens, num_heads, head_size].
        k, v: [keys, num_kv_heads, head_size].
        packed_lengths: int32 [sequences + 1] twice, where each sequence's queries and keys start; and
            [sequences], its number of keys. Its queries are the last of them.
        pattern: of the heads.
        spans: the sequences, which `packed_lengths` are made of.
        scale: factor on the logits, positive.
        lse: float32 [tokens, num_heads], to be filled with the log-sum-exp of the scaled logits, or None.
        tables: of the pattern.
    """
    config = hopper_prefill_config(q.shape[2], q.dtype)
    key = (layouts(q, k, v, out, lse), pattern, spans, scale, *config.values())
    make = partial(_prepare_contiguous, q, k, v, packed_lengths, pattern, scale, out, lse, tables)
    _CONTIGUOUS_CALLS.get(key, make)(q, k, v, out, lse)


def _prepare_contiguous(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    packed_lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor | None,
    tables: HeadTables,
) -> Callable[..., None]:
    """The launch, as a function of tensors like q, k, v, out and lse."""
    columns = k.shape[1] * k.shape[2]
    queries, keys, values = head_blocks(q), _rows(k, columns), _rows(v, columns)
    launch = _prepare(
        queries,
        (keys, values, keys, values),
        (packed_lengths[2], packed_lengths[2]),
        tables,
        packed_lengths,
        pattern,
        scale,
        out,
        lse=lse,
        page_slots=0,
        page_rows=(0, 0),
        head_rows=(0, 0),
        max_seq_len=k.shape[0],
    )
    lock = Lock()  # threads share the descriptors

    def call(
        q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, out: torch.Tensor, lse: torch.Tensor | None
    ) -> None:
        with lock:
            queries.base, keys.base, values.base = q, k, v
            launch(queries, keys, values, keys, values, out, tables.residue, tables.rank, lse)
            queries.base = keys.base = values.base = None

    queries.base = keys.base = values.base = None  # no tensor is kept alive from here

    return call


def _prepare(
    queries: TensorDescriptor,
    keys_and_values: tuple[TensorDescriptor, ...],
    block_tables: tuple[torch.Tensor, torch.Tensor],
    tables: HeadTables,
    lengths: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    *,
    lse: torch.Tensor | None,
    page_slots: int,
    page_rows: tuple[int, int],
    head_rows: tuple[int, int],
    max_seq_len: int,
) -> KernelLaunch:
    """The launch of VARYING."""
    num_tokens, num_heads, head_size = out.shape
    num_requests = lengths[2].shape[0]
    num_tiles = first_tile(num_tokens, num_requests, TILE_M.value)
    num_items = num_tiles * num_heads
    config = hopper_prefill_config(head_size, out.dtype)
    section_bytes = config.pop("section_mib") * MIB
    arguments = {
        "queries": queries,
        **dict(zip(VARYING[1:5], keys_and_values, strict=True)),
        "window_table": block_tables[0],
        "strided_table": block_tables[1],
        "query_start_loc": lengths[0],
        "key_start_loc": lengths[1],
        "seq_lens": lengths[2],
        "residues": tables.residue,
        "ranks": tables.rank,
        "out": out,
        "lse": lse,
        "scale_log2": scale * LOG2_E,
        "num_tiles": num_tiles,
        "num_items": num_items,
        "num_requests": num_requests,
        "heads_per_section": heads_per_section(pattern, max_seq_len, head_size, section_bytes),
        "window_table_stride": block_tables[0].stride(0),
        "strided_table_stride": block_tables[1].stride(0),
        "window_page_rows": page_rows[0],
        "strided_page_rows": page_rows[1],
        "window_head_rows": head_rows[0],
        "strided_head_rows": head_rows[1],
        "out_stride_token": out.stride(0),
        "out_stride_head": out.stride(1),
        "lse_stride_token": 0 if lse is None else lse.stride(0),
        "GROUP_SIZE": pattern.group_size,
        "HEAD_SIZE": head_size,
        "PAGE_SLOTS": page_slots,
        "LOCAL_BLOCKS": local_blocks(pattern),
        "VERT_STRIDE": pattern.vert_stride,
        "NUM_KEPT": pattern.num_kept,
        "HALF_START": max_seq_len > pattern.window_tokens,
        **config,
    }
    grid = (min(num_items, num_multiprocessors(out.device)),)
    return KernelLaunch(prefill_fwd_kernel, grid, arguments, VARYING, num_warps=4)


def hopper_prefill_config(head_size: int, dtype: torch.dtype) -> dict[str, int]:
    """Stages of keys and of values in shared memory, and what a section of heads may have of strided ones.

    By default well within an L2 cache of 50 MB.
    """
    defaults = {"STAGES": 2, "section_mib": 8}
    return launch_config("hopper_prefill", shape_key(head_size, dtype), defaults)


def heads_per_section(pattern: S2Pattern, max_seq_len: int, head_size: int, section_bytes: int) -> int:
    """How many query heads to work on at a time: those of as many KV heads as share the L2 cache well."""
    strided_tokens = max_seq_len * pattern.num_kept // pattern.vert_stride
    head_bytes = max(1, strided_tokens * 2 * head_size * 2)
    fitting = (n for n in range(1, pattern.num_kv_heads + 1) if pattern.num_kv_heads % n == 0)
    kv_heads = max((n for n in fitting if n * head_bytes <= section_bytes), default=1)
    return kv_heads * pattern.group_size


def head_blocks(q: torch.Tensor) -> TensorDescriptor:
    """[tokens, num_heads * head_size], for loads of half a tile of a head."""
    num_tokens, num_heads, head_size = q.shape
    return TensorDescriptor(
        q, [num_tokens, num_heads * head_size], [q.stride(0), 1], [TILE_M.value // 2, head_size], SWIZZLED
    )


def _rows(tensor: torch.Tensor, columns: int) -> TensorDescriptor:
    """[rows, columns]: a tensor's memory, for loads of UNIT rows of a panel."""
    row = tensor.stride(-2 if tensor.dim() == 4 else 0)
    last_row = (
        sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) // row
    )
    return TensorDescriptor(tensor, [last_row + 1, columns], [row, 1], [UNIT.value, PANEL.value], SWIZZLED)
