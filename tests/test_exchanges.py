"""Every way in which an exchange can end, through a live gateway: what is booked, what counts, what the client sees."""

from __future__ import annotations

import asyncio
import base64
import gzip
import json
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.app import running
from proxy.ledger import accounts, reports
from proxy.prices import shipped_card
from proxy.settings import load
from tests.live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    SSE,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    chunked,
    completed,
    event,
    json_answer,
    live_gateway,
    now,
    replay,
    until_closed,
    wait_for,
    whole,
)

PRICES = shipped_card().models["gpt-image-2"].micro_usd
HIGH = PRICES["1024x1024", "high"]
LOW = PRICES["1024x1024", "low"]
LARGE = PRICES["3840x2160", "high"]
DEAREST = max(PRICES.values())

AUTO = {"size": "auto", "quality": "auto"}

# No case comes near it.
BUDGET_MICRO_USD = 100_000_000

_numbers = count(1)


@pytest.fixture(scope="module")
def stage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """One gateway for the whole table: each row has a team of its own."""
    directory = tmp_path_factory.mktemp("stage")
    with live_gateway(f"sqlite:///{directory / 'beanmeter.db'}", directory) as parts:
        yield parts


@dataclass(frozen=True)
class Team:
    """A team of one test's own, with room in its budget for everything."""

    gateway: LiveGateway
    name: str
    key: str

    def budget(self) -> tuple[int, int]:
        """What is (settled, held) against it."""
        self.gateway.settle()
        with self.gateway.database.reading() as connection:
            (status,) = reports.list_budgets(connection, now(), team=self.name)
        return status.settled_micro_usd, status.held_micro_usd

    def charges(self) -> list[dict[str, Any]]:
        self.gateway.settle()
        with self.gateway.database.reading() as connection:
            return list(reports.list_charges(connection, team=self.name))

    def charge(self) -> dict[str, Any]:
        """The team's one charge, once it has ended."""

        def ended() -> dict[str, Any] | None:
            found = self.charges()
            assert len(found) <= 1, found
            return found[0] if found and found[0]["state"] != "forwarded" else None

        return wait_for(ended)

    def spend(self) -> dict[str, Any]:
        self.gateway.settle()
        with self.gateway.database.reading() as connection:
            rows = reports.spend(connection, ["team"])
        return next(row for row in rows if row["team"] == self.name)


def new_team(gateway: LiveGateway) -> Team:
    name = f"team-{next(_numbers)}"
    _, key = gateway.add_team(name)
    gateway.set_budget(BUDGET_MICRO_USD, team=name)
    return Team(gateway, name, key)


@dataclass(frozen=True)
class View:
    """What the client had of an answer: all of it, or what came before the transfer broke."""

    status: int
    headers: httpx2.Headers
    body: bytes
    broken: bool

    @property
    def code(self) -> Any:
        return json.loads(self.body)["error"]["code"]


def ask(team: Team, order: dict[str, Any], path: str = "/images/generations") -> View:
    headers = {"authorization": f"Bearer {team.key}"}
    with team.gateway.client.stream("POST", path, json=order, headers=headers) as response:
        body, broken = b"", False
        try:
            for piece in response.iter_raw():
                body += piece
        except httpx2.TransportError:
            broken = True
        return View(response.status_code, response.headers, body, broken)


# How an answer is framed, and how its connection ends


@dataclass(frozen=True)
class Play:
    """A script: bytes on the wire, and what becomes of the connection after them."""

    wire: bytes
    ending: str = "keep"

    async def __call__(self, conversation: Conversation) -> None:
        await conversation.write(self.wire)
        if self.ending == "close":
            await conversation.close()
        elif self.ending == "reset":
            await conversation.reset()


Headers = list[tuple[str, str]]


def framed(framing: str, headers: Headers, body: bytes, status: int = 200) -> Play:
    """An answer that ends properly, as far as its framing can tell."""
    if framing == "length":
        return Play(whole(status, headers, body))
    if framing == "chunked":
        return Play(chunked(status, headers, [body] if body else []))
    return Play(until_closed(status, headers, body), "close")


