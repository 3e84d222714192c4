"""The gradients of keys and values on a Hopper GPU.

A work item is two blocks of keys of a KV head; each of the two consumer warpgroups keeps the gradients of one
in registers. They go over the blocks of queries, of all query heads of the group, that attend to either. So
every sum is one program's, in one order: two runs give the same bits.

Logits are computed transposed, keys by queries. Their weights, and the gradients of the logits, then are the
left operands of the products that follow, in the registers where they are.
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

from s2_kernels.hopper.consumer import store_rows
from s2_kernels.hopper.gluon_api import tma_load
from s2_kernels.hopper.producer import NO_ROW
from s2_kernels.hopper.schedule import UNIT, item_of_wave, num_waves

ITEMS_LOADED = gl.constexpr(2)
"""The keys and values of an item are loaded while the one before is worked on."""


@gluon.jit
def load_item(items, wave, num_items, ITEM_FIELDS: gl.constexpr):
    """The fields of this program's item in a wave: see `key_items`."""
    items += item_of_wave(wave, num_items) * ITEM_FIELDS
    blocks = (gl.load(items + 1), gl.load(items + 2))
    first_block, last_block, blocks_before = gl.load(items + 3), gl.load(items + 4), gl.load(items + 5)
    queries = (first_block, last_block, blocks_before, gl.load(items + 6), gl.load(items + 7))
    return gl.load(items), blocks, queries, gl.load(items + 8), gl.load(items + 9)


@gluon.jit
def attending_blocks(
    block, residue, first_block, last_block, LOCAL_BLOCKS: gl.constexpr, VERT_STRIDE: gl.constexpr
):
    """(first, end) of the query blocks of a head that attend to a key block, of the sequence's own."""
    is_kept = block % VERT_STRIDE == residue
    end = gl.where(is_kept, last_block, gl.minimum(block + LOCAL_BLOCKS - 1, last_block)) + 1
    return gl.maximum(block, first_block), gl.where(block < 0, 0, end)


@gluon.jit
def steps_of_head(blocks, residue, queries, LOCAL_BLOCKS: gl.constexpr, VERT_STRIDE: gl.constexpr):
    """How a query head's blocks are gone through: those of the first key block, then the second's others.

    Returns (number of steps, their order for `block_of_step`).
    """
    block_0, block_1 = blocks
    first_block, last_block, _, _, _ = queries
    start_0, end_0 = attending_blocks(block_0, residue, first_block, last_block, LOCAL_BLOCKS, VERT_STRIDE)
    start_1, end_1 = attending_blocks(block_1, residue, first_block, last_block, LOCAL_BLOCKS, VERT_STRIDE)
    num_0 = gl.maximum(end_0 - start_0, 0)
    next_1 = gl.maximum(start_1, end_0)
    num_1 = gl.maximum(end_1 - next_1, 0)
    return num_0 + num_1, (start_0, end_0, start_1, end_1, num_0, next_1)


@gluon.jit
def block_of_step(n, order):
    """The query block of step n."""
    start_0, _, _, _, num_0, next_1 = order
    return gl.where(n < num_0, start_0 + n, next_1 + n - num_0)


