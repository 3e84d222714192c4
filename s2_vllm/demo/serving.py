"""Serving the demo's prompts through vLLM: nothing here but vLLM's own interface."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2_vllm.demo.corpus import project_text

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from vllm import LLM, RequestOutput


@dataclass(frozen=True)
class Served:
    """The outputs of one batch, and the seconds it took as a whole."""

    outputs: list[RequestOutput]
    seconds: float


def start_engine(checkpoint: Path, max_model_len: int) -> LLM:
    """vLLM with its defaults on a GPU, and with what a small CPU machine needs elsewhere."""
    from vllm import LLM
    from vllm.platforms import current_platform

    options: dict[str, Any] = {}
    if current_platform.is_cpu():
        options = {
            "dtype": "float32",
            # torch.compile needs a C++ compiler on the CPU, which the machine may not have.
            "enforce_eager": True,
            # By default vLLM claims most of the machine's memory, and fails if that much is not free.
            "kv_cache_memory_bytes": 512 << 20,
        }
    return LLM(
        str(checkpoint),
        max_model_len=max_model_len,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        **options,
    )


def warm_up(llm: LLM, num_tokens: int) -> None:
    """Let kernels compile before anything is timed, on a long prompt that the others share nothing with."""
    from vllm import SamplingParams

    ids = leading_tokens(llm, "\n".join(reversed(project_text().splitlines())), num_tokens)
    llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)


def serve(llm: LLM, prompts: Sequence[str], max_tokens: int, ignore_eos: bool = False) -> Served:
    """All prompts at once, greedily, at most so many tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=max_tokens, ignore_eos=ignore_eos)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return Served(outputs, time.perf_counter() - start)


def leading_tokens(llm: LLM, text: str, num_tokens: int) -> list[int]:
    """The first of `text`."""
    ids: list[int] = llm.get_tokenizer().encode(text, truncation=True, max_length=num_tokens)
    return ids
