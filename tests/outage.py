"""Takes the database away from a running gateway, and gives it back."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psycopg


@contextmanager
def database_away(database_url: str) -> Iterator[None]:
    """Nobody can connect for as long as the block lasts.

    On PostgreSQL open connections are ended too. SQLite has no connections to end: what a process has open already goes
    on working, so take the file away from one that has not opened it yet.
    """
    away = _sqlite_away if database_url.startswith("sqlite") else _postgresql_away
    with away(database_url):
        yield


@contextmanager
def _sqlite_away(database_url: str) -> Iterator[None]:
    path = Path(database_url.removeprefix("sqlite:///"))
    kept = path.with_name("kept.db")
    path.rename(kept)
    # In its place stands what can't be opened, and nothing can be made anew.
    path.mkdir()
    try:
        yield
    finally:
        path.rmdir()
        kept.rename(path)


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
