"""What passes through the gateway passes unchanged, piece by piece as it comes, once, and never in another's way."""

from __future__ import annotations

import asyncio
import hashlib
import json
import queue
import random
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import httpx2
import pytest

from tests.live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    SSE,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    chunked,
    completed,
    event,
    json_answer,
    live_gateway,
    replay,
    until_closed,
    whole,
)

STREAMED = ORDER | {"stream": True}

Parts = tuple[LiveGateway, ScriptedUpstream]


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Parts]:
    directory = tmp_path_factory.mktemp("relay")
    with live_gateway(f"sqlite:///{directory / 'beanmeter.db'}", directory) as found:
        yield found


def digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def base64_noise(size: int) -> bytes:
    """Letters of base64 that no compression and no repetition helps."""
    return random.Random(size).randbytes(size * 3 // 4 + 3).hex().encode()[:size]


# Answers, byte for byte

KB, MB = 1 << 10, 1 << 20


def stream(size: int) -> bytes:
    """A stream as BeansAI sends it, with an image of about ``size`` bytes."""
    preview = event("image_generation.partial_image", b64_json="cHJldmlldw==", partial_image_index=0)
    return preview + completed().replace(b"aW1hZ2U=", base64_noise(size)) + b"data: [DONE]\n\n"


def bare_event() -> bytes:
    return b'data: {"type":"image_generation.completed","b64_json":"aW1hZ2U="}\n\n'


FORMS = {
    "LF": (SSE, stream(KB)),
    "CRLF": (SSE, stream(KB).replace(b"\n", b"\r\n")),
    "CR": (SSE, stream(KB).replace(b"\n", b"\r")),
    "mixed line ends": (SSE, stream(KB).replace(b"\n\n", b"\r\n\r", 1)),
    "comments": (SSE, b": ping\n\n:\n" + stream(KB) + b": end\n\n"),
    "no event lines": (SSE, bare_event() * 2),
    "several data lines": (SSE, b'data: {"type":"image_generation.completed",\ndata: "b64_json":"aW1hZ2U="}\n\n'),
    "byte order mark": (SSE, b"\xef\xbb\xbf" + stream(KB)),
    "no blank line at the end": (SSE, bare_event()[:-2]),
    "unknown events": (SSE, event("image_generation.queued") + stream(KB) + event("nobody.knows", x="\u2028\u0085")),
    "JSON": (JSON, json_answer()),
    "JSON, indented": (JSON, json.dumps(json.loads(json_answer(3)), indent=2).encode().replace(b"\n", b"\r\n")),
    "JSON to read twice": (JSON, b'  {"created":1,"created":2,"data":[{"b64_json":"\\u0061Q=="}],"\xc3\xa9":1e400}\n\n'),
    "not UTF-8": (SSE, b"data: \xff\xfe\x00\n\n" + stream(KB)),
    "a page": ([("Content-Type", "text/html; charset=latin-1")], b"<p>\xe9</p>"),
    "100 KB": (SSE, stream(100 * KB)),
    "1 MB": (SSE, stream(MB)),
    "1 MB in JSON": (JSON, json_answer().replace(b"aW1hZ2U=", base64_noise(MB))),
    "30 MB": (SSE, stream(30 * MB)),
    "30 MB in JSON": (JSON, json_answer().replace(b"aW1hZ2U=", base64_noise(30 * MB))),
}


def cut_up(body: bytes) -> list[bytes]:
    """Pieces of all sizes, from one byte on."""
    chance = random.Random(len(body))
    pieces: list[bytes] = []
    while body:
        size = chance.choice([1, 7, 1000, 65_536, 300_000]) if len(pieces) < 200 else len(body)
        pieces.append(body[:size])
        body = body[size:]
    return pieces


def wire(framing: str, headers: list[tuple[str, str]], body: bytes) -> bytes:
    if framing == "length":
        return whole(200, headers, body)
    if framing == "chunked":
        return chunked(200, headers, cut_up(body))
    return until_closed(200, headers, body)


@pytest.mark.parametrize("framing", ["length", "chunked", "close"])
@pytest.mark.parametrize("form", FORMS)
def test_an_answer_reaches_the_client_byte_for_byte(parts: Parts, form: str, framing: str) -> None:
    gateway, upstream = parts
    headers, body = FORMS[form]
    answer = wire(framing, headers, body)

    async def script(conversation: Conversation) -> None:
        await conversation.write(answer)
        if framing == "close":
            await conversation.close()

    upstream.script = script
    got = hashlib.sha256()
    with gateway.client.stream("POST", "/images/generations", json=STREAMED) as response:
        try:
            for piece in response.iter_raw():
                got.update(piece)
        except httpx2.RemoteProtocolError:
            # Where only the connection's end tells the answer's, one that brought no image may have been cut.
            assert (form, framing) == ("a page", "close")
    assert got.hexdigest() == digest(body)
    assert response.headers["content-type"] == headers[0][1]


@pytest.mark.parametrize("encoding", ["gzip", "br", "nonsense"])
def test_an_encoding_that_nobody_asked_for_passes_as_it_is(parts: Parts, encoding: str) -> None:
    gateway, upstream = parts
    body = bytes(range(256)) * 10
    upstream.answer(whole(200, [*JSON, ("Content-Encoding", encoding)], body))
    with gateway.client.stream("POST", "/images/generations", json=ORDER) as response:
        assert b"".join(response.iter_raw()) == body
    assert response.headers["content-encoding"] == encoding
    assert upstream.requests[-1].values("accept-encoding") == ["identity"]


# Piece by piece, as it comes


def test_a_piece_passes_before_the_next_one_is_sent(parts: Parts) -> None:
    """The upstream sends each piece only after the client has said that it has the one before: nothing is collected."""
    gateway, upstream = parts
    got: queue.SimpleQueue[int] = queue.SimpleQueue()
    pieces = [
        b": ping\n\n",
        b"d",
        b"ata: ",
        bare_event()[6:20],
        bare_event()[20:-1],
        b"\n",
        b"data: [DONE]\n\n",
        *[b":\n"] * 20,
    ]

    async def script(conversation: Conversation) -> None:
        await conversation.write(chunked(200, SSE, [], end=False))
        for place, piece in enumerate(pieces):
            assert await asyncio.to_thread(got.get, timeout=PATIENCE_SECONDS) == place
            await conversation.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        assert await asyncio.to_thread(got.get, timeout=PATIENCE_SECONDS) == len(pieces)
        await conversation.write(b"0\r\n\r\n")

    upstream.script = script
    with gateway.client.stream("POST", "/images/generations", json=STREAMED) as response:
        # The head is there before any byte of the body is.
        assert response.status_code == 200
        assert response.headers["content-type"] == "text/event-stream"
        got.put(0)
        body, confirmed = b"", 0
        for piece in response.iter_raw():
            body += piece
            while confirmed < len(pieces) and body == b"".join(pieces[: confirmed + 1]):
                confirmed += 1
                got.put(confirmed)
    assert body == b"".join(pieces)


def test_a_piece_passes_before_the_next_one_under_a_length(parts: Parts) -> None:
    gateway, upstream = parts
    got = threading.Event()
    body = json_answer(3)

    async def script(conversation: Conversation) -> None:
        head, _, _ = whole(200, JSON, body).partition(body)
        await conversation.write(head + body[:10])
        assert await asyncio.to_thread(got.wait, PATIENCE_SECONDS)
        await conversation.write(body[10:])

    upstream.script = script
    with gateway.client.stream("POST", "/images/generations", json=ORDER) as response:
        answer = b""
        for piece in response.iter_raw():
            answer += piece
            if answer == body[:10]:
                got.set()
    assert answer == body


# What goes up, byte for byte


class Caller:
    """A bare connection that sends a request body as the test says."""

    def __init__(self, gateway: LiveGateway, path: str, content_type: str) -> None:
        self._gateway = gateway
        self._socket = gateway.connect()
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._head = (
            f"POST /v1/images/{path} HTTP/1.1\r\nHost: gateway\r\nAuthorization: Bearer {gateway.key}\r\n"
            f"Content-Type: {content_type}\r\n"
        ).encode()

    def send(self, pieces: list[bytes], *, framing: str) -> int:
        """Send a body in these pieces; the status of the answer."""
        with self._socket as sock:
            if framing == "chunked":
                sock.sendall(self._head + b"Transfer-Encoding: chunked\r\n\r\n")
                for piece in pieces:
                    sock.sendall(b"%x\r\n%s\r\n" % (len(piece), piece))
                sock.sendall(b"0\r\n\r\n")
            else:
                sock.sendall(self._head + b"Content-Length: %d\r\n\r\n" % sum(map(len, pieces)))
                for piece in pieces:
                    sock.sendall(piece)
            return int(sock.recv(1 << 16).split(b" ")[1])


BODIES = {
    "plain": json.dumps(ORDER).encode(),
    "odd formatting": b' \r\n{\t"size" :"1024x1024",\n\n"quality":"high" , "n":1,"model": "gpt-image-2","prompt":"x"}\n \n',
    "unknown fields": json.dumps(ORDER | {"response_format": "b64_json", "x": {"size": 7, "n": [99]}, "user": "u"}).encode(),
    "unknown fields twice": b'{"x":1,"x":2,"model":"gpt-image-2","prompt":"","size":"1024x1024","quality":"high"}',
    "escaped names": b'{"\\u006dodel":"gpt\\u002dimage-2","p":"\\ud83e\\uded8","si\\u007ae":"1024x1024","quality":"high"}',
    "unicode": json.dumps(ORDER | {"prompt": "Bohne \U0001fad8 \u2028 \x7f \u0085"}, ensure_ascii=False).encode(),
    "large numbers": b'{"model":"gpt-image-2","seed":12345678901234567890123456.10e-5,"size":"1024x1024","quality":"high"}',
    "null and absent": b'{"model":"gpt-image-2","prompt":null,"n":null,"size":"1024x1024","quality":"high"}',
    "n after a megabyte": b'{"model":"gpt-image-2","prompt":"%s","size":"1024x1024","quality":"high","n":2}' % base64_noise(MB),
}


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("body", BODIES)
def test_a_json_body_goes_up_byte_for_byte(parts: Parts, body: str, framing: str) -> None:
    gateway, upstream = parts
    upstream.answer(whole(200, JSON, json_answer(2)))
    assert Caller(gateway, "generations", "application/json").send(cut_up(BODIES[body]), framing=framing) == 200
    assert upstream.requests[-1].sha256 == digest(BODIES[body])


@pytest.mark.parametrize("framing", ["length", "chunked"])
def test_a_body_in_single_bytes_goes_up_whole(parts: Parts, framing: str) -> None:
    gateway, upstream = parts
    upstream.answer(whole(200, JSON, json_answer()))
    body = BODIES["escaped names"]
    pieces = [bytes([byte]) for byte in body]
    assert Caller(gateway, "generations", "application/json").send(pieces, framing=framing) == 200
    assert upstream.requests[-1].body == body


def form(image_bytes: int, *, fields_first: bool) -> bytes:
    """A multipart body with noise for an image, which holds line ends and all but the boundary."""
    image = random.Random(image_bytes).randbytes(image_bytes) + b"\r\n--bean\r\n--beanbag--\r\n\x00"
    picture = b'--beans\r\nContent-Disposition: form-data; name="image"; filename="\xc3\xa9.png"\r\n\r\n' + image + b"\r\n"
    fields = {"model": "gpt-image-2", "size": "1024x1024", "quality": "low", "n": "3", "stream": "1", "prompt": "x"}
    text = "".join(f'--beans\r\nContent-Disposition: form-data; name="{k}"\r\n\r\n{v}\r\n' for k, v in fields.items()).encode()
    return (text + picture if fields_first else picture + text) + b"--beans--\r\n"


@pytest.mark.parametrize("framing", ["length", "chunked"])
@pytest.mark.parametrize("fields_first", [True, False])
def test_a_form_of_20_megabytes_goes_up_byte_for_byte(parts: Parts, framing: str, fields_first: bool) -> None:
    gateway, upstream = parts
    upstream.answer(chunked(200, SSE, [completed("edit")] * 3))
    body = form(20 * MB, fields_first=fields_first)
    caller = Caller(gateway, "edits", "multipart/form-data; boundary=beans")
    assert caller.send(cut_up(body), framing=framing) == 200
    request = upstream.requests[-1]
    assert request.sha256 == digest(body)
    assert request.values("content-length") == [str(len(body))]
    assert request.values("content-type") == ["multipart/form-data; boundary=beans"]
    charge = gateway.charges()[-1]
    assert (charge["images_requested"], charge["quality"], charge["stream"]) == (3, "low", True)


def test_a_json_edit_with_its_price_after_megabytes_of_image(parts: Parts) -> None:
    gateway, upstream = parts
    upstream.answer(whole(200, JSON, json_answer(2)))
    url = b"data:image/png;base64," + base64_noise(12 * MB)
    body = b'{"images":[{"image_url":"%s"}],"prompt":"x","model":"gpt-image-2","n":2,"size":"1024x1024","quality":"low"}' % url
    answer = gateway.client.post("/images/edits", content=body, headers={"content-type": "application/json"})
    assert answer.status_code == 200
    assert upstream.requests[-1].sha256 == digest(body)
    charge = gateway.charges()[-1]
    assert (charge["operation"], charge["images_requested"], charge["quality"]) == ("edit", 2, "low")


# A reader that stalls


@contextmanager
def stalled_reader(gateway: LiveGateway) -> Iterator[socket.socket]:
    """A client that asked for an answer and takes none of it; its socket has little room."""
    body = json.dumps(STREAMED).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 16 * KB)
        client.settimeout(PATIENCE_SECONDS)
        client.connect(("127.0.0.1", gateway.port))
        client.sendall(head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        yield client


# What the system's own socket buffers take on the way, at most 6 MB each by default, is out of the gateway's hands.
SYSTEM_BYTES_MAX = 14 * MB


def test_a_reader_that_stalls_holds_back_only_itself(parts: Parts) -> None:
    gateway, upstream = parts
    body = stream(30 * MB)
    taken: list[int] = [0]
    asked = threading.Event()

    async def to_the_stalled_one(conversation: Conversation) -> None:
        conversation._writer.get_extra_info("socket").setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 64 * KB)
        asked.set()
        await conversation.write(whole(200, SSE, body).partition(body)[0])
        for start in range(0, len(body), 64 * KB):
            piece = body[start : start + 64 * KB]
            await conversation.write(piece)
            taken[0] += len(piece)

    upstream.script = to_the_stalled_one
    with stalled_reader(gateway) as stalled:
        assert asked.wait(PATIENCE_SECONDS)
        upstream.answer(whole(200, SSE, body))
        for _ in range(3):
            got = hashlib.sha256()
            with gateway.client.stream("POST", "/images/generations", json=STREAMED) as response:
                for piece in response.iter_raw():
                    got.update(piece)
            assert got.hexdigest() == digest(body)
        # 90 MB went by meanwhile.
        assert taken[0] < SYSTEM_BYTES_MAX
        # Once it reads again, it has everything.
        answer = hashlib.sha256()
        head, _, rest = read_until(stalled, b"\r\n\r\n").partition(b"\r\n\r\n")
        assert b"content-length: %d" % len(body) in head
        answer.update(rest)
        left = len(body) - len(rest)
        while left:
            piece = stalled.recv(MB)
            assert piece
            answer.update(piece)
            left -= len(piece)
        assert answer.hexdigest() == digest(body)
    assert taken[0] == len(body)


