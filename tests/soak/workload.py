"""What the soak's clients ask for: requests that share prefixes, and requests that exceed the limits."""

from __future__ import annotations

from dataclasses import dataclass
from random import Random
from typing import Any

MODEL = "s2-soak"
MAX_MODEL_LEN = 768
TEXT_TOKENS = range(300, 2000)
"""Tokens of whole characters; those before them are special ones and bytes."""

MOST_PROMPT_TOKENS = 640
MOST_ANSWER_TOKENS = 64


@dataclass(frozen=True)
class Request:
    """A greedy completion.

    Attributes:
        prompt: token ids.
        max_tokens: of the answer, as far as the model's length has room for them.
        stop_token_ids: tokens that end it.
    """

    prompt: tuple[int, ...]
    max_tokens: int
    stop_token_ids: tuple[int, ...] = ()

    def body(self, **fields: Any) -> dict[str, Any]:
        """The request as the completions API takes it, with additional fields."""
        return {
            "model": MODEL,
            "prompt": list(self.prompt),
            "max_tokens": self.max_tokens,
            "stop_token_ids": list(self.stop_token_ids),
            "temperature": 0.0,
            "ignore_eos": True,
            "return_token_ids": True,
            **fields,
        }

    def follow_up(self, answer: tuple[int, ...]) -> Request | None:
        """The next turn of a conversation: the prompt, its answer, and more; None if that is too long."""
        more = self.prompt[:20][::-1]
        prompt = (*self.prompt, *answer, *more)
        return Request(prompt, 24) if len(prompt) <= MOST_PROMPT_TOKENS else None


def catalogue(seed: int, size: int) -> list[Request]:
    """`size` different requests: short ones; ones that share the beginning of a few long documents; and a
    few that ask for more tokens than the model's length has room for."""
    rng = Random(seed)
    documents = [_tokens(rng, MOST_PROMPT_TOKENS) for _ in range(max(1, size // 12))]
    requests: dict[Request, None] = {}
    while len(requests) < size:
        kind = rng.random()
        most_tokens = rng.randint(1, MOST_ANSWER_TOKENS)
        if kind < 0.3:
            prompt = _tokens(rng, rng.randint(1, 200))
        elif kind < 0.95:
            shared = rng.randint(100, MOST_PROMPT_TOKENS - 40)
            prompt = rng.choice(documents)[:shared] + _tokens(rng, rng.randint(0, 40))
        else:
            prompt = _tokens(rng, MAX_MODEL_LEN - most_tokens)
            most_tokens += MOST_ANSWER_TOKENS
        stops = _tokens(rng, 100) if rng.random() < 0.2 else ()
        requests[Request(prompt, most_tokens, stops)] = None
    return list(requests)


def _tokens(rng: Random, count: int) -> tuple[int, ...]:
    return tuple(rng.choice(TEXT_TOKENS) for _ in range(count))


@dataclass(frozen=True)
class Refusal:
    """A request that the server has to refuse.

    Attributes:
        body: what is sent: JSON, unless it is bytes already.
        named: what the answer says is wrong.
        status: of the answer.
    """

    body: dict[str, Any] | bytes
    named: str
    status: int = 400


def _refusal(named: str, status: int = 400, **fields: Any) -> Refusal:
    """Of a request that is in order but for some fields."""
    return Refusal(Request(tuple(range(300, 400)), 8).body(**fields), named, status)


REFUSALS = (
    _refusal("maximum context length is 768 tokens", prompt=[300] * 769),
    # It leaves no room for an answer.
    _refusal("max_tokens must be at least 1, got 0", prompt=[300] * 768),
    _refusal("max_tokens must be at least 1, got 0", max_tokens=0),
    _refusal("max_tokens=769 cannot be greater than max_model_len=768", max_tokens=769),
    _refusal("min_tokens must be less than or equal to max_tokens=8, got 9", min_tokens=9),
    _refusal("temperature must be non-negative, got -1", temperature=-1),
    _refusal("top_p must be in (0, 1], got 2", temperature=1, top_p=2),
    _refusal("top_k must be 0 (disable), or at least 1, got -5", top_k=-5),
    _refusal("n must be at least 1, got 0", n=0),
    _refusal("repetition_penalty must be greater than zero, got 0", repetition_penalty=0),
    _refusal("greater than max allowed: 20", logprobs=1000),
    _refusal("[99999] in logit_bias contain out-of-vocab token ids", logit_bias={"99999": 1}),
    _refusal("body.stop_token_ids", stop_token_ids="x"),
    _refusal("body.stream", stream="maybe"),
    _refusal("Token id 99999 is out of vocabulary", prompt=[300, 99999]),
    _refusal("body.prompt", prompt=[-1]),
    _refusal("body.prompt", prompt={"text": "x"}),
    _refusal("You must pass at least one prompt", prompt=[]),
    _refusal("The model `another` does not exist", 404, model="another"),
    Refusal(b'{"model": "s2-soak", "prompt": [300,', "JSON decode error"),
)
