"""What the pages show of the books: sums by day and column of all teams or one, what is open now, and what went wrong upstream.

Sums come from the daily sums, and open charges from their own index: the same work however many charges there are.
Nothing here writes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from proxy.ledger.schema import OPEN_STATES, charges, rollups, teams

SUMS = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")

COLUMNS: Mapping[str, ColumnElement[Any]] = {
    "day": rollups.c.day,
    "team": rollups.c.team_id,
    "key": rollups.c.key_id,
    "model": rollups.c.model,
    "operation": rollups.c.operation,
    "size": rollups.c.size,
    "quality": rollups.c.quality,
}

# Open charges are few among millions, and have an index of their own. SQLite takes it where it reads its very words.
_OPEN = next(index for index in charges.indexes if index.name == "ix_charges_open").dialect_options["sqlite"]["where"]


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
    sums = [func.sum(rollups.c[name]).label(name) for name in SUMS]
    # Grouped as the rows lie, by day and team; a team gets its name once its rows are summed up.
    groups = [COLUMNS[name].label(name) for name in sorted(by, key=list(COLUMNS).index)]
    # A row whose charges all moved to another size is empty, and no group of anything.
    query = select(*groups, *sums).where(rollups.c.requests > 0).group_by(*groups)
    if team is None:
        query = query.where(rollups.c.day >= first, rollups.c.day < end)
    else:
        # Day by day: in a span of days all teams would be read.
        days = [first + timedelta(days=number) for number in range((end - first).days)]
        its_id = select(teams.c.id).where(teams.c.name == team).scalar_subquery()
        query = query.where(rollups.c.day.in_(days), rollups.c.team_id == its_id)
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
        .where(charges.c.state.in_(OPEN_STATES), _OPEN)
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
    count = func.count()
    query = (
        select(charges.c.reason, charges.c.upstream_status, count)
        .where(charges.c.created_at >= since, charges.c.state.in_(("released", "review")))
        .group_by(charges.c.reason, charges.c.upstream_status)
        .order_by(count.desc(), charges.c.reason)
    )
    return [(reason or "", status, found) for reason, status, found in connection.execute(query)]


def find_charge(connection: Connection, request_id: str, *, team: str | None = None) -> dict[str, Any] | None:
    """What became of a request, of any team or of one."""
    names = ("state", "basis", "images_delivered", "settled_micro_usd", "reserved_micro_usd", "size", "quality")
    query = select(*(charges.c[name] for name in names)).where(charges.c.request_id == request_id)
    if team is not None:
        query = query.join(teams, teams.c.id == charges.c.team_id).where(teams.c.name == team)
    row = connection.execute(query).mappings().one_or_none()
    return None if row is None else dict(row)
