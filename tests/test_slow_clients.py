"""Clients that keep the gateway waiting: connections that say nothing, heads and bodies that never end, crowds of them."""

from __future__ import annotations

import json
import resource
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

from proxy.app import running
from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.server import PATIENCE, Patience
from proxy.settings import load
from tests.bare import GENERATIONS, JSON_TYPE, Incoming, Reply, head, order, post, request
from tests.live import JSON, PATIENCE_SECONDS, UPSTREAM_KEY, Conversation, Loop, ScriptedUpstream, json_answer, now, whole

SHORT = Patience(head_seconds=0.4, idle_seconds=0.6, body_seconds=0.5, body_bytes_min=1_000)


@dataclass
class Gate:
    """A gateway with little patience, and what it takes to talk to it."""

    port: int
    key: str
    loop: Loop
    upstream: ScriptedUpstream
    database: Database

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)

    def post(self) -> bytes:
        return post(self.key, order())

    def charges(self) -> int:
        with self.database.reading() as connection:
            return len(list(reports.list_charges(connection)))


@contextmanager
def gate_with(patience: Patience, directory: Path) -> Iterator[Gate]:
    loop = Loop()
    upstream = ScriptedUpstream(loop)
    url = f"sqlite:///{directory / 'beanmeter.db'}"
    database = Database(url)
    migrate(database)
    with database.writing() as connection:
        accounts.add_team(connection, "red", now=now(), actor="test")
        key = accounts.add_key(connection, "red", now=now(), actor="test").key
    environment = {
        "BEANMETER_UPSTREAM_URL": upstream.base_url,
        "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
        "BEANMETER_DATABASE_URL": url,
        "BEANMETER_STATE_DIR": str(directory),
        "BEANMETER_DRAIN_SECONDS": "5",
    }
    gateway = running(load(environment, directory), "127.0.0.1", 0, patience)
    base_url = loop.run(gateway.__aenter__())
    try:
        yield Gate(int(base_url.rpartition(":")[2].removesuffix("/v1")), key, loop, upstream, database)
    finally:
        loop.run(gateway.__aexit__(None, None, None))
        upstream.close()
        loop.close()
        database.close()


@pytest.fixture(scope="module")
def gate(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Gate]:
    with gate_with(SHORT, tmp_path_factory.mktemp("gate")) as gate:
        yield gate


def test_the_limits_are_what_the_manual_says() -> None:
    assert (PATIENCE.head_seconds, PATIENCE.idle_seconds, PATIENCE.body_seconds) == (10, 20, 30)
    assert PATIENCE.body_bytes_min == 30 * 1024


def half_head(gate: Gate) -> bytes:
    return gate.post().partition(b"\r\n\r\n")[0]


def half_body(gate: Gate) -> bytes:
    return gate.post()[:-1]


@pytest.mark.parametrize(
    ("begin", "status"),
    [
        pytest.param(lambda gate: b"", None, id="nothing"),
        pytest.param(lambda gate: b"\r\n", None, id="an empty line"),
        pytest.param(lambda gate: b"P", 408, id="one byte"),
        pytest.param(half_head, 408, id="a head without its end"),
        pytest.param(half_body, 408, id="a body without its last byte"),
        pytest.param(lambda gate: post(gate.key, b"", headers=[("Transfer-Encoding", "chunked")])[:-1], 400, id="both lengths"),
    ],
)
def test_a_request_that_does_not_come_is_not_waited_for(gate: Gate, begin: Callable[[Gate], bytes], status: int | None) -> None:
    upstream_before, charges_before = len(gate.upstream.requests), gate.charges()
    with gate.connect() as connection:
        connection.sendall(begin(gate))
        incoming = Incoming(connection)
        reply = incoming.reply()
        assert (None if reply is None else reply.status) == status
        if reply is not None:
            assert reply.values("connection") == ["close"]
            assert reply.values("x-beanmeter-error-source") == ["gateway"]
            assert reply.error["type"] == "invalid_request_error"
        assert incoming.read() == b""
    assert (len(gate.upstream.requests), gate.charges()) == (upstream_before, charges_before)


def test_a_trickle_does_not_buy_time(gate: Gate) -> None:
    """One byte now and then is no head and no body."""
    for whole_request in (half_head(gate), head("POST", GENERATIONS, body_headers(gate, 500)) + b" " * 500):
        with gate.connect() as connection:
            connection.settimeout(0.02)
            received = trickle(connection, whole_request)
            assert received.startswith(b"HTTP/1.1 408 ")


def body_headers(gate: Gate, length: int) -> list[tuple[str, str]]:
    return [("Host", "gateway.test"), ("Authorization", f"Bearer {gate.key}"), JSON_TYPE, ("Content-Length", str(length))]


def trickle(connection: socket.socket, data: bytes) -> bytes:
    """Send byte by byte until an answer comes; the answer."""
    for at in range(len(data)):
        try:
            connection.sendall(data[at : at + 1])
            return connection.recv(65_536)
        except TimeoutError:
            continue
    raise AssertionError("it took all of it")


def test_an_idle_connection_ends(gate: Gate) -> None:
    with gate.connect() as connection:
        incoming = Incoming(connection)
        for _ in range(3):
            connection.sendall(gate.post())
            assert status_of(incoming.reply()) == 200
        assert incoming.read() == b""


def test_a_kept_connection_has_as_little_time_for_its_next_head(gate: Gate) -> None:
    with gate.connect() as connection:
        incoming = Incoming(connection)
        connection.sendall(gate.post())
        assert status_of(incoming.reply()) == 200
        connection.sendall(half_head(gate))
        assert status_of(incoming.reply()) == 408
        assert incoming.read() == b""


