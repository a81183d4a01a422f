"""One transaction of the books: a batch of reservations and bookings, decided and written together.

The only file that moves money. A team's row is locked first, in the order of ids, so whatever belongs to one team happens
one after the other, in every process, and no two processes wait for each other in a circle. What is then read can't change
before the commit, so the rules in ``decisions`` see the truth.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, cast

from sqlalchemy import Connection, Row, and_, bindparam, case, func, or_, select
from sqlalchemy.dialects.postgresql import insert as postgresql_insert
from sqlalchemy.dialects.sqlite import insert as sqlite_insert

from proxy import periods
from proxy.ledger.decisions import (
    NEXT,
    Admitted,
    Balance,
    Booking,
    Decision,
    Earlier,
    KeyRefused,
    Pace,
    Reservation,
    admit,
    out_of_pace,
    recognise,
)
from proxy.ledger.history import earlier_charges, paces_of
from proxy.ledger.schema import balances, budgets, charges, keys, rollups, teams
from proxy.periods import Period

_RollupKey = tuple[date, int, str, str, str, str, str]


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    images: int = 0
    settled: int = 0
    reserved: int = 0


@dataclass(slots=True)
class _Movements:
    """What one transaction adds to balances and rollups; summed here, so each row is written once a batch."""

    balances: dict[tuple[int, date], tuple[int, int]] = field(default_factory=dict)
    rollups: defaultdict[_RollupKey, _Sums] = field(default_factory=lambda: defaultdict(_Sums))

    def on_balance(self, budget_id: int, period_start: date, settled: int, held: int) -> None:
        before = self.balances.get((budget_id, period_start), (0, 0))
        self.balances[budget_id, period_start] = (before[0] + settled, before[1] + held)


def lock_teams(connection: Connection, team_ids: Iterable[int]) -> dict[int, datetime | None]:
    """Lock these teams' rows for the rest of the transaction, always in the same order; when each was archived, by id."""
    query = select(teams.c.id, teams.c.archived_at).where(teams.c.id.in_(sorted(set(team_ids)))).order_by(teams.c.id)
    # Rows that point at a team may still be added meanwhile: only its money waits.
    return {row.id: row.archived_at for row in connection.execute(query.with_for_update(key_share=True))}


def post(
    connection: Connection, reservations: Sequence[Reservation], bookings: Sequence[Booking], now: datetime
) -> list[Decision]:
    """Write a batch inside the caller's transaction: bookings first, for what they release has room again.

    Answers one decision a reservation, in order; they hold only once the caller has committed. A booking whose charge is
    unknown or has ended already changes nothing.
    """
    locked = lock_teams(connection, [job.team_id for job in reservations] + [job.team_id for job in bookings])
    moves = _Movements()
    if bookings:
        _book(connection, bookings, moves, now)
        _write_balances(connection, moves)
        moves.balances.clear()
    decisions = _reserve(connection, locked, reservations, moves, now) if reservations else []
    _write_balances(connection, moves)
    _write_rollups(connection, moves)
    return decisions


# Reserving


def _reserve(
    connection: Connection,
    locked: dict[int, datetime | None],
    reservations: Sequence[Reservation],
    moves: _Movements,
    now: datetime,
) -> list[Decision]:
    valid = _valid_keys(connection, locked, reservations, now)
    open_budgets = _balances_of(connection, reservations, moves, now)
    paces = paces_of(connection, reservations, now)
    used = earlier_charges(connection, reservations)
    decisions: list[Decision] = []
    rows: list[dict[str, object]] = []
    for job in reservations:
        decision: Decision = KeyRefused()
        if (job.key_id, job.team_id) in valid:
            own_paces = [pace for pace in paces[job.team_id] if pace.key_id in (None, job.key_id)]
            applying = [balance for balance in open_budgets[job.team_id] if balance.key_id in (None, job.key_id)]
            decision = _decide(job, used, own_paces, applying, now)
        decisions.append(decision)
        if not isinstance(decision, Admitted):
            continue
        for balance in applying:
            moves.on_balance(balance.budget_id, periods.start(balance.period, now), 0, job.hold_micro_usd)
        rows.append(_charge_row(job, now))
        sums = moves.rollups[_rollup_key(rows[-1], now)]
        sums.requests += 1
        sums.reserved += job.hold_micro_usd
    if rows:
        connection.execute(charges.insert(), rows)
    return decisions