def read_until(client: socket.socket, mark: bytes) -> bytes:
    found = b""
    while mark not in found:
        piece = client.recv(64 * KB)
        assert piece
        found += piece
    return found


# One request up for each request in


async def close_at_once(conversation: Conversation) -> None:
    await conversation.close()


async def reset_at_once(conversation: Conversation) -> None:
    await conversation.reset()


FAILURES = {
    "closed": close_at_once,
    "reset": reset_at_once,
    "a status that HTTP does not know": replay(whole(999, JSON, json_answer())),
    "a status without a length": replay(b"HTTP/1.1 600 Beyond\r\n\r\n"),
    "a control character in a header": replay(whole(200, [*JSON, ("X-Odd", "a\x01b")], json_answer())),
    "500": replay(whole(500, JSON, b'{"error":{"message":"m"}}')),
    "502": replay(whole(502, [("Content-Type", "text/html")], b"<p>")),
    "503 that asks to try again": replay(whole(503, [("Retry-After", "0")], b"")),
    "429 that asks to try again": replay(whole(429, [("Retry-After", "0"), ("x-should-retry", "true")], b"")),
    "408": replay(whole(408, [("Connection", "close")], b"")),
    "421": replay(whole(421, [], b"")),
    "425": replay(whole(425, [], b"")),
    "401": replay(whole(401, [("WWW-Authenticate", 'Basic realm="x"')], b"")),
    "307": replay(whole(307, [("Location", "/v1/images/edits")], b"")),
    "308 elsewhere": replay(whole(308, [("Location", "http://127.0.0.1:9/v1/images/generations")], b"")),
}


