"""The paged operations: one call each, which chooses between PyTorch, Triton and Hopper kernels.

Each is also there in two steps, for an engine, whose layers make the same call with other tensors.

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
from s2_kernels.paged.calls import AttendCall, WriteCall
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
        window_cache, strided_cache: the two tiers (`s2_kernels.layout`), strides likewise.
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
    call = prepare_write(
        key,
        value,
        window_cache,
        strided_cache,
        window_slots,
        strided_slots,
        pattern,
        tables=tables,
        impl=impl,
    )
    tables = head_tables(pattern, key.device) if tables is None else tables
    call(key, value, window_cache, strided_cache, tables)


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
    call = prepare_attend(
        q,
        requests,
        pattern,
        scale,
        out,
        max_query_len=max_query_len,
        max_seq_len=max_seq_len,
        tables=tables,
        impl=impl,
    )
    tables = head_tables(pattern, q.device) if tables is None else tables
    call(q, requests.window_cache, requests.strided_cache, out, tables)


def prepare_write(
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
) -> WriteCall:
    """`write`, checked and ready for any number of calls with other keys, values and caches like these.

    Args: as of `write`.

    Raises:
        ValueError: as `write`.
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
    if tokens == 0:
        return _does_nothing
    slots = (window_slots[:tokens], strided_slots[:tokens])
    if chosen == "triton":
        from s2_kernels.paged.cache_write import prepare_write as prepare

        tables = head_tables(pattern, key.device) if tables is None else tables
        return prepare(key, value, window_cache, strided_cache, *slots, tokens, pattern, tables)

    def call(
        key: torch.Tensor,
        value: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        new, caches = (key[:tokens], value[:tokens]), (window_cache, strided_cache)
        if chosen == "reference":
            from s2_kernels.reference import cache_write_reference

            cache_write_reference(*new, *caches, *slots, pattern)
        else:
            from s2_kernels.paged import torch_path

            torch_path.write_cache(*new, *caches, *slots, pattern, tables)

    return call


def prepare_attend(
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
) -> AttendCall:
    """`attend`, checked and ready for any number of calls with other queries, caches and outputs like these.

    Calls may share memory for results in between: they must follow each other on one stream.

    Args: as of `attend`.

    Raises:
        ValueError: as `attend`.
    """
    check_attend(q, requests, pattern, scale, out)
    # Decode reads memory for most of its time: the portable kernel is as fast as that allows.
    is_decode = max_query_len == 1 and impl != "hopper"
    chosen = _choose_attend(q, requests, pattern, out, is_decode, impl)
    if q.shape[0] == 0 or len(requests.seq_lens) == 0:
        return _does_nothing
    if chosen in ("triton", "hopper"):
        tables = head_tables(pattern, q.device) if tables is None else tables
        arguments = (q, requests, pattern, scale, out, tables)
        if chosen == "hopper":
            from s2_kernels.hopper import prefill as hopper_prefill

            return hopper_prefill.prepare_prefill(*arguments, max_seq_len)
        if is_decode:
            from s2_kernels.paged.decode import prepare_decode

            return prepare_decode(*arguments)
        from s2_kernels.paged.prefill import prepare_prefill

        return prepare_prefill(*arguments)

    def call(
        q: torch.Tensor,
        window_cache: torch.Tensor,
        strided_cache: torch.Tensor,
        out: torch.Tensor,
        tables: HeadTables,
    ) -> None:
        these = requests._replace(window_cache=window_cache, strided_cache=strided_cache)
        if chosen == "reference":
            from s2_kernels.reference import paged_attention_reference

            tokens = int(requests.query_start_loc[-1])
            out[:tokens] = paged_attention_reference(q, these, pattern, scale)[:tokens]
        else:
            from s2_kernels.paged import torch_path

            torch_path.paged_attention(q, these, pattern, scale, out)

    return call


def _choose_attend(
    q: torch.Tensor,
    requests: PagedRequests,
    pattern: S2Pattern,
    out: torch.Tensor,
    is_decode: bool,
    impl: Impl | None,
) -> Impl:
    refusals: dict[Impl, Callable[[], str | None]] = {
        "reference": _takes_all,
        "torch": _takes_all,
        "triton": partial(
            limits.refusal,
            q.device,
            q.dtype,
            q.shape[2],
            pattern.block_size,
            q=q,
            out=out,
            **requests._asdict(),
        ),
    }
    if not is_decode:
        refusals["hopper"] = partial(_hopper_refusal, q, requests, pattern)
    return choose(impl, q.device, refusals)


def _hopper_refusal(q: torch.Tensor, requests: PagedRequests, pattern: S2Pattern) -> str | None:
    """Why the Hopper kernel does not take heads like these, or caches: the portable one takes all."""
    window, strided = requests.window_cache, requests.strided_cache
    caches = {"window_cache": window}
    if pattern.num_virtual_heads:  # streaming heads have no page of the strided tier
        caches["strided_cache"] = strided
    reason = hopper.refusal(pattern, q, **caches)
    if reason is None and window.shape[2] % pattern.block_size:
        reason = (
            f"window_cache: {window.shape[2]} slots in a page, expected a multiple of {pattern.block_size}"
        )
    return reason


def _takes_all() -> None:
    """No refusal."""


def _does_nothing(*_: object) -> None:
    """The call for a batch without a token."""
