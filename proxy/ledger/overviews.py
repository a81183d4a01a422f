"""What the pages show of the books: sums by day and column of all teams or one, what is open now, what went wrong upstream,
and what was refused.

Sums come from the daily sums, and open or released charges from indexes of their own: the same work however many charges
there are. Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select, union_all

from proxy.ledger.schema import IS_OPEN, IS_RELEASED, OPEN_STATES, charges, refusals, rollups, team_days, teams

SUMS = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")

COLUMNS = ("day", "team", "key", "model", "operation", "size", "quality")


@dataclass(frozen=True, slots=True)
class Open:
    """How many charges of a team are in a state that holds money, and how much they hold."""

    team: str
    state: str
    charges: int
    reserved_micro_usd: int
    oldest_at: datetime


def sum_up(
    connection: Connection, by: Sequence[str], first: date, end: date, *, team: str | None = None
) -> list[dict[str, Any]]:
    """Rows of the columns ``by`` (of :data:`COLUMNS`) and :data:`SUMS`, in their order, for UTC days from ``first`` to
    before ``end``."""
    # What asks for no more than day and team has sums of its own, which are a few hundred times fewer.
    table = team_days if set(by) <= {"day", "team"} else rollups
    columns: Mapping[str, ColumnElement[Any]] = {"team": table.c.team_id} | (
        {"key": table.c.key_id} if table is rollups else {}
    )
    sums = [func.sum(table.c[name]).label(name) for name in SUMS]
    # Grouped as the rows lie, by day and team; a team gets its name once its rows are summed up.
    groups = [(columns[name] if name in columns else table.c[name]).label(name) for name in sorted(by, key=COLUMNS.index)]
    # A row whose charges all moved to another size is empty, and no group of anything.
    query = select(*groups, *sums).where(table.c.requests > 0).group_by(*groups)
    if team is None:
        query = query.where(table.c.day >= first, table.c.day < end)
    else:
        # Day by day: in a span of days all teams would be read.
        days = [first + timedelta(days=number) for number in range((end - first).days)]
        its_id = select(teams.c.id).where(teams.c.name == team).scalar_subquery()
        query = query.where(table.c.day.in_(days), table.c.team_id == its_id)
    summed = query.subquery()
    named = [teams.c.name.label("team") if name == "team" else summed.c[name] for name in by]
    shown = select(*named, *(summed.c[name] for name in SUMS)).select_from(summed).order_by(*named)
    if "team" in by:
        shown = shown.join(teams, teams.c.id == summed.c.team)
    # PostgreSQL adds up whole numbers to decimals.
    return [{**row, **{name: int(row[name]) for name in SUMS}} for row in connection.execute(shown).mappings()]


def list_open(connection: Connection, *, team: str | None = None) -> list[Open]:
    """What is held now, by team and state."""
    # Summed up before teams come in: else a database reads all charges of a team to find the few that are open.
    held = (
        select(
            charges.c.team_id,
            charges.c.state,
            func.count().label("charges"),
            func.sum(charges.c.reserved_micro_usd).label("reserved"),
            func.min(charges.c.created_at, type_=charges.c.created_at.type).label("oldest_at"),
        )
        .where(charges.c.state.in_(OPEN_STATES), IS_OPEN)
        .group_by(charges.c.team_id, charges.c.state)
        .subquery()
    )
    query = (
        select(teams.c.name, held.c.state, held.c.charges, held.c.reserved, held.c.oldest_at)
        .join(teams, teams.c.id == held.c.team_id)
        .order_by(teams.c.name, held.c.state)
    )
    if team is not None:
        query = query.where(teams.c.name == team)
    return [Open(name, state, count, int(held), oldest) for name, state, count, held, oldest in connection.execute(query)]


def list_failures(connection: Connection, since: datetime) -> list[tuple[str, int | None, int]]:
    """Charges reserved since then that were not simply delivered: the reason, the upstream's status, how many; most first."""
    found = select(charges.c.reason, charges.c.upstream_status).where(charges.c.created_at >= since)
    # Each from its own index: what was delivered within an hour can be hundreds of thousands.
    released = found.where(charges.c.team_id.in_(select(teams.c.id)), charges.c.state == "released", IS_RELEASED)
    in_review = found.where(charges.c.state == "review", IS_OPEN)
    either = union_all(released, in_review).subquery()
    count = func.count()
    query = select(either.c.reason, either.c.upstream_status, count).group_by(either.c.reason, either.c.upstream_status)
    query = query.order_by(count.desc(), either.c.reason)
    return [(reason or "", status, times) for reason, status, times in connection.execute(query)]


def list_refusals(connection: Connection, first: date) -> list[tuple[str, str, int, date]]:
    """Requests refused on the UTC days since ``first``, by team (empty where no valid key was shown) and code: team, code,
    how many and the last day, most first. Refusals leave nothing else in the books."""
    times = func.sum(refusals.c.times)
    query = (
        select(refusals.c.team, refusals.c.code, times, func.max(refusals.c.day, type_=refusals.c.day.type))
        .where(refusals.c.day >= first)
        .group_by(refusals.c.team, refusals.c.code)
        .order_by(times.desc(), refusals.c.team, refusals.c.code)
    )
    return [(team, code, int(count), last) for team, code, count, last in connection.execute(query)]


def find_charge(connection: Connection, request_id: str, *, names: Collection[str] | None = None) -> dict[str, Any] | None:
    """What became of a request, of any team or of those with some ``names``."""
    columns = ("state", "basis", "images_delivered", "settled_micro_usd", "reserved_micro_usd", "size", "quality")
    query = select(*(charges.c[name] for name in columns)).where(charges.c.request_id == request_id)
    if names is not None:
        query = query.join(teams, teams.c.id == charges.c.team_id).where(teams.c.name.in_(names))
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else dict(row)