def _decide(
    job: Reservation,
    used: dict[tuple[int, bytes], Earlier],
    paces: Sequence[Pace],
    applying: Sequence[Balance],
    now: datetime,
) -> Decision:
    """In this order: a repetition, the pace, the budgets. Whatever refuses leaves nothing behind."""
    repeat = job.repeat
    if repeat is not None:
        repeated = recognise(repeat, used.get((job.team_id, repeat.key_digest)))
        if repeated is not None:
            return repeated
    decision = out_of_pace(paces, now) or admit(job.hold_micro_usd, applying, now)
    if isinstance(decision, Admitted):
        for pace in paces:
            pace.count(now)
        if repeat is not None:
            used[job.team_id, repeat.key_digest] = Earlier(
                job.request_id, repeat.body_digest, "forwarded", 0, job.hold_micro_usd
            )
    return decision


def _valid_keys(
    connection: Connection, locked: dict[int, datetime | None], reservations: Sequence[Reservation], now: datetime
) -> set[tuple[str, int]]:
    """The (key, team) pairs that may spend at this instant; what a process remembers of a key is not asked."""
    wanted = {job.key_id for job in reservations}
    query = select(keys.c.id, keys.c.team_id, keys.c.expires_at).where(keys.c.id.in_(wanted), keys.c.revoked_at.is_(None))
    return {
        (row.id, row.team_id)
        for row in connection.execute(query)
        if (row.expires_at is None or row.expires_at > now) and row.team_id in locked and locked[row.team_id] is None
    }


def _balances_of(
    connection: Connection, reservations: Sequence[Reservation], moves: _Movements, now: datetime
) -> defaultdict[int, list[Balance]]:
    """The budgets of these teams in their current periods, by team; a period without a row yet gets its row."""
    current = case(*((budgets.c.period == period, periods.start(period, now)) for period in periods.PERIODS))
    query = (
        select(budgets, balances.c.period_start, balances.c.settled_micro_usd, balances.c.held_micro_usd)
        .outerjoin(balances, and_(balances.c.budget_id == budgets.c.id, balances.c.period_start == current))
        .where(
            budgets.c.team_id.in_({job.team_id for job in reservations}),
            or_(budgets.c.key_id.is_(None), budgets.c.key_id.in_({job.key_id for job in reservations})),
        )
        .order_by(budgets.c.id)
    )
    rows = connection.execute(query).all()
    if any(row.period_start is None for row in rows):
        # A new row starts from the daily sums, and what this batch has booked belongs to them.
        _write_rollups(connection, moves)
        moves.rollups.clear()
    found: defaultdict[int, list[Balance]] = defaultdict(list)
    for row in rows:
        settled, held = row.settled_micro_usd, row.held_micro_usd
        if row.period_start is None:
            settled, held = open_balance(connection, row.id, row.team_id, row.key_id, row.period, now)
        found[row.team_id].append(
            Balance(
                budget_id=row.id,
                scope="team" if row.key_id is None else "key",
                key_id=row.key_id,
                period=row.period,
                soft=row.soft,
                limit_micro_usd=row.limit_micro_usd,
                settled_micro_usd=settled,
                held_micro_usd=held,
            )
        )
    return found


