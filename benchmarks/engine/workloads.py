"""What is measured: requests of which lengths, and how many of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

WORKLOADS = ("latency", "throughput", "serve")
LOADS = ("batch", "pool")
"""Of throughput: the same number of requests for both variants, or as many as an engine's memory holds."""

LENGTHS = {
    "latency": (512, 2048, 8192, 32768, 129024),
    "throughput": (256, 1024, 8192, 32768, 129024),
}
TINY_LENGTHS = {"latency": (64, 200), "throughput": (48, 200)}

LATENCY_OUTPUT_TOKENS = 64
# Short prompts are served several times in a repetition: what a single one of 20 ms takes is chance.
SHORT_TOKENS = 8192
SHORT_REQUESTS = 5

# The same batch: 200 x 256, 64 x 1,024, 8 x 8,192 and so on.
BATCH_TOKENS = 65536
BATCH_REQUESTS = 200
# (shortest prompt, output tokens): the longer the prompts, the longer the intervals at which they start, and
# all of them are to decode together in the end.
OUTPUT_TOKENS = ((65536, 1024), (4096, 256), (1024, 128), (0, 64))

MIX = {256: 0.3, 1024: 0.25, 4096: 0.2, 8192: 0.15, 32768: 0.1}
"""Of serving: the prompts' lengths, and how many have them."""
TINY_MIX = {32: 0.25, 64: 0.25, 200: 0.25, 400: 0.25}
SERVE_OUTPUT_TOKENS = 128
LEAST_REQUESTS = 20
REQUEST_RATES = (1.0, 2.0, 4.0, 8.0)
SLO = {"ttft": 3000.0, "tpot": 50.0}
"""What a good request keeps to, in milliseconds."""

WARM_UP_TOKENS = 131072
WARM_UP_OUTPUT_TOKENS = 8


@dataclass(frozen=True)
class Measurement:
    """Requests of one length, served offline by one engine.

    Attributes:
        workload: "latency", one request after the other, or "throughput", all at once.
        load: of throughput, one of LOADS; of latency, "single".
        prompt_tokens, output_tokens: of every request.
        requests: how many; None for as many as the engine's memory holds.
        repetitions: how many times.
    """

    workload: str
    load: str
    prompt_tokens: int
    output_tokens: int
    requests: int | None
    repetitions: int

    @property
    def tokens(self) -> int:
        """Of a request."""
        return self.prompt_tokens + self.output_tokens

    def warm_up_requests(self, requests: int) -> int:
        """How many of a wave's requests go before it, for kernels to be compiled."""
        return max(1, min(requests, WARM_UP_TOKENS // self.prompt_tokens))

    def record(self, requests: int) -> dict[str, Any]:
        """What the records of this measurement, with so many requests, have in common."""
        return {
            "workload": self.workload,
            "load": self.load,
            "prompt_tokens": self.prompt_tokens,
            "output_tokens": self.output_tokens,
            "requests": requests,
        }

    def refusal(self, reason: str) -> dict[str, Any]:
        """The record of an engine that cannot do this."""
        return self.record(0) | {"reason": reason}


def latency(length: int, repetitions: int, tiny: bool = False) -> Measurement:
    """One request of `length` tokens at a time."""
    requests = SHORT_REQUESTS if length <= SHORT_TOKENS and not tiny else 1
    output_tokens = 4 if tiny else LATENCY_OUTPUT_TOKENS
    return Measurement("latency", "single", length, output_tokens, requests, repetitions)


def throughput(length: int, load: str, repetitions: int, tiny: bool = False) -> Measurement:
    """Requests of `length` tokens, all at once."""
    requests = max(1, min(BATCH_REQUESTS, BATCH_TOKENS // length))
    if tiny:
        requests = 3
    return Measurement(
        "throughput",
        load,
        length,
        throughput_output_tokens(length, tiny),
        requests if load == "batch" else None,
        repetitions,
    )


def throughput_output_tokens(length: int, tiny: bool = False) -> int:
    """Output tokens of each request of a throughput measurement."""
    return 4 if tiny else next(tokens for shortest, tokens in OUTPUT_TOKENS if length >= shortest)


@dataclass(frozen=True)
class Traffic:
    """Requests of mixed lengths that arrive at a server as a Poisson process.

    Attributes:
        request_rate: requests per second.
        requests: how many.
        mix: shares of the requests, by prompt tokens.
        output_tokens: of every request.
        slo: milliseconds that a good request keeps to, by "ttft", "tpot" or "e2el".
        repetitions: how many times.
    """

    request_rate: float
    requests: int
    mix: dict[int, float]
    output_tokens: int
    slo: dict[str, float]
    repetitions: int

    @classmethod
    def of_json(cls, fields: dict[str, Any]) -> Traffic:
        """The traffic that was an object in JSON, where all keys are strings."""
        mix = {int(length): share for length, share in fields["mix"].items()}
        return cls(**{**fields, "mix": mix})

    @property
    def tokens(self) -> int:
        """Of the longest request."""
        return max(self.mix) + self.output_tokens

    def record(self, requests: int) -> dict[str, Any]:
        """What the records of this traffic, with so many requests, have in common."""
        return {
            "workload": "serve",
            "load": "mix",
            "prompt_tokens": round(sum(length * share for length, share in self.mix.items())),
            "output_tokens": self.output_tokens,
            "request_rate": self.request_rate,
            "requests": requests,
            "mix": self.mix,
            "slo": self.slo,
        }

    def refusal(self, reason: str) -> dict[str, Any]:
        """The record of an engine that cannot do this."""
        return self.record(0) | {"reason": reason}


def traffic(
    rate: float, seconds: float, slo: dict[str, float], repetitions: int, tiny: bool = False
) -> Traffic:
    """The mix at `rate` requests per second, for about so many seconds."""
    requests = max(LEAST_REQUESTS, round(rate * seconds))
    mix, output_tokens = (TINY_MIX, 4) if tiny else (MIX, SERVE_OUTPUT_TOKENS)
    return Traffic(rate, requests, mix, output_tokens, slo, repetitions)


def too_long(max_model_len: int) -> str:
    """Why an engine refuses longer requests than this."""
    return f"the longest request that this engine's KV cache holds has {max_model_len} tokens"
