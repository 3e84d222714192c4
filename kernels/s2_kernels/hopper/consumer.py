"""The consumer warpgroups: the matrix products and the softmax of 64 queries each."""

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from s2_kernels.hopper.schedule import (
    NO_UNIT,
    TILE_M,
    UNIT,
    is_sink,
    item_of_wave,
    locate_tile,
    num_waves,
    order_units,
    strided_blocks,
    unit_at,
)

BLOCK_N = gl.constexpr(128)
LN_2 = gl.constexpr(0.6931471805599453)


@gluon.jit
def visible_keys(
    n,
    order,
    first_strided,
    stride,
    positions,
    window_starts,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
):
    """[rows]: how many leading keys of unit n each query sees. Windows and units start at blocks."""
    is_window, index = unit_at(n, order, SINK_BLOCKS, HALF_START)
    first_key = gl.where(is_window, index, index * stride + first_strided) * UNIT
    if SINK_BLOCKS > 0:
        is_window = is_window & (is_sink(n, order) == 0)
    is_seen = ((first_key >= window_starts) == is_window) & (index != NO_UNIT)
    return gl.where(is_seen, positions + 1 - first_key, 0)


@gluon.jit
def mask_unit(logits, n, order, first_strided, stride, positions, window_starts, SINK_BLOCKS: gl.constexpr):
    """Logits [rows, UNIT] of unit n, -inf where a query does not see a key."""
    visible = visible_keys(n, order, first_strided, stride, positions, window_starts, SINK_BLOCKS, True)
    visible = gl.convert_layout(visible, gl.SliceLayout(1, logits.type.layout))
    columns = gl.arange(0, UNIT, layout=gl.SliceLayout(0, logits.type.layout))
    return gl.where(columns[None, :] < visible[:, None], logits, float("-inf"))


@gluon.jit
def mask_step(
    logits,
    n,
    order,
    first_strided,
    stride,
    positions,
    window_starts,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
):
    """Logits [rows, BLOCK_N] of units n and n + 1, -inf where a query does not see a key."""
    visible_0 = visible_keys(
        n, order, first_strided, stride, positions, window_starts, SINK_BLOCKS, HALF_START
    )
    visible_1 = visible_keys(
        n + 1, order, first_strided, stride, positions, window_starts, SINK_BLOCKS, HALF_START
    )
    columns = gl.arange(0, BLOCK_N, layout=gl.SliceLayout(0, logits.type.layout))[None, :]
    ends = gl.where(columns < UNIT, visible_0[:, None], visible_1[:, None] + UNIT)
    return gl.where(columns < ends, logits, float("-inf"))


@gluon.jit
def softmax_weights(logits, row_max, row_sum, scale_log2):
    """One step of the online softmax (arXiv 2205.14135, algorithm 1) in base 2.

    Returns (weights, decay of the output so far, row_max, row_sum). `row_max` is of unscaled logits and
    finite from the start, so that a row without any key yet never computes inf - inf.
    """
    rows: gl.constexpr = row_max.type.layout
    new_max = gl.maximum(row_max, gl.convert_layout(gl.max(logits, 1), rows))
    decay = gl.exp2((row_max - new_max) * scale_log2)
    shift = gl.convert_layout(new_max * scale_log2, gl.SliceLayout(1, logits.type.layout))
    weights = gl.exp2(logits * scale_log2 - shift[:, None])
    return weights, decay, new_max, row_sum * decay + gl.convert_layout(gl.sum(weights, 1), rows)


