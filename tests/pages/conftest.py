"""The house that the tests of pages share, on SQLite and on PostgreSQL or on SQLite alone."""

from __future__ import annotations

import io
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from proxy import logs
from tests.pages.house import House, open_house


@pytest.fixture
def house(database_url: str, tmp_path: Path) -> Iterator[House]:
    """For what depends on SQL: once on SQLite and once on PostgreSQL."""
    with open_house(database_url, tmp_path) as opened:
        yield opened


@pytest.fixture
def home(tmp_path: Path) -> Iterator[House]:
    """For what does not: on SQLite."""
    with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as opened:
        yield opened


@pytest.fixture
def log() -> Iterator[io.StringIO]:
    """What is logged meanwhile, as it would be on the operator's disk."""
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    logs.configure(sys.stderr)
