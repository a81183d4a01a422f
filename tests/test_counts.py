"""What a request takes, in what can be counted and does not depend on the machine: transactions, statements, round trips to
the database, rows read, connections upstream, copies of what is relayed."""

from __future__ import annotations

import asyncio
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection

from proxy import exchange, server, transport
from proxy.ledger import accounts, books
from proxy.ledger.engine import driver_of
from tests.ledger.ledgers import NOON, PRICE, Account, Ledger, reservation, settled
from tests.ledger.wire import Wire
from tests.live import ORDER, PATIENCE_SECONDS, SSE, Conversation, chunked, completed, live_gateway, whole

REQUESTS = 20

# More than go one by one, fewer than a transaction takes.
BATCH = 50

# More than any batch may read.
TEAMS = 300


def ready(database_url: str) -> tuple[Ledger, Account]:
    """Books with a team, a key and a budget in which the period has begun and the day has its sums."""
    ledger = Ledger(database_url)
    account = ledger.account()
    ledger.set_budget(1_000_000 * PRICE)
    job = reservation(account)
    ledger.post([job])
    ledger.post(bookings=[settled(job)])
    return ledger, account


def test_requests_one_after_the_other(database_url: str, tmp_path: Path) -> None:
    with live_gateway(database_url, tmp_path) as (gateway, upstream):
        gateway.set_budget(10**9)
        for _ in range(REQUESTS):
            assert gateway.client.post("/images/generations", json=ORDER).status_code == 200
        commits = {
            step: gateway.metric(f'beanmeter_ledger_commit_seconds_count{{step="{step}"}}') for step in ("reserve", "book")
        }
        assert commits == {"reserve": REQUESTS, "book": REQUESTS}
        assert upstream.connections == 1


class Tapped:
    """A transport, with what is written to it kept."""

    def __init__(self, transport: Any, written: list[bytes]) -> None:
        self._transport = transport
        self._written = written

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        self._written.append(data)
        self._transport.write(data)

    def writelines(self, pieces: Sequence[bytes]) -> None:
        self._written.extend(pieces)
        self._transport.writelines(pieces)


Framing = Callable[[int, list[tuple[str, str]], bytes], bytes]


