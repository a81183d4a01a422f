"""Every refusal, over a real socket, as tables of a request and what is answered. Of a request that is refused the
upstream hears nothing, and the ledger keeps nothing."""

from __future__ import annotations

import json
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from sqlalchemy import func, select

from proxy import periods, tokens
from proxy.errors import RateLimitExceeded
from proxy.ledger import accounts
from proxy.ledger.schema import charges
from proxy.periods import Period
from tests.bare import EDITS, GENERATIONS, JSON_TYPE, Reply, ask, head, order, post, request, send
from tests.live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    PRICE_MICRO_USD,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    Loop,
    ScriptedUpstream,
    live_gateway,
    now,
    whole,
)
from tests.outage import database_away

MAX_BODY_BYTES = 100_000

# What is on every refusal, and nothing else unless it is asked for.
NAMES = ["content-type", "content-length", "x-request-id", "x-beanmeter-request-id", "x-beanmeter-error-source"]


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    directory = tmp_path_factory.mktemp("refusals")
    settings = {"BEANMETER_MAX_BODY_BYTES": str(MAX_BODY_BYTES)}
    with live_gateway(f"sqlite:///{directory}/beanmeter.db", directory, settings) as parts:
        yield parts


@pytest.fixture
def key(live: tuple[LiveGateway, ScriptedUpstream]) -> str:
    return live[0].key


@dataclass(frozen=True)
class Refused:
    """How a request is refused. ``headers`` are the refusal's own."""

    status: int
    code: str
    param: str | None = None
    type: str = "invalid_request_error"
    headers: Mapping[str, str] | None = None


def check(reply: Reply, expected: Refused) -> None:
    """The envelope with its four fields, and the headers, all of them."""
    own = dict(expected.headers or {})
    error = reply.error
    assert (reply.status, error["code"], error["param"], error["type"]) == (
        expected.status,
        expected.code,
        expected.param,
        expected.type,
    ), error
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert sorted(reply.names) == sorted([*NAMES, *own])
    assert {name: reply.values(name)[0] for name in own} == own
    assert reply.values("content-type") == ["application/json"]
    assert reply.values("x-beanmeter-error-source") == ["gateway"]
    assert reply.values("x-request-id") == reply.values("x-beanmeter-request-id")
    assert re.fullmatch("req_[0-9A-Z]{26}", reply.values("x-request-id")[0])


@contextmanager
def nothing_heard(live: tuple[LiveGateway, ScriptedUpstream]) -> Iterator[None]:
    """Whatever happens in the block, the upstream sees no connection and no request of it, and the books no charge."""
    gateway, upstream = live

    def seen() -> tuple[int, int, int]:
        with gateway.database.reading() as connection:
            booked = connection.execute(select(func.count()).select_from(charges)).scalar_one()
        return upstream.connections, len(upstream.requests), booked

    before = seen()
    yield
    assert seen() == before


def refused(live: tuple[LiveGateway, ScriptedUpstream], data: bytes, expected: Refused) -> Reply:
    """Send a request that is refused before the upstream hears of it."""
    with nothing_heard(live):
        reply = ask(live[0], data)
        check(reply, expected)
    return reply


INVALID = {field: Refused(400, "invalid_value", field) for field in ("size", "quality", "n", "stream")}
TWICE = {field: Refused(400, "duplicate_parameter", field) for field in ("model", "size", "quality", "n", "stream")}
NO_MODEL = Refused(400, "missing_required_parameter", "model")
OTHER_MODEL = Refused(404, "model_not_found", "model")
NOT_JSON = Refused(400, "invalid_json")
NOT_A_FORM = Refused(400, "invalid_multipart")
OTHER_MEDIA = Refused(415, "unsupported_media_type")
TOO_LARGE = Refused(413, "request_too_large")
NO_KEY = Refused(401, "invalid_api_key", headers={"www-authenticate": "Bearer"})
NO_PATH = Refused(404, "unknown_url")
OVER_BUDGET = Refused(429, "insufficient_quota", type="insufficient_quota", headers={"x-should-retry": "false"})
LEDGER_AWAY = Refused(503, "ledger_unavailable", type="server_error", headers={"retry-after": "5"})
UNREACHABLE = Refused(502, "upstream_unreachable", type="server_error")
CREDENTIALS = Refused(502, "upstream_credentials", type="server_error", headers={"x-should-retry": "false"})
FAILED = Refused(502, "upstream_failed", type="server_error", headers={"x-should-retry": "false"})


# What the request says, in JSON

