"""Connections and transactions on SQLite and PostgreSQL. The only file that knows how either begins, waits and times out."""

from __future__ import annotations

import asyncio
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, cast

from sqlalchemy import Connection, Engine, create_engine, event, make_url
from sqlalchemy.engine import URL
from sqlalchemy.exc import DBAPIError, SQLAlchemyError

# A writer waits this long for another process's transaction (a command beside a running gateway) before it gives up.
LOCK_WAIT_SECONDS = 10

# SQLite has no queue of writers: each looks now and then whether it is its turn. SQLite's own way is to look after 1, 2, 5, 10
# and up to 100 ms, and whoever has just committed is quicker: of two workers under load one waits for hundreds of commits.
LOOK_SECONDS = 0.0002

# A database that does not answer within this is away: requests are refused rather than kept waiting.
CONNECT_SECONDS = 3
STATEMENT_SECONDS = 15

# What the event loop asks. A database that hangs must not take the threads that others need, nor keep anybody waiting.
ASKED_AT_ONCE = 4
ANSWER_SECONDS = 5
CHANGE_SECONDS = 20
LET_GO_SECONDS = 0.2

# A deferred transaction that reads and then writes fails under a second writer; an immediate one waits its turn.
_BEGIN_SQLITE = "BEGIN IMMEDIATE"

Answer = TypeVar("Answer")