def in_a_chunk(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    return chunked(status, headers, [body])


@pytest.mark.parametrize(("framing", "copies"), [(whole, 0), (in_a_chunk, 1)])
@pytest.mark.parametrize("size", [1 << 10, 1 << 20])
def test_an_event_is_copied_once_at_the_most(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, framing: Framing, copies: int, size: int
) -> None:
    """From the reader of the upstream's answer to the client's socket it stays the object that it is, but for the frame of a
    chunk, which is put around it."""
    read: list[bytes] = []
    handed_on: list[bytes] = []
    written: list[bytes] = []
    hear, cork, write = transport.Connection.on_body, server._Corked.__init__, exchange.Client.write

    def on_body(self: transport.Connection, body: bytes) -> None:
        read.append(body)
        hear(self, body)

    def corked(self: server._Corked, transport: Any, loop: asyncio.AbstractEventLoop) -> None:
        cork(self, Tapped(transport, written), loop)  # type: ignore[arg-type]

    async def client_write(self: exchange.Client, piece: bytes) -> None:
        handed_on.append(piece)
        await write(self, piece)

    monkeypatch.setattr(transport.Connection, "on_body", on_body)
    monkeypatch.setattr(server._Corked, "__init__", corked)
    monkeypatch.setattr(exchange.Client, "write", client_write)
    body = completed().replace(b"aW1hZ2U=", b"A" * size) + b"data: [DONE]\n\n"
    with live_gateway(f"sqlite:///{tmp_path / 'beanmeter.db'}", tmp_path) as (gateway, upstream):
        begun = threading.Event()

        async def script(conversation: Conversation) -> None:
            # The head by itself, as from BeansAI: what follows when that has passed is a stream and not a whole answer.
            head, end, rest = framing(200, SSE, body).partition(b"\r\n\r\n")
            await conversation.write(head + end)
            await asyncio.to_thread(begun.wait, PATIENCE_SECONDS)
            await conversation.write(rest)

        upstream.script = script
        with gateway.client.stream("POST", "/images/generations", json=ORDER | {"stream": True}) as response:
            begun.set()
            assert response.read() == body
    assert b"".join(read) == body
    same = {id(piece) for piece in read}
    assert {id(piece) for piece in handed_on} <= same
    copied = sum(len(piece) for piece in written if id(piece) not in same and b"A" * 99 in piece)
    # Beside the body some bytes of frames, and the end of the answer.
    assert copied == pytest.approx(copies * len(body), rel=0.01, abs=200 * copies)


def test_a_batch_on_sqlite_is_a_few_statements(tmp_path: Path) -> None:
    ledger, account = ready(f"sqlite:///{tmp_path / 'beanmeter.db'}")
    with ledger.database.writing() as connection:
        driver = connection.connection.driver_connection
    statements: list[str] = []

    def words() -> list[str]:
        found = [" ".join(statement.split()[:2]) for statement in statements]
        statements.clear()
        return found

    assert driver is not None
    driver.set_trace_callback(statements.append)
    jobs = [reservation(account) for _ in range(BATCH)]
    ledger.post(jobs)
    added = ["INSERT INTO"] * 3  # charges, and the sums by day
    assert words() == ["BEGIN IMMEDIATE", "SELECT '['", *added, "UPDATE balances", "COMMIT"]
    ledger.post(bookings=[settled(job) for job in jobs])
    changed = [f"UPDATE {table}" for table in ("rollups", "team_days", "charges", "balances")]
    assert words() == ["BEGIN IMMEDIATE", "SELECT '['", *changed, "COMMIT"]
    driver.set_trace_callback(None)
    ledger.check()
    ledger.close()


@pytest.mark.postgres
@pytest.mark.parametrize("jobs", [1, BATCH])
def test_a_batch_on_postgresql_is_three_round_trips(postgres_database: str, jobs: int) -> None:
    with Wire(postgres_database) as wire:
        ledger, account = ready(wire.url)
        batch = [reservation(account) for _ in range(jobs)]
        before = wire.waits
        ledger.post(batch)
        assert wire.waits - before == 3, "for what is read, for what is written, and for the commit"
        before = wire.waits
        ledger.post(bookings=[settled(job) for job in batch])
        assert wire.waits - before == 3
        ledger.check()
        ledger.close()


@pytest.mark.postgres
@pytest.mark.parametrize("jobs", [1, BATCH])
def test_rows_are_found_on_postgresql_however_many_there_are(postgres_database: str, jobs: int) -> None:
    """Statements are planned when the tables are next to empty, and stay as they are while the tables grow."""
    ledger, account = ready(postgres_database)
    post_and_book(ledger, account, jobs)
    for _ in range(10):
        post_and_book(ledger, account, BATCH)
    with ledger.database.writing() as connection:
        for number in range(TEAMS):
            team = f"team {number}"
            accounts.add_team(connection, team, now=NOON, actor="test")
            key = accounts.add_key(connection, team, now=NOON, actor="test")
            for key_id in (None, key.id):
                accounts.set_budget(connection, team, key_id, "total", PRICE, soft=False, now=NOON, actor="test")
                accounts.set_limit(connection, team, key_id, rpm=1, now=NOON, actor="test")
    batch = [reservation(account) for _ in range(jobs)]
    ledger.post(batch)
    # By themselves and together: each kind of batch asks in its own way.
    for reserved, booked in (([reservation(account) for _ in range(jobs)], batch[: jobs // 2]), ([], batch[jobs // 2 :])):
        with ledger.database.posting() as connection:
            before = rows_read(connection)
            books.post(connection, reserved, [settled(job) for job in booked], NOON)
            read = rows_read(connection) - before
        assert read["charges"] >= len(booked)
        assert max(read.values()) <= 4 * jobs + 10, read
    ledger.check()
    ledger.close()


def post_and_book(ledger: Ledger, account: Account, jobs: int) -> None:
    """Charges from their beginning to their end: reserved, half of them booked beside other reservations, the rest alone."""
    first, second = ([reservation(account) for _ in range(jobs)] for _ in range(2))
    ledger.post(first)
    ledger.post(second, [settled(job) for job in first])
    ledger.post(bookings=[settled(job) for job in second])


def rows_read(connection: Connection) -> Counter[str]:
    """How many rows of each table this session has read, not counting what it has told the server's statistics of, as it does
    between transactions."""
    read = "coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0)"
    with driver_of(connection) as driver:
        return Counter(dict(driver.execute(f"SELECT relname, {read} FROM pg_stat_xact_user_tables").fetchall()))
