"""How the programs of decode share a batch: the tiles of all its keys in one line, cut into even shares.

A tile is BLOCK_N keys of one block. The line goes through the requests that have a query, within a request
through its KV heads, and within a KV head through the tiles of its window, then those of its older strided
blocks. All KV heads of a request take as many places in the line: those of the last super-block that a head
has no block for yet stay empty, at the end of its part.

All of it follows from the lengths, on the device, so one CUDA graph serves every batch of a size, and the
programs are equally busy whether the contexts are of one length or not.
"""

from __future__ import annotations

import triton
import triton.language as tl

# A program is not worth starting for less.
MIN_TILES = tl.constexpr(2)


@triton.jit
def num_old_blocks(seq_len, BLOCK_SIZE: tl.constexpr, LOCAL_BLOCKS: tl.constexpr):
    """Blocks that are older than the window of the last token."""
    return tl.maximum((seq_len - 1) // BLOCK_SIZE - LOCAL_BLOCKS + 1, 0)


@triton.jit
def num_window_tiles(seq_len, old_blocks, BLOCK_SIZE: tl.constexpr, BLOCK_N: tl.constexpr):
    """Tiles from the start of the window to the last token."""
    return (seq_len - 1) // BLOCK_N + 1 - old_blocks * (BLOCK_SIZE // BLOCK_N)


@triton.jit
def places_per_head(
    seq_len,
    BLOCK_SIZE: tl.constexpr,
    LOCAL_BLOCKS: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Places in the line of a KV head of a request; scalar or tensor."""
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
    """[REQUESTS_PADDED]: the place in the line after each request's last one; the maximum is its length."""
    requests = tl.arange(0, REQUESTS_PADDED)
    is_request = requests < num_requests
    starts = tl.load(query_start_loc + requests, mask=is_request, other=0)
    ends = tl.load(query_start_loc + requests + 1, mask=is_request, other=0)
    lengths = tl.load(seq_lens + requests, mask=is_request, other=1)
    places = places_per_head(lengths, BLOCK_SIZE, LOCAL_BLOCKS, VERT_STRIDE, NUM_KEPT, BLOCK_N)
    return tl.cumsum(tl.where(ends > starts, places, 0), 0) * NUM_KV_HEADS


@triton.jit
def num_shares(line_length, num_programs):
    """Programs that get a share."""
    return tl.minimum(num_programs, tl.cdiv(line_length, MIN_TILES))


@triton.jit
def share_start(share, line_length, shares):
    """The first place of a share; the first shares are a place longer where the line does not divide."""
    return share * (line_length // shares) + tl.minimum(share, line_length % shares)


@triton.jit
def share_of_place(place, line_length, shares):
    """The share that a place is in: the inverse of `share_start`."""
    size = line_length // shares
    longer = line_length % shares
    return tl.where(place < longer * (size + 1), place // (size + 1), (place - longer) // size)
