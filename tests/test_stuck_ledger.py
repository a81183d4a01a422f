"""A ledger that is there and does not answer: somebody else's transaction holds what every hold and booking needs."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.gateway import Gateway
from proxy.ledger import reports
from proxy.ledger.books import lock_teams
from proxy.ledger.engine import Database
from tests.bare import order, post
from tests.live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    PRICE_MICRO_USD,
    Conversation,
    LiveGateway,
    Loop,
    ScriptedUpstream,
    json_answer,
    live_gateway,
    replay,
    wait_for,
    whole,
)

Parts = tuple[LiveGateway, ScriptedUpstream]


@pytest.fixture
def parts(database_url: str, tmp_path: Path) -> Iterator[Parts]:
    with live_gateway(database_url, tmp_path) as (gateway, upstream):
        gateway.set_budget(10 * PRICE_MICRO_USD)
        # From now on the key is remembered: what is stuck below is the ledger's writing alone.
        assert gateway.client.get("/models").status_code == 200
        yield gateway, upstream


@contextmanager
def stuck(gateway: LiveGateway) -> Iterator[None]:
    database = Database(gateway.database_url)
    try:
        with database.writing() as connection:
            lock_teams(connection, [1])
            yield
    finally:
        database.close()


def nothing_held(gateway: LiveGateway) -> bool | None:
    held = gateway.client.get("/budget").json()["budgets"][0]["held_micro_usd"]
    states = {charge["state"] for charge in gateway.charges()}
    return True if held == 0 and states <= {"released"} else None


def test_it_refuses_and_what_it_holds_afterwards_is_let_go(parts: Parts) -> None:
    gateway, upstream = parts
    with stuck(gateway):
        refused = gateway.client.post("/images/generations", json=ORDER)
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "ledger_unavailable")
    assert refused.headers["retry-after"] == "5"
    wait_for(lambda: nothing_held(gateway))
    assert upstream.requests == []
    assert gateway.client.post("/images/generations", json=ORDER).status_code == 200
    assert len(upstream.requests) == 1


def test_who_left_meanwhile_is_not_sent(parts: Parts) -> None:
    gateway, upstream = parts
    body = b'{"model": "gpt-image-2", "prompt": "a bean"}'
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: g\r\nAuthorization: Bearer {gateway.key}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    with stuck(gateway):
        for _ in range(3):
            with gateway.connect() as client:
                client.sendall(head.encode() + body)
        # A request behind them, refused at its time, tells that they have been read.
        assert gateway.client.post("/images/generations", json=ORDER).status_code == 503
    wait_for(lambda: nothing_held(gateway))
    assert upstream.requests == []


def test_an_outcome_is_safe_before_its_answer_ends(parts: Parts) -> None:
    gateway, upstream = parts
    asked, may_answer = threading.Event(), threading.Event()
    answer = replay(whole(200, JSON, json_answer()))

    async def script(conversation: Conversation) -> None:
        asked.set()
        await asyncio.to_thread(may_answer.wait, 30)
        await answer(conversation)

    upstream.script = script
    statuses: list[int] = []
    client = threading.Thread(
        target=lambda: statuses.append(gateway.client.post("/images/generations", json=ORDER).status_code)
    )
    client.start()
    assert asked.wait(30)
    with stuck(gateway):
        may_answer.set()
        client.join(30)
        assert statuses == [200]
        # Noted before its client had it, and on the disk soon after, whatever the ledger does.
        kept = {file.suffix: file for file in (gateway.state_dir / "journal").iterdir()}
        assert b'"state":"settled"' in b"".join(file.read_bytes() for file in kept.values())
        assert wait_for(lambda: b'"state":"settled"' in kept[".journal"].read_bytes() or None)
    assert gateway.charge_when_ended()["settled_micro_usd"] == PRICE_MICRO_USD


def test_what_is_asked_while_the_process_ends_is_not_sent(
    database_url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its body is complete only after all other exchanges were told to end, and the ledger would hold for it a moment later."""
    hang, told_to_end = threading.Event(), threading.Event()
    close = Gateway.close

    async def close_and_tell(self: Gateway) -> None:
        # All is told before there is anything to wait for.
        asyncio.get_running_loop().call_soon(told_to_end.set)
        await close(self)

    monkeypatch.setattr(Gateway, "close", close_and_tell)

    async def say_nothing(_: Conversation) -> None:
        await asyncio.to_thread(hang.wait, PATIENCE_SECONDS)

    loop = Loop()
    upstream = ScriptedUpstream(loop)
    upstream.script = say_nothing
    gateway = LiveGateway(loop, database_url, upstream.base_url, tmp_path, {"BEANMETER_DRAIN_SECONDS": "0.2"}).__enter__()
    data = post(gateway.key, order())
    ending = threading.Thread(target=gateway.__exit__)
    with gateway.connect() as early, gateway.connect() as late:
        early.sendall(data)
        wait_for(lambda: upstream.requests or None)
        late.sendall(data[:-1])
        with stuck(gateway):
            ending.start()
            assert told_to_end.wait(PATIENCE_SECONDS)
            late.sendall(data[-1:])
            assert b"upstream_failed" in early.recv(1 << 16)
        refused = late.recv(1 << 16)
        assert b"ledger_unavailable" in refused
        assert b"This gateway is ending" in refused
        ending.join(PATIENCE_SECONDS)
    hang.set()
    assert len(upstream.requests) == 1
    upstream.close()
    loop.close()
    database = Database(database_url)
    with database.reading() as connection:
        assert [charge["state"] for charge in reports.list_charges(connection)] == ["review"]
    database.close()