# Values that are wrong for each field, as they are written in JSON.
WRONG_VALUES = {
    "size": [
        '"1024X1024"', '" 1024x1024"', '"1024x1024 "', '"1024\\u00d71024"', '"1000x1000"', '"01024x1024"', '"1024*1024"',
        '"AUTO"', '"Auto"', '""',
        '"large"', "1024", "0", "true", "false", '["1024x1024"]', '{"width":1024}', '"' + "1" * 2000 + 'x1"',
    ],
    "quality": [
        '"HIGH"', '"High"', '" high"', '"high "', '"hd"', '"standard"', '"AUTO"', '""', "1", "true", "false", '["high"]', "{}",
    ],
    "n": ["true", "false", "1.0", '"2"', "1e1", "10E-1", "0", "-0", "11", "-1", "1.5", '""', "[]", "{}", "1" + "0" * 30],
    "stream": ['"true"', '"false"', "1", "0", "1.0", '""', '"yes"', "[]", "{}"],
}  # fmt: skip


def raw_order(field: str, value: str) -> bytes:
    """The usual order with one member written so."""
    members = {name: json.dumps(usual) for name, usual in ORDER.items()} | {field: value}
    return ("{" + ",".join(f'"{name}":{written}' for name, written in members.items()) + "}").encode()


USUAL = order()[:-1]

JSON_BODIES: dict[str, tuple[bytes, Refused]] = {
    f"{field} is {value[:30]}": (raw_order(field, value), INVALID[field])
    for field, values in WRONG_VALUES.items()
    for value in values
}
JSON_BODIES |= {
    f"{field} twice": (USUAL + f',"{field}":{first},"{field}":{second}}}'.encode(), TWICE[field])
    for field, first, second in [
        ("model", '"gpt-image-2"', '"gpt-image-2"'),
        ("size", '"auto"', '"auto"'),
        ("quality", "null", "null"),
        ("n", "1", "1"),
        ("stream", "false", "true"),
    ]
}
JSON_BODIES |= {
    "a duplicate with an escaped name": (USUAL + b',"s\\u0069ze":"1024x1024"}', TWICE["size"]),
    "a duplicate that is null": (USUAL + b',"model":null}', TWICE["model"]),
    "a duplicate of another type": (USUAL + b',"n":1,"n":[2]}', TWICE["n"]),
    "no model": (b'{"prompt":"a bean"}', NO_MODEL),
    "an empty object": (b"{}", NO_MODEL),
    "model is null": (raw_order("model", "null"), NO_MODEL),
    "model is empty": (raw_order("model", '""'), OTHER_MODEL),
    "model in capitals": (raw_order("model", '"GPT-IMAGE-2"'), OTHER_MODEL),
    "model with a space": (raw_order("model", '"gpt-image-2 "'), OTHER_MODEL),
    "another model": (raw_order("model", '"dall-e-3"'), OTHER_MODEL),
    "model is a number": (raw_order("model", "2"), OTHER_MODEL),
    "model is true": (raw_order("model", "true"), OTHER_MODEL),
    "model is an array": (raw_order("model", '["gpt-image-2"]'), OTHER_MODEL),
    "model is an object": (raw_order("model", '{"id":"gpt-image-2"}'), OTHER_MODEL),
    "nothing": (b"", NOT_JSON),
    "blanks": (b" \r\n\t ", NOT_JSON),
    "an array": (b"[" + order() + b"]", NOT_JSON),
    "a string": (b'"gpt-image-2"', NOT_JSON),
    "a number": (b"1", NOT_JSON),
    "null": (b"null", NOT_JSON),
    "not JSON at all": (b"model=gpt-image-2", NOT_JSON),
    "NaN": (raw_order("extra", "NaN"), NOT_JSON),
    "Infinity": (raw_order("extra", "Infinity"), NOT_JSON),
    "minus Infinity": (raw_order("extra", "-Infinity"), NOT_JSON),
    "65 levels": (raw_order("extra", "[" * 64 + "]" * 64), NOT_JSON),
    "no end": (order()[:-1], NOT_JSON),
    "a second object": (order() + order(), NOT_JSON),
    "something behind it": (order() + b"x", NOT_JSON),
    "a trailing comma": (USUAL + b",}", NOT_JSON),
    "a comment": (USUAL + b"/* */}", NOT_JSON),
    "single quotes": (order().replace(b'"', b"'"), NOT_JSON),
    "a number with a zero first": (raw_order("n", "01"), NOT_JSON),
    "a number with a plus": (raw_order("n", "+1"), NOT_JSON),
    "a number without a whole part": (raw_order("extra", ".5"), NOT_JSON),
    "a control character in text": (raw_order("extra", '"a\nb"'), NOT_JSON),
    "an unknown escape": (raw_order("extra", '"\\x41"'), NOT_JSON),
    "broken UTF-8": (raw_order("extra", '"?"').replace(b"?", b"\xff"), NOT_JSON),
    "UTF-8 cut short": (raw_order("extra", '"?"').replace(b"?", b"\xe2\x82"), NOT_JSON),
    "a surrogate in UTF-8": (raw_order("extra", '"?"').replace(b"?", b"\xed\xa0\x80"), NOT_JSON),
    "a byte order mark": (b"\xef\xbb\xbf" + order(), NOT_JSON),
    "UTF-16, little end first": (order().decode().encode("utf-16-le"), NOT_JSON),
    "UTF-16, big end first": (order().decode().encode("utf-16-be"), NOT_JSON),
    "UTF-16 with a mark": (order().decode().encode("utf-16"), NOT_JSON),
    "UTF-32": (order().decode().encode("utf-32"), NOT_JSON),
}  # fmt: skip


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize(("body", "expected"), JSON_BODIES.values(), ids=JSON_BODIES)
def test_json(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, body: bytes, expected: Refused) -> None:
    refused(live, post(key, body, path), expected)


