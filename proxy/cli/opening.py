"""How a command comes by its settings, the database, the time and the name it acts under."""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from sqlalchemy import Connection

    from proxy.ledger.engine import Database
    from proxy.settings import Settings


def read_settings(**options: object) -> Settings:
    """The settings in force. ``options`` are those that the command line can set too, ``None`` where it did not."""
    from proxy.settings import SettingsError, load

    try:
        return load(os.environ, Path.cwd(), options)
    except SettingsError as error:
        # What is wrong on the command line is wrong usage, whoever finds it.
        if str(error).startswith("--"):
            raise typer.BadParameter(str(error)) from None
        raise


def connect(settings: Settings) -> Database:
    """The database of the settings; nothing is asked of it yet."""
    from sqlalchemy.exc import ArgumentError

    from proxy.ledger.engine import Database
    from proxy.settings import SettingsError

    try:
        return Database(settings.database_url.get_secret_value())
    except (ArgumentError, ValueError):
        # The error's own text can hold parts of the URL, and so of the password.
        raise SettingsError("BEANMETER_DATABASE_URL (value not shown): its host, port or options can't be read") from None


@contextmanager
def database() -> Iterator[Database]:
    """The database at the newest schema.

    An SQLite file that is missing or old is brought there; PostgreSQL has other users, so an operator says when.
    """
    from proxy.ledger.migrate import migrate, require_current

    opened = connect(read_settings())
    try:
        if opened.dialect == "sqlite":
            migrate(opened)
        else:
            with opened.reading() as connection:
                require_current(connection)
        yield opened
    finally:
        opened.close()


@contextmanager
def reading() -> Iterator[Connection]:
    """A consistent view of the books."""
    with database() as opened, opened.reading() as connection:
        yield connection


@contextmanager
def writing() -> Iterator[Connection]:
    """One change, committed at the end of the block. Print nothing inside: what is printed has to be true."""
    with database() as opened, opened.writing() as connection:
        yield connection


def now() -> datetime:
    return datetime.now(UTC)


def actor() -> str:
    """Who changes something, for the audit row: the user of the operating system, whatever the environment says."""
    try:
        return f"cli:{pwd.getpwuid(os.getuid()).pw_name}"
    except KeyError:  # A container often runs under a number that has no name.
        return f"cli:{os.getuid()}"
