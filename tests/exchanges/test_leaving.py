"""Clients that leave, stall or read too slowly: what was sent upstream is read to its end and paid for."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from proxy.ledger.decisions import Booking
from proxy.ledger.teller import Left, Teller
from tests.exchanges.plays import DONE, IMAGE, PREVIEW
from tests.exchanges.teams import (
    HIGH,
    Team,
    asked,
    assert_that_it_counts,
    booked,
    leave,
    new_team,
    request_bytes,
    review,
    settled,
    streamed,
)
from tests.live import (
    JSON,
    PATIENCE_SECONDS,
    SSE,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    chunked,
    completed,
    json_answer,
    live_gateway,
    replay,
    wait_for,
    whole,
)

SHAPES = {
    "stream": (streamed(n=2), SSE, [PREVIEW, IMAGE, IMAGE, DONE]),
    "json": (asked(n=2), JSON, [json_answer(2)[:30], json_answer(2)[30:60], json_answer(2)[60:]]),
}


@pytest.mark.parametrize("manner", ["close", "reset"])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("sent", [0, 1, 2])
def test_a_client_that_leaves_pays_for_what_is_made(
    stage: tuple[LiveGateway, ScriptedUpstream], shape: str, sent: int, manner: str
) -> None:
    """The client leaves before the first byte (``sent`` is 0) or after a piece of the answer; the rest comes only then."""
    gateway, upstream = stage
    order, headers, pieces = SHAPES[shape]
    asking, left = threading.Event(), threading.Event()

    async def script(conversation: Conversation) -> None:
        asking.set()
        if sent:
            await conversation.write(chunked(200, headers, pieces[:sent], end=False))
        await asyncio.to_thread(left.wait, PATIENCE_SECONDS)
        start = b"" if sent else chunked(200, headers, [], end=False)
        # The last chunk and what comes before it, without another head.
        await conversation.write(start + chunked(200, [], pieces[sent:]).partition(b"\r\n\r\n")[2])

    team = new_team(gateway)
    upstream.script = script
    requests = len(upstream.requests)
    with gateway.connect() as client:
        client.sendall(request_bytes(team, order))
        assert asking.wait(PATIENCE_SECONDS)
        seen = b""
        while sent and pieces[sent - 1] not in seen:
            seen += client.recv(1 << 16)
        leave(client, manner)
    left.set()
    charge = team.charge()
    assert booked(charge) == settled(2)
    assert charge["upstream_status"] == 200
    assert_that_it_counts(team, charge)
    assert len(upstream.requests) == requests + 1


@pytest.mark.parametrize("manner", ["close", "reset"])
def test_a_client_that_leaves_before_a_failure_leaves_a_review(
    stage: tuple[LiveGateway, ScriptedUpstream], manner: str
) -> None:
    gateway, upstream = stage
    asking, left = threading.Event(), threading.Event()

    async def script(conversation: Conversation) -> None:
        asking.set()
        await asyncio.to_thread(left.wait, PATIENCE_SECONDS)
        await conversation.reset()

    team = new_team(gateway)
    upstream.script = script
    with gateway.connect() as client:
        client.sendall(request_bytes(team, asked()))
        assert asking.wait(PATIENCE_SECONDS)
        leave(client, manner)
    left.set()
    assert booked(team.charge()) == review(HIGH)


@pytest.mark.parametrize("manner", ["close", "reset"])
@pytest.mark.parametrize("shape", SHAPES)
def test_clients_that_leave_right_after_sending(stage: tuple[LiveGateway, ScriptedUpstream], shape: str, manner: str) -> None:
    """Some are gone before their request is read, and some after: what went upstream is paid for, and nothing else."""
    gateway, upstream = stage
    order, headers, pieces = SHAPES[shape]
    upstream.script = replay(chunked(200, headers, pieces))
    team = new_team(gateway)
    requests = len(upstream.requests)
    for _ in range(30):
        client = gateway.connect()
        client.sendall(request_bytes(team, order))
        leave(client, manner)

    def over() -> int | None:
        unheld = ("incomplete_body", "client_gone")
        refused = sum(gateway.metric(f'beanmeter_refusals_total{{code="{code}",team="{team.name}"}}') for code in unheld)
        states = Counter(charge["state"] for charge in team.charges())
        return states["settled"] if states["settled"] + states["released"] + refused == 30 else None

    paid = wait_for(over)
    assert len(upstream.requests) - requests == paid
    assert team.budget() == (paid * 2 * HIGH, 0)


@pytest.mark.parametrize("manner", ["close", "reset"])
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_client_that_leaves_in_its_upload_is_not_charged(
    stage: tuple[LiveGateway, ScriptedUpstream], framing: str, manner: str
) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    requests = len(upstream.requests)
    # The body so far is a whole order: only its end is missing.
    body = json.dumps(asked()).encode()
    length = "Transfer-Encoding: chunked" if framing == "chunked" else f"Content-Length: {len(body) + 1}"
    head = (
        request_bytes(team, asked()).partition(b"\r\n\r\n")[0].replace(f"Content-Length: {len(body)}".encode(), length.encode())
    )
    sent = b"%x\r\n%s\r\n" % (len(body), body) if framing == "chunked" else body
    client = gateway.connect()
    client.sendall(head + b"\r\n\r\n" + sent)
    leave(client, manner)
    wait_for(lambda: gateway.metric(f'beanmeter_refusals_total{{code="incomplete_body",team="{team.name}"}}') == 1 or None)
    assert team.charges() == []
    assert team.budget() == (0, 0)
    assert len(upstream.requests) == requests


def test_a_reader_that_stalls_is_let_go_and_its_answer_read_to_the_end(tmp_path: Path) -> None:
    settings = {"BEANMETER_UPSTREAM_TIMEOUT_SECONDS": "4"}
    with live_gateway(f"sqlite:///{tmp_path / 'beanmeter.db'}", tmp_path, settings) as (gateway, upstream):
        team = new_team(gateway)
        line = completed(padding="x" * (1 << 20))
        upstream.script = replay(chunked(200, SSE, [line] * 32))
        with reading_nothing(gateway, team, streamed(n=10)) as client:
            charge = team.charge()
            assert booked(charge)[:4] == ("settled", 32 * HIGH, 0, 32)
            # What it reads now is what was on its way, and then no proper end.
            assert not read_all(client).endswith(b"0\r\n\r\n")
        assert len(upstream.requests) == 1


def test_a_reader_too_slow_for_the_time_is_let_go_and_its_answer_read_to_the_end(tmp_path: Path) -> None:
    settings = {"BEANMETER_UPSTREAM_TIMEOUT_SECONDS": "4"}
    with live_gateway(f"sqlite:///{tmp_path / 'beanmeter.db'}", tmp_path, settings) as (gateway, upstream):
        team = new_team(gateway)
        line = completed(padding="x" * (1 << 20))
        upstream.script = replay(chunked(200, SSE, [line] * 32))
        with reading_nothing(gateway, team, streamed(n=10), room=1 << 16) as client:
            # It never stops, and at this pace it would take several times as long as an exchange may.
            while not client_is_done(client):
                time.sleep(0.03)
            assert booked(team.charge())[:4] == ("settled", 32 * HIGH, 0, 32)
        assert len(upstream.requests) == 1


@contextmanager
def reading_nothing(gateway: LiveGateway, team: Team, order: dict[str, Any], room: int = 4096) -> Iterator[socket.socket]:
    """A connection with a request on it, and little room for the answer."""
    client = socket.socket()
    with client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, room)
        client.settimeout(PATIENCE_SECONDS)
        client.connect(("127.0.0.1", gateway.port))
        client.sendall(request_bytes(team, order))
        yield client


def client_is_done(client: socket.socket) -> bool:
    """Read a little; whether there is nothing more to come."""
    try:
        return not client.recv(1 << 16)
    except ConnectionResetError:
        return True


def read_all(client: socket.socket) -> bytes:
    found = b""
    try:
        while piece := client.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def test_the_process_ends_while_an_outcome_is_being_noted(
    stage: tuple[LiveGateway, ScriptedUpstream], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its exchange is ended at that moment: what is booked is delivered all the same."""
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = replay(whole(200, JSON, json_answer(1)))
    leave_to = Teller.leave
    ended: list[asyncio.Task[Any]] = []

    def and_end(teller: Teller, job: Booking) -> Left | None:
        left = leave_to(teller, job)
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        ended.append(task)
        return left

    monkeypatch.setattr(Teller, "leave", and_end)
    with gateway.connect() as client:
        client.sendall(request_bytes(team, asked()))
        answer = b""
        while not answer.endswith(json_answer(1)):
            piece = client.recv(65_536)
            assert piece, answer
            answer += piece
    wait_for(lambda: all(task.done() for task in ended) or None)
    assert [task.cancelling() for task in ended] == [1]
    assert_that_it_counts(team, team.charge())
