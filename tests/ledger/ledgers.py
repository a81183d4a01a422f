"""Parts for the ledger's tests: a ledger with teams, jobs for it, and an auditor who adds everything up again from the
charges. Sums may be taken on trust nowhere else."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from functools import lru_cache
from itertools import count
from typing import Any

from sqlalchemy import Connection, Row, select

from proxy import periods, tokens
from proxy.ledger import accounts
from proxy.ledger.books import post
from proxy.ledger.decisions import Booking, Decision, Reservation
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.schema import balances, budgets, charges, metadata, rollups, team_days
from proxy.outcomes import Outcome
from proxy.periods import Period
from proxy.prices import Order

# A Sunday: the day, the ISO week and soon the month end together.
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)

ORDER = Order("generation", "gpt-image-2", "1024x1024", "high", 1, False)
PRICE = 210_700

_numbers = count(1)


@dataclass(frozen=True)
class Account:
    """A team and one of its keys."""

    team: str
    team_id: int
    key_id: str
    key: str


class Ledger:
    """A migrated database, and each act on it in a transaction of its own."""

    def __init__(self, url: str) -> None:
        self.url = url
        self.database = Database(url)
        migrate(self.database)

    def close(self) -> None:
        self.database.close()

    def account(self, team: str = "red", *, lifetime: timedelta | None = None) -> Account:
        """A new team with a key."""
        with self.database.writing() as connection:
            accounts.add_team(connection, team, now=NOON, actor="test")
        return self.another_key(team, lifetime=lifetime)

    def another_key(self, team: str = "red", *, lifetime: timedelta | None = None) -> Account:
        with self.database.writing() as connection:
            key = accounts.add_key(connection, team, lifetime=lifetime, now=NOON, actor="test")
            holder = accounts.holder_of(connection, tokens.digest(key.key))
        assert holder is not None
        return Account(team, holder.team_id, key.id, key.key)

    def set_budget(
        self,
        limit: int,
        period: Period = "total",
        *,
        team: str = "red",
        key_id: str | None = None,
        soft: bool = False,
        now: datetime = NOON,
    ) -> None:
        with self.database.writing() as connection:
            accounts.set_budget(connection, team, key_id, period, limit, soft=soft, now=now, actor="test")

    def post(
        self, reservations: Sequence[Reservation] = (), bookings: Sequence[Booking] = (), now: datetime = NOON
    ) -> list[Decision]:
        with self.database.writing() as connection:
            return post(connection, reservations, bookings, now)

    def charges(self) -> dict[str, dict[str, Any]]:
        """All charges by id."""
        with self.database.reading() as connection:
            return {row.id: row._asdict() for row in connection.execute(select(charges).order_by(charges.c.id))}

    def content(self) -> dict[str, list[tuple[Any, ...]]]:
        """Every row of every table."""
        with self.database.reading() as connection:
            return content(connection)

    def check(self) -> None:
        with self.database.reading() as connection:
            check(connection)


def content(connection: Connection) -> dict[str, list[tuple[Any, ...]]]:
    return {table.name: sorted(map(tuple, connection.execute(select(table))), key=repr) for table in metadata.tables.values()}


def reservation(account: Account, order: Order = ORDER, *, hold: int = PRICE, timeout_seconds: float = 60) -> Reservation:
    number = f"{next(_numbers):08}"
    return Reservation(
        charge_id=f"chg_{number}",
        request_id=f"req_{number}",
        team_id=account.team_id,
        key_id=account.key_id,
        order=order,
        hold_micro_usd=hold,
        price_card="test",
        timeout_seconds=timeout_seconds,
    )


def settled(job: Reservation, amount: int | None = None, *, size: str | None = None) -> Booking:
    """The booking of all images, at the hold if no amount is given."""
    order = job.order
    amount = job.hold_micro_usd if amount is None else amount
    outcome = Outcome("settled", amount, 0, order.n, size or order.size, order.quality, "requested", "delivered")
    return Booking(job.charge_id, job.team_id, outcome, upstream_status=200)


def released(job: Reservation) -> Booking:
    outcome = Outcome("released", 0, 0, 0, job.order.size, job.order.quality, None, "failed_upstream")
    return Booking(job.charge_id, job.team_id, outcome, upstream_status=400)


def reviewed(job: Reservation, known: int = 0, held: int | None = None) -> Booking:
    """The booking of an end that nobody knows: ``known`` is owed already, ``held`` stays held."""
    held = job.hold_micro_usd - known if held is None else held
    outcome = Outcome(
        "review", known, held, 1 if known else 0, job.order.size, job.order.quality, "requested" if known else None, "cut"
    )
    return Booking(job.charge_id, job.team_id, outcome, upstream_status=200)


# The auditor

# A scope and period (team, key or none, period, its first day), and what counts in it: [settled, held].
Counted = dict[tuple[int, str | None, Period, date], list[int]]


def check(connection: Connection) -> Counted:
    """Every balance and every daily sum is what the charges add up to, and nothing is anywhere else; what they add up to."""
    rows = connection.execute(_WHAT_COUNTS).all()
    counted = _count(rows)
    _check_balances(connection, counted)
    _check_rollups(connection, rows)
    return counted


_SCOPE = ("team_id", "key_id", "model", "operation", "size", "quality")
# Only what is added up: thousands of steps are checked, each against all charges.
_WHAT_COUNTS = select(
    *(charges.c[name] for name in ("created_at", *_SCOPE, "images_delivered", "settled_micro_usd", "reserved_micro_usd"))
)
_start = lru_cache(maxsize=None)(periods.start)


def _count(rows: Iterable[Row[Any]]) -> Counted:
    counted: Counted = defaultdict(lambda: [0, 0])
    for row in rows:
        for period in periods.PERIODS:
            for key_id in (None, row.key_id):
                sums = counted[row.team_id, key_id, period, _start(period, row.created_at)]
                sums[0] += row.settled_micro_usd
                sums[1] += row.reserved_micro_usd
    return counted


def _check_balances(connection: Connection, counted: Counted) -> None:
    query = select(budgets, balances).join(balances, balances.c.budget_id == budgets.c.id)
    for row in connection.execute(query):
        scope = (row.team_id, row.key_id, row.period, row.period_start)
        assert [row.settled_micro_usd, row.held_micro_usd] == counted[scope], scope


def _check_rollups(connection: Connection, rows: Iterable[Row[Any]]) -> None:
    expected: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for row in rows:
        sums = expected[_start("day", row.created_at), *row[1:7]]
        amounts = (1, row.images_delivered, row.settled_micro_usd, row.reserved_micro_usd)
        for place, amount in enumerate(amounts):
            sums[place] += amount
    found = {tuple(row[:7]): list(row[7:]) for row in connection.execute(select(rollups))}
    assert {key: sums for key, sums in found.items() if any(sums)} == expected
    by_day: defaultdict[tuple[Any, ...], list[int]] = defaultdict(lambda: [0, 0, 0, 0])
    for heading, sums in expected.items():
        by_day[heading[:2]] = [before + amount for before, amount in zip(by_day[heading[:2]], sums, strict=True)]
    assert {tuple(row[:2]): list(row[2:]) for row in connection.execute(select(team_days))} == by_day