def test_what_is_left_of_a_refused_body_is_not_read_forever(gate: Gate) -> None:
    with gate.connect() as connection:
        connection.sendall(head("POST", GENERATIONS, [("Host", "gateway.test"), JSON_TYPE, ("Content-Length", "1000000")]))
        incoming = Incoming(connection)
        assert status_of(incoming.reply()) == 401
        assert incoming.read() == b""


def test_a_body_that_comes_steadily_has_all_the_time_it_needs(gate: Gate) -> None:
    body = order(prompt="x" * 3_000)
    with gate.connect() as connection:
        connection.sendall(head("POST", GENERATIONS, body_headers(gate, len(body))) + body[:1_500])
        outlast_a_body(gate)
        connection.sendall(body[1_500:])
        assert status_of(Incoming(connection).reply()) == 200


def test_nobody_is_blamed_for_a_body_that_we_did_not_read(gate: Gate) -> None:
    """A second request behind one that is being answered is not read, however long that takes."""
    held = [gate.upstream.script]
    answers: list[Conversation] = []

    async def hold(conversation: Conversation) -> None:
        answers.append(conversation)
        if len(answers) > 1:
            await conversation.write(whole(200, JSON, json_answer()))

    body = order(prompt="x" * 3_000)
    gate.upstream.script = hold
    try:
        with gate.connect() as connection:
            connection.sendall(gate.post() + head("POST", GENERATIONS, body_headers(gate, len(body))) + body[:10])
            outlast_a_body(gate)
            outlast_a_body(gate)
            gate.loop.run(answers[0].write(whole(200, JSON, json_answer())))
            incoming = Incoming(connection)
            assert status_of(incoming.reply()) == 200
            connection.sendall(body[10:])
            assert status_of(incoming.reply()) == 200
    finally:
        gate.upstream.script = held[0]


def outlast_a_body(gate: Gate) -> None:
    """Return when the gateway has lost its patience with a body that begins now."""
    with gate.connect() as connection:
        connection.sendall(half_body(gate))
        assert status_of(Incoming(connection).reply()) == 408


def status_of(reply: Reply | None) -> int | None:
    return None if reply is None else reply.status


MANY = b"".join(b"X-%d: 1\r\n" % number for number in range(101))


@pytest.mark.parametrize(
    ("lines", "status", "code"),
    [
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: a\r\n" + MANY + b"\r\n", 431, "headers_too_large", id="a hundred fields"),
        pytest.param(b"GET /livez HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 33_000, 431, "headers_too_large", id="an endless field"),
        pytest.param(
            b"GET /livez HTTP/1.1\r\nHost: a\r\n" + b"X: %s\r\n" % (b"x" * 4_000) * 9 + b"\r\n",
            431,
            "headers_too_large",
            id="many",
        ),
        pytest.param(b"GET /" + b"x" * 8_192 + b" HTTP/1.1\r\nHost: a\r\n\r\n", 414, "url_too_long", id="a long URL"),
        pytest.param(b"GET /" + b"x" * 40_000, 414, "url_too_long", id="an endless URL"),
        pytest.param(b"GET /livez HTTP/1.1\r\n\r\n", 400, "bad_request", id="no Host"),
        pytest.param(b"nonsense\r\n\r\n", 400, "bad_request", id="not HTTP"),
    ],
)
def test_heads_have_a_size(gate: Gate, lines: bytes, status: int, code: str) -> None:
    with gate.connect() as connection:
        connection.sendall(lines)
        incoming = Incoming(connection)
        reply = incoming.reply("GET")
        assert reply is not None
        assert (reply.status, reply.error["code"]) == (status, code)
        assert reply.values("connection") == ["close"]
        assert incoming.read() == b""


@pytest.fixture
def many_descriptors() -> Iterator[None]:
    """Room for both ends of a crowd's connections in this one process."""
    limits = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(limits[1], 4_096) if limits[1] > 0 else 4_096, limits[1]))
    yield
    resource.setrlimit(resource.RLIMIT_NOFILE, limits)


CROWD = 500


@pytest.mark.usefixtures("many_descriptors")
def test_a_crowd_of_half_open_connections_harms_nobody(tmp_path: Path) -> None:
    with gate_with(Patience(head_seconds=2), tmp_path) as gate:
        crowd = [gate.connect() for _ in range(CROWD)]
        for number, connection in enumerate(crowd):
            connection.sendall(half_head(gate)[: number % 100])
        statuses = []
        for _ in range(20):
            with gate.connect() as connection:
                connection.sendall(gate.post())
                statuses.append(status_of(Incoming(connection).reply()))
        assert statuses == [200] * 20
        left = [read_to_the_end(connection) for connection in crowd]
        assert {answer[:12] for answer in left} == {b"", b"HTTP/1.1 408"}
        with gate.connect() as connection:
            connection.sendall(request("GET", "/livez"))
            assert status_of(Incoming(connection).reply("GET")) == 200
        assert gate.charges() == 20


def read_to_the_end(connection: socket.socket) -> bytes:
    with connection:
        received = b""
        while piece := connection.recv(65_536):
            received += piece
        return received


def test_the_envelope_of_a_request_that_came_too_slowly(gate: Gate) -> None:
    with gate.connect() as connection:
        connection.sendall(half_body(gate))
        answer = read_to_the_end(connection)
    assert json.loads(answer.partition(b"\r\n\r\n")[2])["error"]["code"] == "request_timeout"
