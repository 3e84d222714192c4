"""The vocabulary: bytes, what they are often merged to in Python's sources and prose, and all of 000 to 999.

Trained once (`python -m benchmarks.quality tokenizer`) and kept beside this module, so that every machine's
models have the same.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tokenizers import Tokenizer

FILE = Path(__file__).parent / "tokenizer.json"
VOCAB_SIZE = 4096
REPETITIONS = 20000
"""Of what has to be one token, among the text that the vocabulary is made from."""

NAMES = tuple((Path(__file__).parent / "names.txt").read_text().split())
"""What pass keys are of: " NAME" is one token each."""


@cache
def load() -> Tokenizer:
    """The tokenizer.

    Raises:
        FileNotFoundError: nobody has made it.
    """
    from tokenizers import Tokenizer

    if not FILE.exists():
        raise FileNotFoundError(
            f"{FILE}: expected the vocabulary, from python -m benchmarks.quality tokenizer"
        )
    return Tokenizer.from_file(str(FILE))


def encode(text: str) -> list[int]:
    return list(load().encode(text).ids)


def decode(ids: Iterable[int]) -> str:
    return str(load().decode(list(ids)))


def train(texts: Iterable[str]) -> Tokenizer:
    """A vocabulary for `texts`, in which every name and every number of three digits is one token."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"\d{1,3}"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = [f"{number:03}" for number in range(1000)]
    tokenizer.train_from_iterator(
        [*texts, *REPETITIONS * [" ".join(numbers)], *REPETITIONS * [" " + " ".join(NAMES)]], trainer
    )
    return tokenizer
