"""One transaction of the books: a batch of reservations and bookings, decided and written together.

The only file that moves money. A team's row is locked first, in the order of ids, so whatever belongs to one team happens
one after the other, in every process, and no two processes wait for each other in a circle. What is then read can't change
before the commit, so the rules in ``decisions`` see the truth. A transaction reads once and writes once, whatever the size
of its batch.
"""

from __future__ import annotations

import functools
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, date, datetime, time, timedelta
from operator import itemgetter
from typing import Any, NamedTuple

import structlog
from sqlalchemy import Connection, select

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
    Scope,
    State,
    admit,
    out_of_pace,
    recognise,
)
from proxy.ledger.engine import driver_of
from proxy.ledger.history import Limit, earlier_charges, paces_of
from proxy.ledger.schema import teams
from proxy.ledger.statements import Change, Lock, Question, Row, Type, instant, read, stamp, write
from proxy.outcomes import Outcome
from proxy.periods import Period

log = structlog.get_logger(__name__)

# The row of the daily sums that a charge is part of: day, team, key, model, operation, size and quality.
_Heading = tuple[str, int, str, str, str, str, str]

# Requests, images, settled and reserved micro-USD.
_Sums = tuple[int, int, int, int]


@dataclass(slots=True)
class _Charge:
    """What booking a charge needs to know of it. ``created_at`` is as the statements have instants."""

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
    created_at: str

    @property
    def day(self) -> str:
        return self.created_at[:10]

    @property
    def heading(self) -> _Heading:
        return (self.day, self.team_id, self.key_id, self.model, self.operation, self.size, self.quality)

    @property
    def sums(self) -> _Sums:
        return (1, self.images_delivered, self.settled_micro_usd, self.reserved_micro_usd)


class _Key(NamedTuple):
    """Whether a key may spend, and whose it is."""

    team_id: int
    expires_at: str | None
    revoked_at: str | None
    archived_at: str | None


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
    finished_at: str
    upstream_status: int | None
    upstream_cost_micro_usd: int | None
    upstream_request_id: str | None
    input_tokens: int | None
    output_tokens: int | None


@dataclass(slots=True)
class _Page:
    """What a transaction has read, with what its own batch changes of it, and what it has to write. Of its time it knows
    the instant, the same as the statements have it, and the first days of the periods that it is in."""

    now: datetime
    stamped: str
    starts: Mapping[str, str]
    keys: dict[str, _Key]
    charges: dict[str, _Charge]
    budgets: defaultdict[int, list[Balance]]
    limits: list[Limit]
    # The budgets whose current period has no row yet.
    unopened: set[int]
    # Rows to be written, in the order of their columns below.
    ended: dict[str, _Ended] = field(default_factory=dict)
    begun: list[Row] = field(default_factory=list)
    # What moves, summed here, so each row is written once a batch: (settled, held) by budget and period, sums by heading.
    moved: dict[tuple[int, str], tuple[int, int]] = field(default_factory=dict)
    sums: dict[_Heading, _Sums] = field(default_factory=dict)
    # The deadlines of what begins now, by its timeout: nearly always one.
    deadlines: dict[float, str] = field(default_factory=dict)

    def deadline(self, timeout_seconds: float) -> str:
        found = self.deadlines.get(timeout_seconds)
        if found is None:
            found = self.deadlines[timeout_seconds] = stamp(self.now + timedelta(seconds=timeout_seconds))
        return found

    def move(self, budget_id: int, period_start: str, settled: int, held: int) -> None:
        place = (budget_id, period_start)
        before = self.moved.get(place)
        self.moved[place] = (settled, held) if before is None else (before[0] + settled, before[1] + held)

    def add(self, heading: _Heading, amounts: _Sums) -> None:
        self.sums[heading] = _added(self.sums.get(heading), amounts)


def _added(before: _Sums | None, amounts: _Sums) -> _Sums:
    if before is None:
        return amounts
    return (before[0] + amounts[0], before[1] + amounts[1], before[2] + amounts[2], before[3] + amounts[3])


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
    with driver_of(connection) as driver:
        page = _read(driver, reservations, bookings, now)
        _book(page, bookings)
        decisions = _reserve(driver, page, reservations) if reservations else []
        _write(driver, page)
        return decisions


# Reading

_LOCK = Lock({"teams": "bigint[]"}, "SELECT id FROM teams WHERE id IN :teams[] ORDER BY id FOR NO KEY UPDATE")

