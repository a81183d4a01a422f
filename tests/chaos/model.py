"""The rules of the books, each in its simplest form and without a database: what a ledger has to agree with."""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import date, datetime, timedelta

from proxy import periods
from proxy.ledger.decisions import (
    NEXT,
    Admitted,
    Booking,
    Decision,
    KeyRefused,
    OverBudget,
    Repeated,
    Reservation,
    State,
    TooFast,
)
from proxy.ledger.sweep import GRACE
from proxy.periods import Period

MINUTE = timedelta(seconds=60)

# A team, or one of its keys.
Scope = tuple[int, str | None]


@dataclass(slots=True)
class Charge:
    """What the model knows of a charge."""

    job: Reservation
    created_at: datetime
    state: State = "forwarded"
    settled: int = 0
    held: int = 0
    images: int = 0
    finished_at: datetime | None = None

    @property
    def booked(self) -> tuple[State, int, int, int]:
        """State, settled and held micro-USD, images delivered."""
        return self.state, self.settled, self.held, self.images


@dataclass
class Model:
    """The rules of the books, each in its simplest form."""

    charges: dict[str, Charge] = field(default_factory=dict)
    open: dict[str, Charge] = field(default_factory=dict)
    reviews: dict[str, Charge] = field(default_factory=dict)
    # What counts against a scope in a period: [settled, held].
    counted: defaultdict[tuple[Scope, Period, date], list[int]] = field(default_factory=lambda: defaultdict(lambda: [0, 0]))
    budgets: dict[tuple[Scope, Period], tuple[int, bool]] = field(default_factory=dict)
    limits: dict[Scope, tuple[int | None, int | None]] = field(default_factory=dict)
    recent: defaultdict[Scope, deque[datetime]] = field(default_factory=lambda: defaultdict(deque))
    going_on: Counter[Scope] = field(default_factory=Counter)
    repeats: dict[tuple[int, bytes], Charge] = field(default_factory=dict)
    revoked: set[str] = field(default_factory=set)

    def reserve(self, job: Reservation, now: datetime) -> Decision | type[Decision]:
        """The decision that has to be made; of a refusal its kind alone where its words don't matter."""
        scopes = scopes_of(job)
        if job.key_id in self.revoked:
            return KeyRefused
        if job.repeat is not None:
            earlier = self.repeats.get((job.team_id, job.repeat.key_digest))
            if earlier is not None and earlier.state != "released":
                return Repeated
        if any(self._too_fast(scope, now) for scope in scopes):
            return TooFast
        hard: list[int] = []
        for (scope, period), (limit, soft) in self.budgets.items():
            if scope in scopes and not soft:
                hard.append(limit - sum(self.counted[scope, period, periods.start(period, now)]))
        if hard and min(hard) < job.hold_micro_usd:
            return OverBudget
        self._hold(job, now, scopes)
        return Admitted(min(hard) - job.hold_micro_usd if hard else None)

    def book(self, booking: Booking, now: datetime) -> None:
        """What a booking changes, if it may."""
        charge, outcome = self.charges.get(booking.charge_id), booking.outcome
        if charge is None or outcome.state not in NEXT[charge.state]:
            return
        if charge.state == "forwarded":
            del self.open[booking.charge_id]
            for scope in scopes_of(charge.job):
                self.going_on[scope] -= 1
        else:
            del self.reviews[booking.charge_id]
        if outcome.state == "review":
            self.reviews[booking.charge_id] = charge
        self._count(charge, outcome.settled_micro_usd - charge.settled, outcome.reserved_micro_usd - charge.held)
        charge.state, charge.images, charge.finished_at = outcome.state, outcome.images_delivered, now

    def resolve(self, charge: Charge, amount: int | None, now: datetime) -> None:
        """An operator's word on a review: what it cost in all, ``None`` for nothing."""
        del self.reviews[charge.job.charge_id]
        self._count(charge, (amount or 0) - charge.settled, -charge.held)
        charge.state, charge.finished_at = ("released" if amount is None else "settled"), now
        charge.images = 0 if amount is None else charge.images

    def overdue(self, now: datetime, timeout: timedelta) -> set[str]:
        """The charges that a sweep has to end."""
        return {name for name, charge in self.open.items() if charge.created_at + timeout < now - GRACE}

    def expired(self, now: datetime, review_time: timedelta) -> set[str]:
        """The reviews that nobody has settled in time."""
        return {name for name, charge in self.reviews.items() if charge.finished_at and charge.finished_at < now - review_time}

    def _hold(self, job: Reservation, now: datetime, scopes: Sequence[Scope]) -> None:
        charge = self.charges[job.charge_id] = self.open[job.charge_id] = Charge(job, now)
        self._count(charge, 0, job.hold_micro_usd)
        for scope in scopes:
            self.recent[scope].append(now)
            self.going_on[scope] += 1
        if job.repeat is not None:
            self.repeats[job.team_id, job.repeat.key_digest] = charge

    def _count(self, charge: Charge, settled: int, held: int) -> None:
        charge.settled += settled
        charge.held += held
        for scope in scopes_of(charge.job):
            for period in periods.PERIODS:
                sums = self.counted[scope, period, periods.start(period, charge.created_at)]
                sums[0] += settled
                sums[1] += held

    def _too_fast(self, scope: Scope, now: datetime) -> bool:
        rpm, concurrency = self.limits.get(scope, (None, None))
        times = self.recent[scope]
        while times and times[0] <= now - MINUTE:
            times.popleft()
        return (rpm is not None and len(times) >= rpm) or (concurrency is not None and self.going_on[scope] >= concurrency)


def scopes_of(job: Reservation) -> tuple[Scope, Scope]:
    return (job.team_id, None), (job.team_id, job.key_id)
