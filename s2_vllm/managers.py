"""KV cache managers that answer at once in the steps in which a request needs no new page, as most do.

vLLM's scheduler asks the manager of every KV cache group several times per request and step. Where pages are
long, the answers are nearly always that nothing is to be done, and vLLM's managers take their time to find
that out. These do what vLLM's do, block for block, and leave to them every step in which something happens.

They come with specs of their own, by which vLLM's registry knows them. Only the scheduler sees these: workers
keep vLLM's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from s2_vllm.specs import QuickFullAttentionSpec, QuickSlidingWindowSpec, SinkWindowSpec

if TYPE_CHECKING:
    from vllm.v1.core.block_pool import BlockPool
    from vllm.v1.core.kv_cache_utils import BlockHashList, KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheConfig, KVCacheSpec
    from vllm.v1.request import Request


class QuickManager(SingleTypeKVCacheManager):
    """What both kinds have in common. Methods, arguments and results are vLLM's."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        # By request: the tokens up to which `cache_blocks` was asked last.
        self._cached_tokens: dict[str, int] = {}

    def _has_room(self, request_id: str, num_tokens: int) -> bool:
        blocks = self.req_to_blocks.get(request_id)
        return bool(blocks) and num_tokens <= len(blocks) * self.block_size

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        num_local_computed_tokens: int,
        num_tokens_main_model: int,
        apply_admission_cap: bool = False,
        prefill_end: int = 0,
    ) -> int:
        """None, where the request's blocks have room."""
        if not new_computed_blocks and self._has_room(request_id, num_tokens):
            return 0
        return super().get_num_blocks_to_allocate(
            request_id,
            num_tokens,
            new_computed_blocks,
            total_computed_tokens,
            num_local_computed_tokens,
            num_tokens_main_model,
            apply_admission_cap=apply_admission_cap,
            prefill_end=prefill_end,
        )

    def allocate_new_blocks(
        self, request_id: str, num_tokens: int, num_tokens_main_model: int
    ) -> list[KVCacheBlock]:
        """None, where the request's blocks have room."""
        if self._has_room(request_id, num_tokens) and request_id not in self._partial_hit_reqs:
            return []
        return super().allocate_new_blocks(request_id, num_tokens, num_tokens_main_model)

    def cache_blocks(
        self,
        request: Request,
        num_tokens: int,
        retention_interval: int | None = None,
        *,
        replay_boundaries: Sequence[int],
    ) -> None:
        """Nothing, where all of it was cached before: `num_tokens` grows by many at a time."""
        if self._cached_tokens.get(request.request_id) == num_tokens:
            return
        super().cache_blocks(request, num_tokens, retention_interval, replay_boundaries=replay_boundaries)
        if num_tokens <= len(request.block_hashes) * self.block_pool.hash_block_size:
            self._cached_tokens[request.request_id] = num_tokens

    def pop_blocks_for_free(self, request_id: str) -> list[KVCacheBlock]:
        """As vLLM's; a request that comes back starts anew."""
        self._cached_tokens.pop(request_id, None)
        return super().pop_blocks_for_free(request_id)


class QuickFullAttentionManager(QuickManager, FullAttentionManager):
    """Of the strided tier and the dense layers."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Nothing: full attention skips no block."""


