"""Store new tokens in both tiers of the KV cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from s2_kernels.configs import launch_config, shape_key
from s2_kernels.layout import head_tables
from s2_kernels.pattern import S2Pattern
from s2_kernels.tiles import check_caches, check_contiguous_last_dim


@triton.jit(do_not_specialize=["num_tokens"])
def cache_write_kernel(
    key,  # [tokens, num_kv_heads, head_size]
    value,
    window_cache,  # [pages, num_kv_heads, page_slots, 2 * head_size]
    strided_cache,
    window_slots,  # [tokens]
    strided_slots,
    rank_of_residue,  # [num_kv_heads, vert_stride]
    num_tokens,
    key_stride_token: tl.int64,
    key_stride_head: tl.int64,
    value_stride_token: tl.int64,
    value_stride_head: tl.int64,
    window_stride_page: tl.int64,
    window_stride_head: tl.int64,
    window_stride_slot: tl.int64,
    strided_stride_page: tl.int64,
    strided_stride_head: tl.int64,
    strided_stride_slot: tl.int64,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_SIZE: tl.constexpr,
    HEAD_PADDED: tl.constexpr,
    PAGE_SLOTS: tl.constexpr,
    STRIDED_PAGE_TOKENS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    VERT_STRIDE: tl.constexpr,
    NUM_KEPT: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Program i copies ROWS vectors of K and of V: those of all KV heads of token 0, of token 1, ..."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    tokens = (rows // NUM_KV_HEADS).to(tl.int64)
    heads = (rows % NUM_KV_HEADS).to(tl.int64)
    is_token = tokens < num_tokens
    dims = tl.arange(0, HEAD_PADDED)[None, :]
    is_dim = dims < HEAD_SIZE
    # Loaded whether or not the token is padding, so as not to wait for the slots.
    mask = is_token[:, None] & is_dim
    k = tl.load(key + (tokens * key_stride_token + heads * key_stride_head)[:, None] + dims, mask=mask)
    v = tl.load(value + (tokens * value_stride_token + heads * value_stride_head)[:, None] + dims, mask=mask)
    window_slot = tl.load(window_slots + tokens, mask=is_token, other=-1)
    strided_slot = tl.load(strided_slots + tokens, mask=is_token, other=-1)
    is_token = (window_slot >= 0) & (strided_slot >= 0)

    page = window_slot // PAGE_SLOTS
    slot = window_slot % PAGE_SLOTS
    target = page * window_stride_page + heads * window_stride_head + slot * window_stride_slot
    mask = is_token[:, None] & is_dim
    tl.store(window_cache + target[:, None] + dims, k, mask=mask)
    tl.store(window_cache + target[:, None] + HEAD_SIZE + dims, v, mask=mask)

    page = strided_slot // STRIDED_PAGE_TOKENS
    local_position = strided_slot % STRIDED_PAGE_TOKENS
    local_block = local_position // BLOCK_SIZE
    residue = local_block % VERT_STRIDE
    rank = tl.load(rank_of_residue + heads * VERT_STRIDE + residue, mask=is_token, other=-1)
    slot = (local_block // VERT_STRIDE * NUM_KEPT + rank) * BLOCK_SIZE + local_position % BLOCK_SIZE
    target = page * strided_stride_page + heads * strided_stride_head + slot * strided_stride_slot
    mask = (rank >= 0)[:, None] & is_dim
    tl.store(strided_cache + target[:, None] + dims, k, mask=mask)
    tl.store(strided_cache + target[:, None] + HEAD_SIZE + dims, v, mask=mask)


def cache_write_config(head_padded: int, dtype: torch.dtype) -> dict[str, int]:
    """Vectors of K and of V per program, and its warps."""
    return launch_config("cache_write", shape_key(head_padded, dtype), {"ROWS": 16, "num_warps": 2})


def write_cache(
    key: torch.Tensor,
    value: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_slots: torch.Tensor,
    strided_slots: torch.Tensor,
    pattern: S2Pattern,
) -> None:
    """Store new tokens in both tiers, in place: every head in the window tier, kept ones in the strided.

    Args:
        key, value: [tokens, num_kv_heads, head_size], any strides but a contiguous last dimension. May
            have more tokens than the slots (a padded batch), or fewer: the surplus of either is ignored.
        window_cache, strided_cache: [pages, num_kv_heads, page_slots, 2 * head_size], likewise.
        window_slots: int64 [tokens], page * page_slots + slot.
        strided_slots: int64 [tokens], page * strided_page_tokens + position mod strided_page_tokens.
            A token with -1 in either is padding and skipped.
        pattern: the pattern of these heads.

    Raises:
        ValueError: an argument has a wrong shape or dtype; the message names it.
    """
    if key.dim() != 3 or key.shape[1] != pattern.num_kv_heads:
        raise ValueError(
            f"key: shape {tuple(key.shape)}, expected [tokens, {pattern.num_kv_heads}, head_size]"
        )
    if value.shape != key.shape or value.dtype != key.dtype:
        raise ValueError(
            f"value: {value.dtype} {tuple(value.shape)}, expected {key.dtype} {tuple(key.shape)} as key"
        )
    if window_slots.dim() != 1 or strided_slots.shape != window_slots.shape:
        raise ValueError(
            f"strided_slots: shape {tuple(strided_slots.shape)}, expected one dimension, and the shape "
            f"of window_slots, {tuple(window_slots.shape)}"
        )
    for name, tensor in (
        ("key", key),
        ("value", value),
        ("window_slots", window_slots),
        ("strided_slots", strided_slots),
    ):
        check_contiguous_last_dim(name, tensor)
    head_size = key.shape[2]
    layout = check_caches(window_cache, strided_cache, pattern, head_size, key.dtype)
    tokens = min(key.shape[0], window_slots.shape[0])
    if tokens == 0:
        return
    head_padded = triton.next_power_of_2(head_size)
    config = cache_write_config(head_padded, key.dtype)
    cache_write_kernel[(triton.cdiv(tokens * pattern.num_kv_heads, config["ROWS"]),)](
        key,
        value,
        window_cache,
        strided_cache,
        window_slots,
        strided_slots,
        head_tables(pattern, key.device).rank_of_residue,
        tokens,
        *key.stride()[:2],
        *value.stride()[:2],
        *window_cache.stride()[:3],
        *strided_cache.stride()[:3],
        NUM_KV_HEADS=pattern.num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        PAGE_SLOTS=layout.page_slots,
        STRIDED_PAGE_TOKENS=layout.strided_page_tokens,
        BLOCK_SIZE=pattern.block_size,
        VERT_STRIDE=pattern.vert_stride,
        NUM_KEPT=pattern.num_kept,
        **config,
    )
