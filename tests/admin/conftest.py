"""The office that the tests of the admin API share, on SQLite and on PostgreSQL or on SQLite alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.admin.office import Office, open_office


@pytest.fixture
def office(database_url: str, tmp_path: Path) -> Iterator[Office]:
    """For what depends on SQL: once on SQLite and once on PostgreSQL."""
    with open_office(database_url, tmp_path) as opened:
        yield opened


@pytest.fixture
def desk(tmp_path: Path) -> Iterator[Office]:
    """For what does not: on SQLite."""
    with open_office(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as opened:
        yield opened


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Office]:
    """One for many questions that change nothing."""
    directory = tmp_path_factory.mktemp("office")
    with open_office(f"sqlite:///{directory / 'books.db'}", directory) as opened:
        yield opened
