"""The phases of a soak: traffic, an empty pool, a killed engine, and a new server that answers alone."""

from __future__ import annotations

import asyncio
import time
import traceback
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING

import aiohttp

from s2_vllm.demo.checkpoint import train_tokenizer
from s2_vllm.demo.corpus import project_text
from tests.engine.checkpoints import save_checkpoint
from tests.engine.server import STOP_SECONDS, Server, assert_ended, started_server
from tests.soak.answers import Answer, AnswerAlone, Verdict, compare, first_difference
from tests.soak.clients import REQUEST_SECONDS, Client, FaultError, Tally
from tests.soak.traffic import run_clients
from tests.soak.workload import MAX_MODEL_LEN, MODEL, Request, catalogue

if TYPE_CHECKING:
    from collections.abc import AsyncIterator
    from pathlib import Path

S2 = {"block_size": 16, "local_blocks": 2, "vert_stride": 4, "head_sliding_step": 1, "dense_layers": [1]}

FLAGS = (
    *("--served-model-name", MODEL),
    *("--dtype", "float32"),
    "--enforce-eager",
    *("--max-model-len", str(MAX_MODEL_LEN)),
    *("--max-num-batched-tokens", "160"),
    *("--max-num-seqs", "12"),
    *("--kv-cache-memory-bytes", "512M"),
    # Of two requests of the greatest length: there are preemptions all the time.
    *("--num-gpu-blocks-override", "48"),
)

REQUESTS_PER_MINUTE = 20
FEWEST_REQUESTS = 24
PROGRESS_SECONDS = 30.0
IDLE_SECONDS = 60.0
STREAMS_WHEN_KILLED = 8

PREEMPTIONS = "vllm:num_preemptions_total"
HIT_TOKENS = "vllm:prefix_cache_hits_total"
IN_USE = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
"""Metrics that are 0 when no request is left."""


def make_checkpoint(folder: Path) -> None:
    """A tiny model in which attention decides what is generated, with a real tokenizer."""
    tokenizer = train_tokenizer(project_text())
    save_checkpoint(folder, "llama", S2, vocab_size=len(tokenizer))
    tokenizer.save_pretrained(folder)


@asynccontextmanager
async def client_of(server: Server, tally: Tally) -> AsyncIterator[Client]:
    async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=0)) as session:
        yield Client(session, server.url, tally)


async def soak(server: Server, tally: Tally, requests: list[Request], seed: int, minutes: float) -> None:
    """Traffic for some minutes, an empty pool after it, and the end of the engine under new traffic."""
    async with client_of(server, tally) as client:
        start = time.monotonic()
        progress = asyncio.create_task(report_progress(client, start))
        await run_clients(client, requests, seed, start + 60 * minutes)
        progress.cancel()
        await wait_until_idle(client)
        metrics = await client.metrics()
        tally.events["preemptions"] = int(metrics[PREEMPTIONS])
        tally.events["tokens from the prefix cache"] = int(metrics[HIT_TOKENS])
        await kill_engine(server, client)


async def report_progress(client: Client, start: float) -> None:
    while True:
        await asyncio.sleep(PROGRESS_SECONDS)
        metrics = await client.metrics()
        done = ", ".join(f"{times} {event}" for event, times in client.tally.events.items())
        minutes = (time.monotonic() - start) / 60
        print(f"{minutes:.1f} min: {done}, {metrics[PREEMPTIONS]:.0f} preemptions", flush=True)


async def wait_until_idle(client: Client) -> None:
    """No request and no page is left, now that all clients have gone.

    Raises:
        FaultError: something is in use still.
    """
    deadline = time.monotonic() + IDLE_SECONDS
    while True:
        # The engine states its figures after a step: without one, those of the last would stay.
        await client.step()
        metrics = await client.metrics()
        in_use = {name: metrics[name] for name in IN_USE}
        if not any(in_use.values()):
            return
        if time.monotonic() > deadline:
            raise FaultError(f"in use after {IDLE_SECONDS} s without clients: {in_use}")
        await asyncio.sleep(0.5)


async def kill_engine(server: Server, client: Client) -> None:
    """Without its engine the server is unhealthy, leaves nobody waiting, and ends with all its processes.

    Raises:
        FaultError, AssertionError: it does not.
    """
    children = server.children()
    (engine,) = (child for child in children if any("EngineCore" in part for part in child.cmdline()))
    longest = [Request((number,) * 9, MAX_MODEL_LEN - 9) for number in range(STREAMS_WHEN_KILLED)]
    streams = [asyncio.create_task(client.stream(request)) for request in longest]
    async with asyncio.timeout(REQUEST_SECONDS):
        while (await client.metrics())["vllm:num_requests_running"] < len(streams):
            await asyncio.sleep(0.1)
    engine.kill()
    ended, waiting = await asyncio.wait(streams, timeout=STOP_SECONDS)
    if waiting or not all(isinstance(task.exception(), FaultError | aiohttp.ClientError) for task in ended):
        raise FaultError(f"{len(waiting)} streams wait for a killed engine, or have an answer")
    deadline = time.monotonic() + STOP_SECONDS
    while (health := await asyncio.to_thread(server.health)) == 200:
        if time.monotonic() > deadline:
            raise FaultError("healthy without an engine")
        await asyncio.sleep(0.1)
    status = await asyncio.to_thread(server.process.wait, STOP_SECONDS)
    await asyncio.to_thread(assert_ended, children)
    print(f"engine killed: {len(ended)} streams ended, health {health}, server's exit status {status}")


async def serve_alone(server: Server, tally: Tally) -> None:
    """Ask each request again, one after another, and compare."""
    async with client_of(server, tally) as client:
        for number, (request, answers) in enumerate(tally.answers.items()):
            alone = await client.alone(request, salt=f"request {number}")
            tally.events["different requests"] += 1
            for answer, times in answers.items():
                verdict = compare(answer, alone)
                tally.events[f"answers {verdict.value}"] += times
                if verdict is Verdict.DIFFERENT:
                    tally.faults.append(
                        f"{times} times not the answer alone: {describe(answer, alone, request)}"
                    )
        await wait_until_idle(client)


def describe(answer: Answer, alone: AnswerAlone, request: Request) -> str:
    """Where an answer to a request parts from the one that it gets alone."""
    first = first_difference(answer.tokens, alone.answer.tokens)
    return (
        f"{answer.tokens[first : first + 3]} and {answer.finish_reason!r} from token {first} on, expected "
        f"{alone.answer.tokens[first : first + 3]} and {alone.answer.finish_reason!r}, after a prompt of "
        f"{len(request.prompt)} tokens that begins with {request.prompt[:6]}"
    )


def run(folder: Path, minutes: float, seed: int) -> Tally:
    """Soak a server of the checkpoint in `folder`, and compare its answers with those of a new one.

    Whatever goes wrong is a fault, so that there is a report in any case.
    """
    tally = Tally()
    requests = catalogue(seed, max(FEWEST_REQUESTS, int(REQUESTS_PER_MINUTE * minutes)))
    try:
        with started_server(folder, *FLAGS) as server:
            print(f"{server.url}: {minutes} minutes of traffic from {len(requests)} requests, seed {seed}")
            asyncio.run(soak(server, tally, requests, seed, minutes))
        with started_server(folder, *FLAGS) as server:
            print("a new server on the same checkpoint answers each request alone", flush=True)
            asyncio.run(serve_alone(server, tally))
            server.stop()
    except Exception as error:
        traceback.print_exc()
        tally.faults.append(f"{type(error).__name__}: {error}")
    return tally