def test_64_levels_and_a_tenth_image_are_not_refused(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    """The other side of the borders above."""
    for body in (raw_order("extra", "[" * 63 + "]" * 63), raw_order("n", "10"), raw_order("extra", '{"size":1,"size":2}')):
        assert ask(live[0], post(key, body)).status == 200


@pytest.mark.parametrize(
    ("asked", "quality", "told"),
    [
        ("1000x1000", "high", "The nearest preset of that shape is 1024x1024, at $0.210700 in high quality"),
        ("1536x1024", "low", "The nearest preset of that shape is 2016x1344, at "),
        ("1920x1080", "medium", "The nearest preset of that shape is 2048x1152, at "),
    ],
)
def test_a_size_outside_the_table_is_answered_with_the_nearest_preset_and_what_is_accepted(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, asked: str, quality: str, told: str
) -> None:
    message = refused(live, post(key, order(size=asked, quality=quality)), INVALID["size"]).error["message"]
    assert f'"{asked}"' in message
    assert told in message
    assert f"in {quality} quality" in message
    accepted = message.rpartition("Accepted: ")[2].rstrip(".").split(", ")
    assert len(accepted) == 28
    assert {"auto", "1024x1024", "2048x1152", "3840x2160"} <= set(accepted)


@pytest.mark.parametrize(
    ("changes", "expected", "told"),
    [
        ({"quality": "hd"}, INVALID["quality"], ['"hd"', "auto", "low", "medium", "high"]),
        ({"n": 11}, INVALID["n"], ["11", "1 to 10"]),
        ({"stream": "yes"}, INVALID["stream"], ['"yes"', "true", "false"]),
        ({"model": "dall-e-3"}, OTHER_MODEL, ['"dall-e-3"', "gpt-image-2"]),
    ],
)
def test_a_wrong_value_is_answered_with_the_accepted_ones(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, changes: dict[str, Any], expected: Refused, told: list[str]
) -> None:
    message = refused(live, post(key, order(**changes)), expected).error["message"]
    assert [word for word in told if word not in message] == []


# What the request says, in multipart

FORM_TYPE = ("Content-Type", "multipart/form-data; boundary=b")
PNG = b"\x89PNG\r\n\x1a\n and so on"


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


IMAGE = part("image", PNG, '; filename="a.png"\r\nContent-Type: image/png')


def form(*extra: bytes, **changes: str | None) -> bytes:
    """The usual order as a form with an image; fields that are None are left out."""
    fields = {**ORDER, **changes}
    named = [part(name, value.encode()) for name, value in fields.items() if value is not None]
    return b"".join([*named, IMAGE, *extra, b"--b--\r\n"])


FORM_VALUES = {
    "size": ["1024X1024", " 1024x1024", "1024x1024 ", "1000x1000", "AUTO", "", "null", '"1024x1024"'],
    "quality": ["HIGH", " high", "hd", "", "null"],
    "n": ["0", "11", "1.0", "1e1", "-1", "+1", "01", " 1", "true", "", "null", "\u0661"],
    "stream": ["True", "FALSE", "yes", "", "null", " true", "2"],
}

FORMS: dict[str, tuple[bytes, Refused]] = {
    f"{field} is {value!r}": (form(**{field: value}), INVALID[field])
    for field, values in FORM_VALUES.items()
    for value in values
}
FORMS |= {
    f"{field} is a file": (form(part(field, b"1", '; filename="a"'), **{field: None}), INVALID[field]) for field in INVALID
}
FORMS |= {f"{field} twice": (form(part(field, b"1"), part(field, b"1")), expected) for field, expected in TWICE.items()}
FORMS |= {
    "a duplicate without quotes": (form(part("size", b"auto").replace(b'"size"', b"size")), TWICE["size"]),
    "a duplicate that is a file": (form(part("quality", b"high", '; filename="a"')), TWICE["quality"]),
    "no model": (form(model=None), NO_MODEL),
    "another model": (form(model="dall-e-3"), OTHER_MODEL),
    "model is empty": (form(model=""), OTHER_MODEL),
    "model is null": (form(model="null"), OTHER_MODEL),
    "a value in base64 is not decoded": (
        form(part("size", b"MTAyNHgxMDI0", "\r\nContent-Transfer-Encoding: base64"), size=None),
        INVALID["size"],
    ),
    "empty": (b"", NOT_A_FORM),
    "no parts": (b"--b--\r\n", NOT_A_FORM),
    "not closed": (form().removesuffix(b"--b--\r\n"), NOT_A_FORM),
    "cut in an image": (form()[:-60], NOT_A_FORM),
    "another boundary": (form().replace(b"--b", b"--c"), NOT_A_FORM),
    "bare line feeds": (form().replace(b"\r\n", b"\n"), NOT_A_FORM),
    "a part without a disposition": (form(b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n"), NOT_A_FORM),
    "a part without a name": (form(b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n"), NOT_A_FORM),
    "JSON": (order(), NOT_A_FORM),
}


@pytest.mark.parametrize(("body", "expected"), FORMS.values(), ids=FORMS)
def test_multipart(live: tuple[LiveGateway, ScriptedUpstream], key: str, body: bytes, expected: Refused) -> None:
    refused(live, post(key, body, EDITS, [FORM_TYPE]), expected)


def test_a_form_that_is_right_is_not_refused(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    assert ask(live[0], post(key, form(n="2", stream="0"), EDITS, [FORM_TYPE])).status == 200


# How the body comes

TYPES = {
    "none": [],
    "text": ["text/plain"],
    "a form of fields": ["application/x-www-form-urlencoded"],
    "octets": ["application/octet-stream"],
    "no JSON but near": ["application/jsonx"],
    "JSON with a suffix": ["application/problem+json"],
    "JSON lines": ["application/jsonl"],
    "JSON in UTF-16": ["application/json; charset=utf-16"],
    "JSON in two charsets": ["application/json; charset=utf-8; charset=latin-1"],
    "two of them": ["application/json", "application/json"],
    "two in one": ["application/json, application/json"],
    "empty": [""],
    "no type at all": ["json"],
}


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize("values", TYPES.values(), ids=TYPES)
def test_other_content_types(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, values: list[str]) -> None:
    refused(live, post(key, order(), path, [("Content-Type", value) for value in values]), OTHER_MEDIA)


def test_a_form_is_for_edits_only(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    refused(live, post(key, form(), GENERATIONS, [FORM_TYPE]), OTHER_MEDIA)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "x-gzip", "GZIP", "identity, gzip", "gzip, gzip"])
@pytest.mark.parametrize(("path", "kind", "body"), [(GENERATIONS, JSON_TYPE, order()), (EDITS, FORM_TYPE, form())])
def test_content_encodings(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, kind: tuple[str, str], body: bytes, encoding: str
) -> None:
    refused(live, post(key, body, path, [kind, ("Content-Encoding", encoding)]), OTHER_MEDIA)


@pytest.mark.parametrize(
    "boundary",
    [
        "",
        "; boundary=",
        '; boundary=""',
        "; boundary=b; boundary=b",
        "; boundary=" + "b" * 71,
        "; boundary=b\u00e9",
        "; Boundary",
    ],
)
def test_boundaries(live: tuple[LiveGateway, ScriptedUpstream], key: str, boundary: str) -> None:
    refused(live, post(key, form(), EDITS, [("Content-Type", "multipart/form-data" + boundary)]), NOT_A_FORM)


def in_chunks(key: str, body: bytes, path: str, kind: tuple[str, str], size: int = 8_192) -> bytes:
    """A POST whose length nobody knows beforehand."""
    fields = [("Host", "gateway.test"), ("Authorization", f"Bearer {key}"), kind, ("Transfer-Encoding", "chunked")]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return head("POST", path, fields) + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_body_over_the_limit(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str) -> None:
    fitting = order(prompt="x" * (MAX_BODY_BYTES - len(order(prompt=""))))
    assert len(fitting) == MAX_BODY_BYTES
    too_large = fitting + b" "
    for data in (post(key, too_large, path), in_chunks(key, too_large, path, JSON_TYPE)):
        message = refused(live, data, TOO_LARGE).error["message"]
        assert str(MAX_BODY_BYTES) in message
    for data in (post(key, fitting, path), in_chunks(key, fitting, path, JSON_TYPE)):
        assert ask(live[0], data).status == 200


def test_a_form_over_the_limit(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    body = form(part("image[]", b"x" * MAX_BODY_BYTES, '; filename="b.png"'))
    for data in (post(key, body, EDITS, [FORM_TYPE]), in_chunks(key, body, EDITS, FORM_TYPE)):
        refused(live, data, TOO_LARGE)


def test_a_body_that_is_declared_too_large_is_refused_before_it_comes(
    live: tuple[LiveGateway, ScriptedUpstream], key: str
) -> None:
    fields = [("Host", "gateway.test"), ("Authorization", f"Bearer {key}"), JSON_TYPE, ("Content-Length", str(10**15 - 1))]
    refused(live, head("POST", GENERATIONS, fields), TOO_LARGE)


# Paths and methods

PATHS = [
    "/v1/images/generations/", "/v1/images/edits/", "/v1//images/generations", "//v1/images/generations", "/v1/images//edits",
    "/V1/images/generations", "/v1/Images/generations", "/v1/images/GENERATIONS", "/v1/images/generation%73",
    "/v1/images%2Fgenerations", "/v1%2fimages/edits", "/v1/images/./generations", "/v1/images/x/../generations",
    "/v1/images/%2e%2e/images/edits", "/v1/images/generations%20", "/v1/images/generations%00", "/v1/images/generations;a=b",
    "/v1/images/generations/..", "/v1/images/generations\\", "/images/generations", "/v1/v1/images/generations",
    "/openai/v1/images/generations", "/v1/images/variations", "/v1/images", "/v1/images/", "/v1", "/v1/", "/",
    "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/files", "/v1/audio/speech", "/v1/videos",
    "/v1/organization",
    "/v1/models/", "/v1/budget/", "/v1/Models", "/v1/%6dodels", "/v1/models/gpt-image-2/x", "/v1/models/gpt%2Dimage-2",
]  # fmt: skip


@pytest.mark.parametrize("path", PATHS)
def test_other_paths_and_other_spellings(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str) -> None:
    refused(live, post(key, order(), path), NO_PATH)
    refused(live, request("GET", path, key=key), NO_PATH)
    # What there is not, there is not for anybody.
    refused(live, request("GET", path), NO_PATH)
    assert ask(live[0], request("HEAD", path)).status == 404


@pytest.mark.parametrize(
    "target",
    [f"http://gateway.test{GENERATIONS}", f"HTTP://gateway.test{GENERATIONS}", "*", f"{GENERATIONS}#x", f"?x{GENERATIONS}"],
)
def test_a_target_in_another_form(live: tuple[LiveGateway, ScriptedUpstream], key: str, target: str) -> None:
    with nothing_heard(live):
        assert 400 <= ask(live[0], post(key, order(), target)).status < 500


def test_a_query_is_no_part_of_the_path_and_goes_upstream_as_it_is(
    live: tuple[LiveGateway, ScriptedUpstream], key: str
) -> None:
    gateway, upstream = live
    assert ask(gateway, post(key, order(), GENERATIONS + "?a=%2F&b=/../&a=?")).status == 200
    assert upstream.requests[-1].target == GENERATIONS + "?a=%2F&b=/../&a=?"


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize("method", ["GET", "HEAD", "PUT", "PATCH", "DELETE", "OPTIONS", "TRACE", "PROPFIND"])
def test_other_methods_on_priced_paths(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, method: str) -> None:
    for caller in (key, None):
        with nothing_heard(live):
            reply = ask(live[0], request(method, path, [JSON_TYPE], key=caller))
            assert (reply.status, reply.values("allow")) == (405, ["POST"])
            if method == "HEAD":
                assert reply.body == b""
            else:
                check(reply, Refused(405, "method_not_allowed", headers={"allow": "POST"}))


@pytest.mark.parametrize("path", ["/v1/models", "/v1/models/gpt-image-2", "/v1/budget", "/livez", "/readyz", "/metrics"])
@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "OPTIONS"])
def test_other_methods_on_what_is_read(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, method: str) -> None:
    reply = refused(live, request(method, path, key=key), Refused(405, "method_not_allowed", headers={"allow": "GET, HEAD"}))
    assert "GET, HEAD" in reply.error["message"]
    assert ask(live[0], request("HEAD", path, key=key)).status == 200


# Keys


def bad_keys(gateway: LiveGateway) -> dict[str, list[str]]:
    """Values of Authorization, each a way of not having a key."""
    good = gateway.key
    slip = good[:-1] + ("a" if good[-1] != "a" else "b")
    with gateway.database.writing() as connection:
        accounts.add_team(connection, "old", now=now(), actor="test")
        archived = accounts.add_key(connection, "old", now=now(), actor="test").key
        accounts.archive_team(connection, "old", now=now(), actor="test")
        spent = accounts.add_key(connection, "red", lifetime=timedelta(0), now=now(), actor="test").key
        gone = accounts.add_key(connection, "red", now=now(), actor="test")
        accounts.revoke_key(connection, gone.id, now=now(), actor="test")
    return {
        "none": [],
        "empty": [""],
        "another scheme": [f"Basic {good}"],
        "no scheme": [good],
        "no token": ["Bearer"],
        "an empty token": ["Bearer "],
        "a tab between": [f"Bearer\t{good}"],
        "something behind it": [f"Bearer {good} x"],
        "two in one": [f"Bearer {good}, Bearer {good}"],
        "two of them": [f"Bearer {good}", f"Bearer {good}"],
        "not ASCII": [f"Bearer {good}\u00e9"],
        "the upstream's own key": [f"Bearer {UPSTREAM_KEY}"],
        "malformed": ["Bearer sk-bm-nonsense"],
        "mistyped": [f"Bearer {slip}"],
        "in capitals": [f"Bearer {good.upper()}"],
        "unknown": [f"Bearer {tokens.new_key()}"],
        "revoked": [f"Bearer {gone.key}"],
        "expired": [f"Bearer {spent}"],
        "of an archived team": [f"Bearer {archived}"],
    }


def test_a_caller_without_a_valid_key_learns_nothing(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    bodies = set()
    for values in bad_keys(gateway).values():
        credentials = [("Authorization", value) for value in values]
        for data in (
            request("POST", GENERATIONS, [JSON_TYPE, *credentials], order()),
            request("POST", GENERATIONS, [JSON_TYPE, *credentials], b"not even JSON"),
            request("POST", EDITS, [FORM_TYPE, *credentials], form()),
            request("POST", EDITS, credentials, b"?" * (MAX_BODY_BYTES + 1)),
            request("GET", "/v1/models", credentials),
            request("GET", "/v1/models/unheard-of", credentials),
            request("GET", "/v1/budget", credentials),
        ):
            bodies.add(refused(live, data, NO_KEY).body)
    assert len(bodies) == 1


@pytest.mark.parametrize("credentials", ["bearer {key}", "BEARER {key}", "Bearer   {key}", "Bearer {key}  "])
def test_a_key_may_be_given_so(live: tuple[LiveGateway, ScriptedUpstream], key: str, credentials: str) -> None:
    data = request("POST", GENERATIONS, [JSON_TYPE, ("Authorization", credentials.format(key=key))], order())
    assert ask(live[0], data).status == 200


@pytest.mark.parametrize("end", ["revoked", "archived", "expired"])
def test_a_key_that_the_gateway_remembers_is_asked_for_again_at_the_hold(
    live: tuple[LiveGateway, ScriptedUpstream], end: str
) -> None:
    gateway, _ = live
    key_id, caller = gateway.add_team(f"to be {end}")
    assert ask(gateway, post(caller, order())).status == 200
    with gateway.database.writing() as connection:
        if end == "archived":
            accounts.archive_team(connection, "to be archived", now=now(), actor="test")
        elif end == "revoked":
            accounts.revoke_key(connection, key_id, now=now(), actor="test")
        else:
            accounts.rotate_key(connection, key_id, overlap=timedelta(0), now=now(), actor="test")
    refused(live, post(caller, order()), NO_KEY)


# Budgets

PERIODS: list[tuple[Period, str]] = [
    ("day", "per day"),
    ("week", "per week"),
    ("month", "per month"),
    ("total", "for all time"),
]


def reset_of(period: Period) -> str:
    at = periods.resets_at(period, datetime.now(UTC))
    return "" if at is None else f"It resets at {at:%Y-%m-%dT%H:%M:%SZ}."


@pytest.mark.parametrize(("period", "said"), PERIODS)
@pytest.mark.parametrize("scope", ["team", "key"])
def test_over_budget(live: tuple[LiveGateway, ScriptedUpstream], scope: str, period: Period, said: str) -> None:
    gateway, _ = live
    team = f"{scope} {period}"
    key_id, caller = gateway.add_team(team)
    gateway.set_budget(500_000, period, team=team, key_id=key_id if scope == "key" else None)
    assert ask(gateway, post(caller, order())).status == 200
    resets = {reset_of(period)}
    message = refused(live, post(caller, order(n=3)), OVER_BUDGET).error["message"]
    # Midnight can fall between the one and the other.
    resets.add(reset_of(period))
    assert f"The {scope}'s budget of $0.500000 {said} has $0.289300 left" in message
    assert "this request costs up to $0.632100" in message
    assert any(reset in message for reset in resets)
    assert ("resets" in message) == (period != "total")


def test_a_form_over_budget(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("forms")
    gateway.set_budget(PRICE_MICRO_USD - 1, team="forms")
    refused(live, post(caller, form(), EDITS, [FORM_TYPE]), OVER_BUDGET)
    gateway.set_budget(PRICE_MICRO_USD, team="forms")
    assert ask(gateway, post(caller, form(), EDITS, [FORM_TYPE])).status == 200
    refused(live, post(caller, form(), EDITS, [FORM_TYPE]), OVER_BUDGET)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"day": 200_000, "month": 100_000}, "$0.100000 per month"),
        ({"day": 100_000, "month": 200_000}, "$0.100000 per day"),
        ({"day": 200_000, "week": 150_000, "month": 900_000, "total": 180_000}, "$0.150000 per week"),
        ({"day": 900_000, "total": 0}, "$0.000000 for all time"),
    ],
)
def test_the_tightest_budget_is_named(
    live: tuple[LiveGateway, ScriptedUpstream], limits: dict[Period, int], named: str
) -> None:
    gateway, _ = live
    team = f"tight {named.removeprefix('$')}"
    _, caller = gateway.add_team(team)
    for period, limit in limits.items():
        gateway.set_budget(limit, period, team=team)
    assert named in refused(live, post(caller, order()), OVER_BUDGET).error["message"]


def test_a_soft_budget_never_refuses_and_a_hard_one_beside_it_does(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("soft")
    gateway.set_budget(0, "day", team="soft", soft=True)
    assert ask(gateway, post(caller, order())).status == 200
    gateway.set_budget(PRICE_MICRO_USD, "month", team="soft")
    message = refused(live, post(caller, order()), OVER_BUDGET).error["message"]
    assert "$0.210700 per month has $0.000000 left" in message


def test_a_limit_that_is_lowered_counts_at_once(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("lowered")
    gateway.set_budget(10_000_000, team="lowered")
    assert ask(gateway, post(caller, order())).status == 200
    gateway.set_budget(100_000, team="lowered")
    message = refused(live, post(caller, order()), OVER_BUDGET).error["message"]
    assert "budget of $0.100000 per month has $0.000000 left" in message


# The official SDK


def sdk(gateway: LiveGateway, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.base_url, api_key=key, timeout=PATIENCE_SECONDS)


def test_the_sdk_takes_over_budget_as_a_rate_limit_and_asks_once(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("sdk")
    gateway.set_budget(0, team="sdk")
    with nothing_heard(live), sdk(gateway, caller) as client, pytest.raises(openai.RateLimitError) as raised:
        client.images.generate(model="gpt-image-2", prompt="a bean", size="1024x1024", quality="high")
    assert (raised.value.code, raised.value.type) == ("insufficient_quota", "insufficient_quota")
    assert "budget of $0.000000" in str(raised.value)
    assert gateway.metric('beanmeter_refusals_total{code="insufficient_quota",team="sdk"}') == 1


@pytest.mark.parametrize(
    ("changes", "error", "code"),
    [
        ({"size": "1000x1000"}, openai.BadRequestError, "invalid_value"),
        ({"n": 11}, openai.BadRequestError, "invalid_value"),
        ({"model": "dall-e-3"}, openai.NotFoundError, "model_not_found"),
        ({"prompt": "x" * MAX_BODY_BYTES}, openai.APIStatusError, "request_too_large"),
    ],
)
def test_the_sdk_takes_refusals_for_what_they_are(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, changes: dict[str, Any], error: type[openai.APIStatusError], code: str
) -> None:
    with nothing_heard(live), sdk(live[0], key) as client, pytest.raises(error) as raised:
        client.images.generate(**{**ORDER, **changes})
    assert raised.value.code == code
    assert str(raised.value.request_id).startswith("req_")


def test_the_sdk_takes_a_wrong_key_for_what_it_is(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    with nothing_heard(live), sdk(live[0], tokens.new_key()) as client, pytest.raises(openai.AuthenticationError) as raised:
        client.images.generate(model="gpt-image-2", prompt="a bean")
    assert raised.value.code == "invalid_api_key"


@pytest.mark.parametrize(
    ("asked", "told"), [(-3, b"1"), (0, b"1"), (1, b"1"), (59, b"59"), (60, b"60"), (61, b"60"), (86_400, b"60")]
)
def test_nobody_is_told_to_wait_for_more_than_a_minute(asked: int, told: bytes) -> None:
    refusal = RateLimitExceeded("Too many requests.", asked)
    assert (refusal.status, refusal.type, refusal.code) == (429, "requests", "rate_limit_exceeded")
    assert refusal.headers == ((b"retry-after", told),)


# The ledger is away


@pytest.fixture
def own(database_url: str, tmp_path: Path) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """A gateway of the test's own, on each kind of database."""
    with live_gateway(database_url, tmp_path) as parts:
        yield parts


def test_a_key_that_the_gateway_does_not_know_yet(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    with database_away(gateway.database_url):
        for caller in (gateway.key, tokens.new_key()):
            check(ask(gateway, post(caller, order())), LEDGER_AWAY)
            check(ask(gateway, request("GET", "/v1/models", key=caller)), LEDGER_AWAY)
        # What is misspelled is refused without the ledger.
        check(ask(gateway, post(gateway.key[:-1], order())), NO_KEY)
    gateway.database.close()
    assert (gateway.charges(), upstream.connections) == ([], 0)
    assert ask(gateway, post(gateway.key, order())).status == 200


def test_a_key_that_the_gateway_remembers(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    assert ask(gateway, request("GET", "/v1/models", key=gateway.key)).status == 200
    with database_away(gateway.database_url):
        for path, kind, body in ((GENERATIONS, JSON_TYPE, order()), (EDITS, FORM_TYPE, form())):
            check(ask(gateway, post(gateway.key, body, path, [kind])), LEDGER_AWAY)
    gateway.database.close()
    assert (gateway.charges(), upstream.connections) == ([], 0)
    assert ask(gateway, post(gateway.key, order())).status == 200
    assert [charge["state"] for charge in gateway.charges()] == ["settled"]


def test_a_ledger_that_was_written_to_before(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    assert ask(gateway, post(gateway.key, order())).status == 200
    gateway.settle()
    with database_away(gateway.database_url):
        check(ask(gateway, post(gateway.key, order())), LEDGER_AWAY)
    gateway.database.close()
    assert len(gateway.charges()) == len(upstream.requests) == 1
    assert ask(gateway, post(gateway.key, order())).status == 200
    assert [charge["state"] for charge in gateway.charges()] == ["settled", "settled"]


def test_a_budget_while_the_ledger_is_away(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = own
    assert ask(gateway, request("GET", "/v1/budget", key=gateway.key)).status == 200
    with database_away(gateway.database_url):
        check(ask(gateway, request("GET", "/v1/budget", key=gateway.key)), LEDGER_AWAY)
    gateway.database.close()


# The upstream fails


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


# Too many at once


def test_over_a_rate(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("fast")
    with gateway.database.writing() as connection:
        accounts.set_limit(connection, "fast", None, rpm=0, now=now(), actor="test")
    with nothing_heard(live):
        reply = ask(gateway, post(caller, order()))
    (wait,) = reply.values("retry-after")
    check(reply, Refused(429, "rate_limit_exceeded", type="requests", headers={"retry-after": wait}))
    assert 1 <= int(wait) <= 60


# One after the other


def test_refusals_leave_the_connection_usable(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    gateway, _ = live
    refusals = [post(key, order(n=0)), post(key, b"{}"), request("GET", "/v1/none"), post("sk-bm-no", order())]
    replies = send(gateway, b"".join([*refusals, post(key, order())]), answers=5)
    assert [reply.status for reply in replies] == [400, 400, 404, 401, 200]
    identities = [reply.values("x-beanmeter-request-id")[0] for reply in replies]
    assert len(set(identities)) == 5
