"""Teams, their keys and their budgets: making, changing and finding them. Every change leaves an audit row.

Functions take an open transaction and the clock; whoever calls them commits.
"""

from __future__ import annotations

import difflib
import json
import re
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Literal

from sqlalchemy import Connection, Row, select

from proxy import tokens
from proxy.ledger.books import lock_teams, open_balance
from proxy.ledger.marks import mark, set_mark
from proxy.ledger.schema import audit, balances, budgets, keys, limits, teams
from proxy.periods import Period

# A team's name is a metrics label, a column in reports and part of TEAM/KEY_ID on the command line.
_NAME = re.compile(r"[^\W_][\w .@+&-]{0,62}[\w.+]|[^\W_]", re.UNICODE)

# The mark that holds the price card last used with this database.
_PRICES = "prices"

# More than any team sends; a larger number is a typing error.
LIMIT_MAX = 1_000_000


# What helps the reader of an error on: each surface says in its own words how that is done there.
Remedy = Literal["list_teams", "add_team", "list_keys", "add_key", "list_budgets", "list_limits", "list_reviews"]


class AccountError(ValueError):
    """A change that can't be made. The message says what is wrong, ``remedy`` what helps, where the message does not."""

    def __init__(self, wrong: str, remedy: Remedy | None = None) -> None:
        super().__init__(wrong)
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class KeyHolder:
    """Who a key belongs to, and whether it may still be used."""

    key_id: str
    team_id: int
    team: str
    expires_at: datetime | None
    revoked_at: datetime | None
    archived_at: datetime | None

    def valid(self, now: datetime) -> bool:
        """Neither revoked nor expired, and the team not archived."""
        return self.revoked_at is None and self.archived_at is None and (self.expires_at is None or self.expires_at > now)


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key just made. ``key`` is the secret; it is known here and never again."""

    id: str
    team: str
    name: str
    key: str
    expires_at: datetime | None


def holder_of(connection: Connection, digest: bytes) -> KeyHolder | None:
    """Whose key this is, by its SHA-256 digest; ``None`` if nobody's."""
    row = connection.execute(
        select(keys.c.id, keys.c.team_id, teams.c.name, keys.c.expires_at, keys.c.revoked_at, teams.c.archived_at)
        .join(teams)
        .where(keys.c.digest == digest)
    ).one_or_none()
    return None if row is None else KeyHolder(*row)


# Teams


def add_team(connection: Connection, name: str, *, now: datetime, actor: str) -> dict[str, Any]:
    """A new team; its row. Raises :class:`AccountError` for a name that is taken or can't be one."""
    if not _NAME.fullmatch(name):
        raise AccountError(
            f"{name!r} can't be a team's name: use up to 64 letters, digits, spaces and . _ @ + & -, a letter or digit first"
        )
    if connection.execute(select(teams.c.id).where(teams.c.name == name)).first():
        raise AccountError(f"a team named {name!r} exists already", "list_teams")
    connection.execute(teams.insert().values(name=name, created_at=now))
    return record(connection, "team.add", name, None, _team_view(_team(connection, name)), now, actor)


def archive_team(connection: Connection, name: str, *, now: datetime, actor: str) -> dict[str, Any]:
    """Close a team: its keys stop working, its books stay. Archiving twice changes nothing."""
    team = _lock(connection, name)
    before = _team_view(team)
    if team.archived_at is not None:
        return before
    connection.execute(teams.update().where(teams.c.id == team.id).values(archived_at=now))
    return record(connection, "team.archive", name, before, before | {"archived_at": now}, now, actor)


def list_teams(connection: Connection) -> list[dict[str, Any]]:
    """All teams by name, archived ones too."""
    return [_team_view(row) for row in connection.execute(select(teams).order_by(teams.c.name))]


def show_team(connection: Connection, name: str) -> dict[str, Any]:
    """One team, with its keys."""
    team = _team(connection, name)
    return _team_view(team) | {"keys": list_keys(connection, name)}


# Keys


