"""What models are trained on: a batch for every step, the same for all arms whenever it is asked for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import repeat

import numpy as np
import numpy.typing as npt
from torch.utils.data import Dataset

from s2_vllm.demo.passkeys import NUMBER_TOKENS, PassKey, Tokens, draw, excerpt

Roles = npt.NDArray[np.uint8]
Batch = tuple[npt.NDArray[np.int64], Roles]

UNKNOWABLE, TEXT, ANSWER = range(3)
"""A token's role in the loss: a fact's number has no part in it, an answer's number has one of its own."""

TOKENS_PER_FACT = 64
MAX_FACTS = 128
MAX_SEQUENCES = 64
CURRICULUM = ((256, 0.28), (1024, 0.44), (4096, 0.6), (16384, 0.76), (32768, 1.0))
"""(tokens of a sequence, the part of the training's steps that ends with them).

Recall is learned where contexts are short and steps many, and carried to long ones from there.
"""
TINY_CURRICULUM = ((96, 0.5), (192, 1.0))


@dataclass(frozen=True)
class Batches(Dataset[Batch]):
    """Sequences of text with pass keys, which are asked for at any time after they were told.

    Attributes:
        text: tokens to draw excerpts from.
        seed: of all of them.
        tokens_per_step: in all sequences of a batch together, at most; a batch has MAX_SEQUENCES at most.
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

    def sequences(self, step: int) -> int:
        """Of a step's batch."""
        return max(1, min(MAX_SEQUENCES, self.tokens_per_step // self.length(step)))

    def tokens(self, steps: int) -> int:
        """That are predicted in the first `steps` steps."""
        return sum(self.length(step) * self.sequences(step) for step in range(steps))

    def __len__(self) -> int:
        return self.num_steps

    def __getitem__(self, step: int) -> Batch:
        """(tokens [sequences, length + 1], the roles of all but the first [sequences, length])."""
        rng = np.random.default_rng([self.seed, step])
        rows = [self._sequence(rng, self.length(step) + 1) for _ in range(self.sequences(step))]
        tokens, roles = (np.stack(parts) for parts in zip(*rows, strict=True))
        return tokens.astype(np.int64), roles[:, 1:]

    def _sequence(self, rng: np.random.Generator, length: int) -> tuple[Tokens, Roles]:
        """As many questions as there is room for, about few facts or many."""
        questions = max(1, min(MAX_FACTS, length // TOKENS_PER_FACT))
        keys = draw(rng, int(rng.integers(1, questions + 1)))
        told = rng.random(len(keys))
        chosen = np.concatenate([np.arange(len(keys)), rng.integers(len(keys), size=questions - len(keys))])
        asked = told[chosen] + (1 - told[chosen]) * rng.random(questions)
        events = [*zip(told, keys, repeat(False)), *zip(asked, [keys[n] for n in chosen], repeat(True))]
        events.sort(key=lambda event: event[0])
        parts = [_part(key, is_question) for _, key, is_question in events]
        filler = excerpt(rng, self.text, max(0, length - sum(len(part) for part, _ in parts)))
        cuts = np.sort(rng.integers(len(filler) + 1, size=len(parts)))
        tokens, roles, before = [], [], 0
        for cut, (part, part_roles) in zip(cuts, parts, strict=True):
            tokens += [filler[before:cut], np.array(part, dtype=np.uint16)]
            roles += [np.full(cut - before, TEXT, dtype=np.uint8), part_roles]
            before = cut
        tokens.append(filler[before:])
        roles.append(np.full(len(filler) - before, TEXT, dtype=np.uint8))
        return np.concatenate(tokens)[:length], np.concatenate(roles)[:length]


def _part(key: PassKey, is_question: bool) -> tuple[list[int], Roles]:
    """The tokens of a fact, or of a question with its answer, and their roles."""
    part = key.question + key.answer if is_question else key.fact
    roles = np.full(len(part), TEXT, dtype=np.uint8)
    number = key.number_in(part)
    roles[number : number + NUMBER_TOKENS] = ANSWER if is_question else UNKNOWABLE
    return part, roles
