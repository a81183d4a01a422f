"""Attacks on the HTTP edge, as bytes on a bare socket. Whatever two parsers could read in two ways is refused or the
connection is closed; nothing of it goes upstream, nothing of it is logged, and the next caller notices nothing."""

from __future__ import annotations

import io
import json
import socket
import struct
import sys
import threading
from collections.abc import Iterable, Iterator

import pytest

from proxy import logs
from tests.bare import EDITS, GENERATIONS, JSON_TYPE, Incoming, Reply, ask, head, order, post, request, send
from tests.live import PATIENCE_SECONDS, PRICE_MICRO_USD, LiveGateway, ScriptedUpstream, live_gateway, wait_for

# What no log may ever show: it stands in headers, queries and bodies of these requests.
CANARY = "canary-7f3a"

BODY = order(prompt=CANARY)

MEGABYTE = 1 << 20


@pytest.fixture(scope="module")
def log() -> Iterator[io.StringIO]:
    """The log of everything that happens in this file."""
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    logs.configure(sys.stderr)


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory, log: io.StringIO) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    directory = tmp_path_factory.mktemp("edge")
    with live_gateway(f"sqlite:///{directory}/beanmeter.db", directory) as parts:
        yield parts


@pytest.fixture
def gateway(live: tuple[LiveGateway, ScriptedUpstream], log: io.StringIO) -> Iterator[LiveGateway]:
    """A gateway that, whatever the test did to it, is well afterwards and has logged neither errors nor secrets."""
    gateway, _ = live
    yield gateway
    assert ask(gateway, post(gateway.key, order())).status == 200
    lines = [json.loads(line) for line in log.getvalue().splitlines()]
    assert [line for line in lines if line["level"] not in ("info", "warning") or "exception" in line] == []
    assert [line for line in lines for secret in (CANARY, gateway.key) if secret in json.dumps(line)] == []


@pytest.fixture
def upstream(live: tuple[LiveGateway, ScriptedUpstream]) -> ScriptedUpstream:
    return live[1]


def fields(gateway: LiveGateway, *more: tuple[str, str], without: str = "") -> list[tuple[str, str]]:
    """The headers of a POST that would be answered, and more."""
    usual = [
        ("Host", "gateway.test"),
        ("Authorization", f"Bearer {gateway.key}"),
        JSON_TYPE,
        ("X-Canary", CANARY),
        ("Content-Length", str(len(BODY))),
    ]
    return [field for field in usual if field[0] != without] + list(more)


def in_chunks(body: bytes = BODY) -> bytes:
    return b"%x\r\n%s\r\n0\r\n\r\n" % (len(body), body)


CHUNKED = ("Transfer-Encoding", "chunked")

