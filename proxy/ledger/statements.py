"""Statements in each database's own words: made once, for a whole batch at a time, and several of them in one round trip.

For the one transaction that every request waits for. SQLAlchemy's statements, which everything else uses, are built, keyed
and compiled at each use. SQLite's driver moreover lets go of the interpreter at each row, and has to wait for its turn to
have it back; PostgreSQL is as far away as its network. So what is read comes as one row of JSON, and what is written to a
table goes in one statement: docs/performance.md has the figures.

They know no dates and no instants: a day is the text ``2026-11-22``, and an instant is what :func:`stamp` makes of it.
"""

from __future__ import annotations

import functools
import json
import re
import sqlite3
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from itertools import chain
from typing import Any, Literal

import msgspec

Type = Literal["text", "bigint", "boolean", "timestamptz", "date", "bytea", "text[]", "bigint[]", "bytea[]", "json"]
Row = Sequence[object]

# At once, on SQLite: a statement may have 32766 parameters.
ROWS_MAX = 256

# Up to so many rows there is a statement for every four.
FOURS_MAX = 32

# What SQLite's driver does not know as a number or a text it looks for an adapter for, in ways that make and drop an exception:
# six times as long as a number takes, and a third of what is bound is null.
_ADAPTED = {None: None, True: 1, False: 0}
for _kind in (type(None), bool):
    sqlite3.register_adapter(_kind, _ADAPTED.get)

_LIST = re.compile(r"\bIN :(\w+)\[\]")
_NAME = re.compile(r"(?<![:\w]):(\w+)")
_UTC = re.compile(r"\bUTC\(([\w.]+|min\([\w.]+\))\)")
_HEX = re.compile(r"\bHEX\(([\w.]+)\)")


class Lock:
    """What PostgreSQL is told of rows before they are read; SQLite has one writer anyway."""

    def __init__(self, parameters: Mapping[str, Type], sql: str) -> None:
        self.parameters = parameters
        self.postgresql = _numbered(sql, parameters)


class Question:
    """Several SELECTs that are asked as one, each as its columns and what stands behind SELECT and them.

    ``:name`` stands for a parameter of the named type, ``IN :name[]`` for a list of them, ``UTC(column)`` for an instant and
    ``HEX(column)`` for the digits of bytes. The rows of each come in no order.
    """

    def __init__(self, parameters: Mapping[str, Type], *selects: tuple[Sequence[str], str]) -> None:
        self.parameters = parameters
        self._sqlite: dict[tuple[bool, ...], str] = {}
        parts = [f"(SELECT json_group_array(json_array({', '.join(columns)})) {source})" for columns, source in selects]
        together = " || ',' || ".join(parts)
        sql = f"SELECT '[' || {together} || ']'"
        self._of_sqlite = _HEX.sub(r"iif(\1 IS NULL, NULL, lower(hex(\1)))", _UTC.sub(r"\1", sql))
        parts = [
            f"(SELECT coalesce(json_agg(json_build_array({', '.join(columns)})), '[]') {source})" for columns, source in selects
        ]
        sql = f"SELECT json_build_array({', '.join(parts)})"
        sql = _HEX.sub(r"encode(\1, 'hex')", _UTC.sub(r"(\1 AT TIME ZONE 'UTC')", sql))
        self.postgresql = _numbered(sql, parameters)

    def sqlite(self, single: tuple[bool, ...]) -> str:
        """Its words where these parameters are lists of one: to take a list apart takes longer than to look for its member."""
        sql = self._sqlite.get(single)
        if sql is None:
            sql = self._sqlite[single] = _LIST.sub(functools.partial(self._listed, single), self._of_sqlite)
        return sql

    def _listed(self, single: tuple[bool, ...], found: re.Match[str]) -> str:
        name = found[1]
        if single[list(self.parameters).index(name)]:
            return f"IN (:{name})"
        return f"IN (SELECT {'from_hex(value)' if self.parameters[name] == 'bytea[]' else 'value'} FROM json_each(:{name}))"


