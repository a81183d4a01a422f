"""When a session is over: by its age, by nobody looking, and by its key."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.schema import sessions
from proxy.ledger.sessions import IDLE_HOURS, SESSION_HOURS, Session, end_session, find_session, open_session, see_session

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DIGEST, OTHER = bytes(32), bytes([1] * 32)
SECOND = timedelta(seconds=1)


@pytest.fixture
def database(database_url: str) -> Iterator[Database]:
    found = Database(database_url)
    migrate(found)
    yield found
    found.close()


def found(database: Database, at: datetime, digest: bytes = DIGEST) -> Session | None:
    with database.reading() as connection:
        return find_session(connection, digest, at)


def test_a_session_is_over_when_nobody_looks_and_in_the_end(database: Database) -> None:
    idle, end = timedelta(hours=IDLE_HOURS), timedelta(hours=SESSION_HOURS)
    with database.writing() as connection:
        open_session(connection, DIGEST, None, NOON)
    assert found(database, NOON + idle - SECOND) == Session(DIGEST, None, None, NOON)
    assert found(database, NOON + idle) is None
    at = NOON
    while at < NOON + end - idle:
        at += idle / 2
        session = found(database, at)
        assert session is not None
        assert session.stale(at)
        with database.writing() as connection:
            see_session(connection, DIGEST, at)
        assert not Session(DIGEST, None, None, at).stale(at + SECOND)
    assert found(database, NOON + end - SECOND) is not None
    assert found(database, NOON + end) is None


def test_a_session_lasts_no_longer_than_its_key(database: Database) -> None:
    with database.writing() as connection:
        accounts.add_team(connection, "red", now=NOON, actor="test")
        key = accounts.add_key(connection, "red", lifetime=timedelta(hours=1), now=NOON, actor="test")
        open_session(connection, DIGEST, key.id, NOON)
    session = found(database, NOON + timedelta(minutes=59))
    assert session is not None
    assert (session.team, session.key_id, session.is_admin) == ("red", key.id, False)
    assert found(database, NOON + timedelta(hours=1)) is None


def test_what_is_over_is_forgotten_with_the_next_one(database: Database) -> None:
    with database.writing() as connection:
        open_session(connection, DIGEST, None, NOON)
        open_session(connection, OTHER, None, NOON + timedelta(hours=SESSION_HOURS))
        assert connection.scalar(select(func.count()).select_from(sessions)) == 1
        end_session(connection, OTHER)
        assert connection.scalar(select(func.count()).select_from(sessions)) == 0