@gluon.jit
def zero_values_past_end(
    HALF: gl.constexpr,
    order,
    num_tokens,
    pieces,
    stage,
    HEAD_SIZE: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
):
    """Zero the values of unit 0 or 1 in slots without a token, which a request's last block may have.

    What lies there may be NaN, and a weight of zero would not hide it.
    """
    PANELS: gl.constexpr = HEAD_SIZE // pieces.shape[2]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    _, block = unit_at(HALF, order, SINK_BLOCKS, HALF_START)
    if (num_tokens % UNIT != 0) & (block == (num_tokens - 1) // UNIT):
        slots = gl.arange(0, UNIT, layout=gl.SliceLayout(1, LAYOUT))
        for panel in gl.static_range(PANELS):
            piece = pieces.index((stage * PANELS + panel) * 2 + HALF)
            values = piece.load(LAYOUT)
            piece.store(gl.where((slots < num_tokens % UNIT)[:, None], values, gl.zeros_like(values)))
        fence_async_shared()


@gluon.jit
def start_with_full_step(
    queries,
    tiles,
    barriers,
    step,
    num_tokens,
    order,
    first_strided,
    stride,
    positions,
    window_starts,
    row_max,
    row_sum,
    scale_log2,
    OUTPUT: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The softmax of units 0 and 1, whose values are there by then: (weights, row_max, row_sum)."""
    ROWS: gl.constexpr = queries.shape[0]
    HEAD_SIZE: gl.constexpr = queries.shape[1]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    _, k_smem, _, v_pieces = tiles
    _, _, k_ready, k_empty, v_ready, _ = barriers
    stage = step % STAGES
    phase = (step // STAGES) & 1
    mbarrier.wait(k_ready.index(stage), phase)
    logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    logits = warpgroup_mma(queries, k_smem.index(stage).permute([1, 0]), logits, use_acc=False)
    mbarrier.arrive(k_empty.index(stage), count=1)
    logits = mask_step(logits, 0, order, first_strided, stride, positions, window_starts, SINK_BLOCKS, False)
    weights, _, row_max, row_sum = softmax_weights(logits, row_max, row_sum, scale_log2)
    mbarrier.wait(v_ready.index(stage), phase)
    # Both warpgroups do this, each before its own product: they write the same.
    zero_values_past_end(0, order, num_tokens, v_pieces, stage, HEAD_SIZE, SINK_BLOCKS, False)
    return gl.convert_layout(weights.to(queries.dtype), WEIGHTS), row_max, row_sum


@gluon.jit
def start_with_half_step(
    HALF: gl.constexpr,
    queries,
    tiles,
    barriers,
    step,
    num_tokens,
    order,
    masked_end,
    first_strided,
    stride,
    positions,
    window_starts,
    acc,
    row_max,
    row_sum,
    scale_log2,
    SINK_BLOCKS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention to unit HALF, and the softmax of units 2 and 3, whose logits are multiplied meanwhile.

    Returns (acc, weights, row_max, row_sum) as after a step of the main loop.
    """
    ROWS: gl.constexpr = queries.shape[0]
    HEAD_SIZE: gl.constexpr = queries.shape[1]
    OUTPUT: gl.constexpr = acc.type.layout
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    UNIT_LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNIT, 16])
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    dtype: gl.constexpr = queries.dtype
    _, k_smem, v_smem, v_pieces = tiles
    _, _, k_ready, k_empty, v_ready, v_empty = barriers
    half_stage = step % STAGES
    half_phase = (step // STAGES) & 1
    stage = (step + 1) % STAGES
    phase = ((step + 1) // STAGES) & 1

    mbarrier.wait(k_ready.index(half_stage), half_phase)
    half_keys = k_smem.index(half_stage).slice(HALF * UNIT, UNIT, dim=0)
    half_logits = gl.zeros([ROWS, UNIT], gl.float32, UNIT_LOGITS)
    half_logits = warpgroup_mma(queries, half_keys.permute([1, 0]), half_logits, use_acc=False, is_async=True)
    mbarrier.wait(k_ready.index(stage), phase)
    logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    logits = warpgroup_mma(queries, k_smem.index(stage).permute([1, 0]), logits, use_acc=False, is_async=True)
    half_logits = warpgroup_mma_wait(1, deps=[half_logits])
    mbarrier.arrive(k_empty.index(half_stage), count=1)
    half_logits = mask_unit(
        half_logits, HALF, order, first_strided, stride, positions, window_starts, SINK_BLOCKS
    )
    weights, _, row_max, row_sum = softmax_weights(half_logits, row_max, row_sum, scale_log2)
    mbarrier.wait(v_ready.index(half_stage), half_phase)
    zero_values_past_end(HALF, order, num_tokens, v_pieces, half_stage, HEAD_SIZE, SINK_BLOCKS, True)
    weights = gl.convert_layout(weights.to(dtype), WEIGHTS)
    half_values = v_smem.index(half_stage).slice(HALF * UNIT, UNIT, dim=0)
    acc = warpgroup_mma(weights, half_values, acc, use_acc=False, is_async=True)
    logits = warpgroup_mma_wait(1, deps=[logits])
    mbarrier.arrive(k_empty.index(stage), count=1)
    if masked_end > 2:
        logits = mask_step(
            logits, 2, order, first_strided, stride, positions, window_starts, SINK_BLOCKS, True
        )
    next_weights, decay, row_max, row_sum = softmax_weights(logits, row_max, row_sum, scale_log2)
    mbarrier.wait(v_ready.index(stage), phase)
    acc, weights, next_weights, decay = warpgroup_mma_wait(0, deps=[acc, weights, next_weights, decay])
    mbarrier.arrive(v_empty.index(half_stage), count=1)
    acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))[:, None]
    return acc, gl.convert_layout(next_weights.to(dtype), WEIGHTS), row_max, row_sum


