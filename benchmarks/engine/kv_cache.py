"""What an engine has set up: its KV cache groups, whether they are the plan's, and how many requests fit.

The engine's workers are asked, since they live in processes of their own, offline as well as in a server.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

EXTENSION = "benchmarks.engine.kv_cache.WorkerFacts"
"""What `worker_extension_cls` has to be for `METHOD` to be a method of the workers."""
METHOD = "kv_cache_facts"

# vLLM schedules a step while the one before still runs; both hold pages of the window.
STEPS_IN_FLIGHT = 2


class WorkerFacts:
    """Mixed into vLLM's workers."""

    vllm_config: Any
    model_runner: Any

    def kv_cache_facts(self) -> dict[str, Any]:
        """The fields of `KVCacheFacts`, of this worker's rank."""
        from s2_vllm.plan import plan_of

        kv_cache = self.model_runner.kv_cache_config
        plan = plan_of(self.vllm_config)
        groups = kv_cache.kv_cache_groups
        specs = [group.kv_cache_spec for group in groups]
        if plan is None:
            block_bytes = sum(len(g.layer_names) * g.kv_cache_spec.page_size_bytes for g in groups)
        else:
            # To vLLM's runner a group has more layers than entries that own pages.
            block_bytes = plan.block_bytes
        scheduler = self.vllm_config.scheduler_config
        return {
            "num_blocks": kv_cache.num_blocks,
            "kv_cache_bytes": kv_cache.num_blocks * block_bytes,
            "groups": [[spec.block_size, getattr(spec, "sliding_window", None)] for spec in specs],
            "planned_groups": None if plan is None else sum(map(plan.num_groups, plan.tiers)),
            "max_model_len": self.vllm_config.model_config.max_model_len,
            "max_num_batched_tokens": scheduler.max_num_batched_tokens,
            "max_num_seqs": scheduler.max_num_seqs,
        }


@dataclass(frozen=True)
class KVCacheFacts:
    """What an engine has set up.

    Attributes:
        num_blocks: block ids of the pool.
        kv_cache_bytes: of all ranks together.
        groups: (tokens per page, tokens of the sliding window or None) of each KV cache group.
        planned_groups: KV cache groups of the plan; None for a model without a pattern.
        max_model_len: the longest request, in tokens.
        max_num_batched_tokens: the longest step, in tokens.
        max_num_seqs: the most requests of a step.
    """

    num_blocks: int
    kv_cache_bytes: int
    groups: list[tuple[int, int | None]]
    planned_groups: int | None
    max_model_len: int
    max_num_batched_tokens: int
    max_num_seqs: int

    @classmethod
    def of_workers(cls, answers: list[dict[str, Any]]) -> KVCacheFacts:
        """What the ranks' workers have answered."""
        total = sum(answer["kv_cache_bytes"] for answer in answers)
        return cls(**{**answers[0], "kv_cache_bytes": total})

    def check_variant(self, variant: str) -> None:
        """That the engine serves what was asked for: without the plugin a model is dense, and says nothing.

        Raises:
            RuntimeError: the KV cache is not that of the variant.
        """
        expected = self.planned_groups if variant == "s2" else None
        if variant == "s2" and expected is None:
            raise RuntimeError("KV cache plan: none, expected one: vLLM has not loaded the s2_vllm plugin")
        if variant == "dense" and self.planned_groups is not None:
            raise RuntimeError(f"KV cache plan: {self.planned_groups} groups, expected none of a dense model")
        if expected not in (None, len(self.groups)):
            raise RuntimeError(f"KV cache groups: {len(self.groups)}, expected the plan's {expected}")

    def requests_that_fit(self, tokens: int) -> int:
        """The most requests of `tokens` tokens each, prompt and output, that decode at the same time.

        Pages that the window of a prompt being computed needs are counted once: vLLM computes the prompts
        that it has no room to compute together one after the other.
        """
        each = sum(self._pages(group, tokens) for group in self.groups)
        steps = STEPS_IN_FLIGHT * self.max_num_batched_tokens
        steps = min(steps, tokens)
        computing = sum(-(-steps // size) for size, window in self.groups if window is not None)
        # vLLM keeps one block to itself, the null block.
        return min(max(0, (self.num_blocks - 1 - computing) // each), self.max_num_seqs)

    @staticmethod
    def _pages(group: tuple[int, int | None], tokens: int) -> int:
        size, window = group
        if window is None or window >= tokens:
            return -(-tokens // size)
        # The window may begin anywhere in a page.
        return -(-window // size) + 1
