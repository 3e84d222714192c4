"""Serving the demo's prompts through vLLM: nothing here but vLLM's own interface."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from s2_vllm.demo.corpus import project_text

if TYPE_CHECKING:
    from pathlib import Path

    from vllm import LLM, RequestOutput

MAX_MODEL_LEN = 8192
NEW_TOKENS = 32
# Of a window tier vLLM keeps only what a prompt's last aligned position needs for a prefix-cache hit. The
# last multiple of 512 tokens (the plan's `hit_alignment`) lies in the document, whatever question follows.
DOCUMENT_TOKENS = 4700

QUESTIONS = ["What does a head attend to?", "Which pages can be freed?", "Where is the pattern defined?"]
OTHER_PROMPTS = ["Attention is", "Explain in one sentence what a block table is:"]


@dataclass(frozen=True)
class Served:
    """The outputs of one batch, and the seconds it took as a whole."""

    outputs: list[RequestOutput]
    seconds: float


def start_engine(checkpoint: Path) -> LLM:
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
        max_model_len=MAX_MODEL_LEN,
        disable_log_stats=False,
        use_tqdm_on_load=False,
        **options,
    )


def make_batches(llm: LLM) -> tuple[list[str], list[str]]:
    """Prompts of several lengths, one with a long document; then more questions about that document."""
    tokenizer = llm.get_tokenizer()
    document_ids = _leading_tokens(llm, project_text())
    document, excerpt = tokenizer.decode(document_ids), tokenizer.decode(document_ids[-700:])
    first, *others = [f"{document}\n\n{question}\n" for question in QUESTIONS]
    return [first, f"{excerpt}\n\nSummarize this.\n", *OTHER_PROMPTS], others


def warm_up(llm: LLM) -> None:
    """Let kernels compile before anything is timed, on a long prompt that the others share nothing with."""
    from vllm import SamplingParams

    ids = _leading_tokens(llm, "\n".join(reversed(project_text().splitlines())))
    llm.generate({"prompt_token_ids": ids}, SamplingParams(max_tokens=4, ignore_eos=True), use_tqdm=False)


def serve(llm: LLM, prompts: list[str]) -> Served:
    """All prompts at once, greedily, NEW_TOKENS tokens each."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0.0, max_tokens=NEW_TOKENS, ignore_eos=True)
    start = time.perf_counter()
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return Served(outputs, time.perf_counter() - start)


def _leading_tokens(llm: LLM, text: str) -> list[int]:
    """The first DOCUMENT_TOKENS tokens of `text`."""
    ids: list[int] = llm.get_tokenizer().encode(text, truncation=True, max_length=DOCUMENT_TOKENS)
    return ids
