"""Many clients at once, each doing one random thing after another."""

from __future__ import annotations

import asyncio
import time
from random import Random
from typing import TYPE_CHECKING

import aiohttp

from tests.soak.clients import Client, FaultError
from tests.soak.workload import REFUSALS

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

    from tests.soak.workload import Request

CLIENTS = 16
MOST_FAULTS = 20
"""After so many there is no point in going on."""


async def complete(client: Client, requests: list[Request], rng: Random) -> None:
    await client.complete(rng.choice(requests))


async def stream(client: Client, requests: list[Request], rng: Random) -> None:
    await client.stream(rng.choice(requests))


async def converse(client: Client, requests: list[Request], rng: Random) -> None:
    """A completion, and a follow-up that begins with it; only of some requests, to bound their number."""
    request = rng.choice(requests[: 1 + len(requests) // 4])
    follow_up = request.follow_up((await client.complete(request)).tokens)
    if follow_up:
        await client.stream(follow_up)
        client.tally.events["follow-ups"] += 1


async def abort(client: Client, requests: list[Request], rng: Random) -> None:
    await client.abort(rng.choice(requests), after=rng.randint(1, 20))


async def disconnect(client: Client, requests: list[Request], rng: Random) -> None:
    await client.disconnect(rng.choice(requests), seconds=rng.uniform(0.0, 1.0))


async def break_off(client: Client, requests: list[Request], rng: Random) -> None:
    await client.break_off(rng.choice(requests))


async def exceed(client: Client, requests: list[Request], rng: Random) -> None:
    await client.refused(rng.choice(REFUSALS))


ACTIONS: dict[Callable[[Client, list[Request], Random], Awaitable[None]], int] = {
    complete: 4,
    stream: 5,
    converse: 2,
    abort: 3,
    disconnect: 2,
    break_off: 1,
    exceed: 2,
}
"""How often each is done, relative to the others."""


async def run_clients(client: Client, requests: list[Request], seed: int, deadline: float) -> None:
    """CLIENTS of them until `deadline`, by time.monotonic(); what was begun before is finished."""

    async def run(rng: Random) -> None:
        while time.monotonic() < deadline and len(client.tally.faults) < MOST_FAULTS:
            (action,) = rng.choices(list(ACTIONS), list(ACTIONS.values()))
            try:
                await action(client, requests, rng)
            except (FaultError, ValueError, aiohttp.ClientError, TimeoutError) as error:
                client.tally.faults.append(f"{action.__name__}: {type(error).__name__}: {error}")

    await asyncio.gather(*(run(Random(f"{seed} {number}")) for number in range(CLIENTS)))
