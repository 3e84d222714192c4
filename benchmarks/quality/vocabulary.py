"""Making the vocabulary of `s2_vllm.demo.vocabulary`, which the models of all machines share."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from s2_vllm.demo.vocabulary import END_OF_TEXT, NAMES, VOCAB_SIZE

if TYPE_CHECKING:
    from tokenizers import Tokenizer

REPETITIONS = 20000
"""Of what has to be one token, among the texts."""


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
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    numbers = " ".join(f"{number:03}" for number in range(1000))
    names = " " + " ".join(NAMES)
    tokenizer.train_from_iterator([*texts, *REPETITIONS * [numbers, names]], trainer)
    return tokenizer
