"""Who is signed in to the pages: sessions that begin, are looked up and end. Only digests of their tokens are here."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Literal

from sqlalchemy import ColumnElement, Connection, and_, insert, or_, select
from sqlalchemy.sql.functions import coalesce

from proxy.ledger.schema import keys, session_teams, sessions, teams

# An admin sees and changes everything, a viewer sees it, and a member sees what belongs to some teams.
Role = Literal["admin", "viewer", "member"]

# A working day, and a long lunch: an overview that is left open asks for itself and so stays.
SESSION_HOURS = 12
IDLE_HOURS = 2

# Noting every look would be a write a look; a session may seem this much older than it is.
SEEN_MINUTES = 5

# More teams than anybody looks after: a provider that says more means something else by that claim.
TEAMS_MAX = 100


class NoTeam(Exception):
    """A member of teams of which none is here."""


@dataclass(frozen=True, slots=True)
class Holder:
    """Who begins a session: with a team's ``key_id``, as an ``account`` of an identity provider, or, with neither, by the
    admin token. ``teams`` names those of a member who came without a key."""

    role: Role
    key_id: str | None = None
    account: str | None = None
    teams: Collection[str] = ()
    hours: float = SESSION_HOURS


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody signed in. ``teams`` are those of a member, by name; others see all or need none."""

    digest: bytes
    role: Role
    key_id: str | None
    account: str | None
    seen_at: datetime
    teams: tuple[str, ...] = ()

    def stale(self, now: datetime) -> bool:
        """Whether it is time to note that somebody is still there."""
        return now - self.seen_at > timedelta(minutes=SEEN_MINUTES)


def open_session(connection: Connection, digest: bytes, holder: Holder, now: datetime) -> None:
    """Begin a session, and forget those that are over. Raises :class:`NoTeam`."""
    connection.execute(sessions.delete().where(_over(now)))
    row = {
        "digest": digest,
        "role": holder.role,
        "key_id": holder.key_id,
        "account": holder.account,
        "created_at": now,
        "seen_at": now,
        "expires_at": now + timedelta(hours=holder.hours),
    }
    connection.execute(sessions.insert().values(**row))
    if holder.role == "member" and holder.key_id is None:
        named = select(teams.c.id).where(teams.c.name.in_(holder.teams), teams.c.archived_at.is_(None))
        found = connection.scalars(named.order_by(teams.c.name).limit(TEAMS_MAX)).all()
        if not found:
            raise NoTeam
        connection.execute(insert(session_teams), [{"digest": digest, "team_id": team_id} for team_id in found])


def find_session(connection: Connection, digest: bytes, now: datetime) -> Session | None:
    """The session of a token's digest; ``None`` where it is over, or its key is, or every team of it."""
    query = (
        select(sessions.c.digest, sessions.c.role, sessions.c.key_id, sessions.c.account, sessions.c.seen_at, teams.c.name)
        .outerjoin(keys, keys.c.id == sessions.c.key_id)
        .outerjoin(session_teams, session_teams.c.digest == sessions.c.digest)
        .outerjoin(teams, and_(teams.c.id == coalesce(keys.c.team_id, session_teams.c.team_id), teams.c.archived_at.is_(None)))
        .where(
            sessions.c.digest == digest,
            ~_over(now),
            or_(
                sessions.c.key_id.is_(None),
                and_(keys.c.revoked_at.is_(None), or_(keys.c.expires_at.is_(None), keys.c.expires_at > now)),
            ),
        )
        .order_by(teams.c.name)
    )
    rows = connection.execute(query).all()
    named = tuple(row[-1] for row in rows if row[-1] is not None)
    if not rows or (rows[0].role == "member" and not named):
        return None
    return Session(*rows[0][:-1], named)


def see_session(connection: Connection, digest: bytes, now: datetime) -> None:
    """Note that somebody is still there."""
    connection.execute(sessions.update().where(sessions.c.digest == digest).values(seen_at=now))


def end_session(connection: Connection, digest: bytes) -> None:
    """End a session for good."""
    connection.execute(sessions.delete().where(sessions.c.digest == digest))


def _over(now: datetime) -> ColumnElement[bool]:
    return or_(sessions.c.expires_at <= now, sessions.c.seen_at <= now - timedelta(hours=IDLE_HOURS))
