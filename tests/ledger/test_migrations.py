"""The schema's versions: what the migrations make is what the tables say, on either database, in any number of processes."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, MetaData, inspect, text

from proxy.ledger.engine import Database
from proxy.ledger.migrate import SchemaError, current_revision, migrate, require_current
from proxy.ledger.schema import REVISION, metadata

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture
def database(empty_database_url: str) -> Iterator[Database]:
    found = Database(empty_database_url)
    yield found
    found.close()


def scripts() -> ScriptDirectory:
    config = Config()
    config.set_main_option("script_location", str(ROOT / "migrations"))
    return ScriptDirectory.from_config(config)


def test_the_newest_migration_is_the_one_that_a_start_looks_for() -> None:
    assert scripts().get_heads() == [REVISION]


def test_the_migrations_make_what_the_tables_say(database: Database) -> None:
    assert migrate(database)
    with database.reading() as connection:
        context = MigrationContext.configure(connection, opts={"compare_type": True, "compare_server_default": True})
        assert compare_metadata(context, metadata) == []
        assert current_revision(connection) == REVISION
    assert not migrate(database), "there is nothing left to do"
    with database.reading() as connection:
        require_current(connection)


Checks = dict[str, dict[str, str]]


def checks(connection: Connection) -> Checks:
    """Every CHECK by table and name. Alembic does not compare these."""
    inspector = inspect(connection)
    return {
        table: {str(check["name"]): "".join(check["sqltext"].split()) for check in inspector.get_check_constraints(table)}
        for table in metadata.tables
    }


def test_the_migrations_make_every_check(database: Database) -> None:
    migrate(database)
    with database.writing() as connection:
        migrated = checks(connection)
        everything = MetaData()
        everything.reflect(connection)
        everything.drop_all(connection)
        metadata.create_all(connection)
        assert migrated == checks(connection)
    assert sum(map(len, migrated.values())) > 20


def test_a_database_that_is_not_migrated_is_refused_with_the_way_out(database: Database) -> None:
    with pytest.raises(SchemaError, match="is empty; run 'beanmeter migrate'"), database.reading() as connection:
        require_current(connection)
    migrate(database)
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '0000'"))
    match = f"is at version 0000, this release needs {REVISION}; run 'beanmeter migrate'"
    with pytest.raises(SchemaError, match=match), database.reading() as connection:
        require_current(connection)


def test_a_database_of_a_newer_release_is_left_alone(database: Database) -> None:
    migrate(database)
    with database.writing() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = '9999'"))
    with pytest.raises(SchemaError, match="newer"):
        migrate(database)
    with database.reading() as connection:
        assert current_revision(connection) == "9999"


def migrate_in_a_process(url: str) -> bool:
    database = Database(url)
    try:
        return migrate(database)
    finally:
        database.close()


def test_of_many_processes_one_migrates_and_the_others_wait(empty_database_url: str) -> None:
    with multiprocessing.get_context("spawn").Pool(4) as pool:
        # All four are up before the first one starts.
        pool.map(str, range(4))
        # A new file of SQLite's can be opened by two at the wrong moment; it takes some tries to meet it.
        for attempt in range(20 if empty_database_url.startswith("sqlite") else 2):
            url = empty_database_url if attempt == 0 else another(empty_database_url, attempt)
            assert sorted(pool.map(migrate_in_a_process, [url] * 4, chunksize=1)) == [False, False, False, True]


def another(database_url: str, number: int) -> str:
    """The URL of one more empty database beside this one: on PostgreSQL the same, emptied."""
    if database_url.startswith("sqlite"):
        return database_url.replace(".db", f"-{number}.db")
    database = Database(database_url)
    with database.writing() as connection:
        connection.execute(text("DROP SCHEMA public CASCADE"))
        connection.execute(text("CREATE SCHEMA public"))
    database.close()
    return database_url


def run(arguments: list[str], directory: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    """A Python of its own, which has to end well."""
    command = [sys.executable, *arguments]
    return subprocess.run(command, cwd=directory, env=os.environ | environment, check=True, capture_output=True, text=True)


def test_an_installed_wheel_brings_its_migrations(tmp_path: Path) -> None:
    source, wheels, target = tmp_path / "source", tmp_path / "wheels", tmp_path / "target"
    # A copy, so that nothing is left behind in the checkout.
    source.mkdir()
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, source)
    for name in ("proxy", "migrations"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    run(["-m", "hatchling", "build", "-t", "wheel", "-d", str(wheels)], source)
    [wheel] = wheels.iterdir()
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    run(["-m", "pip", *install, "--target", str(target), str(wheel)], tmp_path)
    assert sorted(path.name for path in (target / "proxy/migrations/versions").glob("*.py")) == sorted(
        path.name for path in (ROOT / "migrations/versions").glob("*.py")
    )
    program = (
        "import proxy\n"
        "from proxy.ledger.engine import Database\n"
        "from proxy.ledger.migrate import migrate, require_current\n"
        "database = Database('sqlite:///installed.db')\n"
        "assert migrate(database)\n"
        "with database.reading() as connection:\n"
        "    require_current(connection)\n"
        "print(proxy.__file__)\n"
    )
    # What is installed comes before the checkout.
    done = run(["-c", program], tmp_path, PYTHONPATH=str(target))
    assert done.stdout.strip() == str(target / "proxy/__init__.py")
