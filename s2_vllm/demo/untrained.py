"""The demo with random weights: prompts of several lengths, then more questions about the longest."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2_vllm.demo.checkpoint import make_checkpoint
from s2_vllm.demo.corpus import project_text
from s2_vllm.demo.report import report_batch, report_plan
from s2_vllm.demo.serving import leading_tokens, serve, start_engine, warm_up
from s2_vllm.plan import plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from vllm import LLM

MAX_MODEL_LEN = 8192
NEW_TOKENS = 32
# Of a window tier vLLM keeps only what a prompt's last aligned position needs for a prefix-cache hit. The
# last multiple of 512 tokens (the plan's `hit_alignment`) lies in the document, whatever question follows.
DOCUMENT_TOKENS = 4700

QUESTIONS = ["What does a head attend to?", "Which pages can be freed?", "Where is the pattern defined?"]
OTHER_PROMPTS = ["Attention is", "Explain in one sentence what a block table is:"]


def run(output: Path) -> None:
    """Make the checkpoint and a picture of its pattern in `output`, and print what serving took."""
    checkpoint, picture = output / "checkpoint", output / "pattern.png"
    make_checkpoint(checkpoint)
    print(f"Wrote a checkpoint to {checkpoint}. Its weights are random: the text it generates means nothing.")
    print("Starting vLLM ...", flush=True)
    llm = start_engine(checkpoint, MAX_MODEL_LEN)
    plan = plan_of(llm.llm_engine.vllm_config)
    assert plan is not None, "the checkpoint's architecture requires a pattern"
    warm_up(llm, DOCUMENT_TOKENS)
    for title, prompts in zip(
        ("Prompts of several lengths:", "The long document again, other questions:"),
        make_batches(llm),
        strict=True,
    ):
        print(report_batch(title, serve(llm, prompts, NEW_TOKENS, ignore_eos=True), plan), flush=True)
    llm.llm_engine.engine_core.shutdown()
    print(report_plan(plan, DOCUMENT_TOKENS))
    plan.patterns[0].draw(picture, num_blocks=32)
    print(f"Which blocks each head attends to: {picture}")


def make_batches(llm: LLM) -> tuple[list[str], list[str]]:
    """Prompts of several lengths, one with a long document; then more questions about that document."""
    tokenizer = llm.get_tokenizer()
    document_ids = leading_tokens(llm, project_text(), DOCUMENT_TOKENS)
    document, excerpt = tokenizer.decode(document_ids), tokenizer.decode(document_ids[-700:])
    first, *others = [f"{document}\n\n{question}\n" for question in QUESTIONS]
    return [first, f"{excerpt}\n\nSummarize this.\n", *OTHER_PROMPTS], others