def add_key(
    connection: Connection, team_name: str, *, name: str = "", lifetime: timedelta | None = None, now: datetime, actor: str
) -> NewKey:
    """A new key for a team that is not archived."""
    team = _lock(connection, team_name)
    if team.archived_at is not None:
        raise AccountError(f"team {team_name!r} is archived: a key of it would not work")
    if len(name) > 64 or not all(character.isprintable() for character in name):
        raise AccountError("a key's name has at most 64 printable characters")
    secret = tokens.new_key()
    key = NewKey(
        id=tokens.new_id("key", int(now.timestamp() * 1000)),
        team=team_name,
        name=name,
        key=secret,
        expires_at=None if lifetime is None else now + lifetime,
    )
    connection.execute(
        keys.insert().values(
            id=key.id,
            team_id=team.id,
            name=name,
            digest=tokens.digest(secret),
            last_four=tokens.last_four(secret),
            created_at=now,
            expires_at=key.expires_at,
        )
    )
    record(connection, "key.add", key.id, None, _key_view(_key(connection, key.id), team_name), now, actor)
    return key


def revoke_key(connection: Connection, key_id: str, *, now: datetime, actor: str) -> dict[str, Any]:
    """Stop a key from working. Revoking twice changes nothing."""
    key, team = _lock_key(connection, key_id)
    before = _key_view(key, team.name)
    if key.revoked_at is not None:
        return before
    connection.execute(keys.update().where(keys.c.id == key_id).values(revoked_at=now))
    return record(connection, "key.revoke", key_id, before, before | {"revoked_at": now}, now, actor)


def rotate_key(connection: Connection, key_id: str, *, overlap: timedelta, now: datetime, actor: str) -> NewKey:
    """A new key like this one; the old one goes on working for ``overlap``, or until it would have expired."""
    old, team = _lock_key(connection, key_id)
    if not KeyHolder(old.id, team.id, team.name, old.expires_at, old.revoked_at, None).valid(now):
        raise AccountError(f"key {key_id} is revoked or expired", "add_key")
    if old.successor_id is not None:
        raise AccountError(f"key {key_id} has been rotated already; rotate its successor {old.successor_id}")
    lifetime = None if old.expires_at is None else old.expires_at - old.created_at
    new = add_key(connection, team.name, name=old.name, lifetime=lifetime, now=now, actor=actor)
    _pass_on(connection, team, old.id, new.id, now, actor)
    end = now + overlap if old.expires_at is None else min(now + overlap, old.expires_at)
    before = _key_view(old, team.name)
    connection.execute(keys.update().where(keys.c.id == key_id).values(expires_at=end, successor_id=new.id))
    record(connection, "key.rotate", key_id, before, before | {"expires_at": end}, now, actor)
    return new


def _pass_on(connection: Connection, team: Row[Any], old_id: str, new_id: str, now: datetime, actor: str) -> None:
    """Give a key's budgets and limits to its successor as well. Nothing is spent of them there, so who may spend with a key
    that has a hard budget may not rotate it."""
    for row in connection.execute(select(budgets).where(budgets.c.key_id == old_id)).all():
        set_budget(connection, team.name, new_id, row.period, row.limit_micro_usd, soft=row.soft, now=now, actor=actor)
    for row in connection.execute(select(limits).where(limits.c.key_id == old_id)).all():
        set_limit(connection, team.name, new_id, rpm=row.rpm, concurrency=row.concurrency, now=now, actor=actor)


def list_keys(connection: Connection, team_name: str | None = None) -> list[dict[str, Any]]:
    """Keys of one team or of all, oldest first, without their secrets."""
    query = select(keys, teams.c.name.label("team")).join(teams).order_by(teams.c.name, keys.c.created_at, keys.c.id)
    if team_name is not None:
        query = query.where(keys.c.team_id == _team(connection, team_name).id)
    return [_key_view(row, row.team) for row in connection.execute(query)]


# Budgets


def set_budget(
    connection: Connection,
    team_name: str,
    key_id: str | None,
    period: Period,
    limit_micro_usd: int,
    *,
    soft: bool,
    now: datetime,
    actor: str,
) -> dict[str, Any]:
    """Make or replace the budget of a scope and period. What was spent in the running period counts from the start."""
    team = _lock(connection, team_name)
    _check_scope(connection, team, key_id)
    found = _budget(connection, team.id, key_id, period)
    if found is not None:
        changed = budgets.update().where(budgets.c.id == found.id).values(limit_micro_usd=limit_micro_usd, soft=soft)
        connection.execute(changed)
    else:
        _open_budget(connection, team.id, key_id, period, limit_micro_usd, soft=soft, now=now)
    before = None if found is None else _budget_terms(found)
    after = {"period": period, "limit_micro_usd": limit_micro_usd, "soft": soft}
    return record(connection, "budget.set", _scope_name(team_name, key_id), before, after, now, actor)


