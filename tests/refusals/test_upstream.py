"""Requests that the upstream does not answer."""

from __future__ import annotations

import json
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import openai
import pytest

from tests.bare import EDITS, GENERATIONS, JSON_TYPE, Reply, ask, order, post
from tests.live import (
    JSON,
    PRICE_MICRO_USD,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    Loop,
    ScriptedUpstream,
    live_gateway,
    whole,
)
from tests.refusals.checks import CREDENTIALS, FAILED, UNREACHABLE, check, sdk
from tests.refusals.forms import FORM_TYPE, form


def only_charge(gateway: LiveGateway, reply: Reply) -> tuple[str, int, int]:
    """The state of the request's charge, what is settled and what is still held."""
    charge = gateway.charge_when_ended(reply.values("x-request-id")[0])
    return charge["state"], charge["settled_micro_usd"], charge["reserved_micro_usd"]


@contextmanager
def closed_port() -> Iterator[int]:
    """A port on which nobody listens, kept from everybody else."""
    with socket.socket() as holder:
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]


def test_an_upstream_that_can_not_be_reached(database_url: str, tmp_path: Path) -> None:
    loop = Loop()
    with closed_port() as port, LiveGateway(loop, database_url, f"http://127.0.0.1:{port}/v1", tmp_path) as gateway:
        for path, kind, body in ((GENERATIONS, JSON_TYPE, order()), (EDITS, FORM_TYPE, form())):
            reply = ask(gateway, post(gateway.key, body, path, [kind]))
            check(reply, UNREACHABLE)
            assert only_charge(gateway, reply) == ("released", 0, 0)
    loop.close()


def test_an_upstream_that_refuses_the_organisations_key(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    echo = json.dumps({"error": {"message": f"Incorrect API key provided: {UPSTREAM_KEY}", "code": "invalid_api_key"}}).encode()
    for answer in (
        whole(401, [*JSON, ("X-Request-Id", "theirs"), ("WWW-Authenticate", f"Bearer {UPSTREAM_KEY}")], echo),
        whole(401, [("Content-Type", "text/html")], UPSTREAM_KEY.encode() * 10_000),
        whole(401, [], b""),
    ):
        upstream.answer(answer)
        reply = ask(gateway, post(gateway.key, order()))
        check(reply, CREDENTIALS)
        assert UPSTREAM_KEY not in repr(reply)
        assert only_charge(gateway, reply) == ("released", 0, 0)


async def close_it(conversation: Conversation) -> None:
    await conversation.close()


async def reset_it(conversation: Conversation) -> None:
    await conversation.reset()


async def half_a_head(conversation: Conversation) -> None:
    await conversation.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n")
    await conversation.close()


async def no_http(conversation: Conversation) -> None:
    await conversation.write(b"220 mail.test ESMTP\r\n\r\n")
    await conversation.close()


async def say_nothing(_conversation: Conversation) -> None:
    pass


@pytest.mark.parametrize("script", [close_it, reset_it, half_a_head, no_http])
def test_an_upstream_that_breaks_off_before_it_answers(
    live: tuple[LiveGateway, ScriptedUpstream], script: Callable[[Conversation], Any]
) -> None:
    gateway, upstream = live
    usual, upstream.script = upstream.script, script
    sent = len(upstream.requests)
    try:
        reply = ask(gateway, post(gateway.key, order(n=2)))
    finally:
        upstream.script = usual
    check(reply, FAILED)
    assert only_charge(gateway, reply) == ("review", 0, 2 * PRICE_MICRO_USD)
    assert len(upstream.requests) == sent + 1


def test_an_upstream_that_is_silent_past_the_deadline(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path, {"BEANMETER_UPSTREAM_TIMEOUT_SECONDS": "0.3"}) as (gateway, upstream):
        upstream.script = say_nothing
        reply = ask(gateway, post(gateway.key, order()))
        check(reply, FAILED)
        assert only_charge(gateway, reply) == ("review", 0, PRICE_MICRO_USD)
        assert len(upstream.requests) == 1


def test_the_sdk_does_not_send_again_what_may_have_been_billed(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    upstream.script = close_it
    with sdk(gateway, gateway.key) as client, pytest.raises(openai.InternalServerError) as raised:
        client.images.generate(model="gpt-image-2", prompt="a bean", size="1024x1024", quality="high")
    assert raised.value.code == "upstream_failed"
    assert len(upstream.requests) == len(gateway.charges()) == 1
