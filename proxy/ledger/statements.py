"""Statements in each driver's own words: written once, never built anew, and several of them taken in one round trip.

For the one transaction that every request waits for. SQLAlchemy's statements, which everything else uses, are built, keyed
and compiled at each use, and each waits for the one before it; docs/performance.md has the figures. Its connections,
transactions and errors are used here too.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any

from sqlalchemy import Connection

from proxy.ledger.engine import driver_of

Parameters = Mapping[str, object]

_LIST = re.compile(r"\bIN :(\w+)\[\]")
_NAME = re.compile(r"(?<![:\w]):(\w+)")
# Row locks: SQLite has one writer, and nothing to say about it.
_LOCK = re.compile(r"\s+FOR NO KEY UPDATE")


class Statement:
    """SQL with ``:name`` for a parameter, and ``IN :name[]`` for a list of whole numbers or of texts."""

    __slots__ = ("postgresql", "sqlite")

    def __init__(self, sql: str) -> None:
        self.sqlite = _LIST.sub(r"IN (SELECT value FROM json_each(:\1))", _LOCK.sub("", sql))
        self.postgresql = _NAME.sub(r"%(\1)s", _LIST.sub(r"= ANY(:\1)", sql))


def read(connection: Connection, *questions: tuple[Statement, Parameters]) -> list[list[tuple[Any, ...]]]:
    """The rows that each statement finds, in order. Instants and days are read with :func:`instant` and :func:`day`."""
    with driver_of(connection) as driver:
        if connection.dialect.name == "sqlite":
            cursor = driver.cursor()
            return [cursor.execute(ask.sqlite, _stored(parameters)).fetchall() for ask, parameters in questions]
        with driver.pipeline():
            cursors = [driver.execute(ask.postgresql, parameters) for ask, parameters in questions]
        return [cursor.fetchall() for cursor in cursors]


def write(connection: Connection, *changes: tuple[Statement, Sequence[Parameters]]) -> list[int]:
    """Carry each statement out for each of its rows, in order; how many rows of the table each of them changed."""
    changes = tuple(change for change in changes if change[1])
    if not changes:
        return []
    with driver_of(connection) as driver:
        if connection.dialect.name == "sqlite":
            cursor = driver.cursor()
            return [cursor.executemany(change.sqlite, map(_stored, rows)).rowcount for change, rows in changes]
        cursors = [driver.cursor() for _ in changes]
        with driver.pipeline():
            for cursor, (change, rows) in zip(cursors, changes, strict=True):
                cursor.executemany(change.postgresql, rows)
        return [cursor.rowcount for cursor in cursors]


def instant(value: Any) -> datetime:
    """An instant as a row has it: PostgreSQL's driver reads it, SQLite keeps UTC as text."""
    return datetime.fromisoformat(value).replace(tzinfo=UTC) if isinstance(value, str) else value.astimezone(UTC)


def _stored(parameters: Parameters) -> dict[str, object]:
    """Values as SQLite keeps them, in the schema's own spelling."""
    return {name: _value(value) if type(value) not in _PLAIN else value for name, value in parameters.items()}


_PLAIN = frozenset({str, int, bytes, bool, type(None)})


def _value(value: object) -> object:
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    if isinstance(value, date):
        return value.isoformat()
    if isinstance(value, Iterable) and not isinstance(value, str | bytes):
        return json.dumps(list(value))
    return value