def remove_budget(
    connection: Connection, team_name: str, key_id: str | None, period: Period, *, now: datetime, actor: str
) -> None:
    """Take a budget away; what was spent stays in the books."""
    team = _lock(connection, team_name)
    _check_scope(connection, team, key_id)
    found = _budget(connection, team.id, key_id, period)
    scope = _scope_name(team_name, key_id)
    if found is None:
        raise AccountError(f"{scope} has no budget per {period}", "list_budgets")
    connection.execute(balances.delete().where(balances.c.budget_id == found.id))
    connection.execute(budgets.delete().where(budgets.c.id == found.id))
    record(connection, "budget.remove", scope, _budget_terms(found), None, now, actor)


def _open_budget(
    connection: Connection, team_id: int, key_id: str | None, period: Period, limit_micro_usd: int, *, soft: bool, now: datetime
) -> None:
    row = {"team_id": team_id, "key_id": key_id, "period": period, "limit_micro_usd": limit_micro_usd, "soft": soft}
    budget_id = connection.execute(budgets.insert().values(**row, created_at=now).returning(budgets.c.id)).scalar_one()
    open_balance(connection, budget_id, team_id, key_id, period, now)


def _check_scope(connection: Connection, team: Row[Any], key_id: str | None) -> None:
    if key_id is not None and _key(connection, key_id).team_id != team.id:
        raise AccountError(f"key {key_id} is not of team {team.name!r}", "list_keys")


def _budget(connection: Connection, team_id: int, key_id: str | None, period: Period) -> Row[Any] | None:
    same_key = budgets.c.key_id.is_(None) if key_id is None else budgets.c.key_id == key_id
    query = select(budgets).where(budgets.c.team_id == team_id, same_key, budgets.c.period == period)
    return connection.execute(query).one_or_none()


def _budget_terms(row: Row[Any]) -> dict[str, Any]:
    return {"period": row.period, "limit_micro_usd": row.limit_micro_usd, "soft": row.soft}


def _scope_name(team: str, key_id: str | None) -> str:
    return team if key_id is None else f"{team}/{key_id}"


# Limits


def set_limit(
    connection: Connection,
    team_name: str,
    key_id: str | None,
    *,
    rpm: int | None = None,
    concurrency: int | None = None,
    now: datetime,
    actor: str,
) -> dict[str, Any]:
    """Limit requests a minute, or exchanges at a time, of a team or a key. What is ``None`` stays as it was."""
    if rpm is None and concurrency is None:
        raise AccountError("say what to limit: rpm, concurrency or both")
    if any(value is not None and not 0 <= value <= LIMIT_MAX for value in (rpm, concurrency)):
        raise AccountError(f"a limit is a whole number from 0 to {LIMIT_MAX}")
    team = _lock(connection, team_name)
    _check_scope(connection, team, key_id)
    found = _limit(connection, team.id, key_id)
    before = None if found is None else {"rpm": found.rpm, "concurrency": found.concurrency}
    after = {**(before or {"rpm": None, "concurrency": None}), **_given(rpm=rpm, concurrency=concurrency)}
    if found is None:
        connection.execute(limits.insert().values(team_id=team.id, key_id=key_id, created_at=now, **after))
    else:
        connection.execute(limits.update().where(limits.c.id == found.id).values(**after))
    return record(connection, "limit.set", _scope_name(team_name, key_id), before, after, now, actor)


def remove_limit(connection: Connection, team_name: str, key_id: str | None, *, now: datetime, actor: str) -> None:
    """Take the limits of a team or a key away."""
    team = _lock(connection, team_name)
    _check_scope(connection, team, key_id)
    found = _limit(connection, team.id, key_id)
    scope = _scope_name(team_name, key_id)
    if found is None:
        raise AccountError(f"{scope} has no limit", "list_limits")
    connection.execute(limits.delete().where(limits.c.id == found.id))
    record(connection, "limit.remove", scope, {"rpm": found.rpm, "concurrency": found.concurrency}, None, now, actor)