@pytest.mark.parametrize("reused", [False, True], ids=["fresh connection", "used connection"])
@pytest.mark.parametrize("failure", FAILURES)
def test_no_post_is_sent_twice(parts: Parts, failure: str, reused: bool) -> None:
    gateway, upstream = parts
    if reused:
        upstream.answer(whole(200, JSON, json_answer()))
        assert gateway.client.post("/images/generations", json=ORDER).status_code == 200
    before = len(upstream.requests), len(gateway.charges())
    upstream.script = FAILURES[failure]
    assert gateway.client.post("/images/generations", json=ORDER).status_code >= 300
    assert (len(upstream.requests), len(gateway.charges())) == (before[0] + 1, before[1] + 1)


def test_connections_that_the_upstream_closes_while_idle_do_no_harm(parts: Parts) -> None:
    """Each answer keeps its connection open by its words, and the upstream closes it all the same."""
    gateway, upstream = parts
    closed = threading.Event()

    async def answer_and_close(conversation: Conversation) -> None:
        await conversation.write(whole(200, JSON, json_answer()))
        await conversation.close()
        closed.set()

    upstream.script = answer_and_close
    before = len(upstream.requests)
    for _ in range(20):
        closed.clear()
        assert gateway.client.post("/images/generations", json=ORDER).status_code == 200
        assert closed.wait(PATIENCE_SECONDS)
    assert len(upstream.requests) == before + 20
    assert {charge["state"] for charge in gateway.charges()[-20:]} == {"settled"}


