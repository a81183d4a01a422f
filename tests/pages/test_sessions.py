"""When a session is over: by its age, by nobody looking, and by its key."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest
from sqlalchemy import func, select

from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.schema import session_teams, sessions
from proxy.ledger.sessions import (
    IDLE_HOURS,
    SESSION_HOURS,
    TEAMS_MAX,
    Holder,
    NoTeam,
    Session,
    end_session,
    find_session,
    open_session,
    see_session,
)

NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
DIGEST, OTHER = bytes(32), bytes([1] * 32)
SECOND = timedelta(seconds=1)
ADMIN = Holder("admin")


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
        open_session(connection, DIGEST, ADMIN, NOON)
    assert found(database, NOON + idle - SECOND) == Session(DIGEST, "admin", None, None, NOON)
    assert found(database, NOON + idle) is None
    at = NOON
    while at < NOON + end - idle:
        at += idle / 2
        session = found(database, at)
        assert session is not None
        assert session.stale(at)
        with database.writing() as connection:
            see_session(connection, DIGEST, at)
        assert not Session(DIGEST, "admin", None, None, at).stale(at + SECOND)
    assert found(database, NOON + end - SECOND) is not None
    assert found(database, NOON + end) is None


def test_a_session_lasts_no_longer_than_its_key(database: Database) -> None:
    with database.writing() as connection:
        accounts.add_team(connection, "red", now=NOON, actor="test")
        key = accounts.add_key(connection, "red", lifetime=timedelta(hours=1), now=NOON, actor="test")
        open_session(connection, DIGEST, Holder("member", key_id=key.id), NOON)
    session = found(database, NOON + timedelta(minutes=59))
    assert session is not None
    assert (session.role, session.teams, session.key_id) == ("member", ("red",), key.id)
    assert found(database, NOON + timedelta(hours=1)) is None


def test_what_is_over_is_forgotten_with_the_next_one(database: Database) -> None:
    with database.writing() as connection:
        accounts.add_team(connection, "red", now=NOON, actor="test")
        open_session(connection, DIGEST, Holder("member", account="ada-1", teams=["red"]), NOON)
        assert connection.scalar(select(func.count()).select_from(session_teams)) == 1
        open_session(connection, OTHER, ADMIN, NOON + timedelta(hours=SESSION_HOURS))
        assert connection.scalar(select(func.count()).select_from(session_teams)) == 0
        assert connection.scalar(select(func.count()).select_from(sessions)) == 1
        end_session(connection, OTHER)
        assert connection.scalar(select(func.count()).select_from(sessions)) == 0


def test_a_session_may_be_shorter(database: Database) -> None:
    with database.writing() as connection:
        open_session(connection, DIGEST, Holder("viewer", account="ada-1", hours=0.5), NOON)
    assert found(database, NOON + timedelta(minutes=30) - SECOND) == Session(DIGEST, "viewer", None, "ada-1", NOON)
    assert found(database, NOON + timedelta(minutes=30)) is None


def test_an_account_has_the_teams_that_are_here_for_as_long_as_they_are_open(database: Database) -> None:
    def teams_at(at: datetime) -> tuple[str, ...] | None:
        session = found(database, at)
        return None if session is None else session.teams

    with database.writing() as connection:
        for name in ("red", "green", "blue", "old"):
            accounts.add_team(connection, name, now=NOON, actor="test")
        accounts.archive_team(connection, "old", now=NOON, actor="test")
        holder = Holder("member", account="ada-1", teams=["red", "green", "old", "later"])
        open_session(connection, DIGEST, holder, NOON)
    assert teams_at(NOON) == ("green", "red")
    with database.writing() as connection:
        # A team that comes later is one at the next sign-in.
        accounts.add_team(connection, "later", now=NOON, actor="test")
        accounts.archive_team(connection, "green", now=NOON, actor="test")
    assert teams_at(NOON) == ("red",)
    with database.writing() as connection:
        accounts.archive_team(connection, "red", now=NOON, actor="test")
    assert teams_at(NOON) is None


def test_an_account_without_a_team_has_no_session(database: Database) -> None:
    with pytest.raises(NoTeam), database.writing() as connection:
        open_session(connection, DIGEST, Holder("member", account="ada-1", teams=["red"]), NOON)
    assert found(database, NOON) is None


def test_an_account_has_so_many_teams_and_no_more(database: Database) -> None:
    names = [f"team {number:03}" for number in range(TEAMS_MAX + 1)]
    with database.writing() as connection:
        for name in names:
            accounts.add_team(connection, name, now=NOON, actor="test")
        open_session(connection, DIGEST, Holder("member", account="ada-1", teams=names), NOON)
    session = found(database, NOON)
    assert session is not None
    assert list(session.teams) == names[:TEAMS_MAX]