@dataclass(slots=True)
class _Errand:
    """Work that a thread does for the event loop; the connection while it has one."""

    connection: Connection | None = None


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
        self._kept: Connection | None = None
        self._taken = threading.Lock()
        # Not the event loop's own threads: those write the journal and keep bodies, also while the database hangs.
        self._reading_threads = ThreadPoolExecutor(ASKED_AT_ONCE, "ledger-reader")
        self._writing_threads = ThreadPoolExecutor(1, "ledger-writer")

    @contextmanager
    def writing(self) -> Iterator[Connection]:
        """A transaction that may write: committed at the end of the block, rolled back by an exception."""
        with self._at_hand() as connection, connection.begin():
            yield connection

    @contextmanager
    def posting(self) -> Iterator[Connection]:
        """As :meth:`writing`, for what speaks to the driver alone, as the books do. SQLAlchemy is not told of the transaction,
        which takes it as long as the books' statements take: nothing may be executed through it here."""
        with self._at_hand() as connection:
            try:
                if self.dialect == "sqlite":
                    with driver_of(connection) as driver:
                        _begin_writing(driver)
                # PostgreSQL is told together with the first statements.
                yield connection
                with driver_of(connection) as driver:
                    driver.commit()
            except BaseException:
                _roll_back(connection)
                raise

    @contextmanager
    def _at_hand(self) -> Iterator[Connection]:
        """The connection to write on, which nobody else has meanwhile."""
        # To take a connection out of the pool and put it back costs as much as the books' own statements, so one is kept at
        # hand. On SQLite whoever comes second waits for it, since there is one writer anyway; more would poll the file's lock.
        if not self._taken.acquire(timeout=LOCK_WAIT_SECONDS if self.dialect == "sqlite" else 0):
            if self.dialect == "sqlite":
                raise TimeoutError("another thread writes to the database, and does not come to an end")
            with self._writer.connect() as connection:
                yield connection
            return
        try:
            if self._kept is None:
                self._kept = self._writer.connect()
            yield self._kept
        finally:
            self._taken.release()

    @contextmanager
    def reading(self) -> Iterator[Connection]:
        """A consistent view for reading."""
        with self._reader.begin() as connection:
            yield connection

    async def ask(self, read: Callable[[Connection], Answer]) -> Answer:
        """What ``read`` answers on a consistent view, from a thread. Raises ``TimeoutError`` for a database that hangs,
        else SQLAlchemy's errors."""
        errand = _Errand()
        job = self._reading_threads.submit(self._read, read, errand)
        try:
            async with asyncio.timeout(ANSWER_SECONDS):
                return await asyncio.wrap_future(job)
        except (TimeoutError, asyncio.CancelledError):
            self._let_go(job, errand)
            raise

    async def change(self, write: Callable[[Connection], Answer]) -> Answer:
        """What ``write`` answers inside a transaction, from a thread. It is carried out whether its caller waits or leaves.
        Raises as :meth:`ask` does; whether something was committed then, only the books can tell."""
        return await asyncio.shield(asyncio.wrap_future(self._writing_threads.submit(self._write, write)))

    def _let_go(self, job: Future[Any], errand: _Errand) -> None:
        """Nobody waits for this any more, and its thread has others to serve. It may not have come to its connection yet, or
        be between two statements: so again, until it has ended."""
        if not job.done():
            self.interrupt(errand.connection)
            asyncio.get_running_loop().call_later(LET_GO_SECONDS, self._let_go, job, errand)

    def _read(self, read: Callable[[Connection], Answer], errand: _Errand, *, again: bool = True) -> Answer:
        try:
            with self.reading() as errand.connection:
                return read(errand.connection)
        except DBAPIError as error:
            # The database was restarted since this connection was last used; reading once more does no harm.
            if not (again and error.connection_invalidated):
                raise
        finally:
            errand.connection = None
        return self._read(read, errand, again=False)

    def _write(self, write: Callable[[Connection], Answer]) -> Answer:
        errand = _Errand()
        patience = threading.Timer(CHANGE_SECONDS, lambda: self.interrupt(errand.connection))
        patience.start()
        try:
            with self.writing() as errand.connection:
                return write(errand.connection)
        finally:
            errand.connection = None
            patience.cancel()

    def interrupt(self, connection: Connection | None) -> None:
        """End what another thread waits for on this connection; it fails there. A server that has frozen has no other way
        to be let go: its connection is closed from this side."""
        # One that is not connected any more would connect again, here and now, only to be asked for its socket.
        if connection is None or connection.invalidated:
            return
        # It may have ended by itself meanwhile, and each layer has its own error for that.
        with suppress(Exception):
            driver: Any = connection.connection.driver_connection
            if self.dialect == "sqlite":
                driver.interrupt()
                return
            with socket.socket(fileno=os.dup(driver.pgconn.socket)) as duplicate:
                duplicate.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Give all connections back; what is asked later opens new ones.

        One that a thread is still writing on is not touched on SQLite: taken back from here, the rest of what the thread does
        would be committed statement by statement. It comes to its end, or the end of the process takes it back.
        """
        if self._taken.acquire(blocking=False):
            try:
                kept, self._kept = self._kept, None
                if kept is not None:
                    with suppress(SQLAlchemyError):
                        kept.close()
            finally:
                self._taken.release()
        elif self.dialect == "postgresql":
            # The server takes back what is not committed, and the thread hears of it.
            self.interrupt(self._kept)
        self._writer.dispose()
        self._reader.dispose()


def _roll_back(connection: Connection) -> None:
    """Take back what an exception has ended. A connection on which that fails is of no use any more."""
    try:
        if not (connection.closed or connection.invalidated):
            with driver_of(connection) as driver:
                driver.rollback()
    except SQLAlchemyError as error:
        if not (connection.closed or connection.invalidated):
            connection.invalidate(error)


@contextmanager
def driver_of(connection: Connection) -> Iterator[Any]:
    """The driver's own connection, within the transaction; what it raises comes as SQLAlchemy's error for it."""
    dialect, proxied = connection.dialect, connection.connection
    driver_error: type[Exception] = dialect.loaded_dbapi.Error
    try:
        yield proxied.driver_connection
    except driver_error as error:
        gone = dialect.is_disconnect(cast("Any", error), proxied, None)
        if gone:
            connection.invalidate(error)
            # The idle ones are of the same server: none of them is worth a try, nor a wait without an end.
            connection.engine.dispose()
        # No statement and no values in its text: they would reach the log.
        raise DBAPIError.instance(None, None, error, driver_error, connection_invalidated=gone, dialect=dialect) from error


def _open(url: URL, *, writes: bool) -> Engine:
    return _open_sqlite(url, writes=writes) if url.get_backend_name() == "sqlite" else _open_postgresql(url, writes=writes)


def _open_sqlite(url: URL, *, writes: bool) -> Engine:
    engine = create_engine(
        url,
        pool_size=1 if writes else 4,
        max_overflow=0,
        pool_timeout=LOCK_WAIT_SECONDS,
        # A writer waits in its own way, below.
        connect_args={"timeout": 0 if writes else LOCK_WAIT_SECONDS},
    )

    @event.listens_for(engine, "connect")
    def prepare(connection: Any, _record: object) -> None:
        # The driver's own BEGIN comes late and deferred; ours is explicit, below.
        connection.isolation_level = None
        cursor = connection.cursor()
        _switch_to_wal(cursor)
        # NORMAL can lose commits when the power goes: what is booked would be gone while the bill is not.
        cursor.execute("PRAGMA synchronous = FULL")
        # Whoever's commit makes the log longer than this, 16 MB, writes it back, and a request waits for that. It is four times
        # the default, so a quarter as many wait.
        cursor.execute("PRAGMA wal_autocheckpoint = 4000")
        cursor.execute("PRAGMA foreign_keys = ON")
        # SQLite has no such function before 3.41.
        connection.create_function("from_hex", 1, _from_hex, deterministic=True)
        cursor.close()

    @event.listens_for(engine, "begin")
    def begin(connection: Connection) -> None:
        with driver_of(connection) as driver:
            if writes:
                _begin_writing(driver)
            else:
                driver.execute("BEGIN")

    return engine


def _begin_writing(driver: sqlite3.Connection) -> None:
    """Begin a transaction as the only one who writes; waits for another process's."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            driver.execute(_BEGIN_SQLITE)
            return
        except sqlite3.OperationalError as error:
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
        time.sleep(LOOK_SECONDS)


