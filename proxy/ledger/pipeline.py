"""One round trip to PostgreSQL: several prepared statements sent together, and all that they answer.

For the books' own transaction, which every request waits for. A cursor of the driver's takes longer to send a statement
than the server takes to carry it out, and its pipeline lets go of the interpreter once a statement; here that happens once
a round trip. This is libpq as the driver wraps it, on the driver's connection: transactions, errors and the end of a
connection are the driver's own.
"""

from __future__ import annotations

import select
from collections.abc import Sequence
from itertools import count
from typing import Any
from weakref import WeakKeyDictionary

import psycopg
from psycopg import errors
from psycopg.pq import ConnStatus, ExecStatus, TransactionStatus
from psycopg.pq.abc import PGconn, PGresult

# What the driver says itself ahead of a first statement, and then waits for; here it goes along.
_BEGIN = b"BEGIN ISOLATION LEVEL READ COMMITTED"

# An unknown statement, and what the server can't do, such as carry out one whose result would have other types than when it
# was prepared: somebody has let go of this session's statements, or has changed a table.
_STALE = (errors.InvalidSqlStatementName, errors.FeatureNotSupported)

_numbers = count(1)


# The types of parameters, by their numbers in the server's catalogue.
_TYPES = {
    "bigint": 20,
    "bigint[]": 1016,
    "boolean": 16,
    "bytea": 17,
    "bytea[]": 1001,
    "date": 1082,
    "json": 114,
    "text": 25,
    "text[]": 1009,
    "timestamptz": 1184,
}

# What is sent, with ``$1`` and so on for parameters of these types.
Statement = tuple[bytes, tuple[str, ...]]

# The statements that each connection's server knows, and by which names.
_prepared: WeakKeyDictionary[psycopg.Connection[Any], dict[Statement, bytes]] = WeakKeyDictionary()


def ask(driver: psycopg.Connection[Any], *asked: tuple[Statement, Sequence[object]]) -> list[PGresult]:
    """Send statements with their parameters, wait for all of them, and give the result of each.

    Begins a transaction where there is none, as the driver does. Raises the driver's error for the first that fails; those
    behind it were not carried out then. The connection is in order afterwards, or closed.
    """
    begins = driver.pgconn.transaction_status == TransactionStatus.IDLE
    try:
        return _ask(driver, asked)
    except _STALE:
        if not begins:
            raise
        # Nothing has been done yet in this transaction: it begins once more, with statements that are prepared anew.
        driver.rollback()
        return _ask(driver, asked)


def _ask(driver: psycopg.Connection[Any], asked: Sequence[tuple[Statement, Sequence[object]]]) -> list[PGresult]:
    spelt = [(statement, list(map(_spell, values, statement[1]))) for statement, values in asked]
    pgconn = driver.pgconn
    names = _prepared.setdefault(driver, {})
    new: dict[int, tuple[Statement, bytes]] = {}
    places: list[int] = []
    sent = 0
    pgconn.enter_pipeline_mode()
    try:
        if pgconn.transaction_status == TransactionStatus.IDLE:
            pgconn.send_query_params(_BEGIN, None)
            sent += 1
        for statement, parameters in spelt:
            name = names.get(statement)
            if name is None:
                name = b"books_%d" % next(_numbers)
                pgconn.send_prepare(name, statement[0], [_TYPES[kind] for kind in statement[1]])
                new[sent] = statement, name
                sent += 1
            pgconn.send_query_prepared(name, parameters)
            places.append(sent)
            sent += 1
        pgconn.pipeline_sync()
        results = _results(pgconn)
    except BaseException:
        # In the middle of a pipeline there is no way back: nobody could tell the next answers from these.
        driver.close()
        raise
    pgconn.exit_pipeline_mode()
    # A statement stays prepared whatever becomes of the transaction.
    names.update(new[place] for place in new if results[place].status == ExecStatus.COMMAND_OK)
    for result in results:
        if result.status == ExecStatus.FATAL_ERROR:
            error = errors.error_from_result(result)
            if isinstance(error, _STALE):
                names.clear()
            raise error
    return [results[place] for place in places]


def _results(pgconn: PGconn) -> list[PGresult]:
    """The results up to the end of the pipeline, one a statement."""
    results: list[PGresult] = []
    poll = select.poll()
    while True:
        while pgconn.is_busy():
            # What the socket has not taken yet is sent on while answers are read: neither side waits for the other.
            unsent = pgconn.flush()
            poll.register(pgconn.socket, select.POLLIN | select.POLLOUT if unsent else select.POLLIN)
            poll.poll()
            pgconn.consume_input()
        result = pgconn.get_result()
        if result is None:
            # The end of one statement's results, unless nothing comes any more.
            if pgconn.status == ConnStatus.BAD:
                raise psycopg.OperationalError("the connection was lost")
        elif result.status == ExecStatus.PIPELINE_SYNC:
            return results
        else:
            results.append(result)
            if pgconn.status == ConnStatus.BAD:
                raise errors.error_from_result(result)


def _spell(value: object, kind: str) -> bytes | None:
    """A parameter as PostgreSQL reads it."""
    if isinstance(value, str):
        # It would end there, and nobody be told.
        if "\0" in value:
            raise psycopg.DataError("a text with a NUL")
        return (f"{value}+00" if kind == "timestamptz" else value).encode()
    if value is None:
        return None
    if isinstance(value, list):
        return b"{%s}" % b",".join(map(_quote, value))
    if isinstance(value, bytes):
        return b"\\x" + value.hex().encode()
    return str(value).encode()


def _quote(member: object) -> bytes:
    """A member of a list."""
    spelt = _spell(member, "")
    assert spelt is not None
    return b'"%s"' % spelt.replace(b"\\", b"\\\\").replace(b'"', b'\\"')