_KEYS = (
    ("k.id", "k.team_id", "UTC(k.expires_at)", "UTC(k.revoked_at)", "UTC(t.archived_at)"),
    "FROM keys k JOIN teams t ON t.id = k.team_id WHERE k.id IN :keys[]",
)

_CHARGES = (
    (
        *("id", "team_id", "key_id", "model", "operation", "size", "quality", "state"),
        *("images_delivered", "settled_micro_usd", "reserved_micro_usd", "UTC(created_at)"),
    ),
    "FROM charges WHERE id IN :charges[]",
)


def _rules(table: str, *of_keys: str) -> str:
    """Budgets or limits: the teams' own, and those of keys, by one condition after the other that says whose.

    Each kind has an index of its own, and asked for in one condition they would be found by neither, but by reading all.
    """
    kinds = ["key_id IS NULL"]
    for place, condition in enumerate(of_keys):
        others = "".join(f" AND NOT {before}" for before in of_keys[:place])
        kinds.append(f"key_id IS NOT NULL AND {condition}{others}")
    return "(" + " UNION ALL ".join(f"SELECT * FROM {table} WHERE team_id IN :teams[] AND {kind}" for kind in kinds) + ")"


_OF_KEYS = "key_id IN :keys[]"
_OF_CHARGES = "key_id IN (SELECT key_id FROM charges WHERE id IN :charges[])"

_LIMITS = (Limit._fields, f"FROM {_rules('limits', _OF_KEYS)} AS l")


def _budgets(*of_keys: str) -> tuple[Sequence[str], str]:
    return (
        ("b.id", "b.team_id", "b.key_id", "b.period", "b.soft", "b.limit_micro_usd", "p.settled_micro_usd", "p.held_micro_usd"),
        f"""FROM {_rules("budgets", *of_keys)} AS b LEFT JOIN balances p ON p.budget_id = b.id AND p.period_start =
            CASE b.period WHEN 'day' THEN :day WHEN 'week' THEN :week WHEN 'month' THEN :month ELSE :total END""",
    )


_IN_PERIODS: Mapping[str, Type] = {"teams": "bigint[]", **dict.fromkeys(periods.PERIODS, "date")}
_OF_RESERVATIONS: Mapping[str, Type] = {**_IN_PERIODS, "keys": "text[]"}
_OF_BOOKINGS: Mapping[str, Type] = {**_IN_PERIODS, "charges": "text[]"}

# Most batches are of one job, or of several of a kind: each kind has its own questions, so that nothing is asked in vain.
_ON_RESERVING = Question(_OF_RESERVATIONS, _budgets(_OF_KEYS), _KEYS, _LIMITS)
_ON_BOOKING = Question(_OF_BOOKINGS, _budgets(_OF_CHARGES), _CHARGES)
_ON_BOTH = Question({**_OF_RESERVATIONS, **_OF_BOOKINGS}, _budgets(_OF_KEYS, _OF_CHARGES), _KEYS, _LIMITS, _CHARGES)


def _read(driver: Any, reservations: Sequence[Reservation], bookings: Sequence[Booking], now: datetime) -> _Page:
    """All that the batch depends on, with its teams locked before anything else is looked at."""
    stamped = stamp(now)
    starts = _starts(stamped[:10])
    given: dict[str, object] = {
        "teams": sorted({job.team_id for job in reservations} | {job.team_id for job in bookings}),
        "keys": list({job.key_id for job in reservations}),
        "charges": list({job.charge_id for job in bookings}),
        **starts,
    }
    keys: Sequence[Sequence[Any]] = ()
    limits: Sequence[Sequence[Any]] = ()
    charges: Sequence[Sequence[Any]] = ()
    # The teams first, which locks them: another process's booking of the same charge is then either seen or waits for us.
    if not bookings:
        budgets, keys, limits = read(driver, given, _ON_RESERVING, _LOCK)
    elif not reservations:
        budgets, charges = read(driver, given, _ON_BOOKING, _LOCK)
    else:
        budgets, keys, limits, charges = read(driver, given, _ON_BOTH, _LOCK)
    page = _Page(
        now=now,
        stamped=stamped,
        starts=starts,
        keys={row[0]: _Key._make(row[1:]) for row in keys},
        charges={row[0]: _Charge(*row[1:]) for row in charges},
        budgets=defaultdict(list),
        limits=[Limit._make(row) for row in sorted(limits, key=_first)],
        unopened=set(),
    )
    for budget_id, team_id, key_id, period, soft, limit, settled, held in sorted(budgets, key=_first):
        if settled is None:
            page.unopened.add(budget_id)
        scope: Scope = "team" if key_id is None else "key"
        balance = Balance(budget_id, scope, key_id, period, bool(soft), limit, settled or 0, held or 0)
        page.budgets[team_id].append(balance)
    return page


_first = itemgetter(0)


@functools.lru_cache(maxsize=64)
def _starts(day: str) -> Mapping[str, str]:
    """The first days of the periods that a day is in. A batch's charges are of few days, and the next one's of the same."""
    at = datetime.combine(date.fromisoformat(day), time(), UTC)
    return {period: periods.start(period, at).isoformat() for period in periods.PERIODS}


# Booking


def _book(page: _Page, bookings: Iterable[Booking]) -> None:
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
        page.ended[job.charge_id] = _ending(job, page.ended.get(job.charge_id), page.stamped)
        _move(page, charge, outcome)


def _ending(job: Booking, before: _Ended | None, now: str) -> _Ended:
    outcome = job.outcome
    ended = _Ended(
        job.charge_id,
        outcome.state,
        outcome.settled_micro_usd,
        outcome.reserved_micro_usd,
        outcome.images_delivered,
        outcome.size,
        outcome.quality,
        outcome.basis,
        outcome.reason,
        now,
        job.upstream_status,
        job.upstream_cost_micro_usd,
        job.upstream_request_id,
        job.input_tokens,
        job.output_tokens,
    )
    if before is None:
        return ended
    # Twice in one batch: whoever settles a review knows nothing new of the upstream, and what was told of it stays.
    return ended._replace(**{name: getattr(before, name) for name in _OF_UPSTREAM if getattr(ended, name) is None})


def _move(page: _Page, charge: _Charge, outcome: Outcome) -> None:
    """Carry the change of one charge over to the balances of its own period and to its day's sums."""
    settled = outcome.settled_micro_usd - charge.settled_micro_usd
    held = outcome.reserved_micro_usd - charge.reserved_micro_usd
    starts = _starts(charge.day)
    for balance in page.budgets[charge.team_id]:
        if balance.key_id is None or balance.key_id == charge.key_id:
            start = starts[balance.period]
            page.move(balance.budget_id, start, settled, held)
            if start == page.starts[balance.period]:
                balance.settled_micro_usd += settled
                balance.held_micro_usd += held
    requests, images, settled, reserved = charge.sums
    page.add(charge.heading, (-requests, -images, -settled, -reserved))
    charge.state = outcome.state
    charge.settled_micro_usd = outcome.settled_micro_usd
    charge.reserved_micro_usd = outcome.reserved_micro_usd
    charge.images_delivered = outcome.images_delivered
    charge.size = outcome.size
    charge.quality = outcome.quality
    page.add(charge.heading, charge.sums)


# Reserving


def _reserve(driver: Any, page: _Page, reservations: Sequence[Reservation]) -> list[Decision]:
    paces: Mapping[int, list[Pace]] = {}
    used: dict[tuple[int, bytes], Earlier] = {}
    if page.limits or page.unopened or any(job.repeat for job in reservations):
        # What is counted and added up now has to have this batch's bookings in it.
        _write(driver, page)
        paces = paces_of(driver, page.limits, page.now)
        used = earlier_charges(driver, reservations)
        _open_balances(driver, page)
    decisions: list[Decision] = []
    for job in reservations:
        decision: Decision = KeyRefused()
        if _may_spend(page, job):
            own_paces = [pace for pace in paces.get(job.team_id, ()) if pace.key_id in (None, job.key_id)]
            applying = [balance for balance in page.budgets[job.team_id] if balance.key_id in (None, job.key_id)]
            decision = _decide(job, used, own_paces, applying, page.now)
        decisions.append(decision)
        if isinstance(decision, Admitted):
            for balance in applying:
                page.move(balance.budget_id, page.starts[balance.period], 0, job.hold_micro_usd)
            _begin(page, job)
    return decisions


def _may_spend(page: _Page, job: Reservation) -> bool:
    """Whether key and team may spend at this instant; what a process remembers of a key is not asked."""
    key = page.keys.get(job.key_id)
    if key is None or key.team_id != job.team_id or key.revoked_at is not None or key.archived_at is not None:
        return False
    return key.expires_at is None or instant(key.expires_at) > page.now


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
        decision.counted = repeat is not None or any(pace.concurrency is not None for pace in paces)
    return decision


def _begin(page: _Page, job: Reservation) -> None:
    # Nothing is awaited between this commit and the sending, so the charge is written as forwarded at once: a process that
    # dies in between leaves a review at the most, never a forgotten image.
    order = job.order
    repeat = job.repeat
    page.begun.append(
        (
            *(job.charge_id, job.request_id, job.team_id, job.key_id, order.operation, order.model, order.size, order.quality),
            *(order.size, order.quality, order.stream, order.n, 0, "forwarded"),
            *(job.hold_micro_usd, job.hold_micro_usd, 0, job.price_card),
            None if repeat is None else repeat.key_digest,
            None if repeat is None else repeat.body_digest,
            *(page.stamped, page.deadline(job.timeout_seconds)),
        )
    )
    heading = (page.starts["day"], job.team_id, job.key_id, order.model, order.operation, order.size, order.quality)
    page.add(heading, (1, 0, 0, job.hold_micro_usd))


def _open_balances(driver: Any, page: _Page) -> None:
    """Write the rows of periods that have just begun."""
    for team_id, team_budgets in page.budgets.items():
        for balance in team_budgets:
            if balance.budget_id in page.unopened:
                balance.settled_micro_usd, balance.held_micro_usd = _open_balance(
                    driver, balance.budget_id, team_id, balance.key_id, balance.period, page.now
                )
    page.unopened.clear()


def open_balance(
    connection: Connection, budget_id: int, team_id: int, key_id: str | None, period: Period, now: datetime
) -> tuple[int, int]:
    """Write a budget's row for the period of ``now``, with what its charges add up to: (settled, held) micro-USD.

    Call with the team's row locked. Charges can be there already: the budget is new, or it was set by a host whose clock
    was not yet in the period in which another one's was.
    """
    with driver_of(connection) as driver:
        return _open_balance(driver, budget_id, team_id, key_id, period, now)


_SPENT = Question(
    {"team": "bigint", "key": "text", "start": "date", "end": "date"},
    (
        ("settled", "reserved"),
        """FROM (
            SELECT coalesce(sum(settled_micro_usd), 0) AS settled, coalesce(sum(reserved_micro_usd), 0) AS reserved FROM rollups
            WHERE team_id = :team AND day >= :start AND day < :end AND key_id = coalesce(:key, key_id)
        ) AS spent""",
    ),
)

_OPEN = Change(
    {"budget": "bigint", "start": "date", "settled": "bigint", "held": "bigint"},
    """INSERT INTO balances (budget_id, period_start, settled_micro_usd, held_micro_usd)
    SELECT {budget}, {start}, {settled}, {held} {rows}""",
)

# Behind every day that is written.
_NEVER = date.max


def _open_balance(
    driver: Any, budget_id: int, team_id: int, key_id: str | None, period: Period, now: datetime
) -> tuple[int, int]:
    start, end = periods.start(period, now).isoformat(), periods.resets_at(period, now)
    before = (_NEVER if end is None else end.date()).isoformat()
    (((settled, held),),) = read(driver, {"team": team_id, "key": key_id, "start": start, "end": before}, _SPENT)
    write(driver, (_OPEN, [(budget_id, start, settled, held)]))
    return settled, held


# Writing

_OF_UPSTREAM = ("upstream_status", "upstream_cost_micro_usd", "upstream_request_id", "input_tokens", "output_tokens")

_BIGINTS = frozenset(
    {
        *("settled_micro_usd", "reserved_micro_usd", "images_delivered", "upstream_status", "upstream_cost_micro_usd"),
        *("input_tokens", "output_tokens", "team_id", "images_requested", "hold_micro_usd", "requests", "images"),
    }
)
_TYPES: dict[str, Type] = {
    **dict.fromkeys(_BIGINTS, "bigint"),
    **dict.fromkeys(("created_at", "deadline_at", "finished_at"), "timestamptz"),
    **dict.fromkeys(("idempotency_digest", "body_digest"), "bytea"),
    "day": "date",
    "stream": "boolean",
}


def _typed(names: Iterable[str]) -> dict[str, Type]:
    return {name: _TYPES.get(name, "text") for name in names}


def _values(names: Iterable[str]) -> str:
    return ", ".join(f"{{{name}}}" for name in names)


_END = Change(
    _typed(_Ended._fields),
    f"""UPDATE charges SET
        {", ".join(f"{name} = {{{name}}}" for name in _Ended._fields if name not in ("id", *_OF_UPSTREAM))},
        {", ".join(f"{name} = coalesce({{{name}}}, charges.{name})" for name in _OF_UPSTREAM)}
    {{rows}} WHERE charges.id = {{id}}""",
)

_COLUMNS = (
    *("id", "request_id", "team_id", "key_id", "operation", "model", "size", "quality"),
    *("asked_size", "asked_quality", "stream", "images_requested", "images_delivered", "state"),
    *("hold_micro_usd", "reserved_micro_usd", "settled_micro_usd", "price_card"),
    *("idempotency_digest", "body_digest", "created_at", "deadline_at"),
)

_BEGIN = Change(_typed(_COLUMNS), f"INSERT INTO charges ({', '.join(_COLUMNS)}) SELECT {_values(_COLUMNS)} {{rows}}")

_MOVE = Change(
    {"budget": "bigint", "start": "date", "settled": "bigint", "held": "bigint"},
    """UPDATE balances SET
        settled_micro_usd = balances.settled_micro_usd + {settled}, held_micro_usd = balances.held_micro_usd + {held}
    {rows} WHERE balances.budget_id = {budget} AND balances.period_start = {start}""",
)

_HEADING = ("day", "team_id", "key_id", "model", "operation", "size", "quality")
_DAY = ("day", "team_id")
_ADDED = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")


def _adding(table: str, fields: tuple[str, ...]) -> Change:
    columns = (*fields, *_ADDED)
    return Change(
        _typed(columns),
        f"""INSERT INTO {table} ({", ".join(columns)}) SELECT {_values(columns)} {{rows}} WHERE true
        ON CONFLICT ({", ".join(fields)}) DO UPDATE SET
            {", ".join(f"{name} = {table}.{name} + excluded.{name}" for name in _ADDED)}""",
    )


def _taking(table: str, fields: tuple[str, ...]) -> Change:
    return Change(
        _typed((*fields, *_ADDED)),
        f"""UPDATE {table} SET {", ".join(f"{name} = {table}.{name} + {{{name}}}" for name in _ADDED)}
        {{rows}} WHERE {" AND ".join(f"{table}.{name} = {{{name}}}" for name in fields)}""",
    )


_ADD = _adding("rollups", _HEADING)

# A row that something is taken from is there already, and a row to be inserted may hold nothing below zero.
_TAKE = _taking("rollups", _HEADING)

_ADD_TO_DAY = _adding("team_days", _DAY)
_TAKE_FROM_DAY = _taking("team_days", _DAY)


def _write(driver: Any, page: _Page) -> None:
    """Write what has come together, and forget it: it is in the tables now."""
    if not (page.ended or page.begun):
        # Whatever moves does so because a charge begins or ends.
        return
    moves = [
        (budget_id, start, settled, held)
        for (budget_id, start), (settled, held) in sorted(page.moved.items())
        # A budget that was set after the charge's period has no row for that period, and needs none.
        if settled or held
    ]
    days: dict[tuple[str, int], _Sums] = {}
    for heading, amounts in page.sums.items():
        days[heading[:2]] = _added(days.get(heading[:2]), amounts)
    taken, added = _apart(page.sums)
    taken_of_days, added_to_days = _apart(days)
    counts = write(
        driver,
        (_TAKE, taken),
        (_TAKE_FROM_DAY, taken_of_days),
        (_ADD, added),
        (_ADD_TO_DAY, added_to_days),
        (_END, list(page.ended.values())),
        (_BEGIN, page.begun),
        (_MOVE, moves),
    )
    if counts[0] != len(taken) or counts[1] != len(taken_of_days):
        raise RuntimeError("a charge is not part of its day's sums: nothing of this batch is written")
    page.ended, page.begun, page.moved, page.sums = {}, [], {}, {}


def _apart(changes: Mapping[Any, _Sums]) -> tuple[list[Row], list[Row]]:
    """Sums by the fields of their row, in order: rows that something is taken from, and rows that are only added to."""
    taken: list[Row] = []
    added: list[Row] = []
    for fields, amounts in sorted(changes.items()):
        if any(amounts):
            (taken if min(amounts) < 0 else added).append((*fields, *amounts))
    return taken, added
