"""How each implementation is called on a case's inputs.

A preparation takes inputs and returns a launch: everything that a serving engine does once per step or less
often (index tables, metadata, layouts) is done by the preparation and not timed. A launch returns the output,
[..., tokens, num_heads, head_size] of any strides, nothing copied for that (of cache_write: the cache). Peers
are imported by their preparations.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.kernels import gradients
from benchmarks.kernels.cases import GRADIENT_OPS
from benchmarks.kernels.inputs import DENSE_PAGE_TOKENS, Inputs, empty_two_tier_cache
from benchmarks.kernels.timing import Launch
from s2_kernels import paged
from s2_kernels.attention import s2_attention
from s2_kernels.paged import PagedRequests

Preparation = Callable[[Inputs], Launch]

# vLLM's: attention_config.flash_attn_max_num_splits_for_cuda_graph, and constants of its Triton backend.
FA3_MAX_SPLITS = 32
TRITON_MIN_PROGRAMS = 128
TRITON_SEGMENTS = 16
# Inductor's choice for this head size on Hopper, with tiles that divide the mask's blocks.
FLEX_OPTIONS = {"BLOCK_M": 128, "BLOCK_N": 64, "num_warps": 8, "num_stages": 3}


class Unavailable(Exception):
    """An implementation cannot run here; the message is the reason."""


@dataclass(frozen=True)
class Implementation:
    """What an implementation computes, and how it is prepared for each operation that it has.

    Attributes:
        dense: whether it is causal attention to everything, which ignores the pattern.
        ops: a preparation per operation.
        is_ours: whether it is this project's: that it does not run is an error then, not a fact about a peer.
    """

    dense: bool
    ops: dict[str, Preparation]
    is_ours: bool = False


def prepare_s2_prefill(inputs: Inputs) -> Launch:
    return _prepare_paged(partial(paged.attend, max_seq_len=inputs.case.total_len), inputs)


def prepare_s2_decode(inputs: Inputs) -> Launch:
    return _prepare_paged(partial(paged.attend, max_query_len=1), inputs)


def _prepare_paged(attention: Callable[..., None], inputs: Inputs) -> Launch:
    cache, out = inputs.two_tier, inputs.poisoned_output()
    requests = PagedRequests(
        cache.window_cache,
        cache.strided_cache,
        cache.window_table,
        cache.strided_table,
        inputs.query_start_loc,
        inputs.seq_lens,
    )

    def launch() -> torch.Tensor:
        attention(inputs.q, requests, inputs.case.pattern, inputs.scale, out)
        return out

    return launch


def prepare_s2_cache_write(inputs: Inputs) -> Launch:
    cache = empty_two_tier_cache(inputs.case, inputs.k.dtype, inputs.k.device)
    pools = cache.window_cache, cache.strided_cache
    slots = cache.window_slots, cache.strided_slots

    def launch() -> object:
        paged.write(inputs.k, inputs.v, *pools, *slots, inputs.case.pattern)
        return cache

    return launch


def prepare_s2_contiguous(inputs: Inputs) -> Launch:
    q, k, v = (_batched(x, inputs) for x in (inputs.q, inputs.k, inputs.v))

    def launch() -> torch.Tensor:
        return s2_attention(q, k, v, inputs.case.pattern, scale=inputs.scale)

    return launch


def prepare_sdpa(backend: SDPBackend, inputs: Inputs) -> Launch:
    q, k, v = (_head_major(x, inputs) for x in (inputs.q, *_repeated_key_value(inputs)))

    def launch() -> torch.Tensor:
        with sdpa_kernel(backend):
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=inputs.scale)
        return out.transpose(1, 2)

    return launch


def prepare_flex(inputs: Inputs) -> Launch:
    from torch.nn.attention.flex_attention import flex_attention

    from benchmarks.kernels.flex import flex_block_mask

    q, k, v = (_head_major(x, inputs) for x in (inputs.q, inputs.k, inputs.v))
    mask = flex_block_mask(inputs.case.pattern, inputs.case.total_len, q.device)
    compiled = torch.compile(flex_attention, dynamic=False, fullgraph=True)
    call = partial(
        compiled,
        q,
        k,
        v,
        block_mask=mask,
        scale=inputs.scale,
        enable_gqa=q.shape[1] != k.shape[1],
        kernel_options=FLEX_OPTIONS,
    )

    def launch() -> torch.Tensor:
        return call().transpose(1, 2)

    return launch


def prepare_dkernel(inputs: Inputs) -> Launch:
    attention = _dkernel(inputs)
    keys_values = _repeated_key_value(inputs) if _has_query_patterns(inputs) else (inputs.k, inputs.v)
    q, k, v = (_batched(x, inputs) for x in (inputs.q, *keys_values))
    return partial(attention, q, k, v)


def _dkernel(inputs: Inputs) -> gradients.Attention:
    """DKernel's attention, of as many KV heads as there are patterns: its pattern heads are KV heads."""
    try:
        from dkernel import LocalStrideSparseAttention
    except ImportError as error:
        raise Unavailable(str(error)) from error

    config, pattern = inputs.case.shape.config, inputs.case.pattern
    if pattern.kinds is not None:
        raise Unavailable(pattern.kinds)
    attention = LocalStrideSparseAttention(
        pattern.num_heads,
        inputs.case.total_len,
        pattern.block_size,
        pattern.local_blocks,
        pattern.vert_stride,
        homo_head=config.homo_head,
        num_kv_heads=pattern.num_heads if _has_query_patterns(inputs) else pattern.num_kv_heads,
        head_sliding_offset=config.head_sliding_offset,
        seq_dim=1,
    ).to(inputs.q.device)
    return partial(attention, sm_scale=inputs.scale)


