"""The attention backend on a mixed batch, as an engine's step hands it over: with the GPU's kernels, under
Triton's interpreter where there is no GPU, and with those of the CPU.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from vllm.forward_context import ForwardContext, override_forward_context
from vllm.v1.attention.backend import CommonAttentionMetadata

from s2_kernels.launch.choice import Impl
from s2_kernels.pattern import S2Pattern
from s2_vllm.backend import CacheRows, S2AttentionImpl, S2Metadata, S2MetadataBuilder, StridedPlace
from tests.paged import DEVICE, TOLERANCES, Geometry, PagedBatch, build_batch

STRIDED = "model.layers.3.self_attn.attn.strided"
PATTERNS = {
    "kv": S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=4),
    "query": S2Pattern.build(
        4, 2, block_size=16, local_blocks=2, vert_stride=4, head_sliding_offset=1, pattern_heads="query"
    ),
}
MIXED = {
    "full-and-strided": S2Pattern.build(
        6, 3, block_size=16, local_blocks=2, vert_stride=4, full_heads=[1], sink_blocks=1
    ),
    "full-and-streaming": S2Pattern.build(
        3, 3, block_size=16, local_blocks=2, vert_stride=None, full_heads=[0], sink_blocks=2
    ),
    "streaming": S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=None, sink_blocks=1),
    "full": S2Pattern.build(2, 2, block_size=16, local_blocks=2, vert_stride=None, full_heads=[0, 1]),
}
GEOMETRIES = {name: Geometry(pattern) for name, pattern in {**PATTERNS, **MIXED}.items()} | {
    "kv-beside-mixed": Geometry(PATTERNS["kv"], page_slots=32, residue_slots=48),
    "query-beside-mixed": Geometry(PATTERNS["query"], page_slots=32, residue_slots=48),
}
# (context, queries) of each request, decodes first, as vLLM orders them.
BATCHES = {
    "mixed": [(70, 1), (200, 1), (0, 1), (0, 33), (150, 20)],
    "decodes": [(70, 1), (200, 1), (15, 1)],
    "prefills": [(0, 40), (90, 3)],
    "padded-decodes": [(70, 1), (200, 1), (40, 0), (0, 0)],
}
# Of the other layers of the KV cache entry that the layer shares.
OTHER_ROWS = 4
# Of the strided tier: a layer of streaming heads alone has none, in rows of a block each.
NO_ROWS = CacheRows(0, 0, (0, 16))


def metadata(batch: PagedBatch, block_table: torch.Tensor, slot_mapping: torch.Tensor) -> S2Metadata:
    """What the builder makes of vLLM's metadata of the batch, whose tokens are counted with their padding."""
    requests = batch.requests
    starts = torch.tensor(batch.query_start_loc, dtype=torch.int32)
    common = CommonAttentionMetadata(
        query_start_loc=requests.query_start_loc,
        query_start_loc_cpu=starts,
        seq_lens=requests.seq_lens,
        num_reqs=len(batch.seq_lens),
        num_actual_tokens=len(batch.q),
        max_query_len=int(starts.diff().max()),
        max_seq_len=max(batch.seq_lens),
        block_table_tensor=block_table,
        slot_mapping=slot_mapping,
    )
    builder = S2MetadataBuilder(None, [], None, torch.device(DEVICE))
    return builder.build(0, common)


def make_impl(
    pattern: S2Pattern, impl: Impl | None = None, strided: CacheRows | None = None, scale: float = 1.0
) -> S2AttentionImpl:
    """A layer's implementation for heads of 64 elements, with these rows of its strided tier."""
    rows = CacheRows(0, pattern.num_kv_heads)
    strided = rows if strided is None else strided
    return S2AttentionImpl(
        pattern.num_heads,
        64,
        scale,
        pattern.num_kv_heads,
        None,
        None,
        "auto",
        pattern=pattern,
        window=rows,
        strided=StridedPlace(None if strided is NO_ROWS else STRIDED, strided),
        impl=impl,
    )


