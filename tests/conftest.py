"""What the tests stand on: a real PostgreSQL server, started once and only if a test asks for it, and fresh databases."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import count
from pathlib import Path

import psycopg
import pytest

from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from tests.postgres import running_postgres

# A developer's own settings are none of the tests' business, and would reach every process that a test starts.
for _name in [name for name in os.environ if name.startswith("BEANMETER_")]:
    del os.environ[_name]

_database_numbers = count(1)


@pytest.fixture(scope="session")
def postgres_url() -> Iterator[str]:
    """The URL of a running server's ``postgres`` database, as a superuser, without a password."""
    with running_postgres() as server:
        yield server.url


@pytest.fixture
def postgres_database(postgres_url: str) -> Iterator[str]:
    """The URL of a fresh, empty PostgreSQL database, dropped with all its connections after the test."""
    with fresh_database(postgres_url, "template1") as url:
        yield url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def empty_database_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """The URL of a fresh, empty database: a test that takes it runs once on SQLite and once on PostgreSQL."""
    if request.param == "sqlite":
        return f"sqlite:///{tmp_path / 'beanmeter.db'}"
    url: str = request.getfixturevalue("postgres_database")
    return url


@pytest.fixture(params=["sqlite", pytest.param("postgresql", marks=pytest.mark.postgres)])
def database_url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    """The same with our tables in it, made once and copied: making them takes longer than most tests."""
    if request.param == "sqlite":
        shutil.copyfile(request.getfixturevalue("prepared_file"), tmp_path / "beanmeter.db")
        yield f"sqlite:///{tmp_path / 'beanmeter.db'}"
    else:
        with fresh_database(request.getfixturevalue("postgres_url"), request.getfixturevalue("prepared_template")) as url:
            yield url


@pytest.fixture(scope="session")
def prepared_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An SQLite database with our tables, which nobody has open."""
    path = tmp_path_factory.mktemp("prepared") / "beanmeter.db"
    prepare(f"sqlite:///{path}")
    # A log beside it would have a part of it.
    assert list(path.parent.iterdir()) == [path]
    return path


@pytest.fixture(scope="session")
def prepared_template(postgres_url: str) -> str:
    """The name of a PostgreSQL database with our tables, which nobody has open."""
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute("CREATE DATABASE prepared")
    prepare(postgres_url.removesuffix("postgres") + "prepared")
    return "prepared"


def prepare(url: str) -> None:
    database = Database(url)
    migrate(database)
    database.close()


@contextmanager
def fresh_database(postgres_url: str, template: str) -> Iterator[str]:
    """The URL of a copy of another database, dropped with all its connections at the end."""
    name = f"test_{next(_database_numbers)}"
    with psycopg.connect(postgres_url, autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name} TEMPLATE {template}")
        yield postgres_url.removesuffix("postgres") + name
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