def _dkernel_gradients(op: str, inputs: Inputs) -> Launch:
    return gradients.prepare(_dkernel, op, False, _has_query_patterns(inputs), inputs)


def _has_query_patterns(inputs: Inputs) -> bool:
    return inputs.case.shape.config.pattern_heads == "query"


def _fa4(inputs: Inputs) -> gradients.Attention:
    """FlashAttention's CuTe kernels, those of vLLM's wheel: dense, with GQA."""
    try:
        from vllm.vllm_flash_attn.cute.interface import flash_attn_func
    except ImportError as error:
        raise Unavailable(str(error)) from error

    def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        out = flash_attn_func(q, k, v, softmax_scale=inputs.scale, causal=True)
        return out[0] if isinstance(out, tuple) else out

    return attention


def prepare_fa3_prefill(inputs: Inputs) -> Launch:
    length, out = inputs.case.total_len, inputs.poisoned_output()
    call = partial(
        _fa3().flash_attn_varlen_func,
        inputs.q,
        inputs.k,
        inputs.v,
        out=out,
        max_seqlen_q=length,
        cu_seqlens_q=inputs.query_start_loc,
        max_seqlen_k=length,
        cu_seqlens_k=inputs.key_start_loc,
        softmax_scale=inputs.scale,
        causal=True,
        fa_version=3,
    )

    def launch() -> torch.Tensor:
        call()
        return out

    return launch


def prepare_fa3_paged(inputs: Inputs) -> Launch:
    """Called as vLLM's FlashAttention backend does it, with its bound on splits in CUDA graphs for decode."""
    fa3 = _fa3()
    case, cache, out = inputs.case, inputs.dense_paged, inputs.poisoned_output()
    splits = FA3_MAX_SPLITS if case.op == "decode" else 0
    metadata = fa3.get_scheduler_metadata(
        batch_size=case.batch,
        max_seqlen_q=case.new_tokens,
        max_seqlen_k=case.total_len,
        num_heads_q=inputs.q.shape[1],
        num_heads_kv=inputs.k.shape[1],
        headdim=inputs.q.shape[2],
        cache_seqlens=inputs.seq_lens,
        qkv_dtype=inputs.q.dtype,
        cu_seqlens_q=inputs.query_start_loc,
        page_size=DENSE_PAGE_TOKENS,
        causal=True,
        num_splits=splits,
    )
    call = partial(
        fa3.flash_attn_varlen_func,
        inputs.q,
        cache.k_cache,
        cache.v_cache,
        out=out,
        max_seqlen_q=case.new_tokens,
        cu_seqlens_q=inputs.query_start_loc,
        max_seqlen_k=case.total_len,
        seqused_k=inputs.seq_lens,
        block_table=cache.block_table,
        softmax_scale=inputs.scale,
        causal=True,
        scheduler_metadata=metadata,
        num_splits=splits,
        fa_version=3,
    )

    def launch() -> torch.Tensor:
        call()
        return out

    return launch


def _fa3() -> Any:
    try:
        from vllm import vllm_flash_attn
    except ImportError as error:
        raise Unavailable(str(error)) from error
    if not vllm_flash_attn.is_fa_version_supported(3):
        raise Unavailable(str(vllm_flash_attn.fa_version_unsupported_reason(3)))
    return vllm_flash_attn


def prepare_vllm_triton(inputs: Inputs) -> Launch:
    """Called as vLLM's Triton backend does it: few requests of one query each are split over segments."""
    try:
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError as error:
        raise Unavailable(str(error)) from error

    case, cache, out = inputs.case, inputs.dense_paged, inputs.poisoned_output()
    heads, head_size = inputs.q.shape[1:]
    threshold = TRITON_MIN_PROGRAMS // inputs.k.shape[1]
    segments = inputs.q.new_empty(threshold, heads, TRITON_SEGMENTS, head_size, dtype=torch.float32)
    call = partial(
        unified_attention,
        inputs.q,
        cache.k_cache,
        cache.v_cache,
        out,
        inputs.query_start_loc,
        case.new_tokens,
        inputs.seq_lens,
        case.total_len,
        inputs.scale,
        True,
        (-1, -1),
        cache.block_table,
        0.0,
        None,
        None,
        None,
        seq_threshold_3D=threshold,
        num_par_softmax_segments=TRITON_SEGMENTS,
        softmax_segm_output=segments,
        softmax_segm_max=torch.empty_like(segments[..., 0]),
        softmax_segm_expsum=torch.empty_like(segments[..., 0]),
    )

    def launch() -> torch.Tensor:
        call()
        return out

    return launch


