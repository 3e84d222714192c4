"""Phi-3-small's tokenizer: a tiktoken vocabulary and 96 special tokens after it.

The checkpoint holds `cl100k_base.tiktoken`: 100256 lines of a base64 token and its rank. Its own tokenizer is
slow, and downloads tiktoken's copy of that file besides. This one makes a fast tokenizer of the `tokenizers`
library from the checkpoint's file, with the same ids.
"""

from __future__ import annotations

import base64
from typing import Any, ClassVar

from transformers import TokenizersBackend
from transformers.convert_slow_tokenizer import TikTokenConverter

SPECIAL_TOKENS = (
    "<|dummy_id_2|>",
    "<|endoftext|>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|dummy_id_0|>",
    "<|dummy_id_1|>",
    "<|end|>",
    *(f"<|dummy_id_{i}|>" for i in range(3, 12)),
    "<|endofprompt|>",
    *(f"<|dummy_id_{i}|>" for i in range(12, 87)),
)
"""In the order of their ids, which follow the vocabulary file's: 100256 to 100351."""

_FIRST_SPECIAL_ID = 100256
_UNTRAINED = ("<|dummy_id_", "<|fim_", "<|endofprompt|>")

UNTRAINED_TOKEN_IDS = tuple(
    _FIRST_SPECIAL_ID + i for i, token in enumerate(SPECIAL_TOKENS) if token.startswith(_UNTRAINED)
)
"""Ids that the published models never learned to use; tokenization_phi3_small.py calls them dummies."""


class Phi3SmallTokenizer(TokenizersBackend):
    """A fast tokenizer from `cl100k_base.tiktoken`, or from the `tokenizer.json` it was saved as.

    Raises:
        ValueError: a line of the vocabulary file is not a base64 token and its rank.
    """

    vocab_files_names: ClassVar[dict[str, str]] = {
        "vocab_file": "cl100k_base.tiktoken",
        "tokenizer_file": "tokenizer.json",
    }
    model_input_names: ClassVar[list[str]] = ["input_ids", "attention_mask"]

    @classmethod
    def convert_to_native_format(cls, **kwargs: Any) -> dict[str, Any]:
        """The constructor's arguments, the tokenizer itself among them."""
        kwargs["clean_up_tokenization_spaces"] = False
        vocab_file = kwargs.pop("vocab_file", None)
        if kwargs.get("tokenizer_file") is None and vocab_file is not None:
            converter = _Converter(vocab_file, extra_special_tokens=list(SPECIAL_TOKENS))
            kwargs["tokenizer_object"] = converter.converted()
            return kwargs
        return super().convert_to_native_format(**kwargs)


class _Converter(TikTokenConverter):
    """transformers' converter, whose pre-tokenizer is cl100k_base's; its own reader would cache by path."""

    @staticmethod
    def load_tiktoken_bpe(path: str) -> dict[bytes, int]:
        """The rank of each token of the file."""
        ranks = {}
        with open(path, "rb") as file:
            for number, line in enumerate(file, start=1):
                if not line.strip():
                    continue
                try:
                    token, rank = line.split()
                    ranks[base64.b64decode(token, validate=True)] = int(rank)
                except ValueError as error:
                    raise ValueError(
                        f"{path}, line {number}: {line!r}, expected a token in base64 and its rank"
                    ) from error
        if sorted(ranks.values()) != list(range(len(ranks))):
            raise ValueError(f"{path}: expected each rank from 0 to {len(ranks) - 1} once")
        return ranks