def test_a_connection_serves_one_request_after_the_other(parts: Parts) -> None:
    gateway, upstream = parts
    upstream.answer(chunked(200, SSE, [completed()]))
    gateway.client.post("/images/generations", json=STREAMED)
    before = upstream.connections
    for _ in range(5):
        assert gateway.client.post("/images/generations", json=STREAMED).status_code == 200
    assert upstream.connections == before


@pytest.mark.parametrize(
    "surplus",
    [
        pytest.param(whole(500, JSON, b'{"error":{"message":"not yours"}}'), id="an answer"),
        pytest.param(b"HTTP/1.1 408 Request Timeout\r\nConnection: close\r\n\r\n", id="a farewell"),
        pytest.param(b"\x00\x01 and so on", id="noise"),
    ],
)
def test_what_follows_an_answer_belongs_to_nobody(parts: Parts, surplus: bytes) -> None:
    gateway, upstream = parts
    for answer in (whole(200, JSON, json_answer()), chunked(200, JSON, [json_answer()])):
        upstream.answer(answer + surplus)
        for _ in range(2):
            response = gateway.client.post("/images/generations", json=ORDER)
            assert (response.status_code, response.content) == (200, json_answer())
            assert gateway.charges()[-1]["state"] == "settled"


# Headers


def test_headers_pass_both_ways_with_their_duplicates(parts: Parts) -> None:
    gateway, upstream = parts
    up: list[tuple[str, str]] = [("X-Stainless-Lang", "python"), ("X-Twice", "1"), ("X-Twice", "2"), ("User-Agent", "bean/1")]
    down = [("X-Request-Id", "req_upstream"), ("X-Twice", "a"), ("X-Twice", "b"), ("X-RateLimit-Remaining", "7")]
    upstream.answer(whole(200, [*JSON, *down], json_answer()))

    answer = gateway.client.post("/images/generations", json=ORDER, headers=[*up, ("Cookie", "c=1"), ("X-Beanmeter-X", "1")])

    assert [value for name, value in answer.headers.multi_items() if name == "x-twice"] == ["a", "b"]
    assert answer.headers["x-request-id"] == "req_upstream"
    assert answer.headers["x-ratelimit-remaining"] == "7"
    request = upstream.requests[-1]
    assert request.values("x-twice") == ["1", "2"]
    assert request.values("user-agent") == ["bean/1"]
    assert request.values("cookie") == []
    assert request.values("x-beanmeter-x") == []
    assert len(request.values("authorization")) == 1
    assert gateway.key not in str(request.headers)


