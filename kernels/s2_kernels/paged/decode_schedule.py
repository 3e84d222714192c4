"""How the programs of decode share a batch (split-K): its work items, cut into even splits.

A work item is one tile of keys, BLOCK_N keys of one block, for one KV head of one request. The items of a
batch are numbered by request (those that have a query), within a request by KV head, and within a KV head by
tile: first the tiles of the sinks, then those of its window, then those of its older strided blocks. KV heads
that keep equally many residues have as many items; the last ones are empty for a head that has no block in
the newest super-block yet.

A split is a range of consecutive items, the share of one program. All of it follows from the lengths, on the
device, so one CUDA graph serves every batch of a size, and the programs are equally busy whether the contexts
are of one length or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

from s2_kernels.launch import limits

VARYING = tl.constexpr(limits.VARYING)

MIN_ITEMS = tl.constexpr(2)
"""Of a split: a program is not worth starting for less."""


@triton.jit
def num_old_blocks(seq_len, BLOCK_SIZE: tl.constexpr, LOCAL_BLOCKS: tl.constexpr):
    """Blocks that are older than the window of the last token."""
    return tl.maximum((seq_len - 1) // BLOCK_SIZE - LOCAL_BLOCKS + 1, 0)


@triton.jit
def num_window_tiles(seq_len, old_blocks, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles from the start of the window to the last token."""
    return (seq_len - 1) // BLOCK_N + 1 - old_blocks * (BLOCK_SIZE // BLOCK_N)


@triton.jit
def num_sink_tiles(old_blocks, SINK_BLOCKS: tl.constexpr, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles of the sinks that are older than the window."""
    tiles = old_blocks * 0
    if SINK_BLOCKS > 0:
        tiles = tl.minimum(old_blocks, SINK_BLOCKS) * (BLOCK_SIZE // BLOCK_N)
    return tiles


@triton.jit
def item_counts(
    seq_len,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Work items of each KV head of a request for sinks and window, and for each residue that it keeps.

    Scalars or tensors, as `seq_len`.
    """
    old_blocks = num_old_blocks(seq_len, BLOCK_SIZE, LOCAL_BLOCKS)
    sink_tiles = num_sink_tiles(old_blocks, SINK_BLOCKS, BLOCK_SIZE, BLOCK_N)
    per_residue = tl.cdiv(old_blocks, VERT_STRIDE) * (BLOCK_SIZE // BLOCK_N)
    return sink_tiles + num_window_tiles(seq_len, old_blocks, BLOCK_SIZE, BLOCK_N), per_residue


@triton.jit
def head_items(kv_head, per_head, per_residue, first_kept, NUM_KEPT: tl.constexpr):
    """The first item of a KV head among those of its request, how many it has, and what it keeps.

    The latter as two numbers: residues of the KV heads before it, and its own.

    Args:
        kv_head: the head.
        per_head, per_residue: `item_counts` of the request.
        first_kept: [num_kv_heads + 1], see `s2_kernels.layout.HeadTables`.
        NUM_KEPT: residues of every KV head, or VARYING.
    """
    if NUM_KEPT == VARYING:
        first = tl.load(first_kept + kv_head)
        num_kept = tl.load(first_kept + kv_head + 1) - first
    else:
        first = kv_head * NUM_KEPT
        num_kept = NUM_KEPT
    return kv_head * per_head + first * per_residue, per_head + num_kept * per_residue, first, num_kept


@triton.jit
def head_of_item(
    item,
    per_head,
    per_residue,
    first_kept,
    NUM_KV_HEADS: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    HEADS_PADDED: tl.constexpr,
):
    """The KV head of an item that counts from the first one of its request: the inverse of `head_items`."""
    if NUM_KEPT == VARYING:
        heads = tl.arange(0, HEADS_PADDED)
        is_head = heads < NUM_KV_HEADS
        first = tl.load(first_kept + heads, mask=is_head, other=0)
        starts_before = is_head & (heads * per_head + first * per_residue <= item)
        kv_head = tl.sum(starts_before.to(tl.int32), 0) - 1
    else:
        kv_head = item // (per_head + NUM_KEPT * per_residue)
    return kv_head


@triton.jit
def request_ends(
    query_start_loc,
    seq_lens,
    num_requests,
    first_kept,
    NUM_KV_HEADS: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    REQUESTS_PADDED: tl.constexpr,
    SINK_BLOCKS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[REQUESTS_PADDED]: the item after each request's last one. The maximum is the number of items.

    Residues that vary are counted in a table, so that layers of all kinds share a compiled kernel.
    """
    requests = tl.arange(0, REQUESTS_PADDED)
    is_request = requests < num_requests
    starts = tl.load(query_start_loc + requests, mask=is_request, other=0)
    ends = tl.load(query_start_loc + requests + 1, mask=is_request, other=0)
    lengths = tl.load(seq_lens + requests, mask=is_request, other=1)
    per_head, per_residue = item_counts(lengths, SINK_BLOCKS, BLOCK_SIZE, LOCAL_BLOCKS, VERT_STRIDE, BLOCK_N)
    residues = NUM_KV_HEADS * NUM_KEPT
    if NUM_KEPT == VARYING:
        residues = tl.load(first_kept + NUM_KV_HEADS)
    items = per_head * NUM_KV_HEADS + per_residue * residues
    return tl.cumsum(tl.where(ends > starts, items, 0), 0)


@triton.jit
def num_splits(num_items, num_programs):
    """Splits of a batch: the programs that get one."""
    return tl.minimum(num_programs, tl.cdiv(num_items, MIN_ITEMS))


@triton.jit
def split_start(split, num_items, splits):
    """The first item of a split. Where the items do not divide evenly, the first splits have one more."""
    return split * (num_items // splits) + tl.minimum(split, num_items % splits)


@triton.jit
def split_of_item(item, num_items, splits):
    """The split that an item is in: the inverse of `split_start`."""
    size = num_items // splits
    longer = num_items % splits
    return tl.where(item < longer * (size + 1), item // (size + 1), (item - longer) // size)
