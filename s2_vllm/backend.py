"""The attention backend of sparse layers: metadata for both tiers, and the calls into the kernels."""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cache
from typing import ClassVar, NamedTuple

import torch
from vllm.config import VllmConfig
from vllm.model_executor.layers.attention.attention import get_attention_context
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadata,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
)
from vllm.v1.attention.backends.utils import split_decodes_and_prefills
from vllm.v1.kv_cache_interface import AttentionSpec, KVCacheLayout

from s2_kernels import paged
from s2_kernels.launch.choice import Impl
from s2_kernels.layout import HeadTables, head_tables
from s2_kernels.paged import LayerHeads, PagedRequests, PagedStep
from s2_kernels.pattern import S2Pattern


class CacheRows(NamedTuple):
    """A layer's part of the pages of a KV cache entry, which may have other layers' beside it.

    Attributes:
        first, size: the first of its rows, and how many they are.
        shape: (rows, slots) as which the kernels see them, where that is another shape; None where it is not.
    """

    first: int
    size: int
    shape: tuple[int, int] | None = None

    def of(self, entry_cache: torch.Tensor) -> torch.Tensor:
        """The layer's own of an entry's pages, [pages, rows, slots, 2 * head_size]."""
        own = entry_cache.narrow(1, self.first, self.size)
        return own if self.shape is None else own.view(len(own), *self.shape, own.shape[-1])


class StridedPlace(NamedTuple):
    """Where a layer's strided tier is.

    Attributes:
        entry: the name of the entry that owns its pages; None for a layer of streaming heads alone.
        rows: the layer's own of them; that layer has none of its window tier's, but as many slots in a row as
            the other layers, whose compiled kernels it can share.
    """

    entry: str | None
    rows: CacheRows


class S2AttentionBackend(AttentionBackend):
    """vLLM's CUSTOM backend: S2-Attention over a window tier and a strided tier."""

    supported_dtypes: ClassVar = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        """The name of the slot that vLLM keeps for out-of-tree backends."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[S2AttentionImpl]:
        return S2AttentionImpl

    @staticmethod
    def get_builder_cls() -> type[S2MetadataBuilder]:
        return S2MetadataBuilder

    @classmethod
    def supported_kv_cache_layouts(cls) -> tuple[KVCacheLayout, ...]:
        """Page by page and, in a page, head by head: a head's slots are one contiguous run."""
        return (KVCacheLayout.LBHNC, KVCacheLayout.BLHNC)


@dataclass
class S2Metadata(AttentionMetadata):
    """One tier's view of a batch. Requests with one query (decodes) come first.

    Attributes:
        num_tokens: tokens of the batch, padding included.
        num_decodes: leading requests with at most one query.
        num_decode_tokens: their tokens.
        query_start_loc: int32 [requests + 1].
        seq_lens: int32 [requests].
        max_seq_len: the longest of them, or a bound.
        block_table: int32 [requests, pages].
        slot_mapping: int64 [tokens], -1 for padding.
    """

    num_tokens: int
    num_decodes: int
    num_decode_tokens: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    max_seq_len: int
    block_table: torch.Tensor
    slot_mapping: torch.Tensor

    _steps: dict[int, tuple[S2Metadata | None, PagedStep]] = field(default_factory=dict, repr=False)

    def step_with(self, strided: S2Metadata) -> PagedStep:
        """This batch, of the window tier, together with what the strided tier says about it.

        Made for the first of the layers that have their pages in these two groups. `strided` may be this very
        one, for layers without a strided tier: what stands there is not looked at.
        """
        made = self._steps.get(id(strided))
        if made is None:
            step = PagedStep(
                self.block_table,
                strided.block_table,
                self.slot_mapping,
                strided.slot_mapping,
                self.query_start_loc,
                self.seq_lens,
                num_tokens=self.num_tokens,
                num_decodes=self.num_decodes,
                num_decode_tokens=self.num_decode_tokens,
                max_seq_len=self.max_seq_len,
            )
            # It is kept for its id to stay its own. Keeping itself, it would be garbage for a while.
            made = self._steps[id(strided)] = (None if strided is self else strided, step)
        return made[1]