def open_balance(
    connection: Connection, budget_id: int, team_id: int, key_id: str | None, period: Period, now: datetime
) -> tuple[int, int]:
    """Write a budget's row for the period of ``now``, with what its charges add up to: (settled, held) micro-USD.

    Call with the team's row locked. Charges can be there already: the budget is new, or it was set by a host whose clock
    was not yet in the period in which another one's was.
    """
    start, end = periods.start(period, now), periods.resets_at(period, now)
    query = select(
        func.coalesce(func.sum(rollups.c.settled_micro_usd), 0), func.coalesce(func.sum(rollups.c.reserved_micro_usd), 0)
    ).where(rollups.c.team_id == team_id, rollups.c.day >= start)
    if end is not None:
        query = query.where(rollups.c.day < end.date())
    if key_id is not None:
        query = query.where(rollups.c.key_id == key_id)
    settled, held = (int(amount) for amount in connection.execute(query).one())
    row = {"budget_id": budget_id, "period_start": start, "settled_micro_usd": settled, "held_micro_usd": held}
    connection.execute(balances.insert(), row)
    return settled, held


def _charge_row(job: Reservation, now: datetime) -> dict[str, object]:
    # Nothing is awaited between this commit and the sending, so the charge is written as forwarded at once: a process that
    # dies in between leaves a review at the most, never a forgotten image.
    return {
        "id": job.charge_id,
        "request_id": job.request_id,
        "team_id": job.team_id,
        "key_id": job.key_id,
        "operation": job.order.operation,
        "model": job.order.model,
        "size": job.order.size,
        "quality": job.order.quality,
        "asked_size": job.order.size,
        "asked_quality": job.order.quality,
        "stream": job.order.stream,
        "images_requested": job.order.n,
        "images_delivered": 0,
        "state": "forwarded",
        "hold_micro_usd": job.hold_micro_usd,
        "reserved_micro_usd": job.hold_micro_usd,
        "settled_micro_usd": 0,
        "price_card": job.price_card,
        "idempotency_digest": job.repeat.key_digest if job.repeat else None,
        "body_digest": job.repeat.body_digest if job.repeat else None,
        "created_at": now,
        "deadline_at": now + timedelta(seconds=job.timeout_seconds),
    }


# Booking

_OF_UPSTREAM = ("upstream_status", "upstream_cost_micro_usd", "upstream_request_id", "input_tokens", "output_tokens")

_BOOKED = (
    "state",
    "settled_micro_usd",
    "reserved_micro_usd",
    "images_delivered",
    "size",
    "quality",
    "basis",
    "reason",
    *_OF_UPSTREAM,
    "finished_at",
)

_UPDATE_CHARGE = (
    charges.update().where(charges.c.id == bindparam("charge_id")).values({name: bindparam(name) for name in _BOOKED})
)


def _book(connection: Connection, bookings: Sequence[Booking], moves: _Movements, now: datetime) -> None:
    # Read after the teams are locked: another process's booking of the same charge is either seen here or waits for us.
    rows = {
        row.id: row._asdict()
        for row in connection.execute(select(charges).where(charges.c.id.in_({job.charge_id for job in bookings})))
    }
    budgets_of = _budgets_of(connection, {job.team_id for job in bookings})
    written: list[dict[str, object]] = []
    for job in bookings:
        row = rows.get(job.charge_id)
        if row is None or job.outcome.state not in NEXT[row["state"]]:
            continue
        after = {**row, **_ending(job, row, now)}
        _move(moves, budgets_of[job.team_id], row, after)
        rows[job.charge_id] = after
        written.append({name: after[name] for name in _BOOKED} | {"charge_id": job.charge_id})
    if written:
        connection.execute(_UPDATE_CHARGE, written)


def _ending(job: Booking, row: dict[str, Any], now: datetime) -> dict[str, object]:
    outcome = job.outcome
    return {
        "state": outcome.state,
        "settled_micro_usd": outcome.settled_micro_usd,
        "reserved_micro_usd": outcome.reserved_micro_usd,
        "images_delivered": outcome.images_delivered,
        "size": outcome.size,
        "quality": outcome.quality,
        "basis": outcome.basis,
        "reason": outcome.reason,
        # Whoever settles a review knows nothing new of the upstream: what was written of it stays.
        **{name: row[name] if getattr(job, name) is None else getattr(job, name) for name in _OF_UPSTREAM},
        "finished_at": now,
    }


