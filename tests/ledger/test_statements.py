"""Statements on either database: that rows arrive in any number, and that lists are asked for in any number."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import text

from proxy.ledger.engine import driver_of
from proxy.ledger.statements import ROWS_MAX, Change, Question, instant, read, stamp, write
from tests.ledger.ledgers import Ledger

INSERT = Change(
    {"name": "text", "number": "bigint", "at": "timestamptz", "day": "date", "digest": "bytea", "yes": "boolean"},
    "INSERT INTO given (name, number, at, day, digest, yes) SELECT {name}, {number}, {at}, {day}, {digest}, {yes} {rows}",
)
UPDATE = Change(
    {"name": "text", "more": "bigint"},
    "UPDATE given SET number = coalesce(given.number, 0) + {more} {rows} WHERE given.name = {name}",
)
GIVEN = Question(
    {"names": "text[]", "digests": "bytea[]", "since": "timestamptz"},
    (("name", "number", "UTC(at)", "day", "HEX(digest)", "yes"), "FROM given WHERE name IN :names[]"),
    (("name",), "FROM given WHERE digest IN :digests[]"),
    (("name",), "FROM given WHERE at > :since"),
)

AT = datetime(2026, 11, 22, 12, 0, 0, 100, tzinfo=UTC)


@pytest.fixture
def given(ledger: Ledger) -> Ledger:
    kinds = ("BLOB", "DATETIME") if ledger.database.dialect == "sqlite" else ("bytea", "timestamptz")
    with ledger.database.writing() as connection:
        columns = "name text, number bigint, at {1}, day date, digest {0}, yes boolean".format(*kinds)
        connection.execute(text(f"CREATE TABLE given ({columns})"))
    return ledger


def row(number: int) -> tuple[object, ...]:
    digest = None if number % 3 else bytes([number % 256, 0, 255])
    return (f"n{number:04}", None if number % 2 else number, stamp(AT), "2026-11-22", digest, number % 5 == 0)


def as_read(number: int) -> list[Any]:
    name, whole, _, day, digest, yes = row(number)
    return [name, whole, AT, day, digest.hex() if isinstance(digest, bytes) else None, yes]


@pytest.mark.parametrize("count", [1, 2, 3, 4, 5, 31, 32, 33, 64, 65, ROWS_MAX, ROWS_MAX + 1, 2 * ROWS_MAX + 3])
def test_rows_arrive_in_any_number(given: Ledger, count: int) -> None:
    with given.database.posting() as connection, driver_of(connection) as driver:
        assert write(driver, (INSERT, []), (INSERT, [row(number) for number in range(count)])) == [0, count]
        changes = [(f"n{number:04}", 1) for number in range(count + 1)]
        assert write(driver, (UPDATE, changes), (UPDATE, changes[-1:])) == [count, 0], "of those that are there"
        names = [f"n{number:04}" for number in range(count)]
        found, _, _ = read(driver, {"names": names, "digests": [], "since": stamp(AT)}, GIVEN)
    assert [[*one[:2], instant(one[2]), *one[3:5], bool(one[5])] for one in sorted(found)] == [
        [name, (number or 0) + 1, *rest] for name, number, *rest in map(as_read, range(count))
    ]


@pytest.mark.parametrize("count", [0, 1, 2, 7])
def test_lists_may_have_any_length(given: Ledger, count: int) -> None:
    rows = [row(number) for number in range(0, 30, 3)]
    with given.database.posting() as connection, driver_of(connection) as driver:
        write(driver, (INSERT, rows))
        names, digests = ([one[place] for one in rows[:count]] for place in (0, 4))
        before = stamp(AT.replace(microsecond=99))
        by_name, by_digest, later = read(driver, {"names": names, "digests": digests, "since": before}, GIVEN)
    assert sorted(one[0] for one in by_name) == sorted(one[0] for one in by_digest) == names
    assert len(later) == len(rows)


def test_a_number_that_no_column_can_hold_is_not_written(given: Ledger) -> None:
    for rows in ([row(1)], [row(number) for number in range(9)]):
        large = [(name, 1 << 63, *rest) for name, _, *rest in rows]
        with (
            pytest.raises(Exception, match=r"too large|out of range"),
            given.database.posting() as connection,
            driver_of(connection) as driver,
        ):
            write(driver, (INSERT, rows), (INSERT, large))
    with given.database.reading() as connection:
        assert connection.execute(text("SELECT count(*) FROM given")).scalar() == 0
