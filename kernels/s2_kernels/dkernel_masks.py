"""DKernel's `get_sparse_attn_mask`: local-stride masks of a chunk of queries by a chunk of keys.

`S2Pattern` says the same of whole sequences, without matrices; these masks are for the recipes that want one:
attention that is not causal, and sequence parallelism, in which a rank has some of the queries and, in turn,
of the keys.
"""

from __future__ import annotations

import torch

from s2_kernels.masks import BlockMask


def get_sparse_attn_mask(
    num_heads: int,
    seqlen: int,
    block_size: int = 64,
    local_blocks: int | tuple[int, int] = 4,
    vert_stride: int = 4,
    homo_head: bool = False,
    num_kv_heads: int | None = None,
    past_len: int | None = None,
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str | int | None = None,
    return_dense: bool = False,
    head_sliding_step: int | None = None,
    head_sliding_offset: int = 0,
    num_dense_heads: int = 0,
    kv_seqlen: int | None = None,
    q_start_position: int | None = None,
    kv_start_position: int | None = None,
    vert_position_type: str | None = None,
    causal: bool = True,
) -> tuple[tuple[torch.Tensor, torch.Tensor], torch.Tensor, torch.Tensor | None]:
    """The local-stride mask of some queries and some keys, in three forms.

    A query block attends to the key blocks of its window, and outside it to one in `vert_stride`. By absolute
    position, as in `S2Pattern`, that is key block j for KV head h where (j + h * head_sliding_step +
    head_sliding_offset) mod vert_stride == 0. Relative to the query, it is every one whose distance from the
    window's edge is a multiple of `vert_stride`, whatever the head.

    Args:
        num_heads: query heads.
        seqlen: tokens of the queries' chunk, those of `past_len` included.
        block_size: tokens per block.
        local_blocks: blocks of the local window to either side, the query's own included in both; a causal
            mask takes one number. (before, after) otherwise, or one number for both.
        vert_stride: blocks per block that is attended to outside the window.
        homo_head: whether all heads have the pattern of the first. The masks then have one head.
        num_kv_heads: KV heads, whose query heads share a pattern; None for `num_heads`.
        past_len: leading tokens of the chunk that are no queries; their blocks are left out.
        dtype: of the masks: 1 where attention is, 0 elsewhere.
        device: of the result; None for the current CUDA device where there is one, else the CPU.
        return_dense: whether to return the mask token by token as well.
        head_sliding_step: None for max(1, vert_stride // num_heads), of the query heads.
        head_sliding_offset: shift of the first head.
        num_dense_heads: KV heads, the last ones, that attend to everything.
        kv_seqlen: tokens of the keys' chunk; None for `seqlen`.
        q_start_position, kv_start_position: where the chunks start in the sequence, at multiples of
            `block_size`; None for 0. With the first there is no `past_len`.
        vert_position_type: "absolute" or "relative"; None for absolute if causal, else relative.
        causal: whether a token attends to no later one.

    Returns:
        (crow, col), block mask, token mask. int32 [heads, query blocks + 1] and [heads, most key blocks of a
        head]: where each query block's key blocks start in `col`, which has -1 after the last. [heads, query
        blocks, key blocks]. [heads, queries, keys] or None. One head stands for all where all are the same.
        The token mask is of the same queries as the others, where DKernel's forgets the start positions, and
        the past of one that is not causal.

    Raises:
        ValueError: an argument has a wrong value; the message names it.
    """
    _check_positive(seqlen=seqlen, block_size=block_size, vert_stride=vert_stride, num_heads=num_heads)
    kv_seqlen = seqlen if kv_seqlen is None else kv_seqlen
    past_len = past_len or 0
    _check_positions(block_size, seqlen, past_len, q_start_position, kv_start_position)
    _check_positive(kv_seqlen=kv_seqlen)
    before, after = _window_sides(local_blocks, causal)
    if homo_head:
        num_heads = num_kv_heads = 1
    num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
    if num_kv_heads < 1 or num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads: {num_kv_heads}, expected a divisor of num_heads ({num_heads})")
    if not 0 <= num_dense_heads <= (0 if homo_head else num_kv_heads):
        expected = "0 with homo_head" if homo_head else f"a value in [0, {num_kv_heads}]"
        raise ValueError(f"num_dense_heads: {num_dense_heads}, expected {expected}")
    if vert_position_type not in (None, "absolute", "relative"):
        raise ValueError(f"vert_position_type: {vert_position_type!r}, expected 'absolute' or 'relative'")
    is_relative = not causal if vert_position_type is None else vert_position_type == "relative"

    q_start, kv_start = q_start_position or 0, kv_start_position or 0
    query = _blocks(q_start, seqlen, block_size)[:, None]
    key = _blocks(kv_start, kv_seqlen, block_size)
    # How far outside the window a key block is, on either side.
    outside = (query - key - before + 1).clamp(min=0) + (key - query - after + 1).clamp(min=0)
    kv_head = torch.arange(num_kv_heads, device="cpu")[:, None, None]
    is_dense = kv_head >= num_kv_heads - num_dense_heads
    if is_relative:
        strided = (outside % vert_stride == 0)[None]
    else:
        step = max(1, vert_stride // num_heads) if head_sliding_step is None else head_sliding_step
        strided = (key + kv_head * step + head_sliding_offset) % vert_stride == 0
    mask = (outside == 0) | strided | is_dense
    if causal:
        mask = mask & (query >= key)
    if is_relative and num_dense_heads in (0, num_kv_heads):
        mask = mask[:1]
    else:
        mask = mask.repeat_interleave(num_heads // num_kv_heads, dim=0)

    device = _default_device() if device is None else device
    known = mask[:, -(-past_len // block_size) :]
    csr = BlockMask.from_dense(known, 1, causal=False)
    dense = None
    if return_dense:
        dense = mask.repeat_interleave(block_size, dim=1)[:, past_len:seqlen]
        dense = dense.repeat_interleave(block_size, dim=2)[:, :, :kv_seqlen]
        if causal:
            dense = dense.tril(q_start + past_len - kv_start)
        dense = dense.to(device, dtype)
    return (csr.crow.to(device), csr.col.to(device)), known.to(device, dtype), dense


def _check_positive(**arguments: int) -> None:
    for name, value in arguments.items():
        if value < 1:
            raise ValueError(f"{name}: {value}, expected a positive integer")


def _check_positions(
    block_size: int, seqlen: int, past_len: int, q_start_position: int | None, kv_start_position: int | None
) -> None:
    if not 0 <= past_len <= seqlen:
        raise ValueError(f"past_len: {past_len}, expected a value in [0, {seqlen}]")
    if past_len and q_start_position is not None:
        raise ValueError(f"past_len: {past_len}, expected none with q_start_position")
    starts = {"q_start_position": q_start_position, "kv_start_position": kv_start_position}
    for name, start in starts.items():
        if start is not None and (start < 0 or start % block_size):
            raise ValueError(f"{name}: {start}, expected a multiple of block_size ({block_size})")


def _window_sides(local_blocks: int | tuple[int, int], causal: bool) -> tuple[int, int]:
    """Blocks of the window before and after the query's own, which both count."""
    if causal:
        if not isinstance(local_blocks, int) or local_blocks < 1:
            raise ValueError(f"local_blocks: {local_blocks}, expected a positive integer for a causal mask")
        return local_blocks, 1
    if isinstance(local_blocks, int):
        if local_blocks < 0:
            raise ValueError(f"local_blocks: {local_blocks}, expected no negative number")
        return local_blocks, local_blocks
    if len(local_blocks) != 2 or min(local_blocks) < 1:
        raise ValueError(f"local_blocks: {local_blocks}, expected two positive integers, before and after")
    return local_blocks[0], local_blocks[1]


def _blocks(start: int, tokens: int, block_size: int) -> torch.Tensor:
    """The blocks of a chunk of the sequence."""
    first = start // block_size
    return torch.arange(first, first - (-tokens // block_size), device="cpu")


def _default_device() -> torch.device:
    return (
        torch.device("cuda", torch.cuda.current_device())
        if torch.cuda.is_available()
        else torch.device("cpu")
    )
