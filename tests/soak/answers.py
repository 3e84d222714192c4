"""An answer to a request, and whether it is the one that the request gets alone."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum
from itertools import count
from typing import Any

NEAR_TIE = 1e-3
"""Margins, in natural log-probability, within which float32 decides nothing: batches of other sizes add up
in another order, and either token is right."""


@dataclass(frozen=True)
class Answer:
    """What a completion consists of."""

    tokens: tuple[int, ...]
    text: str
    finish_reason: str

    @classmethod
    def of_choices(cls, choices: list[dict[str, Any]]) -> Answer:
        """An answer of the choices of a stream's events in their order, or of a completion's one choice.

        Raises:
            ValueError: it does not end, or goes on after its end.
        """
        reasons = [choice.get("finish_reason") for choice in choices]
        if not choices or reasons[-1] is None or any(reasons[:-1]):
            raise ValueError(f"finish_reason: {reasons}, expected one, at the end")
        return cls(
            tuple(token for choice in choices for token in choice.get("token_ids") or []),
            "".join(choice["text"] for choice in choices),
            reasons[-1],
        )


@dataclass(frozen=True)
class AnswerAlone:
    """The answer to a request that had the server to itself.

    Attributes:
        answer: the answer.
        margins: for each token, the log-probability of the likeliest token minus that of the second.
    """

    answer: Answer
    margins: tuple[float, ...]

    @classmethod
    def of_choice(cls, choice: dict[str, Any]) -> AnswerAlone:
        """The answer of a completion's choice with the log-probabilities of the two likeliest tokens."""
        tops = [sorted(top.values(), reverse=True) for top in choice["logprobs"]["top_logprobs"]]
        return cls(Answer.of_choices([choice]), tuple(top[0] - top[1] for top in tops))


class Verdict(Enum):
    """How an answer compares with the one that the request gets alone."""

    EQUAL = "equal"
    NEAR_TIE = "equal up to a near-tie"
    DIFFERENT = "different"


def compare(answer: Answer, alone: AnswerAlone) -> Verdict:
    """Equal in tokens, text and end; or parting at a token that the model hardly prefers to another."""
    if answer == alone.answer:
        return Verdict.EQUAL
    first = first_difference(answer.tokens, alone.answer.tokens)
    shortest = min(len(answer.tokens), len(alone.answer.tokens))
    if first < shortest and alone.margins[first] <= NEAR_TIE:
        return Verdict.NEAR_TIE
    return Verdict.DIFFERENT


def first_difference(tokens: tuple[int, ...], others: tuple[int, ...]) -> int:
    """The index of the first token that differs, or where the shorter one ends."""
    return next(i for i in count() if tokens[i : i + 1] != others[i : i + 1] or i >= len(tokens))
