"""What was made and spent day by day, of some teams, keys, models, sizes or operations, from the daily sums alone: the same
work however many charges there are. Nothing here writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date, timedelta
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from proxy.ledger.schema import rollups, team_days, teams

SUMS = ("requests", "images", "settled_micro_usd")

COLUMNS = ("team", "key", "model", "operation", "size", "quality")


def sum_days(
    connection: Connection, first: date, end: date, by: Sequence[str], only: Mapping[str, Collection[str]]
) -> list[dict[str, Any]]:
    """Rows of ``day``, the columns ``by`` and :data:`SUMS`, in that order, for UTC days from ``first`` to before ``end``.

    ``by`` and the names in ``only`` are of :data:`COLUMNS`; ``only`` has the values that count, and an empty collection
    lets nothing count.
    """
    # What asks for no more than teams has sums of its own, which are a few hundred times fewer.
    table = team_days if {*by, *only} <= {"team"} else rollups
    named: Mapping[str, ColumnElement[Any]] = {"team": teams.c.name} | ({"key": table.c.key_id} if table is rollups else {})
    groups = [table.c.day, *((named[name] if name in named else table.c[name]).label(name) for name in by)]
    sums = [func.sum(table.c[name]).label(name) for name in SUMS]
    query = (
        select(*groups, *sums)
        .select_from(table)
        .join(teams, teams.c.id == table.c.team_id)
        # A row whose charges all moved to another size is empty, and no group of anything.
        .where(table.c.day >= first, table.c.day < end, table.c.requests > 0)
        .group_by(*groups)
        .order_by(*groups)
    )
    for name, values in only.items():
        query = query.where((named[name] if name in named else table.c[name]).in_(sorted(values)))
    if "team" in only:
        # Day by day and by their ids: in a span of days all teams would be read.
        days = [first + timedelta(days=number) for number in range((end - first).days)]
        ids = select(teams.c.id).where(teams.c.name.in_(sorted(only["team"])))
        query = query.where(table.c.day.in_(days), table.c.team_id.in_(ids))
    # PostgreSQL adds up whole numbers to decimals.
    return [{**row, **{name: int(row[name]) for name in SUMS}} for row in connection.execute(query).mappings()]