def test_no_cookie_crosses_from_one_caller_to_another(parts: Parts) -> None:
    gateway, upstream = parts
    upstream.answer(whole(200, [*JSON, ("Set-Cookie", "session=1"), ("Set-Cookie", "other=2")], json_answer()))
    with httpx2.Client(trust_env=False, timeout=PATIENCE_SECONDS) as first:
        answer = post(first, gateway)
    assert [value for name, value in answer.headers.multi_items() if name == "set-cookie"] == ["session=1", "other=2"]
    with httpx2.Client(trust_env=False, timeout=PATIENCE_SECONDS) as second:
        post(second, gateway)
    assert upstream.requests[-1].values("cookie") == []


def post(client: httpx2.Client, gateway: LiveGateway, **more: Any) -> httpx2.Response:
    headers = {"authorization": f"Bearer {gateway.key}"}
    return client.post(gateway.base_url + "/images/generations", json=ORDER, headers=headers, **more)


@pytest.mark.parametrize("query", ["a=1&a=2", "q=%2F%2f..%00", "x=%E2%98%83+y", "size=3840x2160&n=10"])
def test_a_query_passes_as_it_is_and_prices_nothing(parts: Parts, query: str) -> None:
    gateway, upstream = parts
    upstream.answer(whole(200, JSON, json_answer()))
    body = json.dumps(ORDER).encode()
    head = f"POST /v1/images/generations?{query} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {gateway.key}\r\n"
    with gateway.connect() as client:
        client.sendall(head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
        assert read_until(client, b"\r\n\r\n").startswith(b"HTTP/1.1 200 ")
    assert upstream.requests[-1].target == f"/v1/images/generations?{query}"
    assert gateway.charges()[-1]["hold_micro_usd"] == 210_700
