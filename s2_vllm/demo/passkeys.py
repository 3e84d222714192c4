"""Pass keys: how they are hidden in a text, asked for and answered, in training as in evaluation.

RULER's needles (arXiv 2404.06654) in the number and with the repeated queries of Zoology's multi-query recall
(arXiv 2312.04927).
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from s2_vllm.demo.vocabulary import END_OF_TEXT, NAMES, encode

Tokens = npt.NDArray[np.uint16]

FACT = "\nThe pass key is {name}{number}. Remember it.\n"
QUESTION = "\nWhat is the pass key of {name}?"
ANSWER = " It is {name}{number}." + END_OF_TEXT
NUMBERS = 1_000_000
NUMBER_TOKENS = 2


@dataclass(frozen=True)
class PassKey:
    """A name and its six digits."""

    name: str
    number: int

    def write(self, form: str) -> str:
        """FACT, QUESTION or ANSWER of this one."""
        return form.format(name=self.name, number=f"{self.number:06}")

    @cached_property
    def fact(self) -> list[int]:
        return self._encode(FACT)

    @cached_property
    def question(self) -> list[int]:
        return self._encode(QUESTION)

    @cached_property
    def answer(self) -> list[int]:
        return self._encode(ANSWER)

    def number_in(self, part: list[int]) -> int:
        """Where the number's tokens begin in the fact or in the answer."""
        first = _piece(f"{self.number // 1000:03}")[0]
        return max(n for n, token in enumerate(part[:-1]) if token == first)

    def is_answered_by(self, ids: list[int]) -> bool:
        """Whether `ids` are the answer up to its number at least."""
        end = self.number_in(self.answer) + NUMBER_TOKENS
        return ids[:end] == self.answer[:end]

    def _encode(self, form: str) -> list[int]:
        """Piece by piece, as each has been encoded before: where they meet, tokens end anyway."""
        before, after = form.split(" {name}")
        number = f"{self.number:06}"
        middle, *end = after.split("{number}")
        pieces = [before, f" {self.name}", middle, *([number[:3], number[3:], *end] if end else [])]
        return [token for piece in pieces for token in _piece(piece)]


@lru_cache(maxsize=4096)
def _piece(text: str) -> tuple[int, ...]:
    return tuple(encode(text))


def draw(rng: np.random.Generator, count: int) -> list[PassKey]:
    """Pass keys of different names."""
    names = rng.choice(len(NAMES), count, replace=False)
    numbers = rng.integers(NUMBERS, size=count)
    return [PassKey(NAMES[name], int(number)) for name, number in zip(names, numbers, strict=True)]


def excerpt(rng: np.random.Generator, text: Tokens, length: int) -> Tokens:
    """Some `length` tokens of the text in a row; it begins anew where it is too short."""
    start = int(rng.integers(len(text)))
    if start + length <= len(text):
        return text[start : start + length]
    return np.resize(np.roll(text, -start), length)


def hidden(
    rng: np.random.Generator, text: Tokens, keys: list[PassKey], positions: list[int], length: int
) -> list[int]:
    """A context of `length` tokens with the facts of `keys`, whose numbers begin at ascending `positions`.

    Raises:
        ValueError: two of them overlap, or one does not fit.
    """
    context: list[int] = []
    filler = excerpt(rng, text, length).tolist()
    for key, position in zip(keys, positions, strict=True):
        start = position - key.number_in(key.fact)
        if start < len(context) or start + len(key.fact) > length:
            raise ValueError(f"positions: {positions}, expected places for facts in {length} tokens")
        context += filler[len(context) : start] + key.fact
    return context + filler[len(context) : length]
