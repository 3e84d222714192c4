"""What the demo prints about the batches it has served."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from vllm import RequestOutput

    from s2_vllm.demo.serving import Served
    from s2_vllm.plan import CachePlan

MIB = 1 << 20


def report_batch(title: str, served: Served, plan: CachePlan) -> str:
    """Completions, one line of figures per request, and the batch's throughput."""
    lines = ["", title]
    lines += [_completion(output) for output in served.outputs]
    lines += ["", *_table(served, plan), _throughput(served)]
    return "\n".join(lines)


def report_answers(are_right: Sequence[bool], sights: Sequence[str]) -> str:
    """A line for each question: whether the answer was right, and what else there is to say of it."""
    lines = ["", f"{sum(are_right)} of {len(are_right)} answers are right:"]
    lines += [
        f"  {'right' if right else 'WRONG'}: {sight}" for right, sight in zip(are_right, sights, strict=True)
    ]
    return "\n".join(lines)


def report_plan(plan: CachePlan, length: int) -> str:
    """What the KV cache stores, for a request of `length` tokens.

    The table's KV figures count the whole pages that a request holds while it decodes.
    """
    tiers = ", ".join(f"{tier.name} ({tier.block_size}-token pages)" for tier in plan.tiers)
    return (
        f"\nKV cache: {tiers}\n"
        f"{len(plan.sparse_layers)} sparse layers and {len(plan.dense_layers)} dense; at {length:,} tokens a "
        f"sparse layer stores {plan.stored_fraction(length):.0%} of what a dense one does"
    )


def _completion(output: RequestOutput) -> str:
    prompt = output.prompt or ""
    shown = prompt if len(prompt) <= 60 else "..." + prompt[-57:]
    return f"  {shown!r}\n    -> {output.outputs[0].text!r}"


def _table(served: Served, plan: CachePlan) -> Iterator[str]:
    yield "  prompt tokens   from cache   first token    KV, all dense   KV, this model"
    for output in served.outputs:
        prompt_tokens = len(output.prompt_token_ids or ())
        length = prompt_tokens + len(output.outputs[0].token_ids)
        dense, stored = plan.dense_bytes_per_request(length), plan.bytes_per_request(length)
        first_token = "" if output.metrics is None else f"{output.metrics.first_token_latency:.2f} s"
        yield (
            f"  {prompt_tokens:>13,}   {output.num_cached_tokens or 0:>10,}   {first_token:>11}   "
            f"{dense / MIB:>10.2f} MiB   {stored / MIB:>10.2f} MiB  ({stored / dense:.0%})"
        )


def _throughput(served: Served) -> str:
    prompt_tokens = sum(len(output.prompt_token_ids or ()) for output in served.outputs)
    cached = sum(output.num_cached_tokens or 0 for output in served.outputs)
    computed = prompt_tokens - cached
    new_tokens = sum(len(output.outputs[0].token_ids) for output in served.outputs)
    return (
        f"  {len(served.outputs)} requests in {served.seconds:.2f} s: "
        f"{computed:,} prompt tokens computed ({computed / served.seconds:,.0f}/s), "
        f"{cached:,} taken from the prefix cache, "
        f"{new_tokens:,} generated ({new_tokens / served.seconds:,.0f}/s)"
    )
