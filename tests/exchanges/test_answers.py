"""Every answer that can come, whole or broken: what is booked, what counts, what the client sees."""

from __future__ import annotations

import base64
import gzip
import json
import struct
from collections import Counter
from dataclasses import dataclass
from typing import Any

import pytest

from proxy.ledger import reports
from tests.exchanges.plays import DONE, IMAGE, PREVIEW, Headers, Play, broken, framed
from tests.exchanges.teams import (
    DEAREST,
    HIGH,
    LARGE,
    LOW,
    PRICES,
    RELEASED,
    ask,
    asked,
    assert_that_it_counts,
    booked,
    new_team,
    review,
    settled,
    streamed,
)
from tests.live import JSON, SSE, LiveGateway, ScriptedUpstream, completed, event, json_answer

AUTO = {"size": "auto", "quality": "auto"}
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