def prepare_xformers_decode(inputs: Inputs) -> Launch:
    """The Triton kernel, called below xformers' dispatch.

    That refuses every operator where the compiled part of xformers does not fit torch; this one needs none.
    """
    try:
        from xformers.ops import fmha
        from xformers.ops.fmha.attn_bias import BlockDiagonalCausalWithOffsetPaddedKeysMask
    except ImportError as error:
        raise Unavailable(str(error)) from error

    batch, length = inputs.case.batch, inputs.case.total_len
    kv_heads, head_size = inputs.k.shape[1:]
    q = inputs.q.view(1, batch, kv_heads, -1, head_size)
    k, v = (x[None, :, :, None].expand(-1, -1, -1, q.shape[3], -1) for x in (inputs.k, inputs.v))
    bias = BlockDiagonalCausalWithOffsetPaddedKeysMask.from_seqlens(
        q_seqlen=[1] * batch, kv_padding=length, kv_seqlen=[length] * batch, device=q.device
    )
    arguments = fmha.Inputs(query=q, key=k, value=v, attn_bias=bias, scale=inputs.scale)

    def launch() -> torch.Tensor:
        out, _ = fmha.triton_splitk.FwOp.apply(arguments, needs_gradient=False)
        return out.reshape(inputs.q.shape)

    return launch


def _batched(packed: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[batch, tokens, heads, head_size] of packed rows; requests are of one length."""
    return packed.unflatten(0, (inputs.case.batch, -1))


def _head_major(packed: torch.Tensor, inputs: Inputs) -> torch.Tensor:
    """[batch, heads, tokens, head_size], contiguous, as PyTorch's attention functions document it."""
    return _batched(packed, inputs).transpose(1, 2).contiguous()


def _repeated_key_value(inputs: Inputs) -> tuple[torch.Tensor, torch.Tensor]:
    """k and v with a head for every query head, for implementations without GQA."""
    group = inputs.case.pattern.group_size
    if group == 1:
        return inputs.k, inputs.v
    return inputs.k.repeat_interleave(group, dim=1), inputs.v.repeat_interleave(group, dim=1)


def _gradients(
    make: gradients.MakeAttention, *, head_major: bool = False, repeat_heads: bool = False
) -> dict[str, Preparation]:
    return {op: partial(gradients.prepare, make, op, head_major, repeat_heads) for op in GRADIENT_OPS}


_fa2 = partial(prepare_sdpa, SDPBackend.FLASH_ATTENTION)
_cudnn = partial(prepare_sdpa, SDPBackend.CUDNN_ATTENTION)

IMPLEMENTATIONS = {
    "s2": Implementation(
        dense=False,
        ops={
            "cache_write": prepare_s2_cache_write,
            "decode": prepare_s2_decode,
            "chunked_prefill": prepare_s2_prefill,
            "prefill": prepare_s2_prefill,
            **_gradients(partial(gradients.s2, None)),
        },
        is_ours=True,
    ),
    "s2_contiguous": Implementation(
        dense=False,
        ops={"chunked_prefill": prepare_s2_contiguous, "prefill": prepare_s2_contiguous},
        is_ours=True,
    ),
    "s2_triton": Implementation(dense=False, ops=_gradients(partial(gradients.s2, "triton")), is_ours=True),
    "fa2": Implementation(
        dense=True,
        ops={
            "prefill": _fa2,
            **_gradients(
                partial(gradients.sdpa, SDPBackend.FLASH_ATTENTION), head_major=True, repeat_heads=True
            ),
        },
    ),
    "fa3": Implementation(
        dense=True,
        ops={
            "decode": prepare_fa3_paged,
            "chunked_prefill": prepare_fa3_paged,
            "prefill": prepare_fa3_prefill,
        },
    ),
    "cudnn": Implementation(
        dense=True,
        ops={
            "prefill": _cudnn,
            **_gradients(
                partial(gradients.sdpa, SDPBackend.CUDNN_ATTENTION), head_major=True, repeat_heads=True
            ),
        },
    ),
    "flex": Implementation(
        dense=False, ops={"prefill": prepare_flex, **_gradients(gradients.flex, head_major=True)}
    ),
    "fa4": Implementation(dense=True, ops=_gradients(_fa4)),
    "dkernel": Implementation(
        dense=False,
        ops={"prefill": prepare_dkernel, **{op: partial(_dkernel_gradients, op) for op in GRADIENT_OPS}},
    ),
    "xformers": Implementation(dense=True, ops={"decode": prepare_xformers_decode}),
    "vllm_triton": Implementation(
        dense=True, ops={"decode": prepare_vllm_triton, "chunked_prefill": prepare_vllm_triton}
    ),
}
