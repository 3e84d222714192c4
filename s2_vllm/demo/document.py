"""A long document of real text in which pass keys are hidden."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from s2_vllm.demo.corpus import project_text
from s2_vllm.demo.passkeys import FACT, NUMBER_TOKENS, QUESTION, PassKey, draw
from s2_vllm.demo.vocabulary import decode, encode


@dataclass(frozen=True)
class Document:
    """Text with pass keys in it.

    Attributes:
        text: as it is served.
        keys: in the order in which they are told.
    """

    text: str
    keys: tuple[PassKey, ...]

    def prompt(self, key: PassKey) -> str:
        """The document, and the question for a key."""
        return self.text + key.write(QUESTION)

    @cached_property
    def tokens(self) -> list[int]:
        return encode(self.text)

    def positions(self, key: PassKey) -> range:
        """The tokens of the key's name and number, where it is told."""
        number = key.number_in(key.fact)
        told = key.fact[number - 1 : number + NUMBER_TOKENS]
        (first,) = (n for n in range(len(self.tokens)) if self.tokens[n : n + len(told)] == told)
        return range(first, first + len(told))

    def block(self, key: PassKey, block_size: int) -> int:
        """The block in which the key's number ends."""
        return self.positions(key)[-1] // block_size

    def num_blocks(self, block_size: int) -> int:
        """Up to the one that the next token is in."""
        return len(self.tokens) // block_size + 1


def hide(depths: Sequence[float], num_tokens: int, seed: int = 0) -> Document:
    """The beginning of the project's own text, with a pass key told at each of the depths.

    Args:
        depths: ascending, from 0 for the beginning to 1 for the end.
        num_tokens: of the text; the facts come on top.
        seed: of names and numbers.
    """
    lines = decode(encode(project_text())[:num_tokens]).splitlines(keepends=True)
    keys = draw(np.random.default_rng(seed), len(depths))
    for depth, key in reversed([*zip(depths, keys, strict=True)]):
        lines.insert(int(depth * len(lines)), key.write(FACT))
    return Document("".join(lines), tuple(keys))