def run_layer(batch: PagedBatch, impl: Impl | None, out: torch.Tensor) -> None:
    """One forward of a layer whose caches have the context of every request, and the new tokens still not.

    The layer's rows are the last ones of the entry's pages; the other layers' are NaN. A row has the slots of
    a block, where the layer's tiers differ.
    """
    pattern, head_size = batch.pattern, batch.q.shape[2]
    shape, slots = batch.strided_cache.shape[1:3], batch.strided_cache.shape[2]
    if batch.window_cache.shape[1:] != batch.strided_cache.shape[1:]:
        slots = pattern.block_size
    count = shape[0] * shape[1] // slots
    entry = batch.strided_cache.new_full(
        (len(batch.strided_cache), OTHER_ROWS + count, slots, 2 * head_size), torch.nan
    )
    rows = CacheRows(OTHER_ROWS, count, None if shape == (count, slots) else shape) if count else NO_ROWS
    rows.of(entry).copy_(batch.strided_cache)
    attention = make_impl(pattern, impl, rows, batch.scale)
    requests = batch.requests
    window = metadata(batch, requests.window_table, batch.window_slots)
    strided = metadata(batch, requests.strided_table, batch.strided_slots)
    context = ForwardContext(
        no_compile_layers={STRIDED: SimpleNamespace(kv_cache=entry)},
        attn_metadata={STRIDED: strided},
        slot_mapping={STRIDED: batch.strided_slots},
    )
    with override_forward_context(context):
        result = attention.forward(
            SimpleNamespace(), batch.q, batch.key, batch.value, batch.window_cache, window, out
        )
    assert result is out
    assert entry[:, :OTHER_ROWS].isnan().all(), "another layer's rows were written"


def forget_new_tokens(batch: PagedBatch) -> None:
    """Make NaN of what the caches hold of the new tokens: the layer is to write them."""
    slots = batch.window_slots[batch.window_slots >= 0]
    page_slots = batch.window_cache.shape[2]
    batch.window_cache[slots // page_slots, :, slots % page_slots] = torch.nan


@pytest.mark.parametrize("padding_tokens", [0, 5], ids=["exact", "padded"])
@pytest.mark.parametrize("impl", ["triton", "torch", "reference"])
@pytest.mark.parametrize("requests", BATCHES)
@pytest.mark.parametrize("name", GEOMETRIES)
def test_step(name: str, requests: str, impl: Impl, padding_tokens: int) -> None:
    batch = build_batch(
        GEOMETRIES[name], BATCHES[requests], pool="token-major", padding_tokens=padding_tokens
    )
    forget_new_tokens(batch)
    out = batch.poisoned_output()
    run_layer(batch, impl, out)
    batch.check(out)


def test_without_metadata_the_output_is_zero() -> None:
    """As when vLLM measures memory."""
    batch = build_batch(Geometry(PATTERNS["kv"]), [(0, 5)])
    attention = make_impl(batch.pattern)
    out = batch.poisoned_output()
    attention.forward(SimpleNamespace(), batch.q, batch.key, batch.value, batch.window_cache, None, out)
    assert (out == 0).all()


def test_decodes_and_the_rest_are_told_apart() -> None:
    batch = build_batch(Geometry(PATTERNS["kv"]), BATCHES["mixed"], padding_tokens=4)
    made = metadata(batch, batch.requests.window_table, batch.window_slots)
    assert (made.num_decodes, made.num_decode_tokens, made.num_tokens) == (3, 3, 60)


def test_the_warm_up_runs_the_prefill_kernels() -> None:
    pattern = PATTERNS["query"]
    attention = make_impl(pattern, "triton")
    page = torch.zeros(2, 2, pattern.num_kept * 16, 128, device=DEVICE)
    attention.warm_up(page, page)
    assert TOLERANCES[page.dtype] > page.abs().max(), "the warm-up wrote to the cache"
