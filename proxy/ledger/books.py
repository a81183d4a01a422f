"""One transaction of the books: a batch of reservations and bookings, decided and written together.

The only file that moves money. A team's row is locked first, in the order of ids, so whatever belongs to one team happens
one after the other, in every process, and no two processes wait for each other in a circle. What is then read can't change
before the commit, so the rules in ``decisions`` see the truth. A transaction reads once and writes once, whatever the size
of its batch.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection, func, select

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
    State,
    admit,
    out_of_pace,
    recognise,
)
from proxy.ledger.history import earlier_charges, paces_of
from proxy.ledger.schema import balances, rollups, teams
from proxy.ledger.statements import Change, Question, Type, instant, read, write
from proxy.periods import Period

log = structlog.get_logger(__name__)


class _Heading(NamedTuple):
    """The row of the daily sums that a charge is part of."""

    day: date
    team_id: int
    key_id: str
    model: str
    operation: str
    size: str
    quality: str


class _Charge(NamedTuple):
    """What booking a charge needs to know of it."""

    id: str
    team_id: int
    key_id: str
    model: str
    operation: str
    size: str
    quality: str
    state: State
    images_delivered: int
    settled_micro_usd: int
    reserved_micro_usd: int
    created_at: datetime

    @property
    def heading(self) -> _Heading:
        return _Heading(
            periods.start("day", self.created_at),
            self.team_id,
            self.key_id,
            self.model,
            self.operation,
            self.size,
            self.quality,
        )


class _Ended(NamedTuple):
    """What is written of a charge that has ended."""

    id: str
    state: State
    settled_micro_usd: int
    reserved_micro_usd: int
    images_delivered: int
    size: str
    quality: str
    basis: str | None
    reason: str
    upstream_status: int | None
    upstream_cost_micro_usd: int | None
    upstream_request_id: str | None
    input_tokens: int | None
    output_tokens: int | None
    finished_at: datetime


@dataclass(slots=True)
class _Sums:
    requests: int = 0
    images: int = 0
    settled: int = 0
    reserved: int = 0

    def add(self, requests: int, images: int, settled: int, reserved: int) -> None:
        self.requests += requests
        self.images += images
        self.settled += settled
        self.reserved += reserved


@dataclass(slots=True)
class _Page:
    """What a transaction has read, with what its own batch changes of it, and what it has to write."""

    archived_at: dict[int, datetime | None]
    keys: dict[str, tuple[int, datetime | None, datetime | None]]
    charges: dict[str, _Charge]
    budgets: defaultdict[int, list[Balance]]
    # The budgets whose current period has no row yet.
    unopened: set[int]
    limited: bool
    # Rows to be written, in the order of their columns below.
    ended: dict[str, _Ended] = field(default_factory=dict)
    begun: list[tuple[object, ...]] = field(default_factory=list)
    # What moves, summed here, so each row is written once a batch: (settled, held) by budget and period, sums by heading.
    moved: dict[tuple[int, date], tuple[int, int]] = field(default_factory=dict)
    sums: defaultdict[_Heading, _Sums] = field(default_factory=lambda: defaultdict(_Sums))

    def move(self, budget_id: int, period_start: date, settled: int, held: int) -> None:
        before = self.moved.get((budget_id, period_start), (0, 0))
        self.moved[budget_id, period_start] = (before[0] + settled, before[1] + held)


def lock_teams(connection: Connection, team_ids: Iterable[int]) -> None:
    """Lock these teams' rows for the rest of the transaction, always in the same order."""
    query = select(teams.c.id).where(teams.c.id.in_(sorted(set(team_ids)))).order_by(teams.c.id)
    # Rows that point at a team may still be added meanwhile: only its money waits.
    connection.execute(query.with_for_update(key_share=True)).all()


def post(
    connection: Connection, reservations: Sequence[Reservation], bookings: Sequence[Booking], now: datetime
) -> list[Decision]:
    """Write a batch inside the caller's transaction: bookings first, for what they release has room again.

    Answers one decision a reservation, in order; they hold only once the caller has committed. A booking whose charge is
    unknown or has ended already changes nothing.
    """
    page = _read(connection, reservations, bookings, now)
    _book(page, bookings, now)
    decisions = _reserve(connection, page, reservations, now) if reservations else []
    _write(connection, page)
    return decisions


# Reading

_TEAMS = Question(
    {"id": "id", "archived_at": "archived_at"}, "FROM teams WHERE id IN :teams[] ORDER BY id", lock="FOR NO KEY UPDATE"
)

_KEYS = Question({name: name for name in ("id", "team_id", "expires_at", "revoked_at")}, "FROM keys WHERE id IN :keys[]")

_CHARGES = Question({name: name for name in _Charge._fields}, "FROM charges WHERE id IN :charges[]")

_BUDGETS = Question(
    {name: f"b.{name}" for name in ("id", "team_id", "key_id", "period", "soft", "limit_micro_usd")}
    | {name: f"p.{name}" for name in ("settled_micro_usd", "held_micro_usd")},
    """FROM budgets b LEFT JOIN balances p ON p.budget_id = b.id AND p.period_start =
        CASE b.period WHEN 'day' THEN :day WHEN 'week' THEN :week WHEN 'month' THEN :month ELSE :total END
    WHERE b.team_id IN :teams[] AND (
        b.key_id IS NULL OR b.key_id IN :keys[] OR b.key_id IN (SELECT key_id FROM charges WHERE id IN :charges[])
    )
    ORDER BY b.id""",
)

_LIMITS = Question({"id": "id"}, "FROM limits WHERE team_id IN :teams[] LIMIT 1")


def _read(connection: Connection, reservations: Sequence[Reservation], bookings: Sequence[Booking], now: datetime) -> _Page:
    """All that the batch depends on, with its teams locked before anything else is looked at."""
    team_ids = sorted({job.team_id for job in reservations} | {job.team_id for job in bookings})
    key_ids = sorted({job.key_id for job in reservations})
    charge_ids = sorted({job.charge_id for job in bookings})
    starts: dict[str, object] = {period: periods.start(period, now) for period in periods.PERIODS}
    wanted = {"teams": team_ids, "keys": key_ids, "charges": charge_ids, **starts}
    # The teams first, which locks them: another process's booking of the same charge is then either seen or waits for us.
    locked, keys, charges, budgets, limited = read(connection, wanted, _TEAMS, _KEYS, _CHARGES, _BUDGETS, _LIMITS)
    page = _Page(
        archived_at=dict(locked),
        keys={row[0]: row[1:] for row in keys},
        charges={row[0]: _Charge._make((*row[:-1], instant(row[-1]))) for row in charges},
        budgets=defaultdict(list),
        unopened=set(),
        limited=bool(limited),
    )
    for budget_id, team_id, key_id, period, soft, limit, settled, held in budgets:
        if settled is None:
            page.unopened.add(budget_id)
        page.budgets[team_id].append(
            Balance(
                budget_id=budget_id,
                scope="team" if key_id is None else "key",
                key_id=key_id,
                period=period,
                soft=bool(soft),
                limit_micro_usd=limit,
                settled_micro_usd=settled or 0,
                held_micro_usd=held or 0,
            )
        )
    return page


# Booking


def _book(page: _Page, bookings: Iterable[Booking], now: datetime) -> None:
    for job in bookings:
        charge = page.charges.get(job.charge_id)
        outcome = job.outcome
        if charge is None:
            if outcome.state != "released":
                # What was held is committed before anything is sent: only a database that went back to an earlier state,
                # such as a standby that was behind, has lost it. The bill has it, so a person has to know.
                told = {"state": outcome.state, "settled_micro_usd": outcome.settled_micro_usd, "team_id": job.team_id}
                log.critical("charge_unknown", charge=job.charge_id, **told, upstream_request_id=job.upstream_request_id)
            continue
        if outcome.state not in NEXT[charge.state]:
            continue
        after = charge._replace(
            state=outcome.state,
            settled_micro_usd=outcome.settled_micro_usd,
            reserved_micro_usd=outcome.reserved_micro_usd,
            images_delivered=outcome.images_delivered,
            size=outcome.size,
            quality=outcome.quality,
        )
        page.charges[job.charge_id] = after
        page.ended[job.charge_id] = _ending(job, page.ended.get(job.charge_id), now)
        _move(page, charge, after, now)


def _ending(job: Booking, before: _Ended | None, now: datetime) -> _Ended:
    outcome = job.outcome
    told = (getattr(job, name) for name in _OF_UPSTREAM)
    if before is not None:
        # Twice in one batch: whoever settles a review knows nothing new of the upstream, and what was told of it stays.
        told = (new if new is not None else getattr(before, name) for name, new in zip(_OF_UPSTREAM, told, strict=True))
    return _Ended._make(
        (
            job.charge_id,
            outcome.state,
            outcome.settled_micro_usd,
            outcome.reserved_micro_usd,
            outcome.images_delivered,
            outcome.size,
            outcome.quality,
            outcome.basis,
            outcome.reason,
            *told,
            now,
        )
    )


def _move(page: _Page, before: _Charge, after: _Charge, now: datetime) -> None:
    """Carry the change of one charge over to the balances of its own period and to its day's sums."""
    created_at = before.created_at
    settled = after.settled_micro_usd - before.settled_micro_usd
    held = after.reserved_micro_usd - before.reserved_micro_usd
    for balance in page.budgets[before.team_id]:
        if balance.key_id in (None, before.key_id):
            start = periods.start(balance.period, created_at)
            page.move(balance.budget_id, start, settled, held)
            if start == periods.start(balance.period, now):
                balance.settled_micro_usd += settled
                balance.held_micro_usd += held
    for charge, sign in ((before, -1), (after, 1)):
        page.sums[charge.heading].add(
            sign, sign * charge.images_delivered, sign * charge.settled_micro_usd, sign * charge.reserved_micro_usd
        )


# Reserving


def _reserve(connection: Connection, page: _Page, reservations: Sequence[Reservation], now: datetime) -> list[Decision]:
    paces: defaultdict[int, list[Pace]] = defaultdict(list)
    used: dict[tuple[int, bytes], Earlier] = {}
    if page.limited or page.unopened or any(job.repeat for job in reservations):
        # What is counted and added up now has to have this batch's bookings in it.
        _write(connection, page)
        paces = paces_of(connection, reservations, now)
        used = earlier_charges(connection, reservations)
        _open_balances(connection, page, now)
    decisions: list[Decision] = []
    for job in reservations:
        decision: Decision = KeyRefused()
        if _may_spend(page, job, now):
            own_paces = [pace for pace in paces[job.team_id] if pace.key_id in (None, job.key_id)]
            applying = [balance for balance in page.budgets[job.team_id] if balance.key_id in (None, job.key_id)]
            decision = _decide(job, used, own_paces, applying, now)
        decisions.append(decision)
        if isinstance(decision, Admitted):
            for balance in applying:
                page.move(balance.budget_id, periods.start(balance.period, now), 0, job.hold_micro_usd)
            _begin(page, job, now)
    return decisions


def _may_spend(page: _Page, job: Reservation, now: datetime) -> bool:
    """Whether key and team may spend at this instant; what a process remembers of a key is not asked."""
    if page.archived_at.get(job.team_id, now) is not None:
        return False
    team_id, expires_at, revoked_at = page.keys.get(job.key_id, (None, None, None))
    return team_id == job.team_id and revoked_at is None and (expires_at is None or instant(expires_at) > now)


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


def _begin(page: _Page, job: Reservation, now: datetime) -> None:
    # Nothing is awaited between this commit and the sending, so the charge is written as forwarded at once: a process that
    # dies in between leaves a review at the most, never a forgotten image.
    order = job.order
    page.begun.append(
        (
            *(job.charge_id, job.request_id, job.team_id, job.key_id, order.operation, order.model, order.size, order.quality),
            *(order.size, order.quality, order.stream, order.n, 0, "forwarded"),
            *(job.hold_micro_usd, job.hold_micro_usd, 0, job.price_card),
            job.repeat.key_digest if job.repeat else None,
            job.repeat.body_digest if job.repeat else None,
            *(now, now + timedelta(seconds=job.timeout_seconds)),
        )
    )
    heading = _Heading(
        periods.start("day", now), job.team_id, job.key_id, order.model, order.operation, order.size, order.quality
    )
    page.sums[heading].add(1, 0, 0, job.hold_micro_usd)


def _open_balances(connection: Connection, page: _Page, now: datetime) -> None:
    """Write the rows of periods that have just begun."""
    for team_id, team_budgets in page.budgets.items():
        for balance in team_budgets:
            if balance.budget_id in page.unopened:
                balance.settled_micro_usd, balance.held_micro_usd = open_balance(
                    connection, balance.budget_id, team_id, balance.key_id, balance.period, now
                )
    page.unopened.clear()


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


# Writing

_OF_UPSTREAM = ("upstream_status", "upstream_cost_micro_usd", "upstream_request_id", "input_tokens", "output_tokens")

_NUMBERS = frozenset(
    {
        *("settled_micro_usd", "reserved_micro_usd", "images_delivered", "upstream_status", "upstream_cost_micro_usd"),
        *("input_tokens", "output_tokens", "team_id", "images_requested", "hold_micro_usd", "requests", "images"),
    }
)
_TYPES: dict[str, Type] = {
    **dict.fromkeys(_NUMBERS, "bigint"),
    **dict.fromkeys(("created_at", "deadline_at", "finished_at"), "timestamptz"),
    **dict.fromkeys(("idempotency_digest", "body_digest"), "bytea"),
    "day": "date",
    "stream": "boolean",
}


def _typed(names: Iterable[str]) -> dict[str, Type]:
    return {name: _TYPES.get(name, "text") for name in names}


_END = Change(
    _typed(_Ended._fields),
    f"""UPDATE charges SET
        {", ".join(f"{name} = r.{name}" for name in _Ended._fields if name not in ("id", *_OF_UPSTREAM))},
        {", ".join(f"{name} = coalesce(r.{name}, charges.{name})" for name in _OF_UPSTREAM)}
    FROM {{rows}} WHERE charges.id = r.id""",
)

_COLUMNS = (
    *("id", "request_id", "team_id", "key_id", "operation", "model", "size", "quality"),
    *("asked_size", "asked_quality", "stream", "images_requested", "images_delivered", "state"),
    *("hold_micro_usd", "reserved_micro_usd", "settled_micro_usd", "price_card"),
    *("idempotency_digest", "body_digest", "created_at", "deadline_at"),
)

_BEGIN = Change(_typed(_COLUMNS), f"INSERT INTO charges ({', '.join(_COLUMNS)}) SELECT {', '.join(_COLUMNS)} FROM {{rows}}")

_MOVE = Change(
    {"budget": "bigint", "start": "date", "settled": "bigint", "held": "bigint"},
    """UPDATE balances SET
        settled_micro_usd = balances.settled_micro_usd + r.settled, held_micro_usd = balances.held_micro_usd + r.held
    FROM {rows} WHERE balances.budget_id = r.budget AND balances.period_start = r.start""",
)

_ADDED = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")
_DAY_FIELDS = ("day", "team_id")


def _adding(table: str, fields: tuple[str, ...]) -> Change:
    columns = (*fields, *_ADDED)
    return Change(
        _typed(columns),
        f"""INSERT INTO {table} ({", ".join(columns)}) SELECT {", ".join(columns)} FROM {{rows}} WHERE true
        ON CONFLICT ({", ".join(fields)}) DO UPDATE SET
            {", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in _ADDED)}""",
    )


def _taking(table: str, fields: tuple[str, ...]) -> Change:
    return Change(
        _typed((*fields, *_ADDED)),
        f"""UPDATE {table} SET {", ".join(f"{name} = {table}.{name} + r.{name}" for name in _ADDED)}
        FROM {{rows}} WHERE {" AND ".join(f"{table}.{name} = r.{name}" for name in fields)}""",
    )


_ADD = _adding("rollups", _Heading._fields)

# A row that something is taken from is there already, and a row to be inserted may hold nothing below zero.
_TAKE = _taking("rollups", _Heading._fields)

_ADD_TO_DAY = _adding("team_days", _DAY_FIELDS)
_TAKE_FROM_DAY = _taking("team_days", _DAY_FIELDS)


def _write(connection: Connection, page: _Page) -> None:
    """Write what has come together, and forget it: it is in the tables now."""
    moves = [
        (budget_id, start, settled, held)
        for (budget_id, start), (settled, held) in sorted(page.moved.items())
        # A budget that was set after the charge's period has no row for that period, and needs none.
        if settled or held
    ]
    days: defaultdict[tuple[date, int], _Sums] = defaultdict(_Sums)
    for heading, sums in page.sums.items():
        days[heading.day, heading.team_id].add(sums.requests, sums.images, sums.settled, sums.reserved)
    taken, added = _apart(page.sums)
    taken_of_days, added_to_days = _apart(days)
    ended = list(page.ended.values())
    counts = write(
        connection,
        (_TAKE, taken),
        (_TAKE_FROM_DAY, taken_of_days),
        (_ADD, added),
        (_ADD_TO_DAY, added_to_days),
        (_END, ended),
        (_BEGIN, page.begun),
        (_MOVE, moves),
    )
    if counts[:2] != [len(taken), len(taken_of_days)]:
        raise RuntimeError("a charge is not part of its day's sums: nothing of this batch is written")
    page.ended, page.begun, page.moved = {}, [], {}
    page.sums.clear()


def _apart(changes: Mapping[Any, _Sums]) -> tuple[list[tuple[object, ...]], list[tuple[object, ...]]]:
    """Sums by the fields of their row, in order: rows that something is taken from, and rows that are only added to."""
    taken: list[tuple[object, ...]] = []
    added: list[tuple[object, ...]] = []
    for fields, sums in sorted(changes.items(), key=_fields):
        amounts = (sums.requests, sums.images, sums.settled, sums.reserved)
        if any(amounts):
            (taken if min(amounts) < 0 else added).append((*fields, *amounts))
    return taken, added


def _fields(item: tuple[tuple[Any, ...], _Sums]) -> tuple[Any, ...]:
    return item[0]
