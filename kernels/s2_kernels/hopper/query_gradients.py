"""The gradients of queries on a Hopper GPU: prefill's walk over the keys, with three products a unit.

Queries and output gradients stay in registers, as left operands. While a unit's logits are turned into their
gradients, the product of the unit before runs.
"""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2_kernels.hopper.consumer import store_rows, visible_keys
from s2_kernels.hopper.gluon_api import tma_load
from s2_kernels.hopper.key_gradients import zero_rows_outside
from s2_kernels.hopper.schedule import (
    TILE_M,
    UNIT,
    item_of_wave,
    locate_tile,
    num_waves,
    order_units,
    unit_at,
)


@gluon.jit
def units_with_keys(
    first_position, last_position, residue, LOCAL_BLOCKS: gl.constexpr, VERT_STRIDE: gl.constexpr
):
    """(number of units, end of those that need a mask, order) as of `order_units`, without the even number.

    Unit u of these is at `place_of_unit(u, order)` among those.
    """
    num_units, masked_end, order = order_units(
        first_position, last_position, residue, VERT_STRIDE, LOCAL_BLOCKS, 0, False
    )
    edge_end = order[2]
    return num_units - (masked_end - edge_end), edge_end, order


@gluon.jit
def place_of_unit(u, order):
    """Where unit u is in the order, which may have one unit without keys after those that need a mask."""
    edge_end, masked_end = order[2], order[4]
    return u + gl.where(u >= edge_end, masked_end - edge_end, 0)


