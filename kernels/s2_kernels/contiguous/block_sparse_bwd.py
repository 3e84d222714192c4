"""The gradients of block-sparse attention over contiguous keys and values, with any block mask per head.

Three kernels: one sums dO * O of each row, one gives the gradient of the queries, and one those of the keys
and values. Each element of a gradient is summed by one program, in one order.
"""

from __future__ import annotations

import torch

from s2_kernels.contiguous.block_sparse import TILE_FIELDS, tile_table
from s2_kernels.contiguous.block_sparse_bwd_delta import block_sparse_bwd_delta_kernel
from s2_kernels.contiguous.block_sparse_bwd_dkdv import block_sparse_bwd_dkdv_kernel
from s2_kernels.contiguous.block_sparse_bwd_dq import block_sparse_bwd_dq_kernel
from s2_kernels.contiguous.key_tiles import KEY_TILE_FIELDS, key_tiles
from s2_kernels.contiguous.key_visits import VISIT_FIELDS
from s2_kernels.contiguous.sequences import Span, first_position
from s2_kernels.contiguous.visits import GROUP_FIELDS, merge_rows
from s2_kernels.launch.configs import launch_config, shape_key
from s2_kernels.launch.cuda_graphs import hold_for_graph
from s2_kernels.launch.limits import LOG2_E, MIN_DOT_SIZE, padded_head_size
from s2_kernels.masks import BlockMask

_DELTA_ELEMENTS = 4096
"""Elements of a tile of the first kernel, which does nothing but load."""


def block_sparse_bwd_configs(
    head_padded: int, dtype: torch.dtype, block_size: int
) -> tuple[dict[str, int], dict[str, int]]:
    """Tile shapes and launch options of the kernels for the queries, and for the keys and values."""
    if dtype == torch.float32:  # multiplied without tensor cores: small tiles, or registers spill
        stages = 1 if head_padded <= 128 else 2
        of_queries = {"BLOCK_M": 32, "BLOCK_N": MIN_DOT_SIZE, "num_warps": 8, "num_stages": stages}
        of_keys = {"BLOCK_M": MIN_DOT_SIZE, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
    elif head_padded > 128:
        of_queries = {"BLOCK_M": 64, "BLOCK_N": 32, "num_warps": 8, "num_stages": 2}
        of_keys = {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 8, "num_stages": 2}
    else:
        of_queries = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}
        of_keys = {"BLOCK_M": 64, "BLOCK_N": 128, "num_warps": 8, "num_stages": 2}
        if block_size < 64:  # the fewer blocks, the more of their visits do they share
            of_keys |= {"BLOCK_M": 32, "BLOCK_N": 64, "num_warps": 4}
    shape = shape_key(head_padded, dtype, block=block_size)
    return (
        launch_config("block_sparse_bwd_dq", shape, of_queries),
        launch_config("block_sparse_bwd_dkdv", shape, of_keys),
    )


