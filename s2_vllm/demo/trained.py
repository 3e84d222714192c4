"""The demo: pass keys hidden in a long document, a small trained model that is asked for them."""

from __future__ import annotations

from typing import TYPE_CHECKING

from s2_vllm.demo.checkpoint import TRAINED
from s2_vllm.demo.document import hide
from s2_vllm.demo.passkeys import ANSWER
from s2_vllm.demo.picture import draw_places, seeing_heads
from s2_vllm.demo.report import report_answers, report_batch, report_plan
from s2_vllm.demo.serving import serve, start_engine, warm_up
from s2_vllm.demo.vocabulary import END_OF_TEXT
from s2_vllm.plan import plan_of

if TYPE_CHECKING:
    from pathlib import Path

    from s2_kernels.pattern import S2Pattern
    from s2_vllm.demo.document import Document
    from s2_vllm.demo.passkeys import PassKey

MAX_MODEL_LEN = 32768
DOCUMENT_TOKENS = 16500
DEPTHS = (0.05, 0.3, 0.5, 0.75)
ANSWER_TOKENS = 16
WARM_UP_TOKENS = 2048


def run(output: Path) -> None:
    """Ask for all keys, print the answers and what they took, and leave two pictures in `output`."""
    document = hide(DEPTHS, DOCUMENT_TOKENS)
    length = len(document.tokens)
    print(
        f"A document of {length:,} tokens, with {len(DEPTHS)} pass keys hidden in it. Starting vLLM ...",
        flush=True,
    )
    llm = start_engine(TRAINED, MAX_MODEL_LEN)
    plan = plan_of(llm.llm_engine.vllm_config)
    assert plan is not None, "the checkpoint's architecture requires a pattern"
    warm_up(llm, WARM_UP_TOKENS)
    outputs = []
    for title, keys in (
        ("The document and a question:", document.keys[:1]),
        ("The document again, other questions:", document.keys[1:]),
    ):
        served = serve(llm, [document.prompt(key) for key in keys], ANSWER_TOKENS)
        print(report_batch(title, served, plan), flush=True)
        outputs += served.outputs
    llm.llm_engine.engine_core.shutdown()
    texts = [output.outputs[0].text for output in outputs]
    sights = [sight(document, key, plan.patterns[0]) for key in document.keys]
    print(report_answers([*map(is_right, document.keys, texts)], sights))
    print(report_plan(plan, length))
    _draw(document, plan.patterns[0], output)


def is_right(key: PassKey, answer: str) -> bool:
    """Whether an answer begins with all that is to be said of a key."""
    return answer.startswith(key.write(ANSWER).removesuffix(END_OF_TEXT))


def sight(document: Document, key: PassKey, pattern: S2Pattern) -> str:
    """Where a key lies, and which heads see it there from the end of the document."""
    block, num_blocks = document.block(key, pattern.block_size), document.num_blocks(pattern.block_size)
    heads = ", ".join(map(str, seeing_heads(pattern, block, num_blocks)))
    return (
        f"{key.name}'s is told at token {document.positions(key)[-1]:,}, in block {block}, "
        f"which the end sees with head {heads}"
    )


def _draw(document: Document, pattern: S2Pattern, output: Path) -> None:
    size = pattern.block_size
    places = {key.name: document.block(key, size) for key in document.keys}
    pictures = output / "pattern.png", output / "pass-keys.png"
    pattern.draw(pictures[0], num_blocks=32)
    draw_places(pattern, places, document.num_blocks(size), pictures[1])
    print(f"Which blocks each head attends to: {pictures[0]}")
    print(f"Where the pass keys lie, and which heads see them: {pictures[1]}")
