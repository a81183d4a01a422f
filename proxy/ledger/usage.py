"""What was made and spent day by day, of some teams, keys, models, sizes or operations, from the daily sums alone: the same
work however many charges there are. Nothing here writes."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from datetime import date
from typing import Any

from sqlalchemy import ColumnElement, Connection, func, select

from proxy.ledger.schema import rollups, teams

SUMS = ("requests", "images", "settled_micro_usd")

COLUMNS: Mapping[str, ColumnElement[Any]] = {
    "team": teams.c.name,
    "key": rollups.c.key_id,
    "model": rollups.c.model,
    "operation": rollups.c.operation,
    "size": rollups.c.size,
    "quality": rollups.c.quality,
}


def sum_days(
    connection: Connection, first: date, end: date, by: Sequence[str], only: Mapping[str, Collection[str]]
) -> list[dict[str, Any]]:
    """Rows of ``day``, the columns ``by`` and :data:`SUMS`, in that order, for UTC days from ``first`` to before ``end``.

    ``by`` and the names in ``only`` are of :data:`COLUMNS`; ``only`` has the values that count, and an empty collection
    lets nothing count.
    """
    groups = [rollups.c.day, *(COLUMNS[name].label(name) for name in by)]
    sums = [func.sum(rollups.c[name]).label(name) for name in SUMS]
    query = (
        select(*groups, *sums)
        .select_from(rollups)
        .join(teams, teams.c.id == rollups.c.team_id)
        # A row whose charges all moved to another size is empty, and no group of anything.
        .where(rollups.c.day >= first, rollups.c.day < end, rollups.c.requests > 0)
        .group_by(*groups)
        .order_by(*groups)
    )
    for name, values in only.items():
        query = query.where(COLUMNS[name].in_(sorted(values)))
    # PostgreSQL adds up whole numbers to decimals.
    return [{**row, **{name: int(row[name]) for name in SUMS}} for row in connection.execute(query).mappings()]
