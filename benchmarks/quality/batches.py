"""What models are trained on: a batch for every step, the same for all arms whenever it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt

from s2_vllm.demo.passkeys import NUMBER_TOKENS, PassKey, Tokens, draw, excerpt

Weights = npt.NDArray[np.float32]
Batch = tuple[npt.NDArray[np.int64], Weights]

TOKENS_PER_FACT = 128
MAX_FACTS = 128
ANSWER_WEIGHT = 8.0
"""Of a number's tokens in an answer, in the loss. Any other token has 1."""
CURRICULUM = ((1024, 0.35), (4096, 0.6), (8192, 0.75), (16384, 0.85), (32768, 1.0))
"""(tokens of a sequence, the part of the training that ends with them)."""
TINY_CURRICULUM = ((96, 0.5), (192, 1.0))


@dataclass(frozen=True)
class Batches:
    """Sequences of text with pass keys, several of which are asked for at any time after they were told.

    Attributes:
        text: tokens to draw excerpts from.
        seed: of all of them.
        tokens_per_step: in all sequences of a batch together.
        num_steps: of the training.
        curriculum: like CURRICULUM.
    """

    text: Tokens
    seed: int
    tokens_per_step: int
    num_steps: int
    curriculum: tuple[tuple[int, float], ...] = CURRICULUM

    def length(self, step: int) -> int:
        """Tokens that are predicted of a sequence in a step."""
        return next(length for length, end in self.curriculum if step < end * self.num_steps)

    def batch(self, step: int) -> Batch:
        """(tokens [sequences, length + 1], the loss's weights of all but the first [sequences, length])."""
        length = self.length(step)
        rng = np.random.default_rng([self.seed, step])
        rows = [self._sequence(rng, length + 1) for _ in range(max(1, self.tokens_per_step // length))]
        tokens, weights = (np.stack(parts) for parts in zip(*rows, strict=True))
        return tokens.astype(np.int64), weights[:, 1:]

    def _sequence(self, rng: np.random.Generator, length: int) -> tuple[Tokens, Weights]:
        most = max(1, min(MAX_FACTS, length // TOKENS_PER_FACT))
        keys = draw(rng, int(rng.integers(1, most + 1)))
        told = rng.random(len(keys))
        asked = told + (1 - told) * rng.random(len(keys))
        events = [*zip(told, keys, repeat(False)), *zip(asked, keys, repeat(True))]
        events.sort(key=lambda event: event[0])
        parts = [_part(key, is_question) for _, key, is_question in events]
        filler = excerpt(rng, self.text, max(0, length - sum(len(part) for part, _ in parts)))
        cuts = np.sort(rng.integers(len(filler) + 1, size=len(parts)))
        tokens, weights, before = [], [], 0
        for cut, (part, part_weights) in zip(cuts, parts, strict=True):
            tokens += [filler[before:cut], np.array(part, dtype=np.uint16)]
            weights += [np.ones(cut - before, dtype=np.float32), part_weights]
            before = cut
        tokens.append(filler[before:])
        weights.append(np.ones(len(filler) - before, dtype=np.float32))
        return np.concatenate(tokens)[:length], np.concatenate(weights)[:length]


def _part(key: PassKey, is_question: bool) -> tuple[list[int], Weights]:
    """The tokens of a fact, or of a question with its answer, and their weights."""
    if not is_question:
        return key.fact, np.ones(len(key.fact), dtype=np.float32)
    weights = np.ones(len(key.question) + len(key.answer), dtype=np.float32)
    number = len(key.question) + key.number_in(key.answer)
    weights[number : number + NUMBER_TOKENS] = ANSWER_WEIGHT
    return key.question + key.answer, weights