def broken(manner: str, headers: Headers, body: bytes, status: int = 200) -> Play:
    """An answer whose transfer ends before its time: one byte short of its length, without its last chunk, or by a reset."""
    if manner == "short":
        return Play(whole(status, headers, body + b"!")[:-1], "close")
    return Play(chunked(status, headers, [body] if body else [], end=False), {"unfinished": "close", "reset": "reset"}[manner])


def asked(**fields: Any) -> dict[str, Any]:
    return ORDER | fields


def streamed(**fields: Any) -> dict[str, Any]:
    return ORDER | {"stream": True} | fields


PREVIEW = event("image_generation.partial_image", b64_json="cHJldmlldw==", partial_image_index=0)
IMAGE = completed()
DONE = b"data: [DONE]\n\n"
ERROR_EVENT = event("error", error={"type": "server_error", "code": "x", "message": "m", "param": None})
FLAT_ERROR = b'data: {"type":"error","code":"x","message":"m"}\n\n'
ERROR = json.dumps({"error": {"message": "m", "type": "server_error", "param": None, "code": "x"}}).encode()
PAGE = b"<html><body>502 Bad Gateway</body></html>"
HTML = [("Content-Type", "text/html")]


def png(size: str) -> str:
    """The beginning of a PNG file of that size, as base64."""
    width, height = map(int, size.split("x"))
    head = b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR" + struct.pack(">II", width, height) + b"\x08\x02\x00\x00\x00"
    return base64.b64encode(head + bytes(200)).decode()


def pictures(*images: str, **fields: Any) -> bytes:
    return json.dumps({"created": 1, "data": [{"b64_json": image} for image in images], **fields}).encode()


@dataclass(frozen=True)
class Row:
    """An order and its answer on the left; on the right what is booked, as (state, settled, reserved, images, basis), and
    whether the client sees a whole transfer."""

    name: str
    order: dict[str, Any]
    headers: Headers
    body: bytes
    charge: tuple[str, int, int, int, str | None]
    sees_whole: bool = True
    status: int = 200

    def __str__(self) -> str:
        return self.name


def settled(images: int, micro_usd: int | None = None, basis: str = "requested") -> tuple[str, int, int, int, str]:
    return "settled", images * HIGH if micro_usd is None else micro_usd, 0, images, basis


def review(held_micro_usd: int, images: int = 0, known_micro_usd: int = 0) -> tuple[str, int, int, int, str | None]:
    return "review", known_micro_usd, held_micro_usd, images, "requested" if images else None


RELEASED = ("released", 0, 0, 0, None)

