"""What a decision has to know of earlier charges: the pace of a team and its keys, and the use of idempotency keys.

Read inside the transaction that decides, with the teams locked, so that it is exact across all processes.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any

from sqlalchemy import ColumnElement, Connection, Row, func, or_, select

from proxy.ledger.decisions import MINUTE, Earlier, Pace, Reservation
from proxy.ledger.schema import charges, limits


def paces_of(connection: Connection, reservations: Sequence[Reservation], now: datetime) -> defaultdict[int, list[Pace]]:
    """The limits that may apply to these reservations, by team."""
    query = (
        select(limits)
        .where(
            limits.c.team_id.in_({job.team_id for job in reservations}),
            or_(limits.c.key_id.is_(None), limits.c.key_id.in_({job.key_id for job in reservations})),
        )
        .order_by(limits.c.id)
    )
    found: defaultdict[int, list[Pace]] = defaultdict(list)
    for row in connection.execute(query):
        found[row.team_id].append(_pace(connection, row, now))
    return found


def earlier_charges(connection: Connection, reservations: Iterable[Reservation]) -> dict[tuple[int, bytes], Earlier]:
    """The charges that hold the reservations' idempotency keys, by team and key digest. None of them is released."""
    wanted = [job for job in reservations if job.repeat is not None]
    if not wanted:
        return {}
    query = select(charges).where(
        charges.c.team_id.in_({job.team_id for job in wanted}),
        charges.c.idempotency_digest.in_({job.repeat.key_digest for job in wanted if job.repeat is not None}),
        charges.c.state != "released",
    )
    return {
        (row.team_id, row.idempotency_digest): Earlier(
            request_id=row.request_id,
            body_digest=row.body_digest,
            state=row.state,
            settled_micro_usd=row.settled_micro_usd,
            reserved_micro_usd=row.reserved_micro_usd,
        )
        for row in connection.execute(query)
    }


def _pace(connection: Connection, limit: Row[Any], now: datetime) -> Pace:
    scope: list[ColumnElement[bool]] = [charges.c.team_id == limit.team_id]
    if limit.key_id is not None:
        scope.append(charges.c.key_id == limit.key_id)
    recent, oldest, going_on = 0, None, 0
    if limit.rpm is not None:
        lately = select(func.count(), func.min(charges.c.created_at)).where(*scope, charges.c.created_at > now - MINUTE)
        recent, oldest = connection.execute(lately).one()
    if limit.concurrency is not None:
        now_open = select(func.count()).where(*scope, charges.c.state.in_(("reserved", "forwarded")))
        going_on = connection.execute(now_open).scalar_one()
    return Pace(
        scope="team" if limit.key_id is None else "key",
        key_id=limit.key_id,
        rpm=limit.rpm,
        concurrency=limit.concurrency,
        recent=recent,
        oldest=oldest,
        open=going_on,
    )
