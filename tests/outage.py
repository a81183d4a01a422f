"""Takes the database away from a running gateway, and gives it back."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import closing, contextmanager

import psycopg


@contextmanager
def database_away(database_url: str) -> Iterator[None]:
    """For as long as the block lasts, nothing can be read from the database and nothing written, by anybody."""
    away = _sqlite_away if database_url.startswith("sqlite") else _postgresql_away
    with away(database_url):
        yield


@contextmanager
def _sqlite_away(database_url: str) -> Iterator[None]:
    # A file that a process has open it keeps, even where it is renamed or removed; its tables can be put out of sight.
    with closing(sqlite3.connect(database_url.removeprefix("sqlite:///"), isolation_level=None)) as connection:
        tables = [name for (name,) in connection.execute("SELECT name FROM sqlite_schema WHERE type = 'table'")]
        tables = [name for name in tables if not name.startswith("sqlite_")]

        def rename(before: str, after: str) -> None:
            # All at once: one by one, each would wait for its turn among the writers.
            renames = [f"ALTER TABLE {before}{name} RENAME TO {after}{name}" for name in tables]
            connection.executescript(";".join(["BEGIN IMMEDIATE", *renames, "COMMIT"]))

        rename("", "away_")
        try:
            yield
        finally:
            rename("away_", "")


@contextmanager
def _postgresql_away(database_url: str) -> Iterator[None]:
    server, _, name = database_url.rpartition("/")
    with psycopg.connect(f"{server}/postgres", autocommit=True) as connection:
        connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS false")
        connection.execute("SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE datname = %s", [name])
        try:
            yield
        finally:
            connection.execute(f"ALTER DATABASE {name} ALLOW_CONNECTIONS true")