# Whatever the framing, even one that can't tell an end from a cut, what is in the bytes decides.
WHOLE = [
    Row("stream", streamed(), SSE, PREVIEW + IMAGE + DONE, settled(1)),
    Row("stream without DONE", streamed(), SSE, PREVIEW + IMAGE, settled(1)),
    Row("stream of three", streamed(n=3), SSE, IMAGE * 3, settled(3)),
    Row("stream in CRLF", streamed(n=2), SSE, (IMAGE * 2).replace(b"\n", b"\r\n"), settled(2)),
    Row("last event without its blank line", streamed(), SSE, IMAGE[:-1], settled(1)),
    Row("last event without any line end", streamed(), SSE, IMAGE[:-2], settled(1)),
    Row("json", asked(), JSON, json_answer(), settled(1)),
    Row("json of ten", asked(n=10), JSON, json_answer(10), settled(10)),
    Row("json to a stream", streamed(n=2), JSON, json_answer(2), settled(2)),
    Row("stream to no stream", asked(), SSE, IMAGE, settled(1)),
    Row("json labelled as a stream", streamed(), SSE, json_answer(), settled(1)),
    Row("url", asked(), JSON, b'{"created":1,"data":[{"url":"http://x/y.png"}]}', settled(1)),
    Row("fewer, json", asked(n=3), JSON, json_answer(2), settled(2)),
    Row("fewer, stream", streamed(n=3), SSE, IMAGE + DONE, settled(1)),
    Row("none, json", asked(n=2), JSON, json_answer(0), RELEASED),
    Row("none, stream", streamed(), SSE, PREVIEW + DONE, RELEASED),
    Row("more, json", asked(n=2), JSON, json_answer(3), settled(3)),
    Row("more, stream", streamed(), SSE, IMAGE * 2, settled(2)),
    Row("error event first", streamed(n=2), SSE, ERROR_EVENT, RELEASED),
    Row("flat error event", streamed(), SSE, PREVIEW + FLAT_ERROR, RELEASED),
    Row("error event after one", streamed(n=3), SSE, IMAGE + ERROR_EVENT, settled(1)),
    Row("400 json", asked(), JSON, ERROR, RELEASED, status=400),
    Row("403 html", streamed(n=2), HTML, PAGE, RELEASED, status=403),
    Row("404 empty", asked(), [], b"", RELEASED, status=404),
    Row("429 json", streamed(), JSON, ERROR, RELEASED, status=429),
    Row("500 json", asked(n=2), JSON, ERROR, RELEASED, status=500),
    Row("503 json to a stream", streamed(), JSON, ERROR, RELEASED, status=503),
    Row("502 html", asked(n=2), HTML, PAGE, review(2 * HIGH), status=502),
    Row("500 empty", asked(), [], b"", review(HIGH), status=500),
    Row("500 json without an error", streamed(), JSON, b'{"detail":"x"}', review(HIGH), status=500),
    Row("500 json of no image", asked(), JSON, json_answer(0), review(HIGH), status=500),
    # What auto came to.
    Row("auto, reported", asked(**AUTO), JSON, json_answer(size="1024x1024", quality="low"), settled(1, LOW, "reported")),
    Row(
        "auto, reported in a stream",
        streamed(**AUTO),
        SSE,
        completed(size="3840x2160", quality="high"),
        settled(1, LARGE, "reported"),
    ),
    Row("auto left out", {"model": "gpt-image-2", "prompt": "x"}, JSON, json_answer(), settled(1, DEAREST, "assumed")),
    Row("auto size, measured", asked(size="auto"), JSON, pictures(png("1024x1024")), settled(1, HIGH, "measured")),
    Row(
        "auto size, measured, unlike",
        asked(size=None, n=2, quality="low"),
        JSON,
        pictures(png("1024x1024"), png("3840x2160")),
        settled(2, LOW + PRICES["3840x2160", "low"], "measured"),
    ),
    Row(
        "auto, reported as auto, measured",
        asked(size="auto"),
        JSON,
        pictures(png("2048x1152"), size="auto"),
        settled(1, PRICES["2048x1152", "high"], "measured"),
    ),
    Row("auto, untold", asked(**AUTO, n=2), JSON, json_answer(2), settled(2, 2 * DEAREST, "assumed")),
    Row("auto, a size beyond the table", asked(**AUTO), JSON, json_answer(size="7x7"), settled(1, DEAREST, "assumed")),
    Row(
        "auto, mixed",
        streamed(**AUTO, n=2),
        SSE,
        completed(size="1024x1024", quality="low") + completed(size="3840x2160", quality="high"),
        settled(2, LOW + LARGE, "reported"),
    ),
    Row("dearer than the hold", asked(), JSON, json_answer(size="3840x2160"), settled(1, LARGE, "reported")),
    Row("cheaper than the hold", asked(), JSON, json_answer(quality="low"), settled(1)),
    Row(
        "gzip all the same",
        asked(n=2),
        [*JSON, ("Content-Encoding", "gzip")],
        gzip.compress(json_answer(2)),
        settled(2),
    ),
]

