"""The parts of the soak, against a server that is made up: `make soak` itself starts real ones."""

from __future__ import annotations

import asyncio
import math
import time
from collections import Counter
from typing import TYPE_CHECKING, Any

import aiohttp
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer

from tests.soak import traffic
from tests.soak.__main__ import HAS_TO_HAPPEN, report
from tests.soak.answers import NEAR_TIE, Answer, AnswerAlone, Verdict, compare
from tests.soak.clients import Client, FaultError, Tally, parse_metrics
from tests.soak.traffic import CLIENTS, MOST_FAULTS, run_clients
from tests.soak.workload import (
    MAX_MODEL_LEN,
    MOST_PROMPT_TOKENS,
    TEXT_TOKENS,
    Refusal,
    Request,
    catalogue,
)

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable

ALONE = AnswerAlone(Answer((5, 6, 7), "five six seven", "length"), (0.5, NEAR_TIE / 2, 0.5))


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        pytest.param(Answer((5, 6, 7), "five six seven", "length"), Verdict.EQUAL, id="equal"),
        pytest.param(Answer((5, 9, 9), "five nine nine", "length"), Verdict.NEAR_TIE, id="near-tie"),
        pytest.param(Answer((5, 9), "five nine", "stop"), Verdict.NEAR_TIE, id="near-tie-that-ends"),
        pytest.param(Answer((9, 6, 7), "nine six seven", "length"), Verdict.DIFFERENT, id="first-token"),
        pytest.param(Answer((5, 6, 9), "five six nine", "length"), Verdict.DIFFERENT, id="last-token"),
        pytest.param(Answer((5,), "five", "length"), Verdict.DIFFERENT, id="too-short"),
        pytest.param(
            Answer((5, 6, 7, 8), "five six seven eight", "length"), Verdict.DIFFERENT, id="too-long"
        ),
        pytest.param(Answer((), "", "length"), Verdict.DIFFERENT, id="empty"),
        pytest.param(Answer((5, 6, 7), "five six sev", "length"), Verdict.DIFFERENT, id="text"),
        pytest.param(Answer((5, 6, 7), "five six seven", "stop"), Verdict.DIFFERENT, id="finish-reason"),
    ],
)
def test_an_answer_against_the_one_alone(answer: Answer, verdict: Verdict) -> None:
    assert compare(answer, ALONE) is verdict


def test_margins_are_those_of_the_two_likeliest_tokens() -> None:
    """Whatever their order; the token that was sampled may be listed as a third."""
    tops = [{"a": -0.25, "b": -2.0}, {"a": -3.0, "b": -1.5, "c": -9.0}]
    choice = {
        "token_ids": [1, 2],
        "text": "ab",
        "finish_reason": "length",
        "logprobs": {"top_logprobs": tops},
    }
    assert AnswerAlone.of_choice(choice).margins == (1.75, 1.5)


@pytest.mark.parametrize("reasons", [[], [None], [None, None], ["stop", None], ["stop", "stop"]], ids=str)
def test_a_stream_has_to_end_once(reasons: list[str | None]) -> None:
    choices = [{"text": "x", "token_ids": [1], "finish_reason": reason} for reason in reasons]
    with pytest.raises(ValueError, match=r"finish_reason: .*, expected one, at the end"):
        Answer.of_choices(choices)


def test_catalogue_fits_the_model_and_shares_prefixes() -> None:
    requests = catalogue(3, 120)
    assert requests == catalogue(3, 120)
    assert requests != catalogue(4, 120)
    assert len(set(requests)) == 120
    assert {len(request.prompt) + request.max_tokens <= MAX_MODEL_LEN for request in requests} == {
        True,
        False,
    }
    for request in requests:
        assert 0 < len(request.prompt) < MAX_MODEL_LEN
        assert set(request.prompt) <= set(TEXT_TOKENS)
    beginnings = [request.prompt[:100] for request in requests if len(request.prompt) >= 100]
    assert len(set(beginnings)) < len(beginnings) / 2


def test_follow_up_begins_with_the_prompt_and_its_answer() -> None:
    request = Request((3, 1, 4), 5)
    follow_up = request.follow_up((1, 5, 9))
    assert follow_up is not None
    assert follow_up.prompt[:6] == (3, 1, 4, 1, 5, 9)
    assert Request((1,) * MOST_PROMPT_TOKENS, 5).follow_up((2,)) is None


def test_metrics_are_added_up_over_labels() -> None:
    text = '# HELP a of b\n# TYPE a counter\na{e="0",m="x y"} 2.0\na{e="1"} 3.0\nvllm:b 1e-05\n'
    assert parse_metrics(text) == {"a": 5.0, "vllm:b": 1e-05}


class MadeUpServer:
    """Answers completions with as many tokens as were asked for, each the last one plus one.

    Args:
        broken: "slow", "status", "error" or "no end", where the server is at fault.
    """

    def __init__(self, broken: str = "") -> None:
        self.broken = broken
        self.left = asyncio.Event()

    async def until_left(self, client: Client) -> None:
        """Returns when a client has closed the connection of a stream, while the server goes on."""
        await asyncio.wait_for(self.left.wait(), 30)

    async def answer(self, http: web.Request) -> web.StreamResponse:
        try:
            body = await http.json()
        except ValueError:
            return web.json_response({"error": {"message": "not JSON"}}, status=400)
        if self.broken == "slow":
            await asyncio.sleep(1.0)
        if self.broken == "status":
            return web.json_response({"error": {"message": "out of order"}}, status=500)
        tokens = [body["prompt"][-1] + 1 + i for i in range(body["max_tokens"])]
        choices = [{"text": f" {token}", "token_ids": [token], "finish_reason": None} for token in tokens]
        choices[-1]["finish_reason"] = "length"
        if body.get("stream"):
            return await self.streamed(http, choices)
        whole = {"text": "".join(c["text"] for c in choices), "token_ids": tokens, "finish_reason": "length"}
        return web.json_response({"choices": [whole]})

    async def streamed(self, http: web.Request, choices: list[dict[str, Any]]) -> web.StreamResponse:
        response = web.StreamResponse()
        await response.prepare(http)
        try:
            for choice in choices:
                await response.write(b"data: " + web.json_response({"choices": [choice]}).body + b"\n\n")
                if self.broken == "error":
                    await response.write(b'data: {"error": {"message": "the engine is gone"}}\n\n')
                await asyncio.sleep(0.01)
            if self.broken != "no end":
                await response.write(b"data: [DONE]\n\n")
        except (asyncio.CancelledError, ConnectionError):
            self.left.set()
            raise
        return response


