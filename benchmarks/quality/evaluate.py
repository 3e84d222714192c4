"""What a trained arm still knows, asked through the engine that serves it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from benchmarks.quality import arms
from s2_vllm.demo.passkeys import NUMBER_TOKENS, PassKey, Tokens, draw, excerpt, hidden

if TYPE_CHECKING:
    from vllm import LLM

Record = dict[str, Any]
Progress = Callable[[str], None]

NUM_DEPTHS = 10
QUESTIONS = 8
"""Of a context with many pass keys."""
TOKENS_PER_FACT = 256
SAMPLES_AT_A_TIME = 50
SEED = 1_000_000
"""Far from the seeds of trainings, though the text is another one anyway."""


@dataclass(frozen=True)
class Suite:
    """What is asked.

    Attributes:
        lengths: tokens of the contexts.
        samples: contexts of every length and depth.
        loss_samples: held-out texts of `loss_length` tokens.
        loss_length: tokens of one of them.
        loss_bins: parts of such a text whose losses are told apart.
        block_size, vert_stride: of the patterns, by which residues are told apart.
    """

    lengths: tuple[int, ...] = (1024, 2048, 4096, 8192, 16384, 32768, 65535)
    samples: int = 20
    loss_samples: int = 24
    loss_length: int = arms.MAX_LENGTH
    loss_bins: int = 16
    block_size: int = arms.BLOCK_SIZE
    vert_stride: int = arms.VERT_STRIDE


TINY = Suite(
    lengths=(96, 192), samples=4, loss_samples=2, loss_length=192, loss_bins=2, block_size=16, vert_stride=4
)


@dataclass(frozen=True)
class Sample:
    """A prompt that one pass key answers.

    Attributes:
        prompt: tokens of the context and the question.
        key: the pass key.
        depth: where it was told, from 0 for the beginning to NUM_DEPTHS - 1.
        residue: of the block that the number begins in, modulo the stride.
    """

    prompt: list[int]
    key: PassKey
    depth: int
    residue: int


def passkey_samples(text: Tokens, length: int, suite: Suite) -> Iterator[Sample]:
    """One pass key in a context, at every depth; the blocks' residues take turns."""
    for depth in range(NUM_DEPTHS):
        for n in range(suite.samples):
            rng = np.random.default_rng([SEED, length, depth, n])
            (key,) = draw(rng, 1)
            position = _position(rng, key, length, depth, n % suite.vert_stride, suite)
            context = hidden(rng, text, [key], [position], length - len(key.question) - len(key.answer))
            residue = position // suite.block_size % suite.vert_stride
            yield Sample(context + key.question, key, depth, residue)


def _position(
    rng: np.random.Generator, key: PassKey, length: int, depth: int, residue: int, suite: Suite
) -> int:
    """Where the number begins: in that part of the context, in a block of that residue if there is one."""
    before, after = key.number_in(key.fact), len(key.fact) - key.number_in(key.fact)
    room = length - len(key.question) - len(key.answer) - before - after
    edges = before + room * np.array([depth, depth + 1]) // NUM_DEPTHS
    places = np.arange(edges[0], max(edges[1], edges[0] + 1))
    in_block = places % suite.block_size <= suite.block_size - NUMBER_TOKENS
    wanted = places[in_block & (places // suite.block_size % suite.vert_stride == residue)]
    return int(rng.choice(wanted if len(wanted) else places))


def recall_samples(text: Tokens, length: int, suite: Suite) -> Iterator[Sample]:
    """Contexts full of pass keys, each asked for several of them."""
    for n in range(suite.samples):
        rng = np.random.default_rng([SEED + 1, length, n])
        count = int(np.clip(length // TOKENS_PER_FACT, 2, 128))
        keys = draw(rng, count)
        room = length - len(keys[0].question) - len(keys[0].answer)
        # A place each in parts of equal size, the largest that a fact with any name needs left free.
        size, longest = room // count, max(len(key.fact) for key in keys)
        starts = np.arange(count) * size + rng.integers(max(1, size - longest), size=count)
        positions = [int(s) + key.number_in(key.fact) for s, key in zip(starts, keys, strict=True)]
        context = hidden(rng, text, keys, positions, room)
        for place in rng.choice(count, min(QUESTIONS, count), replace=False):
            key, position = keys[place], positions[place]
            residue = position // suite.block_size % suite.vert_stride
            yield Sample(context + key.question, key, position * NUM_DEPTHS // room, residue)


def ask(llm: LLM, samples: list[Sample]) -> list[bool]:
    """Whether each was answered, greedily."""
    from vllm import SamplingParams

    params = [
        SamplingParams(temperature=0.0, max_tokens=len(s.key.answer), ignore_eos=True, detokenize=False)
        for s in samples
    ]
    prompts: Any = [{"prompt_token_ids": sample.prompt} for sample in samples]
    outputs = llm.generate(prompts, params, use_tqdm=False)
    return [
        sample.key.is_answered_by(list(output.outputs[0].token_ids))
        for sample, output in zip(samples, outputs, strict=True)
    ]


def accuracies(task: str, length: int, samples: list[Sample], answered: list[bool]) -> list[Record]:
    """A record for every depth and residue that there are samples of."""
    cells: dict[tuple[int, int], list[bool]] = {}
    for sample, is_right in zip(samples, answered, strict=True):
        cells.setdefault((sample.depth, sample.residue), []).append(is_right)
    return [
        {
            "task": task,
            "length": length,
            "depth": depth,
            "residue": residue,
            "samples": len(right),
            "accuracy": round(sum(right) / len(right), 4),
        }
        for (depth, residue), right in sorted(cells.items())
    ]


def held_out_loss(llm: LLM, text: Tokens, suite: Suite, progress: Progress) -> Record:
    """Nats per token of held-out text, and of each part of it by position."""
    from vllm import SamplingParams

    rng = np.random.default_rng([SEED + 2])
    params = SamplingParams(temperature=0.0, max_tokens=1, prompt_logprobs=0, detokenize=False)
    losses = []
    for number in range(suite.loss_samples):
        tokens = excerpt(rng, text, suite.loss_length).tolist()
        prompt: Any = {"prompt_token_ids": tokens}
        (output,) = llm.generate([prompt], params, use_tqdm=False)
        logprobs = output.prompt_logprobs
        assert logprobs is not None
        losses.append(
            [-by_token[token].logprob for token, by_token in zip(tokens, logprobs, strict=True) if by_token]
        )
        progress(f"held-out text {number + 1} of {suite.loss_samples}")
    by_position = np.array(losses).mean(axis=0)
    bins = [float(f"{part.mean():.4f}") for part in np.array_split(by_position, suite.loss_bins)]
    return {"task": "loss", "loss": float(f"{by_position.mean():.5f}"), "loss_by_position": bins}


def evaluate(llm: LLM, text: Tokens, suite: Suite, progress: Progress) -> Iterator[Record]:
    """The records of a model, without what is known of it beforehand."""
    yield held_out_loss(llm, text, suite, progress)
    for length in suite.lengths:
        for task, make in (("passkey", passkey_samples), ("recall", recall_samples)):
            samples = list(make(text, length, suite))
            answered: list[bool] = []
            for first in range(0, len(samples), SAMPLES_AT_A_TIME):
                answered += ask(llm, samples[first : first + SAMPLES_AT_A_TIME])
                progress(f"{task}, {length:,} tokens: {sum(answered)} of {len(answered)} right")
            yield from accuracies(task, length, samples, answered)