class S2MetadataBuilder(AttentionMetadataBuilder[S2Metadata]):
    """Builds the metadata of one tier; vLLM makes one builder per KV cache group."""

    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_SINGLE_TOKEN_DECODE
    reorder_batch_threshold: int | None = 1

    def __init__(
        self,
        kv_cache_spec: AttentionSpec,
        layer_names: list[str],
        vllm_config: VllmConfig,
        device: torch.device,
    ) -> None:
        # Abstract in vLLM, which does all there is to do.
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self,
        common_prefix_len: int,
        common_attn_metadata: CommonAttentionMetadata,
        fast_build: bool = False,
    ) -> S2Metadata:
        """Split the batch into decodes and the rest; all else is vLLM's own tensors."""
        common = common_attn_metadata
        decodes, _, decode_tokens, _ = split_decodes_and_prefills(common, decode_threshold=1)
        return S2Metadata(
            num_tokens=common.num_actual_tokens,
            num_decodes=decodes,
            num_decode_tokens=decode_tokens,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            max_seq_len=common.max_seq_len,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
        )


class S2AttentionImpl(AttentionImpl[S2Metadata]):
    """Stores a batch's new keys and values in both tiers, then attends.

    Attributes:
        tables: of the pattern, which the layer that owns them sets; None for those of the library.

    Args:
        pattern: the pattern of this rank's heads.
        window: this layer's rows of its window tier's entry.
        strided: its strided tier.
        impl: the kernels to run; None for the fastest that take a call.
        others: as every vLLM attention implementation has them.
    """

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        *,
        pattern: S2Pattern,
        window: CacheRows,
        strided: StridedPlace,
        impl: Impl | None = None,
    ) -> None:
        self.num_heads = num_heads
        self.head_size = head_size
        self.scale = scale
        self.num_kv_heads = num_kv_heads
        self.kv_cache_dtype = kv_cache_dtype
        self.pattern = pattern
        self.heads = _shared_heads(pattern, scale, impl)
        self.window = window
        self.strided = strided
        self.tables: HeadTables | None = None

    def warm_up(self, kv_cache: torch.Tensor, strided_cache: torch.Tensor) -> None:
        """Compile the prefill kernels, which the first requests would wait for otherwise.

        vLLM's own warm-up runs decodes only. One query attends to whatever is in page 0; there are kernels
        for short and for long sequences.

        Args:
            kv_cache, strided_cache: this layer's rows of pages of both tiers.
        """

        def integers(*values: int) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=kv_cache.device)

        q = kv_cache.new_zeros(1, self.num_heads, self.head_size)
        table = integers(0)[None]
        request = PagedRequests(kv_cache, strided_cache, table, table, integers(0, 1), integers(1))
        out = torch.empty_like(q)
        for max_seq_len in (1, self.pattern.window_tokens + 1):
            paged.attend(
                q,
                request,
                self.pattern,
                self.scale,
                out,
                max_seq_len=max_seq_len,
                tables=self.tables,
                impl=self.heads.impl,
            )

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: S2Metadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Attend, and write to `output`.

        Args:
            layer: the layer.
            query: [tokens, num_heads, head_size].
            key, value: [tokens, num_kv_heads, head_size].
            kv_cache: the window tier's pages, this layer's heads.
            attn_metadata: the window tier's metadata; None while vLLM measures memory.
            output: [tokens, num_heads, head_size].
            output_scale, output_block_scale: of fused output quantization, which is not supported.

        Returns:
            `output`.
        """
        assert output_scale is None
        assert output_block_scale is None
        if attn_metadata is None:
            return output.zero_()
        strided, strided_entry = attn_metadata, kv_cache
        if self.strided.entry is not None:
            strided, _, strided_entry, _ = get_attention_context(self.strided.entry)
        attn_metadata.step_with(strided).run_layer(
            query,
            key,
            value,
            kv_cache,
            self.strided.rows.of(strided_entry),
            output,
            self.heads,
            self._own_tables(query.device),
        )
        return output

    def _own_tables(self, device: torch.device) -> HeadTables:
        return head_tables(self.pattern, device) if self.tables is None else self.tables


@cache
def _shared_heads(pattern: S2Pattern, scale: float, impl: Impl | None) -> LayerHeads:
    """One object for all layers of a kind: a step prepares their calls once."""
    return LayerHeads(pattern, scale, impl)
