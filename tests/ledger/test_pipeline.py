"""What goes to PostgreSQL past the driver's cursors: that it arrives as it was meant, and that no failure leaves a connection
which answers the wrong question."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import psycopg
import pytest
from psycopg.pq import PipelineStatus, TransactionStatus

from proxy.ledger import pipeline

pytestmark = pytest.mark.postgres

# More than the kernel takes from a client that does not read meanwhile.
MUCH = 32 << 20

ECHO = (b"SELECT $1", ("text",))
LIST = (b"SELECT array_to_json($1)", ("text[]",))
ONE = (b"SELECT 1", ())
WRONG = (b"SELECT 1 / $1", ("bigint",))


@pytest.fixture
def driver(postgres_database: str) -> Iterator[psycopg.Connection[Any]]:
    with psycopg.connect(postgres_database, prepare_threshold=None) as connection:
        yield connection


def value(driver: psycopg.Connection[Any], statement: pipeline.Statement, *given: object) -> bytes | None:
    (result,) = pipeline.ask(driver, (statement, given))
    return result.get_value(0, 0)


def in_order(driver: psycopg.Connection[Any]) -> bool:
    """Whether it can be rolled back and used, by the driver and by us."""
    assert driver.pgconn.pipeline_status == PipelineStatus.OFF
    driver.rollback()
    return driver.execute("SELECT 2").fetchone() == (2,) and value(driver, ECHO, "3") == b"3"


@pytest.mark.parametrize("text", ["", "plain", "käse", 'a"b', "back\\slash", "{a,b}", "NULL", "line\nend", "\U0001f41b"])
def test_texts_arrive_as_they_are(driver: psycopg.Connection[Any], text: str) -> None:
    assert value(driver, ECHO, text) == text.encode()
    assert value(driver, (b"SELECT $1 = ALL($2)", ("text", "text[]")), text, [text, text]) == b"t"


@pytest.mark.parametrize(
    ("kind", "given", "text"),
    [
        ("bigint", -(1 << 63), b"-9223372036854775808"),
        ("boolean", True, b"t"),
        ("bytea", b"\0\xff\\", b"\\x00ff5c"),
        ("date", "2026-11-22", b"2026-11-22"),
        ("timestamptz", "2026-11-22 12:00:00.000001", b"2026-11-22 12:00:00.000001+00"),
        ("bigint[]", [], b"{}"),
        ("bigint[]", [1, 2], b"{1,2}"),
        ("bytea[]", [b"\0\xff"], b'{"\\\\x00ff"}'),
        ("text", None, None),
    ],
)
def test_parameters(driver: psycopg.Connection[Any], kind: str, given: object, text: bytes | None) -> None:
    driver.execute("SET timezone = 'UTC'")
    assert value(driver, (b"SELECT $1", (kind,)), given) == text


def test_a_text_that_would_end_too_soon_is_refused(driver: psycopg.Connection[Any]) -> None:
    for given in ("a\0b", ["a\0b"]):
        with pytest.raises(psycopg.DataError):
            value(driver, LIST if isinstance(given, list) else ECHO, given)
    assert driver.pgconn.transaction_status == TransactionStatus.IDLE
    assert in_order(driver)


def test_it_begins_one_transaction(driver: psycopg.Connection[Any]) -> None:
    now = (b"SELECT pg_current_xact_id()", ())
    one, another = pipeline.ask(driver, (now, ()), (now, ()))
    assert driver.pgconn.transaction_status == TransactionStatus.INTRANS
    assert one.get_value(0, 0) == another.get_value(0, 0) == value(driver, now)
    driver.commit()
    assert one.get_value(0, 0) != value(driver, now)


def test_what_fails_keeps_back_what_is_behind_it(driver: psycopg.Connection[Any]) -> None:
    driver.execute("CREATE TABLE counted (n bigint)")
    driver.commit()
    count = (b"INSERT INTO counted VALUES ($1)", ("bigint",))
    for _ in range(2):
        with pytest.raises(psycopg.errors.DivisionByZero):
            pipeline.ask(driver, (count, (1,)), (WRONG, (0,)), (count, (2,)), (ONE, ()))
        assert in_order(driver)
    assert driver.execute("SELECT count(*) FROM counted").fetchone() == (0,)
    assert [result.command_tuples for result in pipeline.ask(driver, (count, (1,)), (WRONG, (1,)), (count, (2,)))] == [1] * 3


def test_much_can_go_both_ways_at_once(driver: psycopg.Connection[Any]) -> None:
    text = "x" * MUCH
    results = pipeline.ask(driver, *[(ECHO, (text,))] * 3)
    assert [len(result.get_value(0, 0) or b"") for result in results] == [MUCH] * 3
    assert in_order(driver)


def test_statements_that_the_server_has_let_go_of_are_prepared_anew(driver: psycopg.Connection[Any]) -> None:
    assert value(driver, ONE) == b"1"
    driver.execute("DEALLOCATE ALL")
    driver.commit()
    assert value(driver, ONE) == b"1"
    assert in_order(driver)


def test_a_statement_whose_table_has_changed_is_prepared_anew(driver: psycopg.Connection[Any]) -> None:
    driver.execute("CREATE TEMPORARY TABLE facts AS SELECT 1 AS fact")
    driver.commit()
    fact = (b"SELECT fact FROM facts", ())
    assert value(driver, fact) == b"1"
    driver.rollback()
    driver.execute("ALTER TABLE facts ALTER COLUMN fact TYPE text")
    driver.commit()
    assert value(driver, fact) == b"1"
    assert in_order(driver)


def test_what_a_transaction_has_done_before_is_not_done_again(driver: psycopg.Connection[Any]) -> None:
    """Nor is it lost and the rest done: it fails, and so does the transaction."""
    assert value(driver, ONE) == b"1"
    driver.execute("CREATE TEMPORARY TABLE before ()")
    driver.execute("DEALLOCATE ALL")
    with pytest.raises(psycopg.errors.InvalidSqlStatementName):
        value(driver, ONE)
    assert driver.info.transaction_status == TransactionStatus.INERROR
    driver.rollback()
    assert value(driver, ONE) == b"1"


def test_statements_outlive_a_transaction_that_was_taken_back(driver: psycopg.Connection[Any]) -> None:
    names = (b"SELECT count(*) FROM pg_prepared_statements", ())
    before = value(driver, names)
    driver.rollback()
    assert [value(driver, names) for _ in range(2)] == [before] * 2


def test_a_connection_that_was_ended_is_closed(driver: psycopg.Connection[Any], postgres_database: str) -> None:
    assert value(driver, ONE) == b"1"
    with psycopg.connect(postgres_database, autocommit=True) as other:
        other.execute("SELECT pg_terminate_backend(%s, 10000)", [driver.info.backend_pid])
    with pytest.raises(psycopg.OperationalError):
        value(driver, ONE)
    assert driver.closed


def test_what_ends_the_waiting_closes_the_connection(driver: psycopg.Connection[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Its answers may still come, and must not be taken for those to other questions."""

    def end(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(pipeline, "_results", end)
    with pytest.raises(KeyboardInterrupt):
        value(driver, ONE)
    assert driver.closed