REQUEST = Request((1, 2), 3)
ANSWER = Answer((3, 4, 5), " 3 4 5", "length")


def use(server: MadeUpServer, *actions: Callable[[Client], Awaitable[object]]) -> Tally:
    """What a client has noted of a server after some actions; a fault ends them."""

    async def main() -> Tally:
        app = web.Application()
        app.router.add_post("/v1/completions", server.answer)
        tally = Tally()
        async with TestServer(app) as served, aiohttp.ClientSession() as session:
            client = Client(session, str(served.make_url("")), tally)
            for action in actions:
                await action(client)
        return tally

    return asyncio.run(main())


def test_completion_and_stream_are_the_same_answer() -> None:
    tally = use(
        MadeUpServer(), lambda client: client.complete(REQUEST), lambda client: client.stream(REQUEST)
    )
    assert tally.answers == {REQUEST: {ANSWER: 2}}
    assert tally.events == {"completed": 2, "of these, streamed": 1}


def test_abort_closes_the_connection() -> None:
    server = MadeUpServer()
    long = Request((1, 2), 500)
    tally = use(server, lambda client: client.abort(long, after=3), server.until_left)
    assert tally.events == {"aborted in mid-stream": 1}
    assert not tally.answers


def test_an_answer_that_is_too_short_to_be_aborted_counts() -> None:
    tally = use(MadeUpServer(), lambda client: client.abort(REQUEST, after=3))
    assert tally.answers == {REQUEST: {ANSWER: 1}}


def test_disconnect_leaves_before_the_answer() -> None:
    tally = use(MadeUpServer("slow"), lambda client: client.disconnect(REQUEST, seconds=0.05))
    assert tally.events == {"disconnected": 1}
    tally = use(MadeUpServer(), lambda client: client.disconnect(REQUEST, seconds=60.0))
    assert tally.events == {"completed": 1}


def test_breaking_off_leaves_the_server_in_order() -> None:
    tally = use(
        MadeUpServer(), lambda client: client.break_off(REQUEST), lambda client: client.complete(REQUEST)
    )
    assert tally.events == {"broken off": 1, "completed": 1}


@pytest.mark.parametrize(
    ("refusal", "fault"),
    [
        pytest.param(Refusal(b"{", "not JSON"), None, id="as-expected"),
        pytest.param(Refusal(b"{", "comma"), "expected 400 with 'comma'", id="another-name"),
        pytest.param(Refusal(REQUEST.body(), "prompt"), "200 .*, expected 400", id="accepted"),
    ],
)
def test_a_refusal_has_its_status_and_name(refusal: Refusal, fault: str | None) -> None:
    if fault is None:
        tally = use(MadeUpServer(), lambda client: client.refused(refusal))
        assert tally.events == {"refused by name": 1}
    else:
        with pytest.raises(FaultError, match=fault):
            use(MadeUpServer(), lambda client: client.refused(refusal))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        ("status", "status 500: .*out of order"),
        ("error", "the engine is gone"),
        ("no end", "without its end"),
    ],
)
def test_a_broken_stream_is_a_fault(broken: str, message: str) -> None:
    with pytest.raises(FaultError, match=message):
        use(MadeUpServer(broken), lambda client: client.stream(REQUEST))


def traffic_of_a_second(client: Client) -> Awaitable[None]:
    return run_clients(client, catalogue(0, 30), seed=0, deadline=time.monotonic() + 1)


def test_traffic_is_of_every_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "REFUSALS", (Refusal(b"{", "not JSON"),))
    tally = use(MadeUpServer(), traffic_of_a_second)
    assert not tally.faults
    assert {event for event in HAS_TO_HAPPEN if not tally.events[event]} <= {
        "disconnected",
        "preemptions",
        "tokens from the prefix cache",
    }
    assert set(tally.answers) - set(catalogue(0, 30)), "no follow-up"


def test_traffic_ends_after_many_faults(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(traffic, "REFUSALS", (Refusal(REQUEST.body(), "prompt"),))
    tally = use(MadeUpServer(), lambda client: run_clients(client, catalogue(0, 30), 0, deadline=math.inf))
    assert MOST_FAULTS <= len(tally.faults) < MOST_FAULTS + CLIENTS
    assert all(fault.startswith("exceed: FaultError: 200") for fault in tally.faults)
    assert tally.events["completed"] > 0


def test_report_fails_on_a_fault_and_where_too_little_has_happened(
    capsys: pytest.CaptureFixture[str],
) -> None:
    everything = dict.fromkeys(HAS_TO_HAPPEN, 1)
    assert report(Tally(Counter(everything))) == 0
    assert report(Tally(Counter(everything), faults=["another answer"])) == 1
    assert "FAULT another answer" in capsys.readouterr().out
    assert report(Tally(Counter({**everything, "preemptions": 0}))) == 1
    assert "FAULT preemptions: none" in capsys.readouterr().out
