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

from vllm.v1.core.single_type_kv_cache_manager import (
    FullAttentionManager,
    SingleTypeKVCacheManager,
    SlidingWindowManager,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec, SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from s2_vllm.specs import QuickFullAttentionSpec, QuickSlidingWindowSpec

if TYPE_CHECKING:
    from vllm.v1.core.kv_cache_utils import KVCacheBlock
    from vllm.v1.kv_cache_interface import KVCacheConfig
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


_SPECS = {FullAttentionSpec: QuickFullAttentionSpec, SlidingWindowSpec: QuickSlidingWindowSpec}


def use_quick_managers(kv_cache_config: KVCacheConfig) -> None:
    """Let vLLM's scheduler make these managers for the groups of its KV cache configuration."""
    KVCacheSpecRegistry.check_kv_cache_spec_registry({})  # vLLM registers its own if none is there yet
    KVCacheSpecRegistry.register(QuickFullAttentionSpec, QuickFullAttentionManager, FullAttentionSpec)
    KVCacheSpecRegistry.register(QuickSlidingWindowSpec, QuickSlidingWindowManager, SlidingWindowSpec)
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        quick = _SPECS.get(type(spec))
        if quick is not None:
            group.kv_cache_spec = quick(**{f.name: getattr(spec, f.name) for f in fields(spec)})