def _is_busy(error: sqlite3.OperationalError) -> bool:
    return error.sqlite_errorcode & 0xFF == sqlite3.SQLITE_BUSY


def _from_hex(digits: str | None) -> bytes | None:
    return None if digits is None else bytes.fromhex(digits)


def _switch_to_wal(cursor: sqlite3.Cursor) -> None:
    """Write ahead, so that readers and a writer don't wait for each other; the file remembers it."""
    deadline = time.monotonic() + LOCK_WAIT_SECONDS
    while True:
        try:
            (mode,) = cursor.execute("PRAGMA journal_mode = WAL").fetchone()
        except sqlite3.OperationalError as error:
            # Of several processes that open a new file at once, one switches it. SQLite doesn't let the others wait for
            # that as they wait for a writer: it refuses them at once.
            if not _is_busy(error) or time.monotonic() > deadline:
                raise
            time.sleep(0.01)
        else:
            if mode != "wal":
                # It says so, and goes on in another way, in which a reader keeps writers from their commit.
                raise sqlite3.OperationalError(f"SQLite writes in mode {mode!r} here, not ahead: keep it on a local disk")
            return


def _given_options(url: URL) -> tuple[str, ...]:
    """What the URL sets for a session itself, such as its schema; the driver takes the options of one place only."""
    given = url.query.get("options", ())
    return (given,) if isinstance(given, str) else given


def _open_postgresql(url: URL, *, writes: bool) -> Engine:
    options: dict[str, int | str] = {
        "statement_timeout": STATEMENT_SECONDS * 1000,
        "lock_timeout": LOCK_WAIT_SECONDS * 1000,
        "timezone": "UTC",
    }
    if writes:
        # Whoever holds locks and has gone quiet lets go. A reader holds none, and may be somebody paging through a listing.
        options["idle_in_transaction_session_timeout"] = 2 * STATEMENT_SECONDS * 1000
        # The books' statements find their rows by keys, whatever is asked. To plan them anew for each, as the server would
        # for lists whose length it can't foresee, takes it longer than to carry them out.
        options["plan_cache_mode"] = "force_generic_plan"
        # Such a plan is made while the tables are next to empty, when to read all of one seems cheapest, and is kept while
        # they grow. What is left is to look up row by row.
        options |= dict.fromkeys(("enable_seqscan", "enable_hashjoin", "enable_mergejoin"), "off")
        # Where there is no other way, what is switched off looks so dear that the server would compile the statement first.
        options["jit"] = "off"
    return create_engine(
        url.set(drivername="postgresql+psycopg"),
        pool_size=1 if writes else 4,
        # Commands write from several threads at once when a server runs them; the teller needs one.
        max_overflow=4,
        pool_timeout=LOCK_WAIT_SECONDS,
        isolation_level="READ COMMITTED" if writes else "REPEATABLE READ",
        connect_args={
            "connect_timeout": CONNECT_SECONDS,
            "application_name": "beanmeter",
            # What the books send past the driver's cursors is in it.
            "client_encoding": "utf8",
            # At a rollback the driver has the server forget all prepared statements, those of the books too, once it has
            # prepared one itself.
            "prepare_threshold": None if writes else 5,
            "options": " ".join([*_given_options(url), *(f"-c {name}={value}" for name, value in options.items())]),
            # A server that vanished without a word is noticed by the kernel, not after two hours.
            "keepalives_idle": 5,
            "keepalives_interval": 2,
            "keepalives_count": 3,
            "tcp_user_timeout": 10_000,
        },
    )