# Headers in place of the usual one of that name, and the body that goes with them.
HEADS: dict[str, tuple[str, list[tuple[str, str]], bytes]] = {
    "length and chunks": ("", [CHUNKED], in_chunks()),
    "chunks and length": ("Content-Length", [CHUNKED, ("Content-Length", str(len(BODY)))], in_chunks()),
    "length and another coding": ("", [("Transfer-Encoding", "identity")], BODY),
    "two equal lengths": ("", [("Content-Length", str(len(BODY)))], BODY),
    "two unequal lengths": ("", [("Content-Length", "5")], BODY),
    "lengths in one header": ("Content-Length", [("Content-Length", f"{len(BODY)}, {len(BODY)}")], BODY),
    "unequal lengths in one header": ("Content-Length", [("Content-Length", f"{len(BODY)}, 5")], BODY),
    "a gzip coding": ("Content-Length", [("Transfer-Encoding", "gzip")], BODY),
    "gzip in chunks": ("Content-Length", [("Transfer-Encoding", "gzip, chunked")], in_chunks()),
    "chunked, identity": ("Content-Length", [("Transfer-Encoding", "chunked, identity")], in_chunks()),
    "identity": ("Content-Length", [("Transfer-Encoding", "identity")], BODY),
    "chunked twice": ("Content-Length", [CHUNKED, CHUNKED], in_chunks()),
    "chunked twice in one header": ("Content-Length", [("Transfer-Encoding", "chunked, chunked")], in_chunks()),
    "chunked misspelled": ("Content-Length", [("Transfer-Encoding", "xchunked")], in_chunks()),
    "chunked with a parameter": ("Content-Length", [("Transfer-Encoding", "chunked;a=b")], in_chunks()),
    "chunked in quotes": ("Content-Length", [("Transfer-Encoding", '"chunked"')], in_chunks()),
    "chunked after a tab in its name": ("Content-Length", [("Transfer-Encoding\t", "chunked")], in_chunks()),
    "chunked after a blank in its name": ("Content-Length", [("Transfer-Encoding ", "chunked")], in_chunks()),
    "an empty coding": ("", [("Transfer-Encoding", "")], BODY),
    "no host": ("Host", [], BODY),
    "an empty host": ("Host", [("Host", "")], BODY),
    "two hosts": ("", [("Host", "gateway.test")], BODY),
    "two unequal hosts": ("", [("Host", "other.test")], BODY),
    "a host with a path": ("Host", [("Host", "gateway.test/x")], BODY),
    "a host with a user": ("Host", [("Host", "me@gateway.test")], BODY),
    "a host with a space": ("Host", [("Host", "gateway test")], BODY),
    "two hosts in one": ("Host", [("Host", "gateway.test, other.test")], BODY),
    "a NUL": ("", [("X-Test", "a\0b")], BODY),
    "a NUL in a name": ("", [("X-Te\0st", "a")], BODY),
    "a bell": ("", [("X-Test", "a\x07b")], BODY),
    "a vertical tab": ("", [("X-Test", "a\x0bb")], BODY),
    "a form feed": ("", [("X-Test", "\x0c")], BODY),
    "an escape": ("", [("X-Test", "\x1b[2J")], BODY),
    "a delete": ("", [("X-Test", "a\x7f")], BODY),
    "a bare carriage return": ("", [("X-Test", "a\rX-Other: b")], BODY),
    "a bare line feed": ("", [("X-Test", "a\nX-Other: b")], BODY),
    "a folded value": ("", [("X-Test", "a\r\n b")], BODY),
    "a folded value with a tab": ("", [("X-Test", "a\r\n\tb")], BODY),
    "a line without a colon": ("", [("X-Test: a\r\nnonsense\r\nX-Other", "b")], BODY),
    "a name that is empty": ("", [("", "a")], BODY),
    "a name with a space": ("", [("X Test", "a")], BODY),
    "a name that is not ASCII": ("", [("X-T\u00e9st", "a")], BODY),
    "a name in brackets": ("", [("X[Test]", "a")], BODY),
    "101 headers": ("", [("X-Many", "a")] * 96, BODY),
    "10000 headers": ("", [("X-Many", "a")] * 10_000, BODY),
    "a header of 33 KB": ("", [("X-Long", "a" * 33_000)], BODY),
    "a header of a megabyte": ("", [("X-Long", "a" * MEGABYTE)], BODY),
    "a name of a megabyte": ("", [("X" * MEGABYTE, "a")], BODY),
    "a megabyte of headers": ("", [(f"X-{n}", "a" * 16_384) for n in range(64)], BODY),
}  # fmt: skip
HEADS |= {
    f"a length of {length!r}": ("Content-Length", [("Content-Length", length)], BODY)
    for length in (
        "+5",
        "-5",
        "0x5",
        "5 5",
        "",
        " ",
        "5.0",
        "5e1",
        "5;",
        "five",
        "\u00b2",
        "1" * 16,
        "9" * 30,
        "5,",
        ",5",
        '"5"',
    )
}