class QuickSlidingWindowManager(QuickManager, SlidingWindowManager):
    """Of the window tier."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Nothing, while the last block that is wholly before the window is gone: so are those before it."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        if skipped == 0:
            return
        blocks = self.req_to_blocks.get(request_id, ())
        if skipped <= len(blocks) and blocks[skipped - 1] is self._null_block:
            return
        super().remove_skipped_blocks(request_id, processed_computed_tokens, num_prompt_tokens)


class SinkWindowManager(QuickSlidingWindowManager):
    """Of the window tier where the first pages of a sequence are never freed: those of the sinks.

    A prefix-cache hit is one only where these pages are cached beside the window's.
    """

    def __init__(self, kv_cache_spec: SinkWindowSpec, **kwargs: Any) -> None:
        super().__init__(kv_cache_spec, **kwargs)
        self.sink_pages = kv_cache_spec.sink_pages

    def _remove_blocks_in_range(self, request_id: str, first_block: int, last_block: int) -> None:
        super()._remove_blocks_in_range(request_id, max(first_block, self.sink_pages), last_block)

    def _sinks_before_window(
        self, computed_blocks: Sequence[KVCacheBlock], num_computed_tokens: int
    ) -> Sequence[KVCacheBlock]:
        """The sinks among the blocks of a hit that are wholly before the window of its next token."""
        skipped = self.get_num_skipped_tokens(num_computed_tokens) // self.block_size
        return computed_blocks[: min(self.sink_pages, skipped)]

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[KVCacheBlock],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """Beside a sliding window's, the sinks of a hit that could be evicted until now."""
        sinks = self._sinks_before_window(new_computed_blocks, total_computed_tokens)
        return self._get_num_evictable_blocks(sinks) + super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[KVCacheBlock],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """As vLLM's, which drops what is before the window; the sinks are kept."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        computed_tokens = num_local_computed_tokens + num_external_computed_tokens
        sinks = self._sinks_before_window(new_computed_blocks, computed_tokens)
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: BlockHashList,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: BlockPool,
        kv_cache_spec: KVCacheSpec,
        drop_eagle_block: bool,
        alignment_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[KVCacheBlock], ...], int]:
        """As vLLM's, with the sinks; a hit ends before the first of them that is not cached."""
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        assert not drop_eagle_block, "speculative decoding is refused"
        computed_blocks, hit_length = super().find_longest_cache_hit(
            block_hashes,
            max_length,
            kv_cache_group_ids,
            block_pool,
            kv_cache_spec,
            drop_eagle_block,
            alignment_tokens,
            *args,
            **kwargs,
        )
        size = kv_cache_spec.block_size
        hashes = resolve_block_hashes(
            block_hashes, block_pool.hash_block_size, size, alignment_tokens=alignment_tokens
        )
        for page in range(min(kv_cache_spec.sink_pages, len(computed_blocks[0]))):
            sinks = block_pool.get_cached_block(hashes[page], kv_cache_group_ids)
            if not sinks:
                # Those before it have been found, and they are all of this shorter hit.
                hit_length = page * size // alignment_tokens * alignment_tokens
                for computed in computed_blocks:
                    del computed[hit_length // size :]
                break
            for computed, sink in zip(computed_blocks, sinks, strict=True):
                computed[page] = sink
        return computed_blocks, hit_length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: KVCacheSpec,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        """As vLLM's, with the sinks: every hit needs them."""
        assert isinstance(kv_cache_spec, SinkWindowSpec)
        mask = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs
        )
        if mask is not None:
            for block in range(start_block, min(end_block, kv_cache_spec.sink_pages)):
                mask[block - start_block] = True
        return mask


_SPECS = {FullAttentionSpec: QuickFullAttentionSpec, SlidingWindowSpec: QuickSlidingWindowSpec}


def use_quick_managers(kv_cache_config: KVCacheConfig) -> None:
    """Let vLLM's scheduler make these managers for the groups of its KV cache configuration."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM registers its own if none is there yet
    KVCacheSpecRegistry.register(QuickFullAttentionSpec, QuickFullAttentionManager, FullAttentionSpec)
    KVCacheSpecRegistry.register(QuickSlidingWindowSpec, QuickSlidingWindowManager, SlidingWindowSpec)
    KVCacheSpecRegistry.register(SinkWindowSpec, SinkWindowManager, SlidingWindowSpec)
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        quick = _SPECS.get(type(spec))
        if quick is not None:
            group.kv_cache_spec = quick(**{f.name: getattr(spec, f.name) for f in fields(spec)})
