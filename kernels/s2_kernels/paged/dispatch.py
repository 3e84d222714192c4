"""The paged operations: one call each, which chooses between PyTorch, Triton and Hopper kernels.

Implementations are imported when a call first needs them: a process without a GPU needs no Triton.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from s2_kernels import hopper
from s2_kernels.launch import limits
from s2_kernels.launch.choice import Impl, choose
from s2_kernels.layout import HeadTables, head_tables
from s2_kernels.paged.checks import check_attend, check_write
from s2_kernels.paged.requests import PagedRequests
from s2_kernels.pattern import S2Pattern


def write(
    key: torch.Tensor,
    value: torch.Tensor,
    window_cache: torch.Tensor,
    strided_cache: torch.Tensor,
    window_slots: torch.Tensor,
    strided_slots: torch.Tensor,
    pattern: S2Pattern,
    *,
    tables: HeadTables | None = None,
    impl: Impl | None = None,
) -> None:
    """Store new tokens in both tiers, in place: every head in the window tier, kept ones in the strided.

    Args:
        key, value: [tokens, num_kv_heads, head_size], any strides (for Triton with a contiguous last
            dimension). May have more tokens than the slots (a padded batch), or fewer: the surplus of either
            is ignored.
        window_cache, strided_cache: [pages, num_kv_heads, page_slots, 2 * head_size], likewise.
        window_slots: int64 [tokens], page * page_slots + slot.
        strided_slots: int64 [tokens], page * strided_page_tokens + position mod strided_page_tokens, as vLLM
            computes it. A token with -1 in either is padding and skipped.
        pattern: the pattern of these heads.
        tables: its tables, where the caller owns some.
        impl: "reference", "torch" or "triton"; None for the fastest that takes the call.

    Raises:
        ValueError: an argument has a wrong shape or dtype, or `impl` does not take the call; the message
            names it.
    """
    check_write(key, value, window_cache, strided_cache, window_slots, strided_slots, pattern)
    triton_refusal = partial(
        limits.refusal,
        key.device,
        key.dtype,
        key.shape[2],
        limits.MIN_DOT_SIZE,  # blocks of any size: nothing is multiplied
        key=key,
        value=value,
        window_cache=window_cache,
        strided_cache=strided_cache,
        window_slots=window_slots,
        strided_slots=strided_slots,
    )
    chosen = choose(
        impl, key.device, {"reference": _takes_all, "torch": _takes_all, "triton": triton_refusal}
    )
    tokens = min(key.shape[0], window_slots.shape[0])
    new = (key[:tokens], value[:tokens])
    caches = (window_cache, strided_cache)
    slots = (window_slots[:tokens], strided_slots[:tokens])
    if tokens == 0:
        return
    tables = head_tables(pattern, key.device) if tables is None else tables
    if chosen == "reference":
        from s2_kernels.reference import cache_write_reference

        cache_write_reference(*new, *caches, *slots, pattern)
    elif chosen == "torch":
        from s2_kernels.paged.torch_path import write_cache as torch_write_cache

        torch_write_cache(*new, *caches, *slots, pattern, tables)
    else:
        from s2_kernels.paged.cache_write import write_cache

        write_cache(*new, *caches, *slots, pattern, tables)


def attend(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    scale: float,
    out: torch.Tensor,
    *,
    max_query_len: int | None = None,
    max_seq_len: int | None = None,
    tables: HeadTables | None = None,
    impl: Impl | None = None,
) -> None:
    """S2-Attention of a batch of requests whose keys and values are in the two paged tiers.

    Nothing outside a query's set is read, neither a page nor what the block table says about it. With
    `max_query_len` 1 a launch depends on shapes only, so that it can be captured in a CUDA graph, once a
    first call has put the pattern's tables on the device.

    Args:
        q: [tokens, num_heads, head_size], any strides (on a GPU with a contiguous last dimension).
        requests: whose queries these are.
        pattern: the pattern of these heads.
        scale: factor on the logits, positive.
        out: as q; rows of tokens that belong to no request are left as they are.
        max_query_len: the most queries of a request, or a bound, where the host knows one. 1 (decode) has
            kernels of its own.
        max_seq_len: the longest sequence, or a bound, where the host knows one. It decides the order of the
            work, and the faster of two Hopper kernels, never the result.
        tables: the pattern's tables, where the caller owns some.
        impl: "reference", "torch", "triton" or "hopper"; None for the fastest that takes the call.

    Raises:
        ValueError: an argument has a wrong shape, dtype or value, or `impl` does not take the call; the
            message names it.
    """
    check_attend(q, requests, pattern, scale, out)
    triton_refusal = partial(
        limits.refusal, q.device, q.dtype, q.shape[2], pattern.block_size, q=q, out=out, **requests._asdict()
    )
    # Decode reads memory for most of its time: the portable kernel is as fast as that allows.
    is_decode = max_query_len == 1 and impl != "hopper"
    hopper_refusal = partial(
        hopper.refusal,
        pattern,
        q,
        window_cache=requests.window_cache,
        strided_cache=requests.strided_cache,
    )
    refusals: dict[Impl, Callable[[], str | None]] = {
        "reference": _takes_all,
        "torch": _takes_all,
        "triton": triton_refusal,
    }
    if not is_decode:
        refusals["hopper"] = hopper_refusal
    chosen = choose(impl, q.device, refusals)
    if q.shape[0] == 0 or len(requests.seq_lens) == 0:
        return
    tables = head_tables(pattern, q.device) if tables is None else tables
    if chosen == "reference":
        from s2_kernels.reference import paged_attention_reference

        tokens = int(requests.query_start_loc[-1])
        out[:tokens] = paged_attention_reference(q, requests, pattern, scale)[:tokens]
    elif chosen == "torch":
        from s2_kernels.paged.torch_path import paged_attention

        paged_attention(q, requests, pattern, scale, out, tables)
    elif chosen == "hopper":
        from s2_kernels.hopper.prefill import paged_prefill_fwd

        paged_prefill_fwd(q, requests, pattern, scale, out, tables, max_seq_len)
    elif is_decode:
        from s2_kernels.paged.decode import paged_decode

        paged_decode(q, requests, pattern, scale, out, tables)
    else:
        from s2_kernels.paged.prefill import paged_prefill

        paged_prefill(q, requests, pattern, scale, out, tables)


def _takes_all() -> None:
    """No refusal."""
