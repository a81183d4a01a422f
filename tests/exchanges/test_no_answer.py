"""No answer, one that is not passed on, and answers that fall silent."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.exchanges.plays import IMAGE, Play, framed
from tests.exchanges.teams import HIGH, RELEASED, ask, asked, assert_that_it_counts, booked, new_team, review, settled, streamed
from tests.live import (
    JSON,
    SSE,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    chunked,
    json_answer,
    live_gateway,
    replay,
    whole,
)


@pytest.mark.parametrize(
    "play",
    [
        pytest.param(Play(b"", "close"), id="closed"),
        pytest.param(Play(b"", "reset"), id="reset"),
        pytest.param(Play(b"HTTP/1.1 200 OK\r\nContent-", "close"), id="cut in the head"),
        pytest.param(Play(b"HTTP/1.1 200 OK\r\nContent-", "reset"), id="reset in the head"),
        pytest.param(Play(b"SMTP ready\r\n\r\n", "close"), id="not http"),
    ],
)
@pytest.mark.parametrize("order", [asked(n=2), streamed(n=2)], ids=["json", "stream"])
def test_no_answer_is_a_review(stage: tuple[LiveGateway, ScriptedUpstream], play: Play, order: dict[str, Any]) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = play
    requests = len(upstream.requests)

    view = ask(team, order)

    assert (view.status, view.code, view.broken) == (502, "upstream_failed", False)
    assert view.headers["x-should-retry"] == "false"
    assert view.headers["x-beanmeter-error-source"] == "gateway"
    charge = team.charge()
    assert booked(charge) == review(2 * HIGH)
    assert charge["upstream_status"] is None
    assert_that_it_counts(team, charge)
    assert gateway.metric(f'beanmeter_refusals_total{{code="upstream_failed",team="{team.name}"}}') == 1
    assert len(upstream.requests) == requests + 1


def test_a_connection_that_is_not_made_costs_nothing(tmp_path: Path) -> None:
    with live_gateway(f"sqlite:///{tmp_path / 'beanmeter.db'}", tmp_path) as (gateway, upstream):
        upstream.close()
        team = new_team(gateway)
        view = ask(team, asked())
        assert (view.status, view.code) == (502, "upstream_unreachable")
        charge = team.charge()
        assert booked(charge) == RELEASED
        assert charge["upstream_status"] is None
        assert_that_it_counts(team, charge)
        assert upstream.requests == []


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
def test_a_refusal_of_the_organisations_key_is_not_passed_on(stage: tuple[LiveGateway, ScriptedUpstream], framing: str) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    echo = json.dumps({"error": {"message": f"Incorrect API key: {UPSTREAM_KEY}"}}).encode()
    upstream.script = framed(framing, [*JSON, ("X-Echo", UPSTREAM_KEY)], echo, 401)

    view = ask(team, asked())

    assert (view.status, view.code, view.headers["x-should-retry"]) == (502, "upstream_credentials", "false")
    assert UPSTREAM_KEY not in view.body.decode()
    assert UPSTREAM_KEY not in str(view.headers)
    charge = team.charge()
    assert booked(charge) == RELEASED
    assert charge["upstream_status"] == 401
    assert_that_it_counts(team, charge)


@pytest.fixture(scope="module")
def hasty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """A gateway that gives an exchange half a second."""
    directory = tmp_path_factory.mktemp("hasty")
    url = f"sqlite:///{directory / 'beanmeter.db'}"
    with live_gateway(url, directory, {"BEANMETER_UPSTREAM_TIMEOUT_SECONDS": "0.5"}) as parts:
        yield parts


@pytest.mark.parametrize(
    ("order", "wire", "charge"),
    [
        pytest.param(streamed(n=2), chunked(200, SSE, [], end=False), review(2 * HIGH), id="after the head"),
        pytest.param(streamed(n=2), chunked(200, SSE, [IMAGE], end=False), review(HIGH, 1, HIGH), id="after one of two"),
        pytest.param(streamed(), chunked(200, SSE, [IMAGE], end=False), settled(1), id="after the last image"),
        pytest.param(asked(), whole(200, JSON, json_answer())[:-6], review(HIGH), id="in a document"),
    ],
)
def test_silence_in_an_answer_breaks_the_transfer(
    hasty: tuple[LiveGateway, ScriptedUpstream], order: dict[str, Any], wire: bytes, charge: tuple[Any, ...]
) -> None:
    gateway, upstream = hasty
    team = new_team(gateway)
    upstream.script = replay(wire)
    view = ask(team, order)
    assert (view.status, view.broken) == (200, True)
    assert booked(team.charge()) == charge
    assert_that_it_counts(team, team.charge())


def test_silence_before_an_answer_is_a_review(hasty: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = hasty
    team = new_team(gateway)
    upstream.script = Play(b"")
    requests = len(upstream.requests)
    view = ask(team, asked())
    assert (view.status, view.code) == (502, "upstream_failed")
    assert booked(team.charge()) == review(HIGH)
    assert_that_it_counts(team, team.charge())
    assert len(upstream.requests) == requests + 1


def test_trickling_bytes_do_not_put_the_deadline_off(hasty: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = hasty

    async def trickle(conversation: Conversation) -> None:
        await conversation.write(chunked(200, SSE, [], end=False))
        while True:
            await conversation.write(b"3\r\n: \n\r\n")
            await asyncio.sleep(0.05)

    team = new_team(gateway)
    upstream.script = trickle
    view = ask(team, streamed())
    assert view.broken
    assert booked(team.charge()) == review(HIGH)
