"""Connections that break at any byte, the upstream's and the client's: the money follows what was delivered, and a broken
answer looks broken."""

from __future__ import annotations

import asyncio
import random
import re
import socket
import struct
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Row, select

from proxy.ledger.schema import charges
from tests.bare import Incoming, Reply, order, post
from tests.chaos.framing import FRAMINGS, Framing, framed
from tests.chaos.sizes import size
from tests.live import (
    JSON,
    PRICE_MICRO_USD,
    SSE,
    Conversation,
    LiveGateway,
    Script,
    ScriptedUpstream,
    chunked,
    completed,
    event,
    json_answer,
    live_gateway,
    wait_for,
)

DISCONNECTS = size(100, 1_000)

# Every boundary in full; otherwise every so many bytes, from a start that chance gives.
CUT_STEP_BYTES = size(9, 1)

PREVIEW = event("image_generation.partial_image", b64_json="aW1hZ2U=", partial_image_index=0)
IMAGE = completed(size="1024x1024", quality="high")
STREAM = [PREVIEW, IMAGE, IMAGE, b"data: [DONE]\n\n"]


@pytest.fixture
def place(tmp_path: Path) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    with live_gateway(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as found:
        yield found


@pytest.mark.parametrize("framing", FRAMINGS)
@pytest.mark.parametrize("shape", ["stream", "json"])
def test_the_upstream_is_cut_at_every_byte(
    place: tuple[LiveGateway, ScriptedUpstream], chance: random.Random, framing: Framing, shape: str
) -> None:
    gateway, upstream = place
    pieces = STREAM if shape == "stream" else [json_answer(2, size="1024x1024", quality="high")]
    answer = framed(framing, 200, SSE if shape == "stream" else JSON, pieces)
    states: Counter[str] = Counter()
    offsets = [*range(chance.randrange(CUT_STEP_BYTES), len(answer), CUT_STEP_BYTES), len(answer)]
    for offset in offsets:
        how = chance.choice(("close", "reset"))
        upstream.script = cut_at(answer, offset, how)
        reply = ask(gateway, order(n=2, stream=shape == "stream"))
        charge = charge_of(gateway, upstream.requests[-1].values("x-beanmeter-request-id")[0])
        images = images_in(shape, body_in(framing, answer[:offset]))
        where = f"{offset} of {len(answer)}, {how}: {answer[:offset][-40:]!r}"
        owed, held = images * PRICE_MICRO_USD, (2 - images) * PRICE_MICRO_USD
        state = "review" if held else "settled"
        assert (charge.state, charge.settled_micro_usd, charge.reserved_micro_usd) == (state, owed, held), where
        states[charge.state] += 1
        if b"\r\n\r\n" not in answer[:offset]:
            assert reply is not None
            assert (reply.status, reply.error["code"]) == (502, "upstream_failed"), where
        elif ends_whole(framing, shape, offset == len(answer), images, how):
            assert reply is not None, where
            assert reply.body == body_in(framing, answer[:offset])
        else:
            assert reply is None, f"a broken answer that looks whole: {where}"
    assert len(upstream.requests) == len(offsets), "nothing is sent twice"
    assert states["settled"]
    assert states["review"]


def body_in(framing: Framing, answer: bytes) -> bytes:
    """What of the body is in the beginning of an answer."""
    body = answer.partition(b"\r\n\r\n")[2]
    if framing != "chunked":
        return body
    decoded = b""
    while (found := re.match(rb"([0-9a-f]+)\r\n", body)) and int(found[1], 16):
        size_bytes = int(found[1], 16)
        decoded += body[found.end() :][:size_bytes]
        body = body[found.end() + size_bytes + len(b"\r\n") :]
    return decoded


def images_in(shape: str, body: bytes) -> int:
    """The images that somebody who has only this of the body has whole."""
    return body.count(IMAGE.split(b"data: ")[1].rstrip(b"\n") if shape == "stream" else b'"b64_json": "aW1hZ2U="')


def ends_whole(framing: Framing, shape: str, is_all: bool, images: int, how: str) -> bool:
    """Whether the client may take the answer for whole. Where the end is that of the connection, events that came count as
    they are, while a part of a document is nothing."""
    if framing != "close":
        return is_all
    return how == "close" and (is_all or (shape == "stream" and images == 2))


def cut_at(answer: bytes, offset: int, how: str) -> Script:
    async def script(conversation: Conversation) -> None:
        await conversation.write(answer[:offset])
        await (conversation.close() if how == "close" else conversation.reset())

    return script


def ask(gateway: LiveGateway, body: bytes) -> Reply | None:
    """The answer, ``None`` where it broke off."""
    with gateway.connect() as connection:
        connection.sendall(post(gateway.key, body))
        return Incoming(connection).reply()


def charge_of(gateway: LiveGateway, request_id: str) -> Row[Any]:
    """The charge of a request, once it has ended."""

    def ended() -> Row[Any] | None:
        with gateway.database.reading() as connection:
            row = connection.execute(select(charges).where(charges.c.request_id == request_id)).one()
        return None if row.state == "forwarded" else row

    return wait_for(ended)


def test_clients_leave_at_any_byte(place: tuple[LiveGateway, ScriptedUpstream], chance: random.Random) -> None:
    gateway, upstream = place
    image = completed(size="1024x1024", quality="high", padding="x" * 60_000)
    parts = [PREVIEW, image[:30_000], image[30_000:], b"data: [DONE]\n\n"]
    answer = chunked(200, SSE, parts)

    async def script(conversation: Conversation) -> None:
        for start in range(0, len(answer), 16_000):
            await conversation.write(answer[start : start + 16_000])
            await asyncio.sleep(0.001)

    upstream.script = script
    request = post(gateway.key, order(stream=True))
    leavings = [
        (chance.randrange(len(request)), 0) if chance.random() < 0.3 else (len(request), chance.randrange(len(answer)))
        for _ in range(DISCONNECTS)
    ]
    ways = [chance.choice(("close", "reset")) for _ in leavings]
    with ThreadPoolExecutor(8) as clients:
        leaving = [clients.submit(leave, gateway, request, *bounds, how) for bounds, how in zip(leavings, ways, strict=True)]
        for left in leaving:
            left.result()
    served = sum(read > 0 for _, read in leavings)
    # A reset can overtake a request that was just sent, so that nobody ever read it.
    sent = sum(written == len(request) for written, _ in leavings)

    def all_ended() -> list[str] | None:
        states = [row["state"] for row in gateway.charges()]
        return None if len(states) < served or "forwarded" in states else states

    states = wait_for(all_ended)
    assert set(states) == {"settled"}
    assert served <= len(states) <= sent
    assert len(upstream.requests) == len(states)
    assert {row["settled_micro_usd"] for row in gateway.charges()} == {PRICE_MICRO_USD}


def leave(gateway: LiveGateway, request: bytes, written: int, read: int, how: str) -> None:
    """Send so much of a request, read so much of the answer, and go."""
    with gateway.connect() as connection:
        connection.sendall(request[:written])
        while read > 0:
            read -= len(connection.recv(min(read, 65_536)))
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
