"""Who is signed in to the pages: sessions that begin, are looked up and end. Only digests of their tokens are here."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime, timedelta

from sqlalchemy import ColumnElement, Connection, and_, or_, select

from proxy.ledger.schema import keys, sessions, teams

# A working day, and a long lunch: an overview that is left open asks for itself and so stays.
SESSION_HOURS = 12
IDLE_HOURS = 2

# Noting every look would be a write a look; a session may seem this much older than it is.
SEEN_MINUTES = 5


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody signed in: with a team's key, or with the admin token, where ``team`` and ``key_id`` are ``None``."""

    digest: bytes
    team: str | None
    key_id: str | None
    seen_at: datetime

    @property
    def is_admin(self) -> bool:
        """Whether this is an operator."""
        return self.key_id is None

    def stale(self, now: datetime) -> bool:
        """Whether it is time to note that somebody is still there."""
        return now - self.seen_at > timedelta(minutes=SEEN_MINUTES)


def open_session(connection: Connection, digest: bytes, key_id: str | None, now: datetime) -> None:
    """Begin a session, and forget those that are over."""
    connection.execute(sessions.delete().where(_over(now)))
    expires_at = now + timedelta(hours=SESSION_HOURS)
    row = {"digest": digest, "key_id": key_id, "created_at": now, "seen_at": now, "expires_at": expires_at}
    connection.execute(sessions.insert().values(**row))


def find_session(connection: Connection, digest: bytes, now: datetime) -> Session | None:
    """The session of a token's digest; ``None`` where it is over, or its key is, or its team."""
    query = (
        select(sessions.c.digest, teams.c.name, sessions.c.key_id, sessions.c.seen_at)
        .outerjoin(keys, keys.c.id == sessions.c.key_id)
        .outerjoin(teams, teams.c.id == keys.c.team_id)
        .where(
            sessions.c.digest == digest,
            ~_over(now),
            or_(
                sessions.c.key_id.is_(None),
                and_(
                    keys.c.revoked_at.is_(None),
                    or_(keys.c.expires_at.is_(None), keys.c.expires_at > now),
                    teams.c.archived_at.is_(None),
                ),
            ),
        )
    )
    row = connection.execute(query).one_or_none()
    return None if row is None else Session(*row)


def see_session(connection: Connection, digest: bytes, now: datetime) -> None:
    """Note that somebody is still there."""
    connection.execute(sessions.update().where(sessions.c.digest == digest).values(seen_at=now))


def end_session(connection: Connection, digest: bytes) -> None:
    """End a session for good."""
    connection.execute(sessions.delete().where(sessions.c.digest == digest))


def _over(now: datetime) -> ColumnElement[bool]:
    return or_(sessions.c.expires_at <= now, sessions.c.seen_at <= now - timedelta(hours=IDLE_HOURS))
