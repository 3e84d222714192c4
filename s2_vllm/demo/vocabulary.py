"""The trained model's tokens: bytes, what they are merged to in Python's sources, and all of 000 to 999.

`python -m benchmarks.quality vocabulary` makes them, from `train`.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = Path(__file__).parent / "model" / "tokenizer.json"
VOCAB_SIZE = 4096
END_OF_TEXT = "<|endoftext|>"
"""Ends a text, and an answer. Its token is 0."""

NAMES = tuple((Path(__file__).parent / "names.txt").read_text().split())
"""What pass keys are of: " NAME" is one token each."""


@cache
def load() -> Tokenizer:
    """The tokenizer."""
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(FILE))


def encode(text: str) -> list[int]:
    return list(load().encode(text).ids)


def decode(ids: Iterable[int]) -> str:
    return str(load().decode(list(ids), skip_special_tokens=False))