def list_limits(connection: Connection, team_name: str | None = None) -> list[dict[str, Any]]:
    """Limits of one team or of all: team, key_id, rpm, concurrency."""
    query = (
        select(teams.c.name.label("team"), limits.c.key_id, limits.c.rpm, limits.c.concurrency)
        .join(teams, teams.c.id == limits.c.team_id)
        .order_by(teams.c.name, limits.c.key_id.is_not(None), limits.c.key_id)
    )
    if team_name is not None:
        query = query.where(limits.c.team_id == _team(connection, team_name).id)
    return [dict(row) for row in connection.execute(query).mappings()]


def _limit(connection: Connection, team_id: int, key_id: str | None) -> Row[Any] | None:
    same_key = limits.c.key_id.is_(None) if key_id is None else limits.c.key_id == key_id
    return connection.execute(select(limits).where(limits.c.team_id == team_id, same_key)).one_or_none()


def _given(**values: int | None) -> dict[str, int]:
    return {name: value for name, value in values.items() if value is not None}


# Prices


def note_prices(connection: Connection, version: str, fingerprint: str, *, now: datetime, actor: str) -> bool:
    """Leave an audit row when the price card in force is another than before; whether it is.

    ``fingerprint`` tells cards apart that say the same of themselves.
    """
    after = f"{version} {fingerprint}"
    before = mark(connection, _PRICES)
    if before == after:
        return False
    set_mark(connection, _PRICES, after)
    record(connection, "prices.load", version, None if before is None else {"card": before}, {"card": after}, now, actor)
    return True


# Rows and their views


def _team(connection: Connection, name: str) -> Row[Any]:
    row = connection.execute(select(teams).where(teams.c.name == name)).one_or_none()
    if row is None:
        near = difflib.get_close_matches(name, list(connection.scalars(select(teams.c.name))), n=1)
        wrong = f"there is no team named {name!r}"
        raise AccountError(f"{wrong}; did you mean {near[0]!r}?") if near else AccountError(wrong, "add_team")
    return row


def _team_by_id(connection: Connection, team_id: int) -> Row[Any]:
    return connection.execute(select(teams).where(teams.c.id == team_id)).one()


def _lock(connection: Connection, name: str) -> Row[Any]:
    """The team's row, locked, as it is once the lock is held."""
    lock_teams(connection, [_team(connection, name).id])
    return _team(connection, name)


def _key(connection: Connection, key_id: str) -> Row[Any]:
    row = connection.execute(select(keys).where(keys.c.id == key_id)).one_or_none()
    if row is None:
        raise AccountError(f"there is no key {key_id!r}", "list_keys")
    return row


def _lock_key(connection: Connection, key_id: str) -> tuple[Row[Any], Row[Any]]:
    """A key's row and its team's, as they are once the team is locked: nobody else changes the key then, or spends with it."""
    lock_teams(connection, [_key(connection, key_id).team_id])
    key = _key(connection, key_id)
    return key, _team_by_id(connection, key.team_id)


def _team_view(row: Row[Any]) -> dict[str, Any]:
    return {"name": row.name, "created_at": row.created_at, "archived_at": row.archived_at}


def _key_view(row: Row[Any], team: str) -> dict[str, Any]:
    return {
        "id": row.id,
        "team": team,
        "name": row.name,
        "last_four": row.last_four,
        "created_at": row.created_at,
        "expires_at": row.expires_at,
        "revoked_at": row.revoked_at,
    }


def record(
    connection: Connection,
    action: str,
    subject: str,
    before: dict[str, Any] | None,
    after: dict[str, Any] | None,
    now: datetime,
    actor: str,
) -> dict[str, Any]:
    """Leave the audit row of a change; the state after it."""
    text = [None if state is None else json.dumps(state, default=_json, sort_keys=True) for state in (before, after)]
    row = {"at": now, "actor": actor, "action": action, "subject": subject, "before": text[0], "after": text[1]}
    connection.execute(audit.insert().values(**row))
    return after or {}


def _json(value: object) -> str:
    if isinstance(value, datetime):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no place in an audit row")