class Change:
    """An INSERT or UPDATE of many rows at once, with these columns. ``{name}`` is a row's value, and ``{rows}`` stands where
    a FROM would: behind the selected values of an INSERT, or what an UPDATE sets. The first column is never null."""

    def __init__(self, columns: Mapping[str, Type], sql: str) -> None:
        self._columns = tuple(columns)
        self._sql = sql
        self._sqlite: dict[int, str] = {}
        cast = [
            f"{_CAST.get(kind, '({})::' + kind).format(f'value->>{at}')} AS {name}"
            for at, (name, kind) in enumerate(columns.items())
        ]
        rows = f"(SELECT {', '.join(cast)} FROM json_array_elements($1::json))"
        self.postgresql = self._from(rows).encode(), ("json",)
        self.sqlite_each = self._each("?")
        self.postgresql_each = self._each("$").encode(), tuple(columns.values())

    def sqlite(self, count: int) -> tuple[str, int]:
        """Its words for so many rows or some more, and how many parameters they take; rows of nulls are passed over. Numbers
        of rows are rounded up, to multiples of four and the larger ones to powers of two: the driver keeps about a hundred
        statements ready."""
        places = -(-count // 4) * 4 if count <= FOURS_MAX else 1 << (count - 1).bit_length()
        sql = self._sqlite.get(places)
        if sql is None:
            names = ", ".join(f"column{at} AS {name}" for at, name in enumerate(self._columns, 1))
            row = f"({', '.join('?' * len(self._columns))})"
            rows = f"(SELECT {names} FROM (VALUES {', '.join([row] * places)}) WHERE column1 IS NOT NULL)"
            sql = self._sqlite[places] = self._from(rows)
        return sql, len(self._columns) * places

    def _each(self, mark: str) -> str:
        return self._sql.format(rows="", **{name: f"{mark}{at}" for at, name in enumerate(self._columns, 1)})

    def _from(self, rows: str) -> str:
        return self._sql.format(rows=f"FROM {rows} AS r", **{name: f"r.{name}" for name in self._columns})


# What JSON has no type for: bytes are in hexadecimal digits, instants are UTC without saying so.
_CAST: Mapping[Type, str] = {"bytea": "decode({}, 'hex')", "timestamptz": "({})::timestamp AT TIME ZONE 'UTC'"}


def _numbered(sql: str, parameters: Mapping[str, Type]) -> tuple[bytes, tuple[Type, ...]]:
    """A statement of PostgreSQL's, and the types of its parameters."""
    names = list(parameters)
    words = _NAME.sub(lambda found: f"${names.index(found[1]) + 1}", _LIST.sub(r"= ANY(:\1)", sql))
    return words.encode(), tuple(parameters.values())


def read(driver: Any, given: Mapping[str, Any], question: Question, lock: Lock | None = None) -> list[list[list[Any]]]:
    """The rows that each part of the question finds, on the driver's own connection. The lock is taken first, by a statement
    of its own: one that waited for it would still read what was there before."""
    if isinstance(driver, sqlite3.Connection):
        return _read_sqlite(driver, given, question)
    from proxy.ledger import pipeline

    asked = [(one.postgresql, [given[name] for name in one.parameters]) for one in (lock, question) if one is not None]
    value = pipeline.ask(driver, *asked)[-1].get_value(0, 0)
    assert value is not None
    rows: list[list[list[Any]]] = msgspec.json.decode(value)
    return rows


def _read_sqlite(driver: sqlite3.Connection, given: Mapping[str, Any], question: Question) -> list[list[list[Any]]]:
    stored: dict[str, object] = {}
    single = []
    for name in question.parameters:
        value = given[name]
        several = type(value) is list
        single.append(several and len(value) == 1)
        stored[name] = (value[0] if single[-1] else _encode(value)) if several else value
    (found,) = driver.execute(question.sqlite(tuple(single)), stored).fetchall()
    rows: list[list[list[Any]]] = msgspec.json.decode(found[0])
    return rows


def write(driver: Any, *changes: tuple[Change, Sequence[Row]]) -> list[int]:
    """Carry out each change for all of its rows, in order; how many rows of the table it touched. No rows, no statement.

    Raises ``OverflowError`` for a number that no column of SQLite's can hold.
    """
    if isinstance(driver, sqlite3.Connection):
        return [_write_sqlite(driver, change, rows) if rows else 0 for change, rows in changes]
    from proxy.ledger import pipeline

    asked = [
        (change.postgresql_each, rows[0]) if len(rows) == 1 else (change.postgresql, (_encode(rows),))
        for change, rows in changes
        if rows
    ]
    counts = iter([result.command_tuples or 0 for result in pipeline.ask(driver, *asked)] if asked else [])
    return [next(counts) if rows else 0 for _, rows in changes]


def _write_sqlite(driver: sqlite3.Connection, change: Change, rows: Sequence[Row]) -> int:
    if len(rows) == 1:
        return driver.execute(change.sqlite_each, rows[0]).rowcount
    count = 0
    for start in range(0, len(rows), ROWS_MAX):
        some = rows[start : start + ROWS_MAX]
        sql, places = change.sqlite(len(some))
        values = [*chain.from_iterable(some)]
        values += [None] * (places - len(values))
        count += driver.execute(sql, values).rowcount
    return count


def stamp(at: datetime) -> str:
    """An instant as the statements take it: UTC, as SQLite has it by the schema. Its first ten letters are its day."""
    return at.astimezone(UTC).replace(tzinfo=None).isoformat(" ", "microseconds")


def instant(stamped: str) -> datetime:
    """The instant that a row has, as either database writes it."""
    return datetime.fromisoformat(stamped).replace(tzinfo=UTC)


def _hex(value: object) -> str:
    """JSON has no type for bytes."""
    assert isinstance(value, bytes)
    return value.hex()


# Made once: json.dumps makes an encoder at each call that asks for anything but its own.
_encode = json.JSONEncoder(default=_hex, separators=(",", ":")).encode