def refused_or_closed(replies: list[Reply]) -> None:
    assert [reply.status for reply in replies if not 400 <= reply.status < 500] == []
    assert len(replies) <= 1


@pytest.mark.parametrize(("without", "more", "body"), HEADS.values(), ids=HEADS)
def test_heads(
    gateway: LiveGateway, upstream: ScriptedUpstream, without: str, more: list[tuple[str, str]], body: bytes
) -> None:
    sent, booked = len(upstream.requests), len(gateway.charges())
    refused_or_closed(send(gateway, head("POST", GENERATIONS, fields(gateway, *more, without=without)) + body, 2))
    assert (len(upstream.requests), len(gateway.charges())) == (sent, booked)


def first_lines(gateway: LiveGateway) -> dict[str, bytes]:
    """Requests whose first line is the fault, each with all else in order."""
    usual = head("POST", GENERATIONS, fields(gateway)) + BODY
    first = f"POST {GENERATIONS} HTTP/1.1".encode()

    def instead(line: str) -> bytes:
        return usual.replace(first, line.encode("latin-1"), 1)

    return {
        "bare line feeds": head("POST", GENERATIONS, fields(gateway)).replace(b"\r\n", b"\n") + BODY,
        "a bare line feed behind the first line": usual.replace(b"1.1\r\n", b"1.1\n", 1),
        "a bare line feed at the end": usual.replace(b"\r\n\r\n", b"\r\n\n", 1),
        "bare carriage returns": head("POST", GENERATIONS, fields(gateway)).replace(b"\r\n", b"\r") + BODY,
        "a target of another host": instead(f"POST http://gateway.test{GENERATIONS} HTTP/1.1"),
        "a target without a slash": instead(f"POST {GENERATIONS[1:]} HTTP/1.1"),
        "a star": instead("OPTIONS * HTTP/1.1"),
        "CONNECT": instead("CONNECT gateway.test:443 HTTP/1.1"),
        "CONNECT to a path": instead(f"CONNECT {GENERATIONS} HTTP/1.1"),
        "a method in lower case": instead(f"post {GENERATIONS} HTTP/1.1"),
        "a method that nobody knows": instead(f"BREW {GENERATIONS} HTTP/1.1"),
        "no method": instead(f"{GENERATIONS} HTTP/1.1"),
        "no version": instead(f"POST {GENERATIONS}"),
        "tabs": instead(f"POST\t{GENERATIONS}\tHTTP/1.1"),
        "a blank in the target": instead(f"POST {GENERATIONS} x HTTP/1.1"),
        "a NUL in the target": instead(f"POST {GENERATIONS}\0 HTTP/1.1"),
        "a line feed in the target": instead(f"POST {GENERATIONS}?\nx: HTTP/1.1"),
        "a byte that is not ASCII in the target": instead(f"POST {GENERATIONS}\u00e9 HTTP/1.1"),
        "a byte that is not ASCII in the query": instead(f"POST {GENERATIONS}?\u00e9 HTTP/1.1"),
        "a fragment": instead(f"POST {GENERATIONS}#x HTTP/1.1"),
        "HTTP/1.2": instead(f"POST {GENERATIONS} HTTP/1.2"),
        "HTTP/2.0": instead(f"POST {GENERATIONS} HTTP/2.0"),
        "HTTP/11": instead(f"POST {GENERATIONS} HTTP/11"),
        "http in lower case": instead(f"POST {GENERATIONS} http/1.1"),
        "another protocol": instead(f"POST {GENERATIONS} ICY/1.1"),
        "a word behind the version": instead(f"POST {GENERATIONS} HTTP/1.1 x"),
        "HTTP/0.9": b"GET /livez\r\n\r\n",
        "the preface of HTTP/2": b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" + b"\0\0\0\4\0\0\0\0\0",
        "TLS": bytes.fromhex("16030100c8010000c40303") + bytes(200),
        "zeros": bytes(10_000),
        "a long target": instead(f"POST {GENERATIONS}?{'a' * 9_000} HTTP/1.1"),
        "a target of a megabyte": instead(f"POST {GENERATIONS}?{'a' * MEGABYTE} HTTP/1.1"),
    }