@gluon.jit
def load_keys_and_values(
    keys, values, kv_smem, barriers, items_done, blocks, kv_head, key_row, HEAD_SIZE: gl.constexpr
):
    """Load an item's two blocks, zeros for none, once both consumers are done with the item two before."""
    kv_ready, kv_empty, _, _ = barriers
    k_smem, v_smem = kv_smem
    slot = items_done % ITEMS_LOADED
    ready = kv_ready.index(slot)
    mbarrier.wait(kv_empty.index(slot), ((items_done // ITEMS_LOADED) & 1) ^ 1)
    mbarrier.expect(ready, 4 * UNIT * HEAD_SIZE * 2)
    for half in gl.static_range(2):
        block = blocks[half]
        at = [gl.where(block < 0, NO_ROW, key_row + block * UNIT), kv_head * HEAD_SIZE]
        tma_load(keys, at, ready, k_smem.index(slot * 2 + half))
        tma_load(values, at, ready, v_smem.index(slot * 2 + half))


@gluon.jit
def produce_for_keys(
    descriptors,
    kv_smem,
    rows_smem,
    barriers,
    items,
    num_items,
    residues,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    ITEM_FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The producer warp: keys and values of an item, then queries and output gradients of each step."""
    queries, d_out, keys, values = descriptors
    q_smem, d_out_smem = rows_smem
    ready, empty = barriers[2], barriers[3]
    step = 0
    for wave in range(0, num_waves(num_items)):
        kv_head, blocks, of_queries, key_row, _num_keys = load_item(items, wave, num_items, ITEM_FIELDS)
        load_keys_and_values(keys, values, kv_smem, barriers, wave, blocks, kv_head, key_row, HEAD_SIZE)
        for member in range(0, GROUP_SIZE):
            head = kv_head * GROUP_SIZE + member
            num_steps, order = steps_of_head(
                blocks, gl.load(residues + head), of_queries, LOCAL_BLOCKS, VERT_STRIDE
            )
            for n in range(0, num_steps):
                stage = step % STAGES
                mbarrier.wait(empty.index(stage), ((step // STAGES) & 1) ^ 1)
                mbarrier.expect(ready.index(stage), 2 * UNIT * HEAD_SIZE * 2)
                at = [of_queries[3] + block_of_step(n, order) * UNIT, head * HEAD_SIZE]
                tma_load(queries, at, ready.index(stage), q_smem.index(stage))
                tma_load(d_out, at, ready.index(stage), d_out_smem.index(stage))
                step += 1


@gluon.jit
def zero_rows_outside(tile, first, end):
    """Zero the rows of a tile [UNIT, HEAD_SIZE] that are not in [first, end): other sequences', or garbage.

    Weights of zero would not hide NaN there.
    """
    HEAD_SIZE: gl.constexpr = tile.shape[1]
    LAYOUT: gl.constexpr = gl.BlockedLayout([1, 8], [256 // HEAD_SIZE, HEAD_SIZE // 8], [4, 1], [1, 0])
    rows = gl.arange(0, UNIT, layout=gl.SliceLayout(1, LAYOUT))
    values = tile.load(LAYOUT)
    is_inside = ((rows >= first) & (rows < end))[:, None]
    tile.store(gl.where(is_inside, values, gl.zeros_like(values)))


@gluon.jit
def add_query_block(
    keys,
    values,
    queries,
    d_out,
    dk,
    dv,
    row_lse,
    row_delta,
    is_own_block,
    scale_log2,
):
    """Add what a block of queries [UNIT, HEAD_SIZE] gives to the gradients of a block of keys.

    Args of shape [UNIT, HEAD_SIZE]: keys, values, queries and d_out in shared memory, dk and dv in registers.
    row_lse and row_delta point to the queries' log-sum-exp in base 2 and delta.
    """
    LOGITS: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, UNIT, 16])
    OUTPUT: gl.constexpr = dk.type.layout
    WEIGHTS: gl.constexpr = gl.DotOperandLayout(0, OUTPUT, 2)
    dtype: gl.constexpr = queries.dtype
    zeros = gl.zeros([UNIT, UNIT], gl.float32, LOGITS)
    logits = warpgroup_mma(keys, queries.permute([1, 0]), zeros, use_acc=False, is_async=True)
    d_weights = warpgroup_mma(values, d_out.permute([1, 0]), zeros, use_acc=False, is_async=True)
    columns = gl.arange(0, UNIT, layout=gl.SliceLayout(0, LOGITS))
    lse = gl.load(row_lse + columns)
    delta = gl.load(row_delta + columns)
    logits = warpgroup_mma_wait(1, deps=[logits])
    weights = gl.exp2(logits * scale_log2 - lse[None, :])
    if is_own_block:
        rows = gl.arange(0, UNIT, layout=gl.SliceLayout(1, LOGITS))
        weights = gl.where(rows[:, None] <= columns[None, :], weights, 0.0)
    left = gl.convert_layout(weights.to(dtype), WEIGHTS)
    dv = warpgroup_mma(left, d_out, dv, is_async=True)
    d_weights = warpgroup_mma_wait(1, deps=[d_weights])
    d_logits = weights * (d_weights - delta[None, :])
    d_left = gl.convert_layout(d_logits.to(dtype), WEIGHTS)
    dk = warpgroup_mma(d_left, queries, dk, is_async=True)
    dk, dv, left, d_left = warpgroup_mma_wait(0, deps=[dk, dv, left, d_left])
    return dk, dv


@gluon.jit
def consume_for_keys(
    WARPGROUP: gl.constexpr,
    kv_smem,
    rows_smem,
    barriers,
    items,
    num_items,
    residues,
    statistics,
    gradients,
    scale,
    scale_log2,
    GROUP_SIZE: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    ITEM_FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """The gradients of this warpgroup's block of keys of every item of this program."""
    k_smem, v_smem = kv_smem
    q_smem, d_out_smem = rows_smem
    kv_ready, kv_empty, ready, empty = barriers
    row_lse, row_delta, num_blocks = statistics
    d_keys, dk_stride_token, dk_stride_head, d_values, dv_stride_token, dv_stride_head = gradients
    HEAD_SIZE: gl.constexpr = k_smem.shape[2]
    OUTPUT: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, HEAD_SIZE, 16])
    dtype: gl.constexpr = k_smem.dtype
    step = 0
    for wave in range(0, num_waves(num_items)):
        kv_head, blocks, of_queries, key_row, num_keys = load_item(items, wave, num_items, ITEM_FIELDS)
        first_block, _last_block, blocks_before, zero_row, first_row = of_queries
        block = blocks[WARPGROUP]
        slot = wave % ITEMS_LOADED
        keys, values = k_smem.index(slot * 2 + WARPGROUP), v_smem.index(slot * 2 + WARPGROUP)
        end_row = zero_row + num_keys
        dk = gl.zeros([UNIT, HEAD_SIZE], gl.float32, OUTPUT)
        dv = gl.zeros([UNIT, HEAD_SIZE], gl.float32, OUTPUT)
        mbarrier.wait(kv_ready.index(slot), (wave // ITEMS_LOADED) & 1)
        for member in range(0, GROUP_SIZE):
            head = kv_head * GROUP_SIZE + member
            num_steps, order = steps_of_head(
                blocks, gl.load(residues + head), of_queries, LOCAL_BLOCKS, VERT_STRIDE
            )
            start, end = order[2 * WARPGROUP], order[2 * WARPGROUP + 1]
            of_head = head * num_blocks + blocks_before - first_block
            for n in range(0, num_steps):
                stage = step % STAGES
                query_block = block_of_step(n, order)
                mbarrier.wait(ready.index(stage), (step // STAGES) & 1)
                if (query_block >= start) & (query_block < end):
                    queries, d_out = q_smem.index(stage), d_out_smem.index(stage)
                    row = zero_row + query_block * UNIT
                    # Both warpgroups do this, each before its own products: they write the same.
                    if (row < first_row) | (row + UNIT > end_row):
                        zero_rows_outside(queries, first_row - row, end_row - row)
                        zero_rows_outside(d_out, first_row - row, end_row - row)
                        fence_async_shared()
                    at = (of_head + query_block).to(gl.int64) * UNIT
                    dk, dv = add_query_block(
                        keys,
                        values,
                        queries,
                        d_out,
                        dk,
                        dv,
                        row_lse + at,
                        row_delta + at,
                        query_block == block,
                        scale_log2,
                    )
                mbarrier.arrive(empty.index(stage), count=1)
                step += 1
        mbarrier.arrive(kv_empty.index(slot), count=1)
        if block >= 0:
            first_key = block * UNIT
            store_rows(
                d_keys + kv_head * dk_stride_head,
                dk_stride_token,
                (dk * scale).to(dtype),
                key_row,
                first_key,
                num_keys,
            )
            store_rows(
                d_values + kv_head * dv_stride_head,
                dv_stride_token,
                dv.to(dtype),
                key_row,
                first_key,
                num_keys,
            )


@gluon.jit(do_not_specialize=["num_items", "num_blocks"])
def key_gradients_bwd_kernel(
    queries,  # TMA descriptors: [tokens, num_heads * head_size]
    d_out,  # as queries
    keys,  # [keys, num_kv_heads * head_size]
    values,  # as keys
    items,  # [items, ITEM_FIELDS]
    residues,  # [num_heads]
    row_lse,  # [num_heads, num_blocks * UNIT]
    row_delta,  # as row_lse
    d_keys,  # [keys, num_kv_heads, head_size]
    d_values,  # as d_keys
    scale,
    scale_log2,
    num_items,
    num_blocks,
    dk_stride_token: gl.int64,
    dk_stride_head: gl.int64,
    dv_stride_token: gl.int64,
    dv_stride_head: gl.int64,
    GROUP_SIZE: gl.constexpr,
    HEAD_SIZE: gl.constexpr,
    LOCAL_BLOCKS: gl.constexpr,
    VERT_STRIDE: gl.constexpr,
    ITEM_FIELDS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """A program works on one item per wave: `item_of_wave`."""
    dtype: gl.constexpr = queries.dtype
    LAYOUT: gl.constexpr = queries.layout
    q_smem = gl.allocate_shared_memory(dtype, [STAGES, UNIT, HEAD_SIZE], LAYOUT)
    d_out_smem = gl.allocate_shared_memory(dtype, [STAGES, UNIT, HEAD_SIZE], LAYOUT)
    k_smem = gl.allocate_shared_memory(dtype, [2 * ITEMS_LOADED, UNIT, HEAD_SIZE], LAYOUT)
    v_smem = gl.allocate_shared_memory(dtype, [2 * ITEMS_LOADED, UNIT, HEAD_SIZE], LAYOUT)
    BARRIER: gl.constexpr = mbarrier.MBarrierLayout()
    kv_ready = gl.allocate_shared_memory(gl.int64, [ITEMS_LOADED, 1], BARRIER)
    kv_empty = gl.allocate_shared_memory(gl.int64, [ITEMS_LOADED, 1], BARRIER)
    ready = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], BARRIER)
    for slot in gl.static_range(ITEMS_LOADED):
        mbarrier.init(kv_ready.index(slot), count=1)
        mbarrier.init(kv_empty.index(slot), count=2)
    for stage in gl.static_range(STAGES):
        mbarrier.init(ready.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=2)
    fence_async_shared()

    kv_smem, rows_smem = (k_smem, v_smem), (q_smem, d_out_smem)
    barriers = (kv_ready, kv_empty, ready, empty)
    statistics = (row_lse, row_delta, num_blocks)
    gradients = (d_keys, dk_stride_token, dk_stride_head, d_values, dv_stride_token, dv_stride_head)
    descriptors = (queries, d_out, keys, values)
    gl.warp_specialize(
        [
            (
                consume_for_keys,
                (
                    gl.constexpr(0),
                    kv_smem,
                    rows_smem,
                    barriers,
                    items,
                    num_items,
                    residues,
                    statistics,
                    gradients,
                    scale,
                    scale_log2,
                    GROUP_SIZE,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    ITEM_FIELDS,
                    STAGES,
                ),
            ),
            (
                consume_for_keys,
                (
                    gl.constexpr(1),
                    kv_smem,
                    rows_smem,
                    barriers,
                    items,
                    num_items,
                    residues,
                    statistics,
                    gradients,
                    scale,
                    scale_log2,
                    GROUP_SIZE,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    ITEM_FIELDS,
                    STAGES,
                ),
            ),
            (
                produce_for_keys,
                (
                    descriptors,
                    kv_smem,
                    rows_smem,
                    barriers,
                    items,
                    num_items,
                    residues,
                    GROUP_SIZE,
                    HEAD_SIZE,
                    LOCAL_BLOCKS,
                    VERT_STRIDE,
                    ITEM_FIELDS,
                    STAGES,
                ),
            ),
        ],
        [4, 1],
        [240, 24],
    )
