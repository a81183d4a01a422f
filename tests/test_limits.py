"""Limits on requests a minute and at a time, and idempotency keys: exact through one gateway and through several."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.app import running
from proxy.ledger import accounts
from proxy.settings import load
from tests.live import (
    JSON,
    ORDER,
    PRICE_MICRO_USD,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    json_answer,
    live_gateway,
    now,
    replay,
    wait_for,
    whole,
)

Parts = tuple[LiveGateway, ScriptedUpstream]


@pytest.fixture
def parts(tmp_path: Path) -> Iterator[Parts]:
    with live_gateway(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as both:
        yield both


def set_limit(gateway: LiveGateway, **limit: Any) -> None:
    with gateway.database.writing() as connection:
        accounts.set_limit(connection, "red", limit.pop("key_id", None), **limit, now=now(), actor="test")


def send(gateway: LiveGateway, idempotency_key: str | None = None, **fields: Any) -> httpx2.Response:
    headers = {} if idempotency_key is None else {"idempotency-key": idempotency_key}
    return gateway.client.post("/images/generations", json=ORDER | fields, headers=headers)


def code_of(answer: httpx2.Response) -> tuple[int, str | None]:
    return answer.status_code, answer.json().get("error", {}).get("code")


class Gate:
    """A script that answers only once the test opens it."""

    def __init__(self, upstream: ScriptedUpstream) -> None:
        self._open = threading.Event()
        self._answer = replay(whole(200, JSON, json_answer()))
        upstream.script = self.script

    async def script(self, conversation: Conversation) -> None:
        await asyncio.to_thread(self._open.wait, 30)
        await self._answer(conversation)

    def open(self) -> None:
        self._open.set()


@contextmanager
def going_on(gateway: LiveGateway, gate: Gate, number: int, **headers: str) -> Iterator[list[Any]]:
    """So many exchanges that wait for their answers until the end of the block."""
    with ThreadPoolExecutor(number) as pool:
        waiting = [pool.submit(send, gateway, headers.get("idempotency_key")) for _ in range(number)]
        try:
            wait_for(lambda: True if len(gateway.charges()) >= number else None)
            yield waiting
        finally:
            gate.open()


def test_requests_a_minute(parts: Parts) -> None:
    gateway, upstream = parts
    set_limit(gateway, rpm=3)
    answers = [send(gateway) for _ in range(5)]
    assert [answer.status_code for answer in answers] == [200, 200, 200, 429, 429]
    refused = answers[-1]
    assert code_of(refused) == (429, "rate_limit_exceeded")
    assert refused.json()["error"]["type"] == "requests"
    assert 1 <= int(refused.headers["retry-after"]) <= 60
    assert "3 requests a minute" in refused.json()["error"]["message"]
    assert (len(upstream.requests), len(gateway.charges())) == (3, 3)


def test_requests_at_a_time(parts: Parts) -> None:
    gateway, upstream = parts
    set_limit(gateway, concurrency=2)
    gate = Gate(upstream)
    with going_on(gateway, gate, 2) as waiting:
        assert code_of(send(gateway)) == (429, "rate_limit_exceeded")
        assert len(gateway.charges()) == 2
    assert [answer.result().status_code for answer in waiting] == [200, 200]
    assert send(gateway).status_code == 200


def test_a_keys_limit_holds_for_that_key_alone(parts: Parts) -> None:
    gateway, _ = parts
    with gateway.database.writing() as connection:
        other = accounts.add_key(connection, "red", now=now(), actor="test")
    set_limit(gateway, rpm=1, key_id=gateway.key_id)
    assert [send(gateway).status_code for _ in range(2)] == [200, 429]
    headers = {"authorization": f"Bearer {other.key}"}
    assert gateway.client.post("/images/generations", json=ORDER, headers=headers).status_code == 200


def test_what_the_budget_refuses_does_not_count(parts: Parts) -> None:
    gateway, _ = parts
    set_limit(gateway, rpm=1, concurrency=1)
    gateway.set_budget(PRICE_MICRO_USD - 1)
    assert [code_of(send(gateway))[1] for _ in range(3)] == ["insufficient_quota"] * 3
    gateway.set_budget(PRICE_MICRO_USD)
    assert send(gateway).status_code == 200


def test_a_limit_is_exact_through_two_gateways(database_url: str, tmp_path: Path) -> None:
    second_home = tmp_path / "second"
    second_home.mkdir()
    with live_gateway(database_url, tmp_path) as (gateway, upstream):
        set_limit(gateway, rpm=20)

        settings = load(
            {
                "BEANMETER_UPSTREAM_URL": upstream.base_url,
                "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
                "BEANMETER_DATABASE_URL": database_url,
                "BEANMETER_STATE_DIR": str(second_home),
                "BEANMETER_DRAIN_SECONDS": "5",
            },
            second_home,
        )
        second = running(settings, "127.0.0.1", 0)
        urls = [gateway.base_url, gateway.loop.run(second.__aenter__())]
        try:

            def post(number: int) -> int:
                url = urls[number % 2] + "/images/generations"
                headers = {"authorization": f"Bearer {gateway.key}"}
                return httpx2.post(url, json=ORDER, headers=headers, trust_env=False, timeout=30).status_code

            with ThreadPoolExecutor(16) as pool:
                statuses = Counter(pool.map(post, range(60)))
        finally:
            gateway.loop.run(second.__aexit__(None, None, None))
        assert statuses == {200: 20, 429: 40}
        assert len(upstream.requests) == 20


# Idempotency keys


def test_a_repetition_is_refused_and_told_what_the_first_one_cost(parts: Parts) -> None:
    gateway, upstream = parts
    first = send(gateway, "once")
    again = send(gateway, "once")
    assert code_of(again) == (409, "idempotency_key_reused")
    assert again.headers["x-should-retry"] == "false"
    message = again.json()["error"]["message"]
    assert first.headers["x-beanmeter-request-id"] in message
    assert "$0.210700" in message
    assert (len(upstream.requests), len(gateway.charges())) == (1, 1)


def test_while_the_first_one_goes_on(parts: Parts) -> None:
    gateway, upstream = parts
    gate = Gate(upstream)
    with going_on(gateway, gate, 1, idempotency_key="once"):
        again = send(gateway, "once")
        assert code_of(again) == (409, "idempotency_key_in_use")
        assert 1 <= int(again.headers["retry-after"]) <= 60
    assert len(upstream.requests) == 1


def test_with_another_body_it_is_another_request(parts: Parts) -> None:
    gateway, upstream = parts
    send(gateway, "once")
    assert code_of(send(gateway, "once", prompt="another bean")) == (422, "idempotency_key_mismatch")
    assert len(upstream.requests) == 1


def test_another_team_may_use_the_same_key(parts: Parts) -> None:
    gateway, upstream = parts
    _, other = gateway.add_team("green")
    send(gateway, "once")
    headers = {"authorization": f"Bearer {other}", "idempotency-key": "once"}
    assert gateway.client.post("/images/generations", json=ORDER, headers=headers).status_code == 200
    assert len(upstream.requests) == 2


def test_after_a_release_or_a_refusal_it_may_be_tried_again(parts: Parts) -> None:
    gateway, upstream = parts
    gateway.set_budget(PRICE_MICRO_USD - 1)
    assert send(gateway, "once").status_code == 429
    gateway.set_budget(PRICE_MICRO_USD)
    upstream.answer(whole(400, JSON, b'{"error": {"message": "no", "type": "t", "param": null, "code": null}}'))
    assert send(gateway, "once").status_code == 400
    upstream.answer(whole(200, JSON, json_answer()))
    assert send(gateway, "once").status_code == 200
    assert code_of(send(gateway, "once")) == (409, "idempotency_key_reused")
    assert [charge["state"] for charge in gateway.charges()] == ["released", "settled"]


def test_what_is_in_review_is_not_sent_again(parts: Parts) -> None:
    gateway, upstream = parts

    async def break_off(conversation: Conversation) -> None:
        await conversation.reset()

    upstream.script = break_off
    assert send(gateway, "once").status_code == 502
    assert code_of(send(gateway, "once")) == (409, "idempotency_key_reused")
    assert len(upstream.requests) == 1


def test_of_many_at_once_one_is_sent(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, upstream), ThreadPoolExecutor(24) as pool:
        statuses = Counter(answer.status_code for answer in pool.map(lambda _: send(gateway, "once"), range(24)))
        assert statuses == {200: 1, 409: 23}
        assert len(upstream.requests) == 1


@pytest.mark.parametrize("keys", [["a", "b"], [""], ["x" * 256], ["\u00e9".encode("latin-1")]])
def test_a_key_that_is_none_is_refused(parts: Parts, keys: list[Any]) -> None:
    gateway, upstream = parts
    headers = [(b"idempotency-key", key.encode() if isinstance(key, str) else key) for key in keys]
    answer = gateway.client.post("/images/generations", json=ORDER, headers=headers)
    assert code_of(answer) == (400, "invalid_value")
    assert answer.json()["error"]["param"] == "Idempotency-Key"
    assert upstream.requests == []