# What only a framing can show to be the end.
WHOLE_IF_FRAMED = [
    Row("fewer, and nothing more", streamed(n=3), SSE, IMAGE, settled(1)),
    Row("previews, and nothing more", streamed(), SSE, PREVIEW, RELEASED),
    Row("a page under a 200", asked(), HTML, PAGE, review(HIGH)),
    Row("nothing under a 200", asked(), [], b"", review(HIGH)),
    Row("redirect", asked(), [("Location", "http://127.0.0.1:9/")], b"", RELEASED, status=307),
]
WHOLE_IF_NOT = [
    Row("fewer, and nothing more", streamed(n=3), SSE, IMAGE, review(2 * HIGH, 1, HIGH), sees_whole=False),
    Row("previews, and nothing more", streamed(), SSE, PREVIEW, review(HIGH), sees_whole=False),
    Row("cut in a line", streamed(n=2), SSE, IMAGE + IMAGE[:40], review(HIGH, 1, HIGH), sees_whole=False),
    Row("cut in a document", asked(n=2), JSON, json_answer(2)[:-20], review(HIGH, 1, HIGH), sees_whole=False),
    Row("cut in a document's first image", asked(), JSON, json_answer()[:-6], review(HIGH), sees_whole=False),
    Row("a page under a 200", asked(), HTML, PAGE, review(HIGH), sees_whole=False),
    Row("nothing under a 200", asked(), [], b"", review(HIGH), sees_whole=False),
    Row("redirect", asked(), [("Location", "http://127.0.0.1:9/")], b"", review(HIGH), status=307),
]
# The transfer breaks: the client sees that in every case, whatever is booked.
BROKEN = [
    Row("stream, then the transfer breaks", streamed(), SSE, IMAGE + DONE, settled(1), sees_whole=False),
    Row("all images, then the transfer breaks", streamed(n=2), SSE, IMAGE * 2, settled(2), sees_whole=False),
    Row("document, then the transfer breaks", asked(n=2), JSON, json_answer(2), settled(2), sees_whole=False),
    Row("fewer in a document, then it breaks", asked(n=2), JSON, json_answer(1), settled(1), sees_whole=False),
    Row("last event without its blank line", streamed(), SSE, IMAGE[:-2], settled(1), sees_whole=False),
    Row("headers only", streamed(n=2), SSE, b"", review(2 * HIGH), sees_whole=False),
    Row("before any image", streamed(), SSE, PREVIEW, review(HIGH), sees_whole=False),
    # Another reader of the request takes it to ask for ten.
    Row("fewer than asked in another case", streamed(N=10), SSE, IMAGE, review(9 * HIGH, 1, HIGH), sees_whole=False),
    Row("in an image", streamed(n=2), SSE, PREVIEW + IMAGE[:50], review(2 * HIGH), sees_whole=False),
    Row("after one of three", streamed(n=3), SSE, IMAGE, review(2 * HIGH, 1, HIGH), sees_whole=False),
    Row("in a document", asked(n=3), JSON, json_answer(3)[:-20], review(HIGH, 2, 2 * HIGH), sees_whole=False),
    Row("after an error event", streamed(n=2), SSE, IMAGE + ERROR_EVENT, settled(1), sees_whole=False),
    Row("in a 400", asked(), JSON, ERROR[:20], RELEASED, sees_whole=False, status=400),
    Row("in a 500's error", asked(), JSON, ERROR[:20], review(HIGH), sees_whole=False, status=500),
    Row("in a 502's page", asked(n=2), HTML, PAGE, review(2 * HIGH), sees_whole=False, status=502),
]

MANNERS = ["short", "unfinished", "reset"]

ANSWERS = [
    *(
        pytest.param(row, framed(f, row.headers, row.body, row.status), id=f"{row}, {f}")
        for row in WHOLE
        for f in ("length", "chunked", "close")
    ),
    *(
        pytest.param(row, framed(f, row.headers, row.body, row.status), id=f"{row}, {f}")
        for row in WHOLE_IF_FRAMED
        for f in ("length", "chunked")
    ),
    *(pytest.param(row, framed("close", row.headers, row.body, row.status), id=f"{row}, close") for row in WHOLE_IF_NOT),
    *(pytest.param(row, broken(m, row.headers, row.body, row.status), id=f"{row}, {m}") for row in BROKEN for m in MANNERS),
]


