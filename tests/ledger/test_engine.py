"""What the connections of either database really are set to, and who waits for whom."""

from __future__ import annotations

import asyncio
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import pytest
from sqlalchemy import Connection, text
from sqlalchemy.exc import DBAPIError, IntegrityError, OperationalError

from proxy.ledger import engine
from proxy.ledger.engine import ASKED_AT_ONCE, LOCK_WAIT_SECONDS, STATEMENT_SECONDS, Database, driver_of
from proxy.ledger.schema import keys
from tests.ledger.ledgers import NOON, Ledger, reservation
from tests.ledger.wire import Wire
from tests.live import wait_for

# What takes longer than this won't come.
PATIENCE_SECONDS = 20

ON_SQLITE = pytest.mark.parametrize("database_url", ["sqlite"], indirect=True)
ON_POSTGRESQL = pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)


@ON_SQLITE
@pytest.mark.parametrize(
    ("pragma", "value"),
    [
        ("journal_mode", ("wal", "wal")),
        ("synchronous", (2, 2)),
        ("foreign_keys", (1, 1)),
        ("busy_timeout", (0, LOCK_WAIT_SECONDS * 1000)),
    ],
)
def test_sqlite_connections(ledger: Ledger, pragma: str, value: tuple[object, object]) -> None:
    with ledger.database.writing() as writer, ledger.database.reading() as reader:
        assert tuple(one.exec_driver_sql(f"PRAGMA {pragma}").scalar() for one in (writer, reader)) == value


@ON_SQLITE
def test_a_writer_on_sqlite_has_the_lock_from_its_first_moment(ledger: Ledger, tmp_path: Path) -> None:
    other = sqlite3.connect(tmp_path / "beanmeter.db", timeout=0, isolation_level=None)
    try:
        with ledger.database.writing(), pytest.raises(sqlite3.OperationalError, match="locked"):
            other.execute("BEGIN IMMEDIATE")
        with ledger.database.reading():
            other.execute("BEGIN IMMEDIATE")
            other.execute("ROLLBACK")
    finally:
        other.close()


@pytest.mark.postgres
@ON_POSTGRESQL
def test_postgresql_sessions(ledger: Ledger) -> None:
    expected = [
        ("statement_timeout", f"{STATEMENT_SECONDS}s", f"{STATEMENT_SECONDS}s"),
        ("lock_timeout", f"{LOCK_WAIT_SECONDS}s", f"{LOCK_WAIT_SECONDS}s"),
        ("idle_in_transaction_session_timeout", f"{2 * STATEMENT_SECONDS}s", "0"),
        ("timezone", "UTC", "UTC"),
        ("application_name", "beanmeter", "beanmeter"),
        ("transaction_isolation", "read committed", "repeatable read"),
        ("synchronous_commit", "on", "on"),
        ("plan_cache_mode", "force_generic_plan", "auto"),
        *((f"enable_{way}", "off", "on") for way in ("seqscan", "hashjoin", "mergejoin")),
        ("jit", "off", None),
    ]
    with ledger.database.writing() as writer, ledger.database.reading() as reader:
        for setting, *values in expected:
            found = [one.execute(text(f"SHOW {setting}")).scalar() for one in (writer, reader)]
            # None is whatever the server has.
            assert [None if value is None else one for one, value in zip(found, values, strict=True)] == values, setting