def block_sparse_bwd(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    out: torch.Tensor,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    d_lse: torch.Tensor | None,
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    """The gradients of `block_sparse_fwd`, in place; the same call gives the same bits.

    Args:
        q, k, v, mask, spans, scale: of the forward pass. No key is of two sequences.
        out, lse: what it gave: as q, and float32 [batch, num_heads, queries], contiguous.
        d_out: the gradient of `out`, as q, any strides but a contiguous last dimension.
        d_lse: the gradient of `lse`, as it; None for zeros.
        dq, dk, dv: as q, k and v. Nothing is written for tokens that belong to no sequence.
    """
    delta = torch.empty_like(lse)
    _launch_delta(out, d_out, d_lse, delta)
    _launch_dq(q, k, v, mask, spans, scale, lse, d_out, delta, dq)
    _launch_dkdv(q, k, v, mask, spans, scale, lse, d_out, delta, dk, dv)


def _launch_delta(
    out: torch.Tensor, d_out: torch.Tensor, d_lse: torch.Tensor | None, delta: torch.Tensor
) -> None:
    batch, num_queries, num_heads, head_size = out.shape
    head_padded = padded_head_size(head_size)
    rows = _DELTA_ELEMENTS // head_padded
    num_row_tiles = -(-num_queries // rows)
    if out.numel() == 0:
        return
    block_sparse_bwd_delta_kernel[(batch * num_row_tiles * num_heads,)](
        out,
        d_out,
        delta if d_lse is None else d_lse,
        delta,
        num_queries,
        num_row_tiles,
        *out.stride()[:3],
        *d_out.stride()[:3],
        *delta.stride()[:2],
        NUM_HEADS=num_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        WITH_D_LSE=d_lse is not None,
        ROWS=rows,
        num_warps=4,
    )


def _launch_dq(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    delta: torch.Tensor,
    dq: torch.Tensor,
) -> None:
    num_heads, head_size = q.shape[2:]
    head_padded = padded_head_size(head_size)
    config, _ = block_sparse_bwd_configs(head_padded, q.dtype, mask.block_size)
    first_positions = tuple(first_position(span, mask) for span in spans)
    tiles = tile_table(spans, first_positions, config["BLOCK_M"], q.device)
    if len(tiles) == 0:
        return
    rows, visits_per_step = (max(1, config[extent] // mask.block_size) for extent in ("BLOCK_M", "BLOCK_N"))
    visits = merge_rows(mask, rows, visits_per_step, q.device)
    hold_for_graph(tiles, *visits[:4])
    block_sparse_bwd_dq_kernel[(len(tiles) * num_heads,)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        tiles,
        *visits[:4],
        dq,
        scale,
        scale * LOG2_E,
        visits.num_groups,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *d_out.stride()[:3],
        *dq.stride()[:3],
        *lse.stride()[:2],
        NUM_HEADS=num_heads,
        GROUP_SIZE=num_heads // k.shape[2],
        MASK_GROUP_SIZE=num_heads // mask.num_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=mask.block_size,
        CAUSAL=mask.is_causal,
        TILE_FIELDS=TILE_FIELDS,
        GROUP_FIELDS=GROUP_FIELDS,
        **config,
    )


def _launch_dkdv(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    mask: BlockMask,
    spans: tuple[Span, ...],
    scale: float,
    lse: torch.Tensor,
    d_out: torch.Tensor,
    delta: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
) -> None:
    num_heads, head_size = q.shape[2:]
    num_kv_heads = k.shape[2]
    head_padded = padded_head_size(head_size)
    _, config = block_sparse_bwd_configs(head_padded, q.dtype, mask.block_size)
    blocks, visits_per_step = (max(1, config[extent] // mask.block_size) for extent in ("BLOCK_N", "BLOCK_M"))
    tables = key_tiles(mask, spans, num_heads, num_kv_heads, blocks, visits_per_step, q.device)
    if tables.num_tiles == 0:
        return
    hold_for_graph(*tables[:7])
    parts = max(1, mask.block_size // config["BLOCK_N"])
    block_sparse_bwd_dkdv_kernel[(tables.num_tiles * parts * num_kv_heads,)](
        q,
        k,
        v,
        d_out,
        lse,
        delta,
        *tables[:7],
        dk,
        dv,
        scale,
        scale * LOG2_E,
        tables.num_tiles,
        *q.stride()[:3],
        *k.stride()[:3],
        *v.stride()[:3],
        *d_out.stride()[:3],
        *dk.stride()[:3],
        *dv.stride()[:3],
        *lse.stride()[:2],
        NUM_KV_HEADS=num_kv_heads,
        GROUP_SIZE=num_heads // num_kv_heads,
        HEAD_SIZE=head_size,
        HEAD_PADDED=head_padded,
        BLOCK_SIZE=mask.block_size,
        CAUSAL=mask.is_causal,
        TILE_FIELDS=KEY_TILE_FIELDS,
        VISIT_FIELDS=VISIT_FIELDS,
        **config,
    )
