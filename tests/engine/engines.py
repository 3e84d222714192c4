"""Starting, inspecting and stopping a real vLLM engine inside the test process."""

from __future__ import annotations

import os
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from vllm import LLM, RequestOutput, SamplingParams

_DEFAULTS: dict[str, Any] = {
    "skip_tokenizer_init": True,
    "dtype": "float32",
    "enforce_eager": True,
    "seed": 0,
    "max_model_len": 1024,
    "max_num_seqs": 32,
    "num_gpu_blocks_override": 512,
    "kv_cache_memory_bytes": 1 << 30,
    # Several test processes may share a GPU.
    "gpu_memory_utilization": 0.1,
    "disable_log_stats": False,
}


@contextmanager
def engine(checkpoint: Path, **options: Any) -> Iterator[LLM]:
    """An engine whose scheduler and workers live in this process; its state is gone afterwards.

    Args:
        checkpoint: folder of the model.
        options: engine arguments, on top of float32, eager and a pool of 512 pages.
    """
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    from vllm import LLM
    from vllm.distributed.parallel_state import cleanup_dist_env_and_memory

    try:
        llm = LLM(str(checkpoint), **{**_DEFAULTS, **options})
        try:
            yield llm
        finally:
            # Not left to the garbage collector: it would take down the engine that comes next.
            llm.llm_engine.engine_core.shutdown()
            del llm
    finally:
        cleanup_dist_env_and_memory()


def greedy_params(num_tokens: int, **options: Any) -> SamplingParams:
    """Sampling parameters for exactly `num_tokens` greedy tokens."""
    from vllm import SamplingParams

    return SamplingParams(
        **{"temperature": 0.0, "max_tokens": num_tokens, "ignore_eos": True, "detokenize": False, **options}
    )


def generate(
    llm: LLM, prompts: Sequence[Sequence[int]], params: SamplingParams | Sequence[SamplingParams]
) -> list[RequestOutput]:
    """The outputs of all prompts, served at the same time, in the prompts' order."""
    return llm.generate([{"prompt_token_ids": list(p)} for p in prompts], params, use_tqdm=False)


def greedy(llm: LLM, prompts: Sequence[Sequence[int]], num_tokens: int) -> list[list[int]]:
    """The greedy continuation of each prompt."""
    outputs = generate(llm, prompts, greedy_params(num_tokens))
    return [list(output.outputs[0].token_ids) for output in outputs]


def scheduler(llm: LLM) -> Any:
    """The scheduler of an engine that `engine` has started."""
    return llm.llm_engine.engine_core.engine_core.scheduler


def attention_layers(llm: LLM) -> dict[str, str]:
    """Class name of every attention layer and cache entry that vLLM knows, by its name."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    return {name: type(layer).__name__ for name, layer in context.items()}


def cache_specs(llm: LLM) -> dict[str, Any]:
    """The KV cache spec of every cache entry, by its name."""
    groups = scheduler(llm).kv_cache_config.kv_cache_groups
    return {name: group.kv_cache_spec for group in groups for name in group.layer_names}


def assert_all_pages_free(llm: LLM) -> None:
    """Every page is back in the pool, except the null page, and no request is left."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    assert not scheduler(llm).has_unfinished_requests()
    assert pool.get_num_free_blocks() == pool.num_gpu_blocks - 1


def preemptions(llm: LLM) -> int:
    """Requests that this engine has preempted so far."""
    return sum(metric.value for metric in llm.get_metrics() if metric.name == "vllm:num_preemptions")


@contextmanager
def pages_handed_out(llm: LLM) -> Iterator[list[int]]:
    """Ids of the pages that the pool hands out meanwhile, a page once for each time."""
    pool = scheduler(llm).kv_cache_manager.block_pool
    original, ids = pool.get_new_blocks, []

    def recording(num_blocks: int) -> list[Any]:
        blocks = original(num_blocks)
        ids.extend(block.block_id for block in blocks)
        return blocks

    pool.get_new_blocks = recording
    try:
        yield ids
    finally:
        del pool.get_new_blocks


def kv_caches(llm: LLM) -> list[Any]:
    """The pools of pages of all cache entries, as the worker's tensors."""
    return _model_runner(llm).kv_caches


def model(llm: LLM) -> Any:
    """The model's module."""
    return _model_runner(llm).model


def _model_runner(llm: LLM) -> Any:
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner
