"""The sparse attention layer: two KV cache entries behind vLLM's `Attention` interface.

`S2Attention` itself is the entry of the window tier. Its sibling, `StridedTier`, has no forward: it
exists to own the strided tier's pages, block table and slot mapping. Several layers may share an entry's
pages, each with rows of its own (`CachePlan.window_place` and `strided_place`). The first of them, the
*leader*, brings the entry. Of the window tier the others share its KV cache through vLLM's own KV sharing; of
the strided tier they look it up by the leader's name. A layer need not lead, or share, both tiers with the
same layers. Where the plan has padding entries, the first sparse layer brings them, so that vLLM makes groups
of the planned size.
"""

from __future__ import annotations

from inspect import signature
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from vllm.config import VllmConfig, get_current_vllm_config_or_none
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.model_executor.models.utils import extract_layer_index
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import KVCacheSpec

from s2_kernels.layout import make_head_tables
from s2_vllm import refusals
from s2_vllm.backend import CacheRows, S2AttentionBackend, StridedPlace
from s2_vllm.kernel_cache import keep_compiled_kernels
from s2_vllm.plan import plan_of
from s2_vllm.specs import STRIDED_SUFFIX, padding_entries, strided_spec, window_spec

if TYPE_CHECKING:
    from collections.abc import Iterator

    from s2_vllm.plan import CachePlan


def attention_class(cls: type[Attention], args: tuple[Any, ...], kwargs: dict[str, Any]) -> type[Attention]:
    """The class to construct where a model asks for `cls`: `S2Attention` for a sparse layer.

    Args:
        cls: vLLM's class.
        args, kwargs: what it is to be constructed with.

    Raises:
        S2ConfigError: the layer has no place in the plan, a sparse one asks for a special kind of attention,
            or a dense one for something else than full attention.
    """
    vllm_config = get_current_vllm_config_or_none()
    plan = None if vllm_config is None else plan_of(vllm_config)
    if plan is None:
        return cls
    arguments = _by_name(cls, args, kwargs)
    if refusals.layer_index(arguments.get("prefix", ""), plan) in plan.dense_layers:
        refusals.check_dense_layer(cls, arguments)
        return cls
    refusals.check_sparse_layer(cls, arguments)
    return S2Attention


