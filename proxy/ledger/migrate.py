"""The schema's versions: telling how old a database is, and bringing it to the newest, one process at a time."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from sqlalchemy import Connection, inspect, text

from proxy.ledger.engine import Database
from proxy.ledger.schema import REVISION

# Any constant does, as long as every release takes the same lock.
_LOCK_ID = 0x6265616E


class SchemaError(RuntimeError):
    """The database can't be used with this release; the message tells the operator what to do."""


def current_revision(connection: Connection) -> str | None:
    """The version a database is at, ``None`` for one without our tables."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def migrate(database: Database) -> bool:
    """Bring the database to the newest schema; whether anything was done.

    Any number of processes may call this at once: one works, the others wait for it and find nothing to do.
    Raises :class:`SchemaError` for a database that a newer release has written.
    """
    with database.reading() as connection:
        if current_revision(connection) == REVISION:
            return False
    with database.writing() as connection:
        if database.dialect == "postgresql":
            connection.execute(text("SELECT pg_advisory_xact_lock(:id)"), {"id": _LOCK_ID})
        if current_revision(connection) == REVISION:
            return False
        _upgrade(connection)
        return True


def require_current(connection: Connection) -> None:
    """Raise :class:`SchemaError` unless the database is at the newest schema."""
    found = current_revision(connection)
    if found != REVISION:
        state = "is empty" if found is None else f"is at version {found}, this release needs {REVISION}"
        raise SchemaError(f"the database {state}; run 'beanmeter migrate'")


def _upgrade(connection: Connection) -> None:
    # Loading Alembic takes longer than the whole of most commands, and most starts don't need it.
    from alembic import command
    from alembic.config import Config
    from alembic.util.exc import CommandError

    config = Config()
    config.set_main_option("script_location", str(_scripts()))
    config.attributes["connection"] = connection
    try:
        command.upgrade(config, "head")
    except CommandError as error:
        raise SchemaError(f"the database can't be migrated by this release: {error}; was it written by a newer one?") from None


def _scripts() -> Path:
    """The migrations: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(str(resources.files("proxy")))
    inside = package / "migrations"
    return inside if inside.is_dir() else package.parent / "migrations"
