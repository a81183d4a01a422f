"""Statements in each database's own words: made once, for a whole batch at a time, and several of them in one round trip.

For the one transaction that every request waits for. SQLAlchemy's statements, which everything else uses, are built, keyed
and compiled at each use. SQLite's driver moreover lets go of the interpreter at each row, and has to wait for its turn to
have it back; PostgreSQL is as far away as its network. So what is read comes as one row, and what is written goes as one
parameter: docs/performance.md has the figures. SQLAlchemy's connections, transactions and errors are used here too.
"""

from __future__ import annotations

import functools
import json
import re
from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime
from typing import Any, Literal

from sqlalchemy import Connection

from proxy.ledger.engine import driver_of

Type = Literal["text", "bigint", "boolean", "timestamptz", "date", "bytea"]

_BEYOND = 1 << 63

# Up to so many rows SQLite takes them one by one in two thirds of the time, and seldom gives the interpreter away.
FEW_ROWS = 4

_LIST = re.compile(r"\bIN :(\w+)\[\]")
_NAME = re.compile(r"(?<![:\w]):(\w+)")


class Question:
    """A SELECT: what is selected, by name, and everything behind it. ``:name`` stands for a parameter, ``IN :name[]`` for a
    list of whole numbers or of texts. ``lock`` is what PostgreSQL is told of the rows; SQLite has one writer anyway."""

    def __init__(self, columns: Mapping[str, str], source: str, lock: str = "") -> None:
        sql = f"SELECT {', '.join(f'{selected} AS {name}' for name, selected in columns.items())} {source}"
        self.postgresql = _NAME.sub(r"%(\1)s", _LIST.sub(r"= ANY(:\1)", f"{sql} {lock}"))
        listed = _LIST.sub(r"IN (SELECT value FROM json_each(:\1))", sql)
        self.sqlite = f"(SELECT json_group_array(json_array({', '.join(columns)})) FROM ({listed}))"


class Change:
    """An INSERT or UPDATE of many rows at once: ``{rows}`` is a table of them called ``r``, with these columns."""

    def __init__(self, columns: Mapping[str, Type], sql: str) -> None:
        listed = [
            f"{_FROM_JSON.get(kind, '{}').format(f'json_extract(value, {_place(at)})')} AS {name}"
            for at, (name, kind) in enumerate(columns.items())
        ]
        self.sqlite = sql.format(rows=f"(SELECT {', '.join(listed)} FROM json_each(:rows)) AS r")
        self.sqlite_each = sql.format(rows=f"(SELECT {', '.join(f'? AS {name}' for name in columns)}) AS r")
        cast = [
            f"{_CAST.get(kind, '({})::' + kind).format(f'value->>{at}')} AS {name}"
            for at, (name, kind) in enumerate(columns.items())
        ]
        self.postgresql = sql.format(rows=f"(SELECT {', '.join(cast)} FROM json_array_elements(%(rows)s::json)) AS r")


# What JSON has no type for: bytes are in hexadecimal digits, instants are UTC without saying so.
_FROM_JSON: Mapping[Type, str] = {"bytea": "from_hex({})"}
_CAST: Mapping[Type, str] = {"bytea": "decode({}, 'hex')", "timestamptz": "({})::timestamp AT TIME ZONE 'UTC'"}


def _place(at: int) -> str:
    return f"'$[{at}]'"


def read(connection: Connection, parameters: Mapping[str, object], *questions: Question) -> list[list[Any]]:
    """The rows that each question finds. An instant is read with :func:`instant`."""
    with driver_of(connection) as driver:
        if connection.dialect.name == "sqlite":
            stored = {name: _stored(value) for name, value in parameters.items()}
            (found,) = driver.execute(_all_of(questions), stored).fetchall()
            return [json.loads(rows) for rows in found]
        with driver.pipeline():
            cursors = [driver.execute(question.postgresql, parameters) for question in questions]
        return [cursor.fetchall() for cursor in cursors]


def write(connection: Connection, *changes: tuple[Change, Sequence[Sequence[object]]]) -> list[int]:
    """Carry out each change for all of its rows, in order; how many rows of the table it touched. No rows, no statement.

    Raises ``OverflowError`` for a number that no column can hold: SQLite would make one with a fraction of it.
    """
    for _, rows in changes:
        if any(type(value) is int and not -_BEYOND <= value < _BEYOND for row in rows for value in row):
            raise OverflowError("a number of more than 64 bits")
    with driver_of(connection) as driver:
        if connection.dialect.name == "sqlite":
            return [_write_sqlite(driver, change, rows) if rows else 0 for change, rows in changes]
        with driver.pipeline():
            cursors = [driver.execute(change.postgresql, {"rows": _encode(rows)}) if rows else None for change, rows in changes]
        return [cursor.rowcount if cursor else 0 for cursor in cursors]


def _write_sqlite(driver: Any, change: Change, rows: Sequence[Sequence[object]]) -> int:
    if len(rows) > FEW_ROWS:
        cursor = driver.execute(change.sqlite, {"rows": _encode(rows)})
    else:
        plain = [[_plain(value) if isinstance(value, date) else value for value in row] for row in rows]
        cursor = driver.executemany(change.sqlite_each, plain)
    count: int = cursor.rowcount
    return count


def instant(value: datetime | str) -> datetime:
    """An instant as a row has it: PostgreSQL's driver reads it, SQLite keeps UTC as text."""
    return datetime.fromisoformat(value).replace(tzinfo=UTC) if isinstance(value, str) else value.astimezone(UTC)


@functools.cache
def _all_of(questions: tuple[Question, ...]) -> str:
    """One SELECT for all of them."""
    return f"SELECT {', '.join(question.sqlite for question in questions)}"


def _stored(value: object) -> object:
    return _encode(value) if isinstance(value, list) else value.isoformat() if isinstance(value, date) else value


def _plain(value: object) -> str:
    """A value that JSON has no type for, in the schema's own spelling."""
    if isinstance(value, datetime):
        return value.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")
    if isinstance(value, date):
        return value.isoformat()
    assert isinstance(value, bytes)
    return value.hex()


# Made once: json.dumps makes an encoder at each call that asks for anything but its own.
_encode = json.JSONEncoder(default=_plain, separators=(",", ":")).encode
