"""How the programs of decode share a batch (split-K): its work items, cut into even splits.

A work item is one tile of keys, BLOCK_N keys of one block, for one KV head of one request. The items of a
batch are numbered by request (those that have a query), within a request by KV head, and within a KV head by
tile: first the tiles of its window, then those of its older strided blocks. Every KV head of a request has as
many items; the last ones are empty for a head that has no block in the newest super-block yet.

A split is a range of consecutive items, the share of one program. All of it follows from the lengths, on the
device, so one CUDA graph serves every batch of a size, and the programs are equally busy whether the contexts
are of one length or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

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
def items_per_head(
    seq_len,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Work items of each KV head of a request; scalar or tensor."""
    old_blocks = num_old_blocks(seq_len, BLOCK_SIZE, LOCAL_BLOCKS)
    strided_tiles = tl.cdiv(old_blocks, VERT_STRIDE) * NUM_KEPT * (BLOCK_SIZE // BLOCK_N)
    return num_window_tiles(seq_len, old_blocks, BLOCK_SIZE, BLOCK_N) + strided_tiles


@triton.jit
def request_ends(
    query_start_loc,
    seq_lens,
    num_requests,
    NUM_KV_HEADS: tl.constexpr,
    REQUESTS_PADDED: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """[REQUESTS_PADDED]: the item after each request's last one. The maximum is the number of items."""
    requests = tl.arange(0, REQUESTS_PADDED)
    is_request = requests < num_requests
    starts = tl.load(query_start_loc + requests, mask=is_request, other=0)
    ends = tl.load(query_start_loc + requests + 1, mask=is_request, other=0)
    lengths = tl.load(seq_lens + requests, mask=is_request, other=1)
    items = items_per_head(lengths, BLOCK_SIZE, LOCAL_BLOCKS, VERT_STRIDE, NUM_KEPT, BLOCK_N)
    return tl.cumsum(tl.where(ends > starts, items, 0), 0) * NUM_KV_HEADS


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
