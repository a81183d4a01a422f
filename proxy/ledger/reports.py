"""Reading the books: spend, charges, budgets, and the figures that metrics show. Nothing here writes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, time, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, Date, Select, and_, case, cast, func, or_, select

from proxy import periods
from proxy.ledger.schema import IS_OPEN, OPEN_STATES, audit, balances, budgets, charges, rollups, teams

# How many rows of a listing are in memory at a time.
PAGE_ROWS = 1_000

GROUPS = ("team", "key", "model", "operation", "size", "quality", "day", "week", "month")

CHARGE_COLUMNS = (
    "id",
    "request_id",
    "team",
    "key_id",
    "operation",
    "model",
    "size",
    "quality",
    "asked_size",
    "asked_quality",
    "stream",
    "images_requested",
    "images_delivered",
    "state",
    "hold_micro_usd",
    "reserved_micro_usd",
    "settled_micro_usd",
    "basis",
    "reason",
    "upstream_status",
    "upstream_cost_micro_usd",
    "upstream_request_id",
    "input_tokens",
    "output_tokens",
    "price_card",
    "created_at",
    "finished_at",
)


@dataclass(frozen=True, slots=True)
class BudgetStatus:
    """One budget in its current period. ``resets_at`` is ``None`` for all time."""

    team: str
    key_id: str | None
    scope: str
    period: periods.Period
    soft: bool
    limit_micro_usd: int
    settled_micro_usd: int
    held_micro_usd: int
    resets_at: datetime | None

    @property
    def remaining_micro_usd(self) -> int:
        """Below zero where a soft budget, or a limit that was lowered, is overspent."""
        return self.limit_micro_usd - self.settled_micro_usd - self.held_micro_usd


@dataclass(frozen=True, slots=True)
class Figures:
    """What metrics read from the ledger at a scrape. ``oldest_review_hours`` is how long the oldest open review has been one; 0
    where there is none."""

    budgets: list[BudgetStatus]
    open_charges: dict[str, int]
    oldest_review_hours: float


def list_budgets(
    connection: Connection, now: datetime, *, team: str | None = None, key_id: str | None = None
) -> list[BudgetStatus]:
    """Budgets with what counts against them now: all, one team's, or those that apply to one of its keys."""
    current = case(*((budgets.c.period == period, periods.start(period, now)) for period in periods.PERIODS))
    query = (
        select(budgets, teams.c.name.label("team"), balances.c.settled_micro_usd, balances.c.held_micro_usd)
        .join(teams, teams.c.id == budgets.c.team_id)
        .outerjoin(balances, and_(balances.c.budget_id == budgets.c.id, balances.c.period_start == current))
        .order_by(teams.c.name, budgets.c.key_id.is_not(None), budgets.c.key_id, _period_order())
    )
    if team is not None:
        query = query.where(teams.c.name == team)
    if key_id is not None:
        query = query.where(or_(budgets.c.key_id.is_(None), budgets.c.key_id == key_id))
    return [
        BudgetStatus(
            team=row.team,
            key_id=row.key_id,
            scope="team" if row.key_id is None else "key",
            period=row.period,
            soft=row.soft,
            limit_micro_usd=row.limit_micro_usd,
            settled_micro_usd=row.settled_micro_usd or 0,
            held_micro_usd=row.held_micro_usd or 0,
            resets_at=periods.resets_at(row.period, now),
        )
        for row in connection.execute(query)
    ]


def _period_order() -> ColumnElement[int]:
    return case(*((budgets.c.period == period, place) for place, period in enumerate(periods.PERIODS)))


def list_charges(
    connection: Connection,
    *,
    team: str | None = None,
    state: str | None = None,
    since: datetime | None = None,
    until: datetime | None = None,
) -> Iterator[dict[str, Any]]:
    """Charges, oldest first, reserved from ``since`` (inclusive) to ``until`` (exclusive); read page by page."""
    columns = [teams.c.name.label("team") if name == "team" else charges.c[name] for name in CHARGE_COLUMNS]
    query = select(*columns).join(teams, teams.c.id == charges.c.team_id).order_by(charges.c.created_at, charges.c.id)
    if team is not None:
        query = query.where(teams.c.name == team)
    if state is not None:
        query = query.where(charges.c.state == state)
    if since is not None:
        query = query.where(charges.c.created_at >= since)
    if until is not None:
        query = query.where(charges.c.created_at < until)
    rows = connection.execution_options(yield_per=PAGE_ROWS).execute(query)
    for row in rows.mappings():
        yield dict(row)


