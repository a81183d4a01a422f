"""Connections and transactions on SQLite and PostgreSQL. The only file that knows how either begins, waits and times out."""

from __future__ import annotations

import os
import socket
import sqlite3
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any, Literal

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL

# A writer waits this long for another process's transaction (a command beside a running gateway) before it gives up.
LOCK_WAIT_SECONDS = 10

# A database that does not answer within this is away: requests are refused rather than kept waiting.
CONNECT_SECONDS = 3
STATEMENT_SECONDS = 15


class Database:
    """One database, opened for reading and for writing.

    ``url`` is ``sqlite:///path`` or ``postgresql://...``. Nothing connects before the first transaction. Errors are
    SQLAlchemy's.
    """

    def __init__(self, url: str) -> None:
        parsed = make_url(url)
        self.dialect: Literal["sqlite", "postgresql"] = "sqlite" if parsed.get_backend_name() == "sqlite" else "postgresql"
        self._writer = _open(parsed, writes=True)
        self._reader = _open(parsed, writes=False)

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write: committed at the end of the block, rolled back by an exception."""
        with self._writer.begin() as connection:
            yield connection

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A consistent view for reading."""
        with self._reader.begin() as connection:
            yield connection

    def interrupt(self, connection: Connection) -> None:
        """End the network connection of a transaction that another thread waits in; it fails there. Without effect on
        SQLite, where no server can freeze."""
        if self.dialect == "postgresql":
            driver: Any = connection.connection.driver_connection
            # It may have ended by itself meanwhile, and the driver has its own error for that.
            with suppress(Exception), socket.socket(fileno=os.dup(driver.pgconn.socket)) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give all connections back. None may be in use."""
        self._writer.dispose()
        self._reader.dispose()


def _open(url: URL, *, writes: bool) -> Engine:
    return _open_sqlite(url, writes=writes) if url.get_backend_name() == "sqlite" else _open_postgresql(url, writes=writes)


def _open_sqlite(url: URL, *, writes: bool) -> Engine:
    engine = create_engine(
        url,
        pool_size=1 if writes else 4,
        max_overflow=0,
        pool_timeout=LOCK_WAIT_SECONDS,
        connect_args={"timeout": LOCK_WAIT_SECONDS},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # The driver's own BEGIN comes late and deferred; ours is explicit, below.
        connection.isolation_level = None
        cursor = connection.cursor()
        _switch_to_wal(cursor)
        # NORMAL can lose commits when the power goes: what is booked would be gone while the bill is not.
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        # A deferred transaction that reads and then writes fails under a second writer; an immediate one waits its turn.
        connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")

    return engine


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    """Write ahead, so that readers and a writer don't wait for each other; the file remembers it."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            cursor.execute("PRAGMA journal_mode = WAL")
            return
        except sqlite3.OperationalError as error:
            # Of several processes that open a new file at once, one switches it. SQLite doesn't let the others wait for
            # that as they wait for a writer: it refuses them at once.
            if error.sqlite_errorcode & 0xFF != sqlite3.SQLITE_BUSY or time.monotonic() > deadline:
                raise
            time.sleep(0.01)


def _open_postgresql(url: URL, *, writes: bool) -> Engine:
    options: dict[str, int | str] = {
        "statement_timeout": STATEMENT_SECONDS * 1000,
        "lock_timeout": LOCK_WAIT_SECONDS * 1000,
        "timezone": "UTC",
    }
    if writes:
        # Whoever holds locks and has gone quiet lets go. A reader holds none, and may be somebody paging through a listing.
        options["idle_in_transaction_session_timeout"] = 2 * STATEMENT_SECONDS * 1000
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=1 if writes else 4,
        # Commands write from several threads at once when a server runs them; the teller needs one.
        max_overflow=4,
        # After a restart of the server its old connections are found out here, not by whoever reads next. The writer goes
        # without: this costs a round trip each time.
        pool_pre_ping=not writes,
        pool_timeout=LOCK_WAIT_SECONDS,
        isolation_level="READ COMMITTED" if writes else "REPEATABLE READ",
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "beanmeter",
            "options": " ".join(f"-c {name}={value}" for name, value in options.items()),
            # A server that vanished without a word is noticed by the kernel, not after two hours.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )
