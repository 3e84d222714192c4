"""Clients of the server under soak: what they do, and what they remember of it."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter, defaultdict
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import aiohttp

from tests.soak.answers import Answer, AnswerAlone
from tests.soak.workload import Refusal, Request

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

REQUEST_SECONDS = 300.0
"""The most that any answer may take: everything ends by itself."""

COMPLETIONS = "/v1/completions"


class FaultError(Exception):
    """The server has not done what it has to."""


@dataclass
class Tally:
    """What has happened.

    Attributes:
        events: counts.
        answers: how often each request got which answer.
        faults: what the server has done wrong, in words.
    """

    events: Counter[str] = field(default_factory=Counter)
    answers: dict[Request, Counter[Answer]] = field(default_factory=lambda: defaultdict(Counter))
    faults: list[str] = field(default_factory=list)

    def completed(self, request: Request, answer: Answer) -> None:
        self.answers[request][answer] += 1
        self.events["completed"] += 1


class Client:
    """One user of a server. Every method ends within REQUEST_SECONDS.

    Args:
        session: of HTTP requests.
        url: of the server, without a path.
        tally: what happens is noted here.

    Raises:
        FaultError, ValueError, aiohttp.ClientError, TimeoutError: by any method, when the server is at fault.
    """

    def __init__(self, session: aiohttp.ClientSession, url: str, tally: Tally) -> None:
        self.session = session
        self.url = url
        self.tally = tally

    async def complete(self, request: Request) -> Answer:
        """The answer, in one piece."""
        choice = await self._post(request.body())
        answer = Answer.of_choices([choice])
        self.tally.completed(request, answer)
        return answer

    async def stream(self, request: Request) -> Answer:
        """The answer, token by token."""
        async with asyncio.timeout(REQUEST_SECONDS):
            answer = Answer.of_choices([choice async for choice in self.choices(request)])
        self.tally.completed(request, answer)
        self.tally.events["of these, streamed"] += 1
        return answer

    async def abort(self, request: Request, after: int) -> None:
        """Close the connection of a stream after `after` pieces, if it has that many."""
        choices = []
        async with asyncio.timeout(REQUEST_SECONDS), aclosing(self.choices(request)) as stream:
            async for choice in stream:
                choices.append(choice)
                if len(choices) == after and choice.get("finish_reason") is None:
                    self.tally.events["aborted in mid-stream"] += 1
                    return
        self.tally.completed(request, Answer.of_choices(choices))

    async def disconnect(self, request: Request, seconds: float) -> None:
        """Close the connection while the answer is awaited, if it takes longer than `seconds`."""
        try:
            async with asyncio.timeout(seconds):
                await self.complete(request)
        except TimeoutError:
            self.tally.events["disconnected"] += 1

    async def break_off(self, request: Request) -> None:
        """Close the connection in the middle of sending a request."""
        address = urlsplit(self.url)
        body = json.dumps(request.body()).encode()
        head = f"POST {COMPLETIONS} HTTP/1.1\r\nHost: {address.netloc}\r\nContent-Type: application/json\r\n"
        async with asyncio.timeout(REQUEST_SECONDS):
            _, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(head.encode() + b"Content-Length: %d\r\n\r\n" % len(body) + body[: len(body) // 2])
            await writer.drain()
            writer.close()
        self.tally.events["broken off"] += 1

    async def refused(self, refusal: Refusal) -> None:
        """Ask for what cannot be had."""
        body = refusal.body if isinstance(refusal.body, bytes) else json.dumps(refusal.body).encode()
        headers = {"Content-Type": "application/json"}
        async with (
            asyncio.timeout(REQUEST_SECONDS),
            self.session.post(self.url + COMPLETIONS, data=body, headers=headers) as response,
        ):
            text = await response.text()
        if response.status != refusal.status or refusal.named not in text:
            raise FaultError(
                f"{response.status} {text[:500]}, expected {refusal.status} with {refusal.named!r}"
            )
        self.tally.events["refused by name"] += 1

    async def alone(self, request: Request, salt: str) -> AnswerAlone:
        """The answer of a server that has nothing else to do, from no page that was written before."""
        body = request.body(logprobs=2, return_tokens_as_token_ids=True, cache_salt=salt)
        return AnswerAlone.of_choice(await self._post(body))

    async def step(self) -> None:
        """Have the engine make a step, whatever comes of it."""
        await self._post(Request(prompt=(1, 2, 3), max_tokens=1).body())

    async def metrics(self) -> Counter[str]:
        """The server's metrics by name, added up over their labels."""
        async with asyncio.timeout(REQUEST_SECONDS), self.session.get(f"{self.url}/metrics") as response:
            await _expect_ok(response)
            return parse_metrics(await response.text())

    async def choices(self, request: Request) -> AsyncIterator[dict[str, Any]]:
        """The pieces of a streamed answer. Closed before its end, it closes the connection."""
        async with self.session.post(self.url + COMPLETIONS, json=request.body(stream=True)) as response:
            await _expect_ok(response)
            done = False
            async for line in response.content:
                event = line.strip().removeprefix(b"data: ")
                if event == b"[DONE]":
                    done = True
                elif event:
                    message = json.loads(event)
                    if "error" in message:
                        raise FaultError(f"an error in the stream: {message['error']}")
                    for choice in message["choices"]:
                        yield choice
        if not done:
            raise FaultError("a stream without its end")

    async def _post(self, body: dict[str, Any]) -> dict[str, Any]:
        """The one choice of a completion."""
        async with (
            asyncio.timeout(REQUEST_SECONDS),
            self.session.post(self.url + COMPLETIONS, json=body) as response,
        ):
            await _expect_ok(response)
            (choice,) = (await response.json())["choices"]
            return dict(choice)


def parse_metrics(text: str) -> Counter[str]:
    """Values by name, added up over labels, of Prometheus' text format."""
    values: Counter[str] = Counter()
    for name, value in re.findall(r"^([\w:]+)(?:\{.*\})? (\S+)$", text, re.MULTILINE):
        values[name] += float(value)
    return values


async def _expect_ok(response: aiohttp.ClientResponse) -> None:
    if response.status != 200:
        raise FaultError(f"status {response.status}: {(await response.text())[:500]}")
