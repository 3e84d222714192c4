"""S2-Attention of many queries per request on a Hopper GPU: TMA loads, wgmma, specialized warps.

One warp loads (the producer) and two warpgroups multiply (the consumers), 64 queries of a tile each. A step
takes two blocks of keys, 128 tokens, wherever they lie. The overlap of products and softmax is that of
FlashAttention-3 (arXiv 2407.08608, section 3.2) within a warpgroup; across the two the hardware does it.
Programs are persistent, so that the loads for a tile begin while the one before is finished.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from math import gcd
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
from s2_kernels.launch import limits
from s2_kernels.launch.call_cache import CallCache, layouts
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.device import num_multiprocessors
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.launch.limits import LOG2_E
from s2_kernels.layout import HeadTables, TierLayout
from s2_kernels.paged.calls import AttendCall
from s2_kernels.paged.requests import UNALIGNED, PagedRequests
from s2_kernels.pattern import NO_RESIDUE, S2Pattern
from s2_kernels.tiles import first_tile

SWIZZLED = gl.NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=2)
MIB = 2**20
OF_KINDS = ("num_streaming", "first_full", "full_per_section")
"""The arguments that say how many heads are of which kind, None where all are of one."""
KEYS_AND_VALUES = ("window_keys", "window_values", "strided_keys", "strided_values")
OF_HEADS = ("residues", "ranks", "first_kept", "by_work")
VARYING = ("queries", *KEYS_AND_VALUES, "out", *OF_HEADS, "lse")
"""The arguments that a launch is repeated with."""

_CONTIGUOUS_CALLS: CallCache[Callable[..., None]] = CallCache()


@gluon.jit(
    do_not_specialize=[
        "num_tiles",
        "num_items",
        "num_requests",
        "heads_per_section",
        "num_streaming",
        "first_full",
        "full_per_section",
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
    first_kept,  # [num_kv_heads + 1], and what else is None without KINDS
    by_work,  # [num_heads]
    num_streaming,
    first_full,
    full_per_section,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    PAGE_SLOTS: gl.constexpr,
    RESIDUE_SLOTS: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    NUM_KEPT: gl.constexpr,
    KINDS: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A program works on one tile per wave: `item_of_wave`, `locate_tile`.

    KINDS: heads may be full or streaming, and the strided tier's pages have RESIDUE_SLOTS slots for each kept
    residue of a KV head. Otherwise those pages are like the window tier's, and each KV head keeps NUM_KEPT.
    """
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
    sections = heads_per_section
    if KINDS:
        sections = (heads_per_section, by_work, num_streaming, first_full, full_per_section)
    work = (num_tiles, num_items, num_requests, sections)
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
                    ranks,
                    out_rows,
                    lse,
                    lse_stride_token,
                    scale_log2,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    KINDS,
                    SINK_BLOCKS,
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
                    ranks,
                    out_rows,
                    lse,
                    lse_stride_token,
                    scale_log2,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    KINDS,
                    SINK_BLOCKS,
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
                    first_kept,
                    GROUP_SIZE,
                    HEAD_SIZE,
                    PAGE_SLOTS,
                    RESIDUE_SLOTS,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    NUM_KEPT,
                    KINDS,
                    SINK_BLOCKS,
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
    layout = TierLayout.of_caches(pattern, window_cache, strided_cache)
    # Streaming heads have no pages of the strided tier: nothing is read there.
    has_strided = strided_cache.numel() > 0
    strided_cache = strided_cache if has_strided else window_cache
    num_kept = limits.num_kept(layout)
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
        num_kept=num_kept,
        page_slots=page_slots,
        residue_slots=layout.residue_slots,
        page_rows=(
            window_cache.stride(0) // window_cache.stride(2),
            strided_cache.stride(0) // strided_cache.stride(2),
        ),
        head_rows=(
            window_cache.stride(1) // window_cache.stride(2),
            strided_cache.stride(1) // strided_cache.stride(2),
        ),
        max_seq_len=max_seq_len or window_table.shape[1] * page_slots,
    )

    def attend(
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        # The descriptors of the launch, moved: what Triton checks of each new one has been checked.
        queries.base, window.base = q, window_cache
        strided.base = strided_cache if has_strided else window_cache
        launch(queries, window, window, strided, strided, out, *_head_tables(tables, num_kept), None)
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
    num_kept = pattern.num_kept if pattern.kinds is None else limits.VARYING
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
        num_kept=num_kept,
        page_slots=0,
        residue_slots=0,
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
            launch(queries, keys, values, keys, values, out, *_head_tables(tables, num_kept), lse)
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
    num_kept: int,
    page_slots: int,
    residue_slots: int,
    page_rows: tuple[int, int],
    head_rows: tuple[int, int],
    max_seq_len: int,
) -> KernelLaunch:
    """The launch of VARYING.

    Args:
        num_kept: residues of each KV head; `limits.VARYING` where its heads may be of several kinds.
        page_slots: slots of a KV head in a page of the window tier, 0 for keys that are not paged.
        residue_slots: slots of a virtual head in a page of the strided tier.
        page_rows, head_rows: rows from one page, or head, to the next, in either tier.
        max_seq_len: the longest sequence, or a bound.
        others: as of `prepare_prefill` and `contiguous_prefill_fwd`.
    """
    num_tokens, num_heads, head_size = out.shape
    num_requests = lengths[2].shape[0]
    num_tiles = first_tile(num_tokens, num_requests, TILE_M.value)
    num_items = num_tiles * num_heads
    config = hopper_prefill_config(head_size, out.dtype)
    section_bytes = config.pop("section_mib") * MIB
    arguments = {
        "queries": queries,
        **dict(zip(KEYS_AND_VALUES, keys_and_values, strict=True)),
        "window_table": block_tables[0],
        "strided_table": block_tables[1],
        "query_start_loc": lengths[0],
        "key_start_loc": lengths[1],
        "seq_lens": lengths[2],
        **dict(zip(OF_HEADS, _head_tables(tables, num_kept), strict=True)),
        "out": out,
        "lse": lse,
        "scale_log2": scale * LOG2_E,
        "num_tiles": num_tiles,
        "num_items": num_items,
        "num_requests": num_requests,
        **_sections(pattern, num_kept, max_seq_len, head_size, section_bytes),
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
        "RESIDUE_SLOTS": residue_slots,
        "LOCAL_BLOCKS": limits.local_blocks(pattern),
        "VERT_STRIDE": pattern.vert_stride,
        "NUM_KEPT": num_kept,
        "KINDS": num_kept == limits.VARYING,
        "SINK_BLOCKS": limits.sink_blocks(pattern),
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
    return _fitting(pattern.num_heads, pattern.group_size, strided_tokens, head_size, section_bytes)


def _fitting(num_heads: int, group_size: int, kv_tokens: int, head_size: int, section_bytes: int) -> int:
    """Of so many query heads, those of a section; each group of them reads `kv_tokens` older than the window.

    Sections are equal, and have whole groups where the kind of heads that they are of has.
    """
    group_size = gcd(num_heads, group_size)
    groups = num_heads // group_size
    head_bytes = max(1, kv_tokens * 2 * head_size * 2)
    fitting = (n for n in range(1, groups + 1) if groups % n == 0)
    return group_size * max((n for n in fitting if n * head_bytes <= section_bytes), default=1)


def _sections(
    pattern: S2Pattern, num_kept: int, max_seq_len: int, head_size: int, section_bytes: int
) -> dict[str, int | None]:
    """How heads come in sections, by the names of the kernel's arguments: see `schedule.kind_at`."""
    if num_kept != limits.VARYING:
        per_section = heads_per_section(pattern, max_seq_len, head_size, section_bytes)
        return {"heads_per_section": per_section, **dict.fromkeys(OF_KINDS)}
    group_size = pattern.group_size
    num_full = len(pattern.full_heads) * group_size
    num_streaming = pattern.residues.count(NO_RESIDUE) - num_full
    first_full = pattern.num_heads - num_full
    strided_tokens = max_seq_len * pattern.most_strided // pattern.vert_stride
    strided = _fitting(first_full - num_streaming, group_size, strided_tokens, head_size, section_bytes)
    full = _fitting(num_full, group_size, max_seq_len, head_size, section_bytes)
    of_kinds = (num_streaming, first_full, full)
    return {"heads_per_section": strided, **dict(zip(OF_KINDS, of_kinds, strict=True))}


def _head_tables(tables: HeadTables, num_kept: int) -> tuple[torch.Tensor | None, ...]:
    """What the kernel reads of a pattern's tables: OF_HEADS."""
    if num_kept != limits.VARYING:
        return tables.residue, tables.rank, None, None
    return tables.residue, tables.rank, tables.first_kept, tables.by_work


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