@gluon.jit
def store_rows(out, stride_token, values, query_start, first_row, query_len):
    """Store values [rows, head_size], of a request's queries from `first_row` on, in 16-byte pieces."""
    ROWS: gl.constexpr = values.shape[0]
    HEAD_SIZE: gl.constexpr = values.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    values = gl.convert_layout(values, LAYOUT)
    rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LAYOUT))
    dims = gl.arange(0, HEAD_SIZE, layout=gl.SliceLayout(0, LAYOUT))
    pointers = out + (query_start + rows).to(gl.int64) * stride_token
    gl.store(pointers[:, None] + dims[None, :], values, mask=(rows < query_len)[:, None])


@gluon.jit
def consume(
    WARPGROUP: gl.constexpr,
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
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    KINDS: gl.constexpr,
    SINK_BLOCKS: gl.constexpr,
    HALF_START: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Attention of this warpgroup's half of every tile of this program.

    The softmax of a step runs while the output of the one before is multiplied.
    """
    q_smem, k_smem, v_smem, _ = tiles
    q_ready, q_empty, k_ready, k_empty, v_ready, v_empty = barriers
    num_items = work[1]
    query_start_loc, _, seq_lens = lengths
    out, out_stride_token, out_stride_head = out_rows
    ROWS: gl.constexpr = TILE_M // 2
    HEAD_SIZE: gl.constexpr = v_smem.shape[2]
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, BLOCK_N, 16])
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    dtype: gl.constexpr = q_smem.dtype
    no_logits = gl.zeros([ROWS, BLOCK_N], gl.float32, LOGITS)
    queries = q_smem.index(WARPGROUP)
    step = 0
    tiles_done = 0
    for wave in range(0, num_waves(num_items)):
        head, request, query_start, query_len, first_row = locate_tile(
            item_of_wave(wave, num_items), work, query_start_loc, KINDS
        )
        if first_row < query_len:
            # Rows past the last query repeat it, so that every row has keys.
            num_tokens = gl.load(seq_lens + request)
            context_len = num_tokens - query_len
            last_position = context_len + gl.minimum(first_row + TILE_M, query_len) - 1
            rows = first_row + WARPGROUP * ROWS + gl.arange(0, ROWS, layout=gl.SliceLayout(1, LOGITS))
            positions = gl.minimum(context_len + rows, last_position)
            window_starts = (positions // UNIT - LOCAL_BLOCKS + 1) * UNIT
            if KINDS:
                first_strided, stride, _num_sinks = strided_blocks(
                    gl.load(residues + head), gl.load(ranks + head), VERT_STRIDE, SINK_BLOCKS
                )
            else:
                first_strided = gl.load(residues + head)
                stride = VERT_STRIDE
            num_units, masked_end, order = order_units(
                context_len + first_row,
                last_position,
                first_strided,
                stride,
                LOCAL_BLOCKS,
                SINK_BLOCKS,
                HALF_START,
            )
            acc = gl.zeros([ROWS, HEAD_SIZE], gl.float32, OUTPUT)
            row_max = gl.full([ROWS], -1e30, gl.float32, gl.SliceLayout(1, LOGITS))
            row_sum = gl.zeros([ROWS], gl.float32, gl.SliceLayout(1, LOGITS))

            mbarrier.wait(q_ready, tiles_done & 1)
            if HALF_START:
                acc, weights, row_max, row_sum = start_with_half_step(
                    1 - WARPGROUP,
                    queries,
                    tiles,
                    barriers,
                    step,
                    num_tokens,
                    order,
                    masked_end,
                    first_strided,
                    stride,
                    positions,
                    window_starts,
                    acc,
                    row_max,
                    row_sum,
                    scale_log2,
                    SINK_BLOCKS,
                    STAGES,
                )
                step += 1
                first_unit = 4
            else:
                weights, row_max, row_sum = start_with_full_step(
                    queries,
                    tiles,
                    barriers,
                    step,
                    num_tokens,
                    order,
                    first_strided,
                    stride,
                    positions,
                    window_starts,
                    row_max,
                    row_sum,
                    scale_log2,
                    OUTPUT,
                    SINK_BLOCKS,
                    STAGES,
                )
                first_unit = 2

            for n in range(first_unit, num_units, 2):
                last_stage = step % STAGES
                step += 1
                stage = step % STAGES
                phase = (step // STAGES) & 1
                mbarrier.wait(k_ready.index(stage), phase)
                logits = warpgroup_mma(
                    queries, k_smem.index(stage).permute([1, 0]), no_logits, use_acc=False, is_async=True
                )
                acc = warpgroup_mma(weights, v_smem.index(last_stage), acc, is_async=True)
                logits = warpgroup_mma_wait(1, deps=[logits])
                mbarrier.arrive(k_empty.index(stage), count=1)
                if n < masked_end:
                    logits = mask_step(
                        logits,
                        n,
                        order,
                        first_strided,
                        stride,
                        positions,
                        window_starts,
                        SINK_BLOCKS,
                        HALF_START,
                    )
                next_weights, decay, row_max, row_sum = softmax_weights(logits, row_max, row_sum, scale_log2)
                # Values are wanted in the next step only, but the wait for them keeps ptxas from moving the
                # wait for the output up, before the softmax. The softmax's results are in that one's list
                # so that LLVM does not move them down.
                mbarrier.wait(v_ready.index(stage), phase)
                acc, weights, next_weights, decay = warpgroup_mma_wait(
                    0, deps=[acc, weights, next_weights, decay]
                )
                mbarrier.arrive(v_empty.index(last_stage), count=1)
                acc = acc * gl.convert_layout(decay, gl.SliceLayout(1, OUTPUT))[:, None]
                weights = gl.convert_layout(next_weights.to(dtype), gl.DotOperandLayout(0, OUTPUT, 2))

            mbarrier.arrive(q_empty, count=1)
            acc = warpgroup_mma(weights, v_smem.index(step % STAGES), acc)
            mbarrier.arrive(v_empty.index(step % STAGES), count=1)
            step += 1
            tiles_done += 1

            acc = acc * gl.convert_layout(1.0 / row_sum, gl.SliceLayout(1, OUTPUT))[:, None]
            store_rows(
                out + head * out_stride_head,
                out_stride_token,
                acc.to(dtype),
                query_start,
                first_row + WARPGROUP * ROWS,
                query_len,
            )
            if lse is not None:
                row_lse = (row_max * scale_log2 + gl.log2(row_sum)) * LN_2
                lse_rows = lse + (query_start + rows).to(gl.int64) * lse_stride_token + head
                gl.store(lse_rows, row_lse, mask=rows < query_len)