def test_first_lines(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    for name, data in first_lines(gateway).items():
        sent = len(upstream.requests)
        replies = send(gateway, data, 2)
        assert [reply.status for reply in replies if not 400 <= reply.status < 500] == [], name
        assert len(upstream.requests) == sent, name
        assert ask(gateway, request("GET", "/livez")).status == 200, name


@pytest.mark.parametrize(
    "line",
    [b"POST /v1/images/generations?", b"X-Endless: ", b"X-Endless", b"Content-Length: 0", b"\r\n"],
    ids=["a target", "a header", "a name", "a length", "nothing but line ends"],
)
def test_what_never_ends_is_cut(gateway: LiveGateway, upstream: ScriptedUpstream, line: bytes) -> None:
    """Nobody has to wait for the end of it, and nobody has to keep it."""
    start = line if line.startswith((b"POST", b"\r\n")) else b"POST /v1/images/generations HTTP/1.1\r\nHost: x\r\n" + line
    filling = (line if line == b"\r\n" else b"0") * 4_096
    sent = len(upstream.requests)
    assert taken(gateway, start, filling) < MEGABYTE
    assert len(upstream.requests) == sent


@pytest.mark.parametrize("start", [b"0\r\nX-Endless: ", b"0\r\nX-Endless", b"5;extension="], ids=["value", "name", "extension"])
def test_what_never_ends_behind_a_chunk_is_cut(gateway: LiveGateway, upstream: ScriptedUpstream, start: bytes) -> None:
    sent = len(upstream.requests)
    begun = head("POST", GENERATIONS, fields(gateway, CHUNKED, without="Content-Length"))
    assert taken(gateway, begun + start, b"a" * 4_096) < MEGABYTE
    assert len(upstream.requests) == sent


def taken(gateway: LiveGateway, start: bytes, filling: bytes) -> int:
    """How many bytes the gateway takes before it closes; more than a megabyte where it does not."""
    with gateway.connect() as connection:
        # Small buffers, so that what is sent is what was read.
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 16_384)
        connection.settimeout(PATIENCE_SECONDS)
        count = 0
        try:
            connection.sendall(start)
            while count < 16 * MEGABYTE:
                connection.sendall(filling)
                count += len(filling)
                if _has_ended(connection):
                    break
        except OSError:
            pass
    return count if count < 16 * MEGABYTE else sys.maxsize


def _has_ended(connection: socket.socket) -> bool:
    connection.setblocking(False)
    try:
        # An answer, or the end of the connection: the gateway has made up its mind.
        connection.recv(1)
    except BlockingIOError:
        return False
    finally:
        connection.settimeout(PATIENCE_SECONDS)
    return True


# What stands behind a body