class BareEntry(nn.Module, AttentionLayerBase):
    """A KV cache entry without forward: it owns pages, a block table and a slot mapping."""

    def __init__(self, layer: S2Attention, name: str, spec: KVCacheSpec) -> None:
        super().__init__()
        self.layer_name = name
        self.num_heads = layer.num_heads
        self.impl = layer.impl
        self.kv_cache = torch.tensor([])
        self._spec = spec

    def get_attn_backend(self) -> type[S2AttentionBackend]:
        """The same backend as the window tier's: its builder makes this entry's metadata."""
        return S2AttentionBackend

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The entry's pages, as vLLM's KV cache manager sees them."""
        return self._spec


class StridedTier(BareEntry):
    """The KV cache entry of the strided tier."""


class S2Attention(Attention):
    """A sparse layer in the place of `Attention`, with the same constructor; `attention_class` chooses it.

    Raises:
        S2ConfigError: its heads are not those of the plan, it has a sliding window, or vLLM finds its backend
            unfit for what the engine is to do.
    """

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        if current_platform.is_cuda_alike():
            keep_compiled_kernels()
        # What else a layer may be given has been found to say nothing, and the backend does not take it.
        given = _by_name(Attention, args, kwargs)
        kwargs = {name: value for name, value in given.items() if name in refusals.PLAIN_ARGUMENTS}
        prefix = kwargs["prefix"]
        vllm_config = get_current_vllm_config_or_none()
        assert vllm_config is not None
        plan = plan_of(vllm_config)
        assert plan is not None
        self.plan: CachePlan = plan
        self.index = plan.sparse_layers.index(extract_layer_index(prefix))
        self.rank = get_tensor_model_parallel_rank()
        window = plan.window_place(self.index)
        kwargs.update(
            attn_backend=S2AttentionBackend,
            kv_sharing_target_layer_name=None
            if window.leader == self.index
            else _name_of(plan.sparse_layers[window.leader], vllm_config),
            pattern=plan.pattern_of(self.index, self.rank),
            window=CacheRows(window.first, plan.num_kv_heads),
            strided=self._strided_place(prefix, vllm_config),
        )
        super().__init__(**kwargs)
        refusals.check_made_layer(self, plan, vllm_config)
        context = vllm_config.compilation_config.static_forward_context
        context.update({entry.layer_name: entry for entry in self._entries()})

    def _strided_place(self, name: str, vllm_config: VllmConfig) -> StridedPlace:
        """Where this layer's strided tier is, by its own name or its leader's."""
        place = self.plan.strided_place(self.index, self.rank)
        if place is None:
            slots = self.plan.layout_of(self.index, self.rank).residue_slots
            return StridedPlace(None, CacheRows(0, 0, (0, slots)))
        if place.leader != self.index:
            name = _name_of(self.plan.sparse_layers[place.leader], vllm_config)
        size, shape = self.plan.strided_rows(self.index, self.rank)
        return StridedPlace(name + STRIDED_SUFFIX, CacheRows(place.first, size, shape))

    def _entries(self) -> Iterator[BareEntry]:
        """The entries that this layer brings beside itself."""
        place = self.plan.strided_place(self.index, self.rank)
        if place is not None and place.leader == self.index:
            spec = strided_spec(self.plan, self.kv_cache_torch_dtype)
            self.strided = StridedTier(self, self.layer_name + STRIDED_SUFFIX, spec)
            yield self.strided
        if self.index == 0:
            yield from self._padding()

    def _padding(self) -> Iterator[BareEntry]:
        """The entries of both tiers that no layer uses."""
        for name, spec in padding_entries(self.plan, self.layer_name, self.kv_cache_torch_dtype):
            yield BareEntry(self, name, spec)

    def process_weights_after_loading(self, act_dtype: torch.dtype) -> None:
        """Make the pattern's tables now: no CUDA graph may be waiting for them later.

        Once: vLLM calls this again for new weights, and captured graphs read the tables where they are.
        They are the layer's own, and its buffers: in its sleep mode vLLM frees what was made while loading,
        and keeps parameters and buffers. Tables that others use as well would be gone for them too.
        """
        super().process_weights_after_loading(act_dtype)
        if self.impl.tables is not None:
            return
        device = torch.empty(0, device=current_platform.device_type).device
        self.impl.tables = make_head_tables(self.impl.pattern, device)
        for name, table in self.impl.tables._asdict().items():
            self.register_buffer(f"s2_{name}", table, persistent=False)

    def get_kv_cache_spec(self, vllm_config: VllmConfig) -> KVCacheSpec:
        """The window tier's; vLLM asks leaders only, and asks the strided sibling by itself."""
        return window_spec(self.plan, self.kv_cache_torch_dtype)

    def bind_kv_cache(self, kv_cache: torch.Tensor) -> None:
        """Take this layer's heads of the entry's pages.

        Args:
            kv_cache: [pages, entry's KV heads, page_slots, 2 * head_size].

        Raises:
            RuntimeError: the pages are not the planned ones; the kernels would read wrong tokens.
        """
        expected = (*self.plan.window_shape, 2 * self.head_size)
        if kv_cache.shape[1:] != expected:
            raise RuntimeError(
                f"KV cache of layer {self.layer_name}: pages of {tuple(kv_cache.shape[1:])}, "
                f"expected {expected}"
            )
        self.kv_cache = self.impl.window.of(kv_cache)
        if self.kv_cache.is_cuda and self._is_first_of_its_kind():
            self.impl.warm_up(self.kv_cache, self._strided_cache_like(kv_cache))

    def _is_first_of_its_kind(self) -> bool:
        """Whether no layer before this one runs the same kernels, as layers of one pattern do."""
        earlier = (self.plan.pattern_of(index, self.rank) for index in range(self.index))
        return self.impl.pattern not in earlier

    def _strided_cache_like(self, kv_cache: torch.Tensor) -> torch.Tensor:
        """Pages of the window tier as if they were this layer's strided tier: all tiers' have as many bytes.

        Args:
            kv_cache: the pages of an entry, which may be bound before those of the strided tier.
        """
        if self.impl.strided.entry is None:
            return self.impl.strided.rows.of(self.kv_cache)
        pages = kv_cache.view(len(kv_cache), *self.plan.strided_shape, kv_cache.shape[-1])
        return self.impl.strided.rows.of(pages)


def _by_name(cls: type[Attention], args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """All arguments of a layer's constructor by name, however they are passed, defaults included."""
    bound = signature(cls.__init__).bind(None, *args, **kwargs)
    bound.apply_defaults()
    named = dict(bound.arguments)
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            named.update(named.pop(parameter.name))
    del named["self"]
    return named


def _name_of(wanted: int, vllm_config: VllmConfig) -> str:
    """The name of the sparse layer of index `wanted`, which owns pages of layers after it."""
    for layer in vllm_config.compilation_config.static_forward_context.values():
        if isinstance(layer, S2Attention) and extract_layer_index(layer.layer_name) == wanted:
            return layer.layer_name
    raise RuntimeError(f"layer {wanted}, which owns the pages of layers after it, does not exist yet")
