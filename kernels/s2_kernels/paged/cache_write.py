"""Store new tokens in both tiers of the KV cache, in one launch."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

from s2_kernels.launch import limits
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.handle import KernelLaunch
from s2_kernels.layout import HeadTables, TierLayout
from s2_kernels.paged.calls import WriteCall, cache_strides
from s2_kernels.pattern import S2Pattern

VARYING = tl.constexpr(limits.VARYING)


@triton.jit(do_not_specialize=["num_tokens"])
def cache_write_kernel(
    key,  # [tokens, num_kv_heads, head_size]
    value,
    window_cache,  # [pages, num_kv_heads, page_slots, 2 * head_size]
    strided_cache,
    window_slots,  # [tokens]
    strided_slots,
    rank_of_residue,  # [num_kv_heads, vert_stride]
    first_kept,  # [num_kv_heads + 1]
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
    if NUM_KEPT == VARYING:
        strided_row = tl.load(first_kept + heads).to(tl.int64)
        num_kept = tl.load(first_kept + heads + 1) - strided_row
    else:
        strided_row = heads
        num_kept = NUM_KEPT
    slot = (local_block // VERT_STRIDE * num_kept + rank) * BLOCK_SIZE + local_position % BLOCK_SIZE
    target = page * strided_stride_page + strided_row * strided_stride_head + slot * strided_stride_slot
    mask = (rank >= 0)[:, None] & is_dim
    tl.store(strided_cache + target[:, None] + dims, k, mask=mask)
    tl.store(strided_cache + target[:, None] + HEAD_SIZE + dims, v, mask=mask)


def cache_write_config(head_padded: int, dtype: torch.dtype) -> dict[str, int]:
    """Vectors of K and of V per program, and its warps."""
    return launch_config("cache_write", shape_key(head_padded, dtype), {"ROWS": 16, "num_warps": 2})


def prepare_write(
    key: torch.Tensor,
    value: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_slots: torch.Tensor,
    strided_slots: torch.Tensor,
    num_tokens: int,
    pattern: S2Pattern,
    tables: HeadTables,
) -> WriteCall:
    """`s2_kernels.paged.write` of the first `num_tokens` tokens, one or more, after its checks."""
    head_size = key.shape[2]
    layout = TierLayout.of_caches(pattern, window_cache, strided_cache)
    head_padded = triton.next_power_of_2(head_size)
    config = cache_write_config(head_padded, key.dtype)
    arguments = {
        "key": key,
        "value": value,
        "window_cache": window_cache,
        "strided_cache": strided_cache,
        "window_slots": window_slots,
        "strided_slots": strided_slots,
        "rank_of_residue": tables.rank_of_residue,
        "first_kept": tables.first_kept,
        "num_tokens": num_tokens,
        "key_stride_token": key.stride(0),
        "key_stride_head": key.stride(1),
        "value_stride_token": value.stride(0),
        "value_stride_head": value.stride(1),
        **cache_strides(window_cache, strided_cache),
        "NUM_KV_HEADS": pattern.num_kv_heads,
        "HEAD_SIZE": head_size,
        "HEAD_PADDED": head_padded,
        "PAGE_SLOTS": layout.page_slots,
        "STRIDED_PAGE_TOKENS": layout.strided_page_tokens,
        "BLOCK_SIZE": pattern.block_size,
        "VERT_STRIDE": pattern.vert_stride,
        "NUM_KEPT": limits.num_kept(layout),
        "ROWS": config.pop("ROWS"),
    }
    grid = (triton.cdiv(num_tokens * pattern.num_kv_heads, arguments["ROWS"]),)
    varying = ("key", "value", "window_cache", "strided_cache", "rank_of_residue", "first_kept")
    launch = KernelLaunch(cache_write_kernel, grid, arguments, varying, **config)

    def write(
        key: torch.Tensor,
        value: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        launch(key, value, window_cache, strided_cache, tables.rank_of_residue, tables.first_kept)

    return write