def _budgets_of(connection: Connection, team_ids: set[int]) -> defaultdict[int, list[Row[Any]]]:
    found: defaultdict[int, list[Row[Any]]] = defaultdict(list)
    for row in connection.execute(select(budgets).where(budgets.c.team_id.in_(team_ids)).order_by(budgets.c.id)):
        found[row.team_id].append(row)
    return found


def _move(moves: _Movements, team_budgets: Iterable[Row[Any]], before: dict[str, Any], after: dict[str, Any]) -> None:
    """Carry the change of one charge over to the balances of its own period and to its day's rollup."""
    created_at: datetime = before["created_at"]
    settled = after["settled_micro_usd"] - before["settled_micro_usd"]
    held = after["reserved_micro_usd"] - before["reserved_micro_usd"]
    for budget in team_budgets:
        if budget.key_id in (None, before["key_id"]):
            moves.on_balance(budget.id, periods.start(budget.period, created_at), settled, held)
    for row, sign in ((before, -1), (after, 1)):
        sums = moves.rollups[_rollup_key(row, created_at)]
        sums.requests += sign
        sums.images += sign * row["images_delivered"]
        sums.settled += sign * row["settled_micro_usd"]
        sums.reserved += sign * row["reserved_micro_usd"]


# Sums

_ADD_TO_BALANCE = (
    balances.update()
    .where(balances.c.budget_id == bindparam("budget"), balances.c.period_start == bindparam("start"))
    .values(
        settled_micro_usd=balances.c.settled_micro_usd + bindparam("settled"),
        held_micro_usd=balances.c.held_micro_usd + bindparam("held"),
    )
)


def _write_balances(connection: Connection, moves: _Movements) -> None:
    # A budget that was set after the charge's period has no row for that period, and needs none.
    rows = [
        {"budget": budget_id, "start": start, "settled": settled, "held": held}
        for (budget_id, start), (settled, held) in sorted(moves.balances.items())
        if settled or held
    ]
    if rows:
        connection.execute(_ADD_TO_BALANCE, rows)


_ROLLUP_KEY = ("day", "team_id", "key_id", "model", "operation", "size", "quality")

_ADD_TO_ROLLUP = (
    rollups.update()
    .where(*(rollups.c[name] == bindparam(f"k_{name}") for name in _ROLLUP_KEY))
    .values(
        requests=rollups.c.requests + bindparam("d_requests"),
        images=rollups.c.images + bindparam("d_images"),
        settled_micro_usd=rollups.c.settled_micro_usd + bindparam("d_settled"),
        reserved_micro_usd=rollups.c.reserved_micro_usd + bindparam("d_reserved"),
    )
)


def _rollup_key(row: dict[str, Any], created_at: datetime) -> _RollupKey:
    return cast(
        _RollupKey,
        (periods.start("day", created_at), *(row[name] for name in _ROLLUP_KEY[1:])),
    )


def _write_rollups(connection: Connection, moves: _Movements) -> None:
    changed = {key: sums for key, sums in moves.rollups.items() if sums != _Sums()}
    if not changed:
        return
    empty = {"requests": 0, "images": 0, "settled_micro_usd": 0, "reserved_micro_usd": 0}
    insert = (sqlite_insert if connection.dialect.name == "sqlite" else postgresql_insert)(rollups).on_conflict_do_nothing()
    connection.execute(insert, [dict(zip(_ROLLUP_KEY, key, strict=True)) | empty for key in sorted(changed)])
    connection.execute(
        _ADD_TO_ROLLUP,
        [
            {f"k_{name}": value for name, value in zip(_ROLLUP_KEY, key, strict=True)}
            | {"d_requests": sums.requests, "d_images": sums.images, "d_settled": sums.settled, "d_reserved": sums.reserved}
            for key, sums in sorted(changed.items())
        ],
    )