def spend(
    connection: Connection, by: Sequence[str], *, since: datetime | None = None, until: datetime | None = None
) -> list[dict[str, Any]]:
    """Requests, images and amounts of all charges, summed over the columns ``by`` (of :data:`GROUPS`).

    Whole UTC days are read from the daily sums, however many charges they hold; a span that starts or ends within a day
    is summed from the charges themselves.
    """
    whole_days = all(at is None or at.time() == time() for at in (since, until))
    query = _from_rollups(by, since, until) if whole_days else _from_charges(connection, by, since, until)
    summed: dict[tuple[Any, ...], list[int]] = {}
    for row in connection.execute(query).mappings():
        group = tuple(_bucket(name, row) for name in by)
        sums = summed.setdefault(group, [0] * len(_SUMS))
        for place, name in enumerate(_SUMS):
            sums[place] += int(row[name])
    return [
        {**dict(zip(by, group, strict=True)), **dict(zip(_SUMS, sums, strict=True))} for group, sums in sorted(summed.items())
    ]


_SUMS = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")
_CALENDAR = ("day", "week", "month")


def _bucket(name: str, row: Any) -> Any:
    """A group's value in a row; weeks and months are named by their first day."""
    if name not in _CALENDAR:
        return row[name]
    first: date = periods.start(name, datetime.combine(row["day"], time(), UTC))  # type: ignore[arg-type]
    return first


def _from_rollups(by: Sequence[str], since: datetime | None, until: datetime | None) -> Select[Any]:
    groups = _groups(by, rollups.c, rollups.c.day)
    sums = [func.sum(rollups.c[name]).label(name) for name in _SUMS]
    query = select(*groups, *sums).select_from(rollups).join(teams, teams.c.id == rollups.c.team_id).group_by(*groups)
    # A row whose charges all moved to another size is empty, and no group of anything.
    query = query.where(rollups.c.requests > 0)
    if since is not None:
        query = query.where(rollups.c.day >= since.date())
    return query if until is None else query.where(rollups.c.day < until.date())


def _from_charges(connection: Connection, by: Sequence[str], since: datetime | None, until: datetime | None) -> Select[Any]:
    sqlite = connection.dialect.name == "sqlite"
    created_at = charges.c.created_at
    day = func.date(created_at, type_=Date()) if sqlite else cast(func.timezone("UTC", created_at), Date)
    groups = _groups(by, charges.c, day)
    sums = [
        func.count().label("requests"),
        func.sum(charges.c.images_delivered).label("images"),
        func.sum(charges.c.settled_micro_usd).label("settled_micro_usd"),
        func.sum(charges.c.reserved_micro_usd).label("reserved_micro_usd"),
    ]
    query = select(*groups, *sums).select_from(charges).join(teams, teams.c.id == charges.c.team_id).group_by(*groups)
    if since is not None:
        query = query.where(created_at >= since)
    return query if until is None else query.where(created_at < until)


def _groups(by: Sequence[str], columns: Any, day: ColumnElement[date]) -> list[ColumnElement[Any]]:
    """The columns to group by in SQL: at most one of the calendar, the day, which the weeks and months are made of."""
    named: dict[str, ColumnElement[Any]] = {"team": teams.c.name, "key": columns.key_id}
    groups = [(named[name] if name in named else columns[name]).label(name) for name in by if name not in _CALENDAR]
    if any(name in _CALENDAR for name in by):
        groups.append(day.label("day"))
    # Grouping by nothing still needs a group, or an empty table would yield a row of NULLs.
    return groups or [teams.c.id.label("team_id")]


def read_figures(connection: Connection, now: datetime) -> Figures:
    """Budgets of teams and keys, how many charges are open in each state, and how old the oldest review is."""
    state, since = charges.c.state, func.min(charges.c.finished_at).label("since")
    query = select(state, func.count().label("open"), since).where(IS_OPEN).group_by(state)
    found = {row.state: row for row in connection.execute(query)}
    return Figures(
        budgets=list_budgets(connection, now),
        open_charges={state: found[state].open if state in found else 0 for state in OPEN_STATES},
        oldest_review_hours=(now - found["review"].since) / timedelta(hours=1) if "review" in found else 0.0,
    )


def list_audit(
    connection: Connection, *, since: datetime | None = None, until: datetime | None = None
) -> Iterator[dict[str, Any]]:
    """Who changed what, oldest first; ``before`` and ``after`` are JSON, ``None`` where there was or is nothing."""
    query = select(audit.c.at, audit.c.actor, audit.c.action, audit.c.subject, audit.c.before, audit.c.after).order_by(
        audit.c.id
    )
    if since is not None:
        query = query.where(audit.c.at >= since)
    if until is not None:
        query = query.where(audit.c.at < until)
    for row in connection.execution_options(yield_per=PAGE_ROWS).execute(query).mappings():
        yield dict(row)