def test_trailers_are_no_headers(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    trailers = (
        "Authorization: Bearer sk-canary-7f3a\r\nContent-Type: text/plain\r\nHost: other.test\r\n"
        "Cookie: a=b\r\nX-Trailer: canary-7f3a\r\nX-Beanmeter-Request-Id: mine\r\n"
    )
    begun = head("POST", GENERATIONS, fields(gateway, CHUNKED, ("Trailer", "Authorization"), without="Content-Length"))
    chunks = in_chunks().removesuffix(b"\r\n") + trailers.encode() + b"\r\n"
    assert ask(gateway, begun + chunks).status == 200
    sent = upstream.requests[-1]
    assert sent.body == BODY
    assert {"trailer", "x-trailer", "cookie", "transfer-encoding"} & {name for name, _ in sent.headers} == set()
    assert sent.values("content-type") == ["application/json"]
    assert sent.values("content-length") == [str(len(BODY))]


def test_trailers_do_not_give_a_key_to_who_has_none(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    sent = len(upstream.requests)
    begun = head("POST", GENERATIONS, [("Host", "gateway.test"), JSON_TYPE, CHUNKED])
    chunks = in_chunks().removesuffix(b"\r\n") + f"Authorization: Bearer {gateway.key}\r\n\r\n".encode()
    assert ask(gateway, begun + chunks).status == 401
    assert len(upstream.requests) == sent


BAD_CHUNKS = {
    "a size that is no number": b"zz\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a size with a sign": b"+%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    "a size with 0x": b"0x%x\r\n" % len(BODY) + BODY + b"\r\n0\r\n\r\n",
    "a size beyond measure": b"f" * 17 + b"\r\n" + BODY,
    "an empty size": b"\r\n" + BODY + b"\r\n0\r\n\r\n",
    "bare line feeds": b"%x\n%s\n0\n\n" % (len(BODY), BODY),
    "a chunk that is longer than said": b"5\r\n" + BODY + b"\r\n0\r\n\r\n",
    "a trailer without a colon": in_chunks().removesuffix(b"\r\n") + b"nonsense\r\n\r\n",
    "a length among the trailers": in_chunks().removesuffix(b"\r\n") + b"Content-Length: 5\r\n\r\n",
    "a coding among the trailers": in_chunks().removesuffix(b"\r\n") + b"Transfer-Encoding: gzip\r\n\r\n",
    "a trailer with a NUL": in_chunks().removesuffix(b"\r\n") + b"X: \0\r\n\r\n",
}


@pytest.mark.parametrize("chunks", BAD_CHUNKS.values(), ids=BAD_CHUNKS)
def test_chunks(gateway: LiveGateway, upstream: ScriptedUpstream, chunks: bytes) -> None:
    sent, booked = len(upstream.requests), len(gateway.charges())
    begun = head("POST", GENERATIONS, fields(gateway, CHUNKED, without="Content-Length"))
    refused_or_closed(send(gateway, begun + chunks, 2))
    assert (len(upstream.requests), len(gateway.charges())) == (sent, booked)


def test_a_request_inside_a_body_is_a_body(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    last = request("GET", "/livez", [("Connection", "close")])
    inner = post(gateway.key, order(n=2), EDITS)
    outer = order(prompt=inner.decode())
    sent = len(upstream.requests)
    replies = send(gateway, post(gateway.key, inner) + post(gateway.key, outer) + last, 5)
    assert [reply.status for reply in replies] == [400, 200, 200]
    assert [received.body for received in upstream.requests[sent:]] == [outer]


def test_requests_in_a_row_are_answered_in_order(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    sent = len(upstream.requests)
    bodies = [order(prompt=str(place), n=place) for place in range(1, 5)]
    replies = send(gateway, b"".join(post(gateway.key, body) for body in bodies), answers=4)
    held = [reply.values("x-beanmeter-reserved-usd") for reply in replies]
    assert held == [[f"{place * PRICE_MICRO_USD / 1_000_000:.6f}"] for place in range(1, 5)]
    assert [received.body for received in upstream.requests[sent:]] == bodies


def test_a_row_of_requests_may_be_longer_than_a_head(gateway: LiveGateway) -> None:
    """What belongs to a body, or to another head, does not count against the next head."""
    first = post(gateway.key, order(prompt="x" * 100_000))
    second = post(gateway.key, order())
    with gateway.connect() as connection:
        connection.sendall(first + second[:50])
        incoming = Incoming(connection)
        assert incoming.reply() is not None
        connection.sendall(second[50:])
        reply = incoming.reply()
    assert reply is not None
    assert reply.status == 200


@pytest.mark.parametrize(
    "behind",
    [b"nonsense\r\n\r\n", b"\0\0\0", b"GET /v1/models HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n", b'"}'],
    ids=["words", "zeros", "a bad head", "more of the body"],
)
def test_more_than_the_length_says(gateway: LiveGateway, upstream: ScriptedUpstream, behind: bytes) -> None:
    """The request that came whole is answered, and booked as it was answered; then there is nothing more to say."""
    assert ask(gateway, post(gateway.key, BODY)).status == 200
    sent, booked = len(upstream.requests), len(gateway.charges())
    replies = send(gateway, post(gateway.key, BODY) + behind, 3)
    assert [reply.status for reply in replies] in ([200], [200, 400])
    assert replies[0].values("x-beanmeter-reserved-usd") == ["0.210700"]
    assert (len(upstream.requests), len(gateway.charges())) == (sent + 1, booked + 1)
    assert upstream.requests[-1].body == BODY


def test_nonsense_behind_a_second_request_spoils_neither(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    sent = len(upstream.requests)
    replies = send(gateway, post(gateway.key, BODY) * 2 + b"nonsense\r\n\r\n", 3)
    assert [reply.status for reply in replies] in ([200, 200], [200, 200, 400])
    assert len(upstream.requests) == sent + 2


def test_a_second_request_that_breaks_in_its_body_is_not_sent(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    body = order(prompt="broken")
    begun = head("POST", GENERATIONS, fields(gateway, CHUNKED, without="Content-Length"))
    send(gateway, post(gateway.key, BODY) + begun + in_chunks(body).replace(b"\r\n0\r\n", b"\r\nzz\r\n"), 3)
    assert ask(gateway, post(gateway.key, order())).status == 200
    assert [received for received in upstream.requests if b"broken" in received.body] == []


# What is unusual, and works


def test_http_1_0(gateway: LiveGateway) -> None:
    data = post(gateway.key, BODY).replace(b" HTTP/1.1", b" HTTP/1.0", 1)
    replies = send(gateway, data, 2)
    assert [reply.status for reply in replies] == [200]
    assert replies[0].values("connection") == ["close"]


@pytest.mark.parametrize("protocol", ["h2c", "websocket", "TLS/1.3", "x"])
def test_an_offer_of_another_protocol_is_declined(gateway: LiveGateway, upstream: ScriptedUpstream, protocol: str) -> None:
    """The request itself is answered, body and all, and what follows it is not lost."""
    offer = [("Connection", "Upgrade, HTTP2-Settings"), ("Upgrade", protocol), ("HTTP2-Settings", "AAMAAABkAAQAoAAA")]
    data = head("POST", GENERATIONS, fields(gateway, *offer)) + BODY
    sent = len(upstream.requests)
    assert [reply.status for reply in send(gateway, data + request("GET", "/livez", offer) + data, 3)] == [200, 200, 200]
    assert [received.body for received in upstream.requests[sent:]] == [BODY, BODY]
    assert {"upgrade", "http2-settings", "connection"} & {name for name, _ in upstream.requests[-1].headers} == set()


def test_a_body_behind_an_offer_is_never_a_request(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    offer = [("Connection", "Upgrade"), ("Upgrade", "websocket")]
    inner = post(gateway.key, BODY)
    begun = head("POST", GENERATIONS, [*fields(gateway, *offer, without="Content-Length"), ("Content-Length", str(len(inner)))])
    sent = len(upstream.requests)
    with gateway.connect() as connection:
        connection.sendall(begun)
        assert ask(gateway, request("GET", "/livez")).status == 200
        connection.sendall(inner)
        reply = Incoming(connection).reply()
    assert reply is not None
    assert reply.error["code"] == "invalid_json"
    assert len(upstream.requests) == sent


def test_many_offers_in_a_row(gateway: LiveGateway) -> None:
    offer = request("GET", "/livez", [("Connection", "Upgrade"), ("Upgrade", "x")])
    assert [reply.status for reply in send(gateway, offer * 1_500, 1_500)] == [200] * 1_500


def test_expect_100_continue(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    with gateway.connect() as connection:
        connection.sendall(head("POST", GENERATIONS, fields(gateway, ("Expect", "100-continue"))))
        interim = b"HTTP/1.1 100 Continue\r\n\r\n"
        assert connection.recv(len(interim), socket.MSG_WAITALL) == interim
        connection.sendall(BODY)
        reply = Incoming(connection).reply()
    assert reply is not None
    assert reply.status == 200
    assert upstream.requests[-1].values("expect") == []


@pytest.mark.parametrize("key", ["sk-bm-nonsense", None])
def test_who_is_refused_is_not_told_to_continue(gateway: LiveGateway, key: str | None) -> None:
    with gateway.connect() as connection:
        head_ = fields(gateway, ("Expect", "100-continue"), without="Authorization")
        connection.sendall(head("POST", GENERATIONS, [*head_, *([("Authorization", f"Bearer {key}")] if key else [])]))
        assert connection.recv(12, socket.MSG_WAITALL) == b"HTTP/1.1 401"


# Clients that leave


@pytest.mark.parametrize("how", ["closed", "reset"])
@pytest.mark.parametrize("framing", ["length", "chunks", "continue"])
def test_a_client_that_leaves_in_the_middle_of_its_body(
    gateway: LiveGateway, upstream: ScriptedUpstream, how: str, framing: str
) -> None:
    sent, booked, refusals = len(upstream.requests), len(gateway.charges()), incomplete(gateway)
    with gateway.connect() as connection:
        if framing == "chunks":
            begun = head("POST", GENERATIONS, fields(gateway, CHUNKED, without="Content-Length"))
            # All of the order is there, but not the last chunk.
            connection.sendall(begun + in_chunks().removesuffix(b"0\r\n\r\n"))
        else:
            more = [("Expect", "100-continue")] if framing == "continue" else []
            connection.sendall(head("POST", GENERATIONS, fields(gateway, *more)) + BODY[:-1])
        if how == "reset":
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    wait_for(lambda: True if incomplete(gateway) == refusals + 1 else None)
    assert (len(upstream.requests), len(gateway.charges())) == (sent, booked)


def incomplete(gateway: LiveGateway) -> float:
    return gateway.metric('beanmeter_refusals_total{code="incomplete_body",team="red"}')


def test_a_crowd_of_callers_that_leave_does_not_keep_the_others_out(gateway: LiveGateway, upstream: ScriptedUpstream) -> None:
    sent = len(upstream.requests)
    begun = head("POST", GENERATIONS, fields(gateway)) + BODY[:-1]

    def leave(times: Iterable[int]) -> None:
        for _ in times:
            with gateway.connect() as connection:
                connection.sendall(begun)

    crowd = [threading.Thread(target=leave, args=(range(50),)) for _ in range(4)]
    for member in crowd:
        member.start()
    for _ in range(10):
        assert ask(gateway, post(gateway.key, order())).status == 200
    for member in crowd:
        member.join()
    assert len(upstream.requests) == sent + 10


def test_queries_and_prompts_are_in_no_log(gateway: LiveGateway, upstream: ScriptedUpstream, log: io.StringIO) -> None:
    answered = ask(gateway, head("POST", f"{GENERATIONS}?token={CANARY}", fields(gateway)) + BODY)
    refused = ask(gateway, post(gateway.key, order(size=CANARY), f"{GENERATIONS}?{CANARY}"))
    unknown = ask(gateway, post(gateway.key, BODY, f"/v1/{CANARY}?{CANARY}"))
    assert [reply.status for reply in (answered, refused, unknown)] == [200, 400, 404]
    # The log is read, and tells of this request: that it has no secrets in it says something.
    assert answered.values("x-beanmeter-request-id")[0] in log.getvalue()
    assert upstream.requests[-1].target.endswith(f"?token={CANARY}")