def test_a_reader_and_a_writer_do_not_wait_for_each_other(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(10**9)
    with ledger.database.reading() as reader:
        before = reader.exec_driver_sql("SELECT count(*) FROM charges").scalar()
        ledger.post([reservation(account)])
        # The reader's view stays the one it began with, and what was written meanwhile is there for the next.
        assert reader.exec_driver_sql("SELECT count(*) FROM charges").scalar() == before == 0
    with ledger.database.writing() as writer:
        writer.exec_driver_sql("DELETE FROM charges")
        assert len(ledger.charges()) == 1


def test_writers_of_one_database_take_turns(ledger: Ledger) -> None:
    """Several threads of a process, with one object between them, lose no update."""

    def count_up() -> None:
        for _ in range(10):
            with ledger.database.writing() as connection:
                connection.exec_driver_sql("UPDATE marks SET value = CAST(CAST(value AS integer) + 1 AS text)")

    with ledger.database.writing() as connection:
        connection.exec_driver_sql("INSERT INTO marks VALUES ('count', '0')")
    threads = [threading.Thread(target=count_up) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with ledger.database.reading() as connection:
        assert connection.exec_driver_sql("SELECT value FROM marks").scalar() == "40"


@ON_SQLITE
def test_a_writer_waits_for_another_process(ledger: Ledger, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = sqlite3.connect(tmp_path / "beanmeter.db", isolation_level=None, check_same_thread=False)
    other.execute("BEGIN IMMEDIATE")
    later = threading.Timer(0.5, other.execute, ["ROLLBACK"])
    later.start()
    with ledger.database.posting() as connection:
        put_mark(connection, "waited")
    later.join()
    monkeypatch.setattr(engine, "LOCK_WAIT_SECONDS", 0.1)
    other.execute("BEGIN IMMEDIATE")
    for transaction in (ledger.database.writing, ledger.database.posting):
        with pytest.raises(DBAPIError, match="locked"), transaction():
            pytest.fail("it has not got the lock")
    other.execute("ROLLBACK")
    other.close()
    with ledger.database.writing() as connection:
        put_mark(connection, "and went on")
    assert marks(ledger) == ["and went on", "waited"]


TURNS = 400

WRITING_UNTIL_TOLD = """
import select, sys
from proxy.ledger.engine import Database, driver_of

url, name = sys.argv[1:]
database = Database(url)
with database.reading():
    print("ready", flush=True)
sys.stdin.readline()
turn = 0
while not select.select([sys.stdin], [], [], 0)[0]:
    turn += 1
    with database.posting() as connection, driver_of(connection) as driver:
        driver.execute("INSERT INTO marks (name, value) VALUES (?, 'test')", [f"{name}{turn}"])
"""


@ON_SQLITE
def test_processes_that_write_all_the_time_take_turns(ledger: Ledger, database_url: str) -> None:
    """SQLite gives its lock to whoever asks while it is free, and who has just committed asks at once."""

    def order() -> str:
        with ledger.database.reading() as connection:
            rows = connection.exec_driver_sql("SELECT name FROM marks WHERE value = 'test' ORDER BY rowid")
            return "".join(row[0][0] for row in rows)

    with ExitStack() as stack:
        writers = []
        for name in ("a", "b"):
            command = [sys.executable, "-c", WRITING_UNTIL_TOLD, database_url, name]
            writer = stack.enter_context(subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True))
            stack.callback(writer.kill)
            assert writer.stdout is not None
            assert writer.stdout.readline() == "ready\n"
            writers.append(writer)
        for writer in writers:
            assert writer.stdin is not None
            writer.stdin.write("\n")
            writer.stdin.flush()
        give_up_at = time.monotonic() + PATIENCE_SECONDS * 5
        while min(order().count("a"), order().count("b")) < TURNS:
            assert time.monotonic() < give_up_at, order()[-1000:]
            time.sleep(0.1)
        assert [(writer.communicate(timeout=PATIENCE_SECONDS), writer.returncode)[1] for writer in writers] == [0, 0]
    # Whoever began first was alone until the other did.
    written = order()
    while_both_wrote = Counter(written[max(written.index("a"), written.index("b")) :])
    assert min(while_both_wrote.values()) > max(while_both_wrote.values()) / 10


def marks(ledger: Ledger) -> list[str]:
    with ledger.database.reading() as connection:
        return [row[0] for row in connection.execute(text("SELECT name FROM marks WHERE value = 'test' ORDER BY name"))]


def put_mark(connection: Connection, name: str) -> None:
    with driver_of(connection) as driver:
        driver.execute(f"INSERT INTO marks (name, value) VALUES ('{name}', 'test')")


def test_what_is_posted_is_there_or_taken_back(ledger: Ledger) -> None:
    database = ledger.database

    def fail_late() -> None:
        with database.posting() as connection:
            put_mark(connection, "late")
            raise ZeroDivisionError

    def fail_in_the_middle() -> None:
        with database.posting() as connection:
            put_mark(connection, "middle")
            put_mark(connection, "middle")

    for number in range(3):
        with pytest.raises(ZeroDivisionError):
            fail_late()
        with pytest.raises(IntegrityError):
            fail_in_the_middle()
        with database.posting() as connection:
            put_mark(connection, f"posted {number}")
        # The same connection serves both kinds of transaction, in turns.
        with database.writing() as other:
            assert other is connection
            put_mark(other, f"written {number}")
    assert marks(ledger) == [f"{how} {number}" for how in ("posted", "written") for number in range(3)]


def test_a_commit_that_is_refused_leaves_nothing_and_no_transaction(ledger: Ledger) -> None:
    database = ledger.database
    sqlite = database.dialect == "sqlite"
    with database.writing() as connection:
        if sqlite:
            late = "PRAGMA defer_foreign_keys = ON"
        else:
            connection.execute(text("ALTER TABLE session_teams ALTER CONSTRAINT fk_session_teams_team_id DEFERRABLE"))
            late = "SET CONSTRAINTS ALL DEFERRED"
        digest = "zeroblob(32)" if sqlite else "decode(repeat('00', 32), 'hex')"
        row = f"{digest}, 'admin', '2026-11-22', '2026-11-22', '2026-11-22'"
        connection.execute(text(f"INSERT INTO sessions (digest, role, created_at, seen_at, expires_at) VALUES ({row})"))
    failed = []
    try:
        with database.posting() as connection:
            put_mark(connection, "refused")
            with driver_of(connection) as driver:
                driver.execute(late)
                driver.execute("INSERT INTO session_teams SELECT digest, 99 FROM sessions")
    except IntegrityError as error:
        failed.append(error)
    assert failed
    with database.posting() as connection:
        put_mark(connection, "next")
    assert marks(ledger) == ["next"]


def test_a_row_cannot_point_at_nothing(ledger: Ledger) -> None:
    row = {"id": "key_1", "team_id": 99, "name": "", "digest": b"x" * 32, "last_four": "abcd", "created_at": NOON}
    with pytest.raises(IntegrityError), ledger.database.writing() as connection:
        connection.execute(keys.insert().values(**row))


def test_nothing_connects_before_it_is_used(tmp_path: Path) -> None:
    for url in (f"sqlite:///{tmp_path}/nowhere/beanmeter.db", "postgresql://nobody@127.0.0.1:1/none"):
        database = Database(url)
        for transaction in (database.writing, database.reading):
            with pytest.raises(OperationalError), transaction():
                pass
        database.close()
    assert list(tmp_path.iterdir()) == []


# What the event loop asks

ENDLESS = {
    "sqlite": "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT max(i) FROM n",
    "postgresql": "SELECT pg_sleep(600)",
}


def count_teams(connection: Connection) -> int:
    return int(connection.execute(text("SELECT count(*) FROM teams")).scalar_one())


def test_a_question_that_is_not_answered_is_given_up_with_its_thread(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    ledger.account()
    database = ledger.database
    ended: list[str] = []

    def endless(connection: Connection) -> None:
        try:
            connection.execute(text(ENDLESS[database.dialect]))
        finally:
            ended.append("ended")

    async def scenario() -> None:
        monkeypatch.setattr(engine, "ANSWER_SECONDS", 0.3)
        # As many as there are threads, and as many again behind them.
        asked = 2 * ASKED_AT_ONCE
        ends = await asyncio.gather(*(database.ask(endless) for _ in range(asked)), return_exceptions=True)
        assert [type(end) for end in ends] == [TimeoutError] * asked
        monkeypatch.setattr(engine, "ANSWER_SECONDS", 30)
        assert await asyncio.gather(*(database.ask(count_teams) for _ in range(asked))) == [1] * asked
        # Whoever had begun has come to an end.
        while len(ended) < ASKED_AT_ONCE:  # noqa: ASYNC110 -- it happens in threads
            await asyncio.sleep(0.01)

    asyncio.run(asyncio.wait_for(scenario(), 60))


@pytest.mark.postgres
@ON_POSTGRESQL
def test_a_question_is_asked_once_more_after_a_restart(ledger: Ledger) -> None:
    ledger.account()

    async def scenario() -> None:
        assert await ledger.database.ask(count_teams) == 1
        with ledger.database.writing() as connection:
            others = "FROM pg_stat_activity WHERE pid <> pg_backend_pid() AND datname = current_database()"
            assert connection.execute(text(f"SELECT count(pg_terminate_backend(pid, 10000)) {others}")).scalar_one() >= 1
        assert await ledger.database.ask(count_teams) == 1

    asyncio.run(scenario())


def test_a_change_is_made_though_its_caller_leaves(ledger: Ledger) -> None:
    begun, may_end = threading.Event(), threading.Event()

    def write(connection: Connection) -> None:
        connection.execute(text("INSERT INTO marks (name, value) VALUES ('left', 'yes')"))
        begun.set()
        assert may_end.wait(30)

    async def scenario() -> None:
        change = asyncio.create_task(ledger.database.change(write))
        await asyncio.to_thread(begun.wait, 30)
        change.cancel()
        with pytest.raises(asyncio.CancelledError):
            await change
        may_end.set()
        # The next one has its turn after it.
        assert await ledger.database.change(lambda connection: len(connection.execute(text("SELECT * FROM marks")).all())) == 1

    asyncio.run(scenario())


@pytest.mark.postgres
@ON_POSTGRESQL
def test_a_change_that_hangs_is_let_go(ledger: Ledger, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(engine, "CHANGE_SECONDS", 0.3)

    async def scenario() -> None:
        with pytest.raises(OperationalError):
            await ledger.database.change(lambda connection: connection.execute(text(ENDLESS["postgresql"])))
        assert await ledger.database.change(count_teams) == 0

    asyncio.run(asyncio.wait_for(scenario(), 60))


@contextmanager
def stuck(database: Database) -> Iterator[list[Exception]]:
    """A thread that waits inside a transaction for a server that has fallen silent, and the error that it ends with."""
    entered: list[Connection] = []
    failed: list[Exception] = []

    def wait_for_it() -> None:
        try:
            ask(database, entered)
        except DBAPIError as error:
            failed.append(error)

    thread = threading.Thread(target=wait_for_it, daemon=True)
    thread.start()
    wait_for(lambda: entered or None)
    # Long enough for the statement to be on its way; to come earlier would only make the test easier.
    time.sleep(0.5)
    try:
        yield failed
    finally:
        database.interrupt(entered[0])
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive()


def ask(database: Database, entered: list[Connection]) -> None:
    with database.writing() as connection:
        entered.append(connection)
        with driver_of(connection) as driver:
            driver.execute("SELECT 1")


@pytest.mark.postgres
@ON_POSTGRESQL
def test_idle_connections_to_a_server_that_fell_silent_are_not_tried(ledger: Ledger) -> None:
    with Wire(ledger.url) as wire:
        database = Database(wire.url)
        # Two at once: one is kept at hand, the other is idle in the pool from now on.
        with database.writing() as one, database.writing() as another:
            for connection in (one, another):
                connection.execute(text("SELECT 1"))
        wire.fall_silent()
        with stuck(database) as failed:
            pass
        assert failed
        entered: list[Connection] = []
        thread = threading.Thread(target=ask, args=(database, entered), daemon=True)
        thread.start()
        thread.join(PATIENCE_SECONDS)
        assert not thread.is_alive(), "it waits for a connection that was idle when the server fell silent"
        database.close()


@pytest.mark.postgres
@ON_POSTGRESQL
def test_a_thread_that_is_stuck_keeps_no_process_from_ending(ledger: Ledger) -> None:
    with Wire(ledger.url) as wire:
        database = Database(wire.url)
        with database.writing() as connection:
            connection.execute(text("SELECT 1"))
        wire.fall_silent()
        with stuck(database) as failed:
            closing = threading.Thread(target=database.close, daemon=True)
            closing.start()
            closing.join(PATIENCE_SECONDS)
            assert not closing.is_alive()
        assert failed


@pytest.mark.parametrize("fails", [False, True], ids=["ends well", "fails"])
@ON_SQLITE
def test_what_a_thread_is_writing_when_all_is_closed_is_whole(ledger: Ledger, database_url: str, fails: bool) -> None:
    database = Database(database_url)
    half, closed = threading.Event(), threading.Event()

    def write() -> None:
        with suppress(ZeroDivisionError), database.posting() as connection:
            put_mark(connection, "first")
            half.set()
            assert closed.wait(PATIENCE_SECONDS)
            put_mark(connection, "second")
            if fails:
                raise ZeroDivisionError

    writer = threading.Thread(target=write)
    writer.start()
    assert half.wait(PATIENCE_SECONDS)
    database.close()
    closed.set()
    writer.join()
    assert marks(ledger) == ([] if fails else ["first", "second"])
    database.close()


@ON_POSTGRESQL
@pytest.mark.postgres
def test_what_a_url_sets_for_its_sessions_holds(ledger: Ledger, database_url: str) -> None:
    database = Database(f"{database_url}{'&' if '?' in database_url else '?'}options=-c%20search_path%3Dpublic%2Cpg_catalog")
    with database.writing() as writer, database.reading() as reader:
        for connection in (writer, reader):
            assert connection.exec_driver_sql("SHOW search_path").scalar_one() == "public,pg_catalog"
            assert connection.exec_driver_sql("SHOW statement_timeout").scalar_one() == f"{STATEMENT_SECONDS}s"
    database.close()
