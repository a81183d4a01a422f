"""Facts about the database itself, such as which prices are in force, or that it holds sample data."""

from __future__ import annotations

from sqlalchemy import Connection, select

from proxy.ledger.schema import marks


def mark(connection: Connection, name: str) -> str | None:
    """What was noted under this name, ``None`` for nothing."""
    return connection.execute(select(marks.c.value).where(marks.c.name == name)).scalar()


def set_mark(connection: Connection, name: str, value: str) -> None:
    """Note a fact in place of what was noted before."""
    connection.execute(marks.delete().where(marks.c.name == name))
    connection.execute(marks.insert().values(name=name, value=value))
