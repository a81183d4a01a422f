"""Listings page by page: each page begins behind the last row of the one before, so that rows which are added meanwhile are
neither shown twice nor push others out. Nothing here writes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any

from sqlalchemy import Column, ColumnElement, Connection, Select, bindparam, literal, select, tuple_

from proxy.ledger import reports
from proxy.ledger.schema import IS_OPEN, IS_RELEASED, OPEN_STATES, Instant, audit, budgets, charges, keys, limits, teams

# What a row is found again by: its id, or where rows are in the order of time, microseconds since 1970 and its id.
Place = tuple[int | str, ...]

_START = datetime(1970, 1, 1, tzinfo=UTC)
_MICROSECOND = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Page:
    """Rows, and the place of the last one where more come behind it."""

    rows: list[dict[str, Any]]
    last: Place | None


@dataclass(frozen=True, slots=True)
class Turn:
    """Which page: at most ``rows`` behind ``after``; ``None`` begins."""

    rows: int
    after: Place | None = None


def list_teams(connection: Connection, turn: Turn) -> Page:
    """Teams as they were made, archived ones too."""
    return _page(connection, select(teams.c.name, teams.c.created_at, teams.c.archived_at), [teams.c.id], turn)


def list_keys(connection: Connection, turn: Turn, *, team: str | None = None) -> Page:
    """Keys of one team or of all as they were made, without their secrets."""
    columns = (keys.c[name] for name in ("name", "last_four", "created_at", "expires_at", "revoked_at"))
    query = select(keys.c.id, teams.c.name.label("team"), *columns).join(teams, teams.c.id == keys.c.team_id)
    return _page(connection, _of_team(query, team), [keys.c.id], turn)


def list_budgets(connection: Connection, turn: Turn, now: datetime, *, team: str | None = None) -> Page:
    """Budgets of one team or of all as they were made, with what counts against them now."""
    query = select(teams.c.name.label("team"), budgets.c.key_id, budgets.c.period).join(teams, teams.c.id == budgets.c.team_id)
    page = _page(connection, _of_team(query, team), [budgets.c.id], turn)
    now_there = {(one.team, one.key_id, one.period): one for one in reports.list_budgets(connection, now, team=team)}
    return Page([budget_row(now_there[row["team"], row["key_id"], row["period"]]) for row in page.rows], page.last)


def list_limits(connection: Connection, turn: Turn, *, team: str | None = None) -> Page:
    """Limits of one team or of all as they were made."""
    query = select(teams.c.name.label("team"), limits.c.key_id, limits.c.rpm, limits.c.concurrency)
    return _page(connection, _of_team(query.join(teams, teams.c.id == limits.c.team_id), team), [limits.c.id], turn)


def list_charges(
    connection: Connection,
    turn: Turn,
    columns: Sequence[str] = reports.CHARGE_COLUMNS,
    /,
    *,
    team: str | None = None,
    key_id: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
    newest_first: bool = False,
) -> Page:
    """Charges in the order of their reservation, from ``since`` (inclusive) to ``until`` (exclusive)."""
    shown = [teams.c.name.label("team") if name == "team" else charges.c[name] for name in columns]
    query = select(*shown).join(teams, teams.c.id == charges.c.team_id)
    # The narrowest index is to be taken, whatever a database believes of the others: an open charge is one of few, then a
    # released one of its team, then any of its key or team. What something is added to offers no index. Ids are written out:
    # of a parameter, PostgreSQL assumes as many charges as others have, and would look through those of all teams.
    team_id: ColumnElement[Any] = charges.c.team_id
    key: ColumnElement[Any] = charges.c.key_id
    if state is not None:
        query = query.where(charges.c.state == state)
    if state in OPEN_STATES:
        query, team_id, key = query.where(IS_OPEN), team_id + 0, key + ""
    elif state == "released" and team is not None:
        query, key = query.where(IS_RELEASED), key + ""
    if key_id is not None:
        owner = team_of_key(connection, key_id)
        if owner is None or team not in (None, owner):
            return Page([], None)
        query = query.where(key == bindparam("key", key_id, literal_execute=True))
    if team is not None and (key_id is None or state == "released"):
        its_id = connection.execute(select(teams.c.id).where(teams.c.name == team)).scalar()
        if its_id is None:
            return Page([], None)
        query = query.where(team_id == bindparam("team", its_id, literal_execute=True))
    query = _within(query, charges.c.created_at, since, until)
    return _page(connection, query, [charges.c.created_at, charges.c.id], turn, newest_first=newest_first)


def list_audit(
    connection: Connection,
    turn: Turn,
    *,
    since: datetime | None = None,
    until: datetime | None = None,
    newest_first: bool = False,
) -> Page:
    """Who changed what; ``before`` and ``after`` are JSON, ``None`` where there was or is nothing."""
    query = select(audit.c.at, audit.c.actor, audit.c.action, audit.c.subject, audit.c.before, audit.c.after)
    return _page(connection, _within(query, audit.c.at, since, until), [audit.c.id], turn, newest_first=newest_first)


def team_of_key(connection: Connection, key_id: str) -> str | None:
    """The name of a key's team; ``None`` where there is no such key."""
    query = select(teams.c.name).join(keys, keys.c.team_id == teams.c.id).where(keys.c.id == key_id)
    name: str | None = connection.execute(query).scalar()
    return name


def has_charge(connection: Connection, charge_id: str) -> bool:
    """Whether a charge has this id."""
    return connection.execute(select(charges.c.id).where(charges.c.id == charge_id)).first() is not None


def budget_row(status: reports.BudgetStatus) -> dict[str, Any]:
    """A budget as listings show it."""
    return {
        "team": status.team,
        "key_id": status.key_id,
        "scope": status.scope,
        "period": status.period,
        "soft": status.soft,
        "limit_micro_usd": status.limit_micro_usd,
        "settled_micro_usd": status.settled_micro_usd,
        "held_micro_usd": status.held_micro_usd,
        "remaining_micro_usd": status.remaining_micro_usd,
        "resets_at": status.resets_at,
    }


def _of_team(query: Select[Any], team: str | None) -> Select[Any]:
    return query if team is None else query.where(teams.c.name == team)


def _within(query: Select[Any], at: Column[Any], since: datetime | None, until: datetime | None) -> Select[Any]:
    if since is not None:
        query = query.where(at >= since)
    return query if until is None else query.where(at < until)


def _page(
    connection: Connection, query: Select[Any], order: Sequence[Column[Any]], turn: Turn, *, newest_first: bool = False
) -> Page:
    """A page of ``query`` in the order of these columns, which together are unique."""
    query = query.add_columns(*(column.label(f"_{place}") for place, column in enumerate(order)))
    if turn.after is not None:
        found, last = tuple_(*order), tuple_(*(_value(column, part) for column, part in zip(order, turn.after, strict=True)))
        query = query.where(found < last if newest_first else found > last)
    query = query.order_by(*(column.desc() if newest_first else column for column in order)).limit(turn.rows + 1)
    rows = connection.execute(query).all()
    width = len(order)
    shown = [dict(zip(row._fields[:-width], row[:-width], strict=True)) for row in rows[: turn.rows]]
    more = len(rows) > turn.rows
    return Page(shown, tuple(map(_part, rows[turn.rows - 1][-width:])) if more else None)


def _value(column: Column[Any], part: int | str) -> Any:
    value = _START + int(part) * _MICROSECOND if isinstance(column.type, Instant) else part
    return literal(value, column.type)


def _part(value: Any) -> int | str:
    part: int | str = (value - _START) // _MICROSECOND if isinstance(value, datetime) else value
    return part
