"""Refusals in the books: what several processes counted is one sum, and what can't be written now is written later."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import closing
from datetime import date, datetime, timedelta

import pytest
from sqlalchemy import text

from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.overviews import list_refusals
from proxy.ledger.refused import Refused
from tests.ledger.ledgers import NOON


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    with closing(Database(database_url)) as found:
        migrate(found)
        yield found


TODAY = NOON.date()


def noted(database: Database, first: date = TODAY) -> list[tuple[str, str, int]]:
    with database.reading() as connection:
        return [row[:3] for row in list_refusals(connection, first)]


def note(database: Database, refused: Refused, now: datetime = NOON) -> None:
    asyncio.run(refused.note(database, lambda: now))


def test_what_processes_count_adds_up_day_by_day(database: Database) -> None:
    one, other = Refused(), Refused()
    for _ in range(3):
        one.count("red", "insufficient_quota")
    other.count("red", "insufficient_quota")
    other.count("", "invalid_api_key")

    async def both() -> None:
        await asyncio.gather(one.note(database, lambda: NOON), other.note(database, lambda: NOON))

    asyncio.run(both())
    assert noted(database) == [("red", "insufficient_quota", 4), ("", "invalid_api_key", 1)]
    note(database, one)
    assert noted(database)[0][2] == 4, "what was noted is not noted again"
    one.count("red", "insufficient_quota")
    note(database, one, NOON + timedelta(days=1))
    assert noted(database) == [("red", "insufficient_quota", 5), ("", "invalid_api_key", 1)]
    assert noted(database, TODAY + timedelta(days=1)) == [("red", "insufficient_quota", 1)]
    with database.reading() as connection:
        assert [row[3] for row in list_refusals(connection, TODAY)] == [TODAY + timedelta(days=1), TODAY]


def test_what_cannot_be_noted_is_kept_and_added_to(database: Database) -> None:
    refused = Refused()
    refused.count("red", "rate_limit_exceeded")
    with database.writing() as connection:
        connection.execute(text("ALTER TABLE refusals RENAME TO away"))
    note(database, refused)
    refused.count("red", "rate_limit_exceeded")
    with database.writing() as connection:
        connection.execute(text("ALTER TABLE away RENAME TO refusals"))
    assert noted(database) == []
    note(database, refused)
    assert noted(database) == [("red", "rate_limit_exceeded", 2)]