def booked(charge: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(charge[name] for name in ("state", "settled_micro_usd", "reserved_micro_usd", "images_delivered", "basis"))


def assert_that_it_counts(team: Team, charge: dict[str, Any]) -> None:
    """One charge is the team's whole account: in its budget and in its spend."""
    amounts = charge["settled_micro_usd"], charge["reserved_micro_usd"]
    assert team.budget() == amounts
    assert team.spend() == {
        "team": team.name,
        "requests": 1,
        "images": charge["images_delivered"],
        "settled_micro_usd": amounts[0],
        "reserved_micro_usd": amounts[1],
    }


@pytest.mark.parametrize(("row", "play"), ANSWERS)
def test_an_answer_is_booked_and_shown(stage: tuple[LiveGateway, ScriptedUpstream], row: Row, play: Play) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = play
    requests = len(upstream.requests)

    view = ask(team, row.order)

    assert (view.status, view.broken) == (row.status, not row.sees_whole)
    assert view.body == row.body
    charge = team.charge()
    assert booked(charge) == row.charge
    assert charge["upstream_status"] == row.status
    assert charge["request_id"] == view.headers["x-beanmeter-request-id"]
    assert_that_it_counts(team, charge)
    assert len(upstream.requests) == requests + 1


@pytest.mark.parametrize(
    ("order", "body", "overruns"),
    [
        (asked(), json_answer(size="3840x2160"), 1),
        (asked(n=2), json_answer(3), 1),
        (asked(), json_answer(size="1024x1024"), 0),
        (asked(**AUTO), json_answer(size="3840x2160", quality="high"), 0),
    ],
)
def test_an_answer_dearer_than_its_hold_is_an_alarm(
    stage: tuple[LiveGateway, ScriptedUpstream], order: dict[str, Any], body: bytes, overruns: int
) -> None:
    gateway, upstream = stage
    before = gateway.metric("beanmeter_overrun_total")
    upstream.script = framed("length", JSON, body)
    team = new_team(gateway)
    ask(team, order)
    charge = team.charge()
    assert charge["settled_micro_usd"] > charge["hold_micro_usd"] or not overruns
    assert gateway.metric("beanmeter_overrun_total") - before == overruns


def test_mixed_images_are_named_so(stage: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = framed(
        "chunked", SSE, completed(size="1024x1024", quality="low") + completed(size="1024x1024", quality="high")
    )
    ask(team, streamed(**AUTO, n=2))
    charge = team.charge()
    assert (charge["size"], charge["quality"]) == ("1024x1024", "mixed")


# No answer


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


# The deadline


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


def client_is_done(client: socket.socket) -> bool:
    """Read a little; whether there is nothing more to come."""
    try:
        return not client.recv(1 << 16)
    except ConnectionResetError:
        return True


# A client that leaves


def request_bytes(team: Team, order: dict[str, Any]) -> bytes:
    body = json.dumps(order).encode()
    head = (
        "POST /v1/images/generations HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\n"
        f"Authorization: Bearer {team.key}\r\nContent-Length: {len(body)}\r\n\r\n"
    )
    return head.encode() + body


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


def read_all(client: socket.socket) -> bytes:
    found = b""
    try:
        while piece := client.recv(1 << 16):
            found += piece
    except ConnectionResetError:
        pass
    return found


def leave(client: socket.socket, manner: str) -> None:
    if manner == "reset":
        client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    client.close()


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


# What the upstream says that it costs


@pytest.mark.parametrize(
    ("stated", "stored", "mismatches"),
    [
        (str(HIGH), HIGH, 0),
        (str(HIGH + 1), HIGH + 1, 1),
        ("0", 0, 1),
        ("a lot", None, 0),
        ("-1", None, 0),
        ("1e5", None, 0),
        ("9" * 30, None, 0),
    ],
)
@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_the_upstreams_own_cost_is_stored_and_a_difference_counted(
    stage: tuple[LiveGateway, ScriptedUpstream], stated: str, stored: int | None, mismatches: int, framing: str
) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = framed(framing, [*JSON, ("X-Request-Cost-Micro-Usd", stated)], json_answer())
    before = gateway.metric("beanmeter_upstream_cost_mismatch_total")

    view = ask(team, asked())

    assert view.headers["x-request-cost-micro-usd"] == stated
    charge = team.charge()
    assert charge["upstream_cost_micro_usd"] == stored
    assert booked(charge) == settled(1)
    assert gateway.metric("beanmeter_upstream_cost_mismatch_total") - before == mismatches


# Every price


def form(fields: dict[str, str]) -> tuple[bytes, str]:
    """A multipart body with its fields after an image, and its content type."""
    parts = [b'--x\r\nContent-Disposition: form-data; name="image"; filename="a.png"\r\n\r\n\x89PNG\r\n']
    parts += [
        f'--x\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n'.encode() for name, value in fields.items()
    ]
    return b"".join(parts) + b"--x--\r\n", "multipart/form-data; boundary=x"


def test_every_price_is_held_and_booked_exactly(stage: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    expected = []
    for place, ((size, quality), price) in enumerate(PRICES.items()):
        n = 1 + place % 10
        upstream.script = framed("length", JSON, json_answer(n))
        view = ask(team, asked(size=size, quality=quality, n=n))
        held = view.headers["x-beanmeter-reserved-usd"].replace(".", "")
        assert int(held) == n * price
        expected.append((size, quality, n, n * price))
    charges = [(c["size"], c["quality"], c["images_delivered"], c["settled_micro_usd"]) for c in team.charges()]
    assert charges == expected
    assert team.budget() == (sum(micro_usd for *_, micro_usd in expected), 0)
    assert len(charges) == 81


@pytest.mark.parametrize(
    ("size", "quality", "n"), [("1024x1024", "low", 1), ("3840x2160", "high", 10), ("2016x1344", "medium", 3)]
)
def test_an_edit_costs_the_same(stage: tuple[LiveGateway, ScriptedUpstream], size: str, quality: str, n: int) -> None:
    gateway, upstream = stage
    team = new_team(gateway)
    upstream.script = framed("chunked", SSE, completed("edit") * n)
    fields = {"model": "gpt-image-2", "prompt": "x", "size": size, "quality": quality, "n": str(n), "stream": "true"}
    body, content_type = form(fields)
    headers = {"authorization": f"Bearer {team.key}", "content-type": content_type}
    answer = gateway.client.post("/images/edits", content=body, headers=headers)
    assert answer.status_code == 200
    charge = team.charge()
    assert charge["operation"] == "edit"
    assert booked(charge) == settled(n, n * PRICES[size, quality])
    assert_that_it_counts(team, charge)
    assert (upstream.requests[-1].target, upstream.requests[-1].body) == ("/v1/images/edits", body)


def test_spend_is_the_sum_of_all_charges(stage: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """Whatever came before in this file: the daily sums agree with the charges, however they are grouped."""
    gateway, upstream = stage
    upstream.script = framed("length", JSON, json_answer())
    ask(new_team(gateway), asked())
    charges = gateway.charges()
    with gateway.database.reading() as connection:
        for by in ([], ["team"], ["size", "quality"], ["operation", "day"], ["key", "model"]):
            rows = reports.spend(connection, by)
            sums = {
                name: sum(row[name] for row in rows)
                for name in ("requests", "images", "settled_micro_usd", "reserved_micro_usd")
            }
            assert sums == {
                "requests": len(charges),
                "images": sum(charge["images_delivered"] for charge in charges),
                "settled_micro_usd": sum(charge["settled_micro_usd"] for charge in charges),
                "reserved_micro_usd": sum(charge["reserved_micro_usd"] for charge in charges),
            }
        by_size = {row["size"]: row["settled_micro_usd"] for row in reports.spend(connection, ["size"])}
    for size, micro_usd in by_size.items():
        assert micro_usd == sum(charge["settled_micro_usd"] for charge in charges if charge["size"] == size)


def test_metrics_say_what_the_books_say(stage: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """Whatever came before in this file: each charge is in the counters once, under its own labels."""
    gateway, upstream = stage
    upstream.script = framed("length", JSON, json_answer())
    ask(new_team(gateway), asked())
    expected: Counter[str] = Counter()
    for charge in gateway.charges():
        team, operation = f'team="{charge["team"]}"', f'operation="{charge["operation"]}"'
        expected[f'beanmeter_requests_total{{{operation},outcome="{charge["state"]}",{team}}}'] += 1
        expected[f'beanmeter_budget_settled_usd{{period="month",{team}}}'] += charge["settled_micro_usd"]
        expected[f'beanmeter_budget_held_usd{{period="month",{team}}}'] += charge["reserved_micro_usd"]
        image = f'model="{charge["model"]}",{operation},quality="{charge["quality"]}",size="{charge["size"]}",{team}'
        if charge["images_delivered"]:
            expected[f"beanmeter_images_total{{{image}}}"] += charge["images_delivered"]
            expected[f"beanmeter_spend_usd_total{{{image}}}"] += charge["settled_micro_usd"]
    page = samples(gateway)
    counters = ("beanmeter_requests_total{", "beanmeter_images_total{", "beanmeter_spend_usd_total{")
    assert {name for name in page if name.startswith(counters)} == {name for name in expected if name.startswith(counters)}
    for name, value in expected.items():
        # Counters add dollars up as floats; to the micro-dollar they are exact.
        assert (round(page[name] * 1_000_000) if "_usd" in name else page[name]) == value, name


def samples(gateway: LiveGateway) -> dict[str, float]:
    """Every sample of the metrics page by its name and labels, read once."""
    page = gateway.client.get(gateway.base_url.removesuffix("/v1") + "/metrics").text
    rows = (row.rpartition(" ") for row in page.splitlines() if not row.startswith("#"))
    return {name: float(value) for name, _, value in rows}


# Many at once


async def post_bare(port: int, wire: bytes) -> tuple[int, bytes]:
    """One request on a connection of its own; the answer's status and body."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    try:
        writer.write(wire)
        head = await reader.readuntil(b"\r\n\r\n")
        length = next(int(line[16:]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length: "))
        return int(head.split(b" ")[1]), await reader.readexactly(length)
    finally:
        writer.close()


def storm(requests: list[tuple[int, bytes]]) -> list[tuple[int, bytes]]:
    """All requests, as (port, bytes), at once; their answers in order."""

    async def run() -> list[tuple[int, bytes]]:
        async with asyncio.timeout(PATIENCE_SECONDS):
            return await asyncio.gather(*(post_bare(port, wire) for port, wire in requests))

    return asyncio.run(run())


@contextmanager
def watched_budgets(gateway: LiveGateway) -> Iterator[list[int]]:
    """Looks at all budgets again and again from another connection; gives what each look found left, at the least."""
    over = threading.Event()
    least: list[int] = []

    def look() -> None:
        # A pause, or two cores have time for nothing else.
        while not over.wait(0.005):
            with gateway.database.reading() as connection:
                least.append(min(budget.remaining_micro_usd for budget in reports.list_budgets(connection, now())))

    watch = threading.Thread(target=look)
    watch.start()
    try:
        yield least
    finally:
        over.set()
        watch.join()


def test_200_requests_at_once_with_room_for_37(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, upstream):
        limit = 38 * HIGH - 1
        gateway.set_budget(limit)
        team = Team(gateway, "red", gateway.key)
        with watched_budgets(gateway) as least:
            answers = storm([(gateway.port, request_bytes(team, asked()))] * 200)

        assert Counter(status for status, _ in answers) == {200: 37, 429: 163}
        for error in (json.loads(body)["error"] for status, body in answers if status == 429):
            assert (error["type"], error["code"]) == ("insufficient_quota", "insufficient_quota")
            for told in ("team's budget of $8.006599 per month", "$0.210699 left", "costs up to $0.210700", "resets at"):
                assert told in error["message"]
        assert len(upstream.requests) == 37
        assert team.budget() == (37 * HIGH, 0)
        assert Counter(charge["state"] for charge in team.charges()) == {"settled": 37}
        assert least
        assert min(least) >= 0
        assert gateway.metric('beanmeter_refusals_total{code="insufficient_quota",team="red"}') == 163


def test_two_replicas_two_teams_and_a_key_never_spend_beyond_any_limit(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, upstream), replica(gateway) as other_port:
        red = Team(gateway, "red", gateway.key)
        first_id, first_key = gateway.add_team("blue")
        with gateway.database.writing() as connection:
            second = accounts.add_key(connection, "blue", now=now(), actor="test")
        blue = [Team(gateway, "blue", key) for key in (first_key, second.key)]
        gateway.set_budget(11 * HIGH)
        gateway.set_budget(10_000 * HIGH, "total")
        gateway.set_budget(19 * HIGH + 5, team="blue")
        gateway.set_budget(7 * HIGH, "day", team="blue", key_id=first_id)
        ports = (gateway.port, other_port)
        with watched_budgets(gateway) as least:
            callers = [red, *blue] * 60
            answers = storm([(ports[place % 2], request_bytes(team, asked())) for place, team in enumerate(callers)])

        forwarded = Counter(team.key for team, (status, _) in zip(callers, answers, strict=True) if status == 200)
        assert forwarded[red.key] == 11
        assert forwarded[first_key] <= 7
        assert forwarded[first_key] + forwarded[second.key] == 19
        assert {status for status, _ in answers} == {200, 429}
        assert len(upstream.requests) == 30
        assert min(least) >= 0
        for port in ports:
            gateway.settle(port)
        with gateway.database.reading() as connection:
            found = {(b.team, b.scope, b.period): b for b in reports.list_budgets(connection, now())}
        spent = {name: (budget.settled_micro_usd, budget.held_micro_usd) for name, budget in found.items()}
        assert spent == {
            ("red", "team", "month"): (11 * HIGH, 0),
            ("red", "team", "total"): (11 * HIGH, 0),
            ("blue", "team", "month"): (19 * HIGH, 0),
            ("blue", "key", "day"): (forwarded[first_key] * HIGH, 0),
        }


def test_who_has_its_answer_is_no_longer_open_anywhere(database_url: str, tmp_path: Path) -> None:
    """One request after the other, to two gateways in turns, under a limit of one at a time."""
    with live_gateway(database_url, tmp_path) as (gateway, upstream), replica(gateway) as other_port:
        upstream.answer(whole(200, JSON, json_answer()))
        with gateway.database.writing() as connection:
            accounts.set_limit(connection, "red", None, rpm=None, concurrency=1, now=now(), actor="test")
        ports = (gateway.port, other_port)
        red = Team(gateway, "red", gateway.key)
        answers = [storm([(ports[place % 2], request_bytes(red, asked()))])[0][0] for place in range(20)]
        assert answers == [200] * 20


@contextmanager
def replica(gateway: LiveGateway) -> Iterator[int]:
    """A second gateway on the same database; its port."""
    environment = {
        "BEANMETER_UPSTREAM_URL": gateway.upstream_url,
        "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
        "BEANMETER_DATABASE_URL": gateway.database_url,
        "BEANMETER_STATE_DIR": str(gateway.state_dir / "replica"),
    }
    other = running(load(environment, gateway.state_dir), "127.0.0.1", 0)
    base_url = gateway.loop.run(other.__aenter__())
    try:
        yield int(base_url.rpartition(":")[2].removesuffix("/v1"))
    finally:
        gateway.loop.run(other.__aexit__(None, None, None))