@gluon.jit
def produce_for_queries(
    descriptors,
    rows_smem,
    kv_smem,
    barriers,
    work,
    lengths,
    residues,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp: queries and output gradients of a tile, then keys and values of each unit."""
    queries, d_out, keys, values = descriptors
    q_smem, d_out_smem = rows_smem
    k_smem, v_smem = kv_smem
    rows_ready, rows_empty, ready, empty = barriers
    num_items = work[1]
    query_start_loc, key_start_loc, seq_lens, _row_starts = lengths
    step = 0
    tiles_done = 0
    for wave in range(0, num_waves(num_items)):
        head, request, query_start, query_len, first_row = locate_tile(
            item_of_wave(wave, num_items), work, query_start_loc, False
        )
        if first_row < query_len:
            context_len = gl.load(seq_lens + request) - query_len
            last_position = context_len + gl.minimum(first_row + TILE_M, query_len) - 1
            residue = gl.load(residues + head)
            num_units, _masked_end, order = units_with_keys(
                context_len + first_row, last_position, residue, LOCAL_BLOCKS, VERT_STRIDE
            )
            key_row = gl.load(key_start_loc + request)
            key_column = head // GROUP_SIZE * HEAD_SIZE
            mbarrier.wait(rows_empty, (tiles_done & 1) ^ 1)
            mbarrier.expect(rows_ready, 2 * TILE_M * HEAD_SIZE * 2)
            for half in gl.static_range(2):
                at = [query_start + first_row + half * (TILE_M // 2), head * HEAD_SIZE]
                tma_load(queries, at, rows_ready, q_smem.index(half))
                tma_load(d_out, at, rows_ready, d_out_smem.index(half))
            tiles_done += 1
            for u in range(0, num_units):
                is_window, index = unit_at(place_of_unit(u, order), order, 0, False)
                block = gl.where(is_window, index, index * VERT_STRIDE + residue)
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(stage), 2 * UNIT * HEAD_SIZE * 2)
                unit_row = [key_row + block * UNIT, key_column]
                tma_load(keys, unit_row, ready.index(stage), k_smem.index(stage))
                tma_load(values, unit_row, ready.index(stage), v_smem.index(stage))
                step += 1


@gluon.jit
def logit_gradients(logits, d_weights, lse, delta, scale_log2):
    """weight * (d_weight - delta), [rows, UNIT], of unscaled logits."""
    return gl.exp2(logits * scale_log2 - lse[:, None]) * (d_weights - delta[:, None])


@gluon.jit
def mask_gradients(d_logits, u, order, residue, positions, window_starts, VERT_STRIDE: gl.constexpr):
    """Gradients of the logits of unit u, zero where a query does not see a key."""
    place = place_of_unit(u, order)
    visible = visible_keys(place, order, residue, VERT_STRIDE, positions, window_starts, 0, False)
    columns = gl.arange(0, UNIT, layout=gl.SliceLayout(0, d_logits.type.layout))
    return gl.where(columns[None, :] < visible[:, None], d_logits, 0.0)


@gluon.jit
def consume_for_queries(
    WARPGROUP: gl.constexpr,
    rows_smem,
    kv_smem,
    barriers,
    work,
    lengths,
    residues,
    statistics,
    gradients,
    scale,
    scale_log2,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The gradients of this warpgroup's half of every tile of this program."""
    q_smem, d_out_smem = rows_smem
    k_smem, v_smem = kv_smem
    rows_ready, rows_empty, ready, empty = barriers
    num_items = work[1]
    query_start_loc, _key_start_loc, seq_lens, row_starts = lengths
    row_lse, row_delta, num_blocks = statistics
    d_queries, dq_stride_token, dq_stride_head = gradients
    ROWS: gl.constexpr = TILE_M // 2
    HEAD_SIZE: gl.constexpr = k_smem.shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNIT, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    LEFT: gl.constexpr = gl.DotOperandLayout(0, LOGITS, 2)
    GRADIENTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    dtype: gl.constexpr = k_smem.dtype
    zeros = gl.zeros([ROWS, UNIT], gl.float32, LOGITS)
    step = 0
    tiles_done = 0
    for wave in range(0, num_waves(num_items)):
        head, request, query_start, query_len, first_row = locate_tile(
            item_of_wave(wave, num_items), work, query_start_loc, False
        )
        if first_row < query_len:
            # Rows past the last query repeat it, so that every row has keys.
            num_tokens = gl.load(seq_lens + request)
            context_len = num_tokens - query_len
            last_position = context_len + gl.minimum(first_row + TILE_M, query_len) - 1
            rows = first_row + WARPGROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
            positions = gl.minimum(context_len + rows, last_position)
            window_starts = (positions // UNIT - LOCAL_BLOCKS + 1) * UNIT
            residue = gl.load(residues + head)
            num_units, masked_end, order = units_with_keys(
                context_len + first_row, last_position, residue, LOCAL_BLOCKS, VERT_STRIDE
            )
            of_head = (head * num_blocks + gl.load(row_starts + request)).to(gl.int64) * UNIT
            at = of_head + context_len % UNIT + rows
            lse = gl.load(row_lse + at, mask=rows < query_len, other=float("inf"))
            delta = gl.load(row_delta + at, mask=rows < query_len, other=0.0)
            dq = gl.zeros([ROWS, HEAD_SIZE], gl.float32, OUTPUT)

            mbarrier.wait(rows_ready, tiles_done & 1)
            queries = q_smem.index(WARPGROUP).load(LEFT)
            d_out = d_out_smem.index(WARPGROUP).load(LEFT)
            mbarrier.arrive(rows_empty, count=1)

            stage = step % STAGES
            mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
            # What lies past the last key may be NaN, and a gradient of zero would not hide it. Both
            # warpgroups do this, each before its own products: they write the same.
            if (num_tokens % UNIT != 0) & (last_position // UNIT == (num_tokens - 1) // UNIT):
                zero_rows_outside(k_smem.index(stage), 0, num_tokens % UNIT)
                fence_async_shared()
            logits = warpgroup_mma(
                queries, k_smem.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
            )
            d_weights = warpgroup_mma(
                d_out, v_smem.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
            )
            logits, d_weights = warpgroup_mma_wait(0, deps=[logits, d_weights])
            d_logits = logit_gradients(logits, d_weights, lse, delta, scale_log2)
            d_logits = mask_gradients(d_logits, 0, order, residue, positions, window_starts, VERT_STRIDE)
            left = gl.convert_layout(d_logits.to(dtype), GRADIENTS)
            for u in range(1, num_units):
                last_stage = step % STAGES
                step += 1
                stage = step % STAGES
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                logits = warpgroup_mma(
                    queries, k_smem.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
                )
                d_weights = warpgroup_mma(
                    d_out, v_smem.index(stage).permute([1, 0]), zeros, use_acc=False, is_async=True
                )
                dq = warpgroup_mma(left, k_smem.index(last_stage), dq, is_async=True)
                logits, d_weights = warpgroup_mma_wait(1, deps=[logits, d_weights])
                d_logits = logit_gradients(logits, d_weights, lse, delta, scale_log2)
                if u < masked_end:
                    d_logits = mask_gradients(
                        d_logits, u, order, residue, positions, window_starts, VERT_STRIDE
                    )
                dq, left, d_logits = warpgroup_mma_wait(0, deps=[dq, left, d_logits])
                mbarrier.arrive(empty.index(last_stage), count=1)
                left = gl.convert_layout(d_logits.to(dtype), GRADIENTS)
            dq = warpgroup_mma(left, k_smem.index(step % STAGES), dq)
            mbarrier.arrive(empty.index(step % STAGES), count=1)
            step += 1
            tiles_done += 1
            store_rows(
                d_queries + head * dq_stride_head,
                dq_stride_token,
                (dq * scale).to(dtype),
                query_start,
                first_row + WARPGROUP * ROWS,
                query_len,
            )


@gluon.jit(
    do_not_specialize=["num_tiles", "num_items", "num_requests", "heads_per_section", "num_blocks"],
)
def query_gradients_bwd_kernel(
    queries,  # TMA descriptors: [tokens, num_heads * head_size]
    d_out,  # as queries
    keys,  # [keys, num_kv_heads * head_size]
    values,  # as keys
    query_start_loc,  # [requests + 1]
    key_start_loc,  # [requests + 1]
    seq_lens,  # [requests]
    row_starts,  # [requests], query blocks of the sequences before
    residues,  # [num_heads]
    row_lse,  # [num_heads, num_blocks * UNIT]
    row_delta,  # as row_lse
    d_queries,  # [tokens, num_heads, head_size]
    scale,
    scale_log2,
    num_tiles,
    num_items,
    num_requests,
    heads_per_section,
    num_blocks,
    dq_stride_token: gl.int64,
    dq_stride_head: gl.int64,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A program works on one tile per wave: `item_of_wave`, `locate_tile`."""
    dtype: gl.constexpr = queries.dtype
    LAYOUT: gl.constexpr = queries.layout
    q_smem = gl.allocate_shared_memory(dtype, [2, TILE_M // 2, HEAD_SIZE], LAYOUT)
    d_out_smem = gl.allocate_shared_memory(dtype, [2, TILE_M // 2, HEAD_SIZE], LAYOUT)
    k_smem = gl.allocate_shared_memory(dtype, [STAGES, UNIT, HEAD_SIZE], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [STAGES, UNIT, HEAD_SIZE], LAYOUT)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    rows_ready = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    rows_empty = gl.allocate_shared_memory(gl.int64, [1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    mbarrier.init(rows_ready, count=1)
    mbarrier.init(rows_empty, count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()

    # Tuples without compile-time constants: Triton 3.6 takes those out of a tuple that has a name.
    rows_smem, kv_smem = (q_smem, d_out_smem), (k_smem, v_smem)
    barriers = (rows_ready, rows_empty, ready, empty)
    work = (num_tiles, num_items, num_requests, heads_per_section)
    lengths = (query_start_loc, key_start_loc, seq_lens, row_starts)
    statistics = (row_lse, row_delta, num_blocks)
    gradients = (d_queries, dq_stride_token, dq_stride_head)
    descriptors = (queries, d_out, keys, values)
    gl.warp_specialize(
        [
            (
                consume_for_queries,
                (
                    gl.constexpr(0),
                    rows_smem,
                    kv_smem,
                    barriers,
                    work,
                    lengths,
                    residues,
                    statistics,
                    gradients,
                    scale,
                    scale_log2,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    STAGES,
                ),
            ),
            (
                consume_for_queries,
                (
                    gl.constexpr(1),
                    rows_smem,
                    kv_smem,
                    barriers,
                    work,
                    lengths,
                    residues,
                    statistics,
                    gradients,
                    scale,
                    scale_log2,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    STAGES,
                ),
            ),
            (
                produce_for_queries,
                (
                    descriptors,
                    rows_smem,
                    kv_smem,
                    barriers,
                    work,
                    lengths,
                    residues,
                    GROUP_SIZE,
                    HEAD_SIZE,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
