"""The rules of the books, without the books: which reservation has room, which step may follow which.

Pure: balances and the clock are arguments. Everything that decides over money in the ledger is decided here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Literal

from proxy import periods
from proxy.outcomes import Outcome
from proxy.periods import Period
from proxy.prices import Order

State = Literal["reserved", "forwarded", "settled", "released", "review"]
Scope = Literal["team", "key"]

# Terminal is terminal: what is not here can't happen.
NEXT: dict[State, frozenset[State]] = {
    "reserved": frozenset({"forwarded", "released"}),
    "forwarded": frozenset({"settled", "released", "review"}),
    "review": frozenset({"settled", "released"}),
    "settled": frozenset(),
    "released": frozenset(),
}


@dataclass(slots=True)
class Reservation:
    """A request that wants to be sent: what it may cost at most, and who pays. ``timeout_seconds`` is how long its
    exchange may take."""

    charge_id: str
    request_id: str
    team_id: int
    key_id: str
    order: Order
    hold_micro_usd: int
    price_card: str
    timeout_seconds: float
    repeat: Repeatable | None = None


@dataclass(slots=True)
class Repeatable:
    """A request that its caller may send again: SHA-256 digests of the idempotency key, and of what came with it."""

    key_digest: bytes
    body_digest: bytes


@dataclass(slots=True)
class Booking:
    """The end of an exchange, to be written. Writing it twice changes nothing."""

    charge_id: str
    team_id: int
    outcome: Outcome
    upstream_status: int | None = None
    upstream_cost_micro_usd: int | None = None
    upstream_request_id: str | None = None
    input_tokens: int | None = None
    output_tokens: int | None = None


@dataclass(slots=True)
class Balance:
    """One budget in its current period. ``settled`` and ``held`` move as reservations of one batch are decided."""

    budget_id: int
    scope: Scope
    key_id: str | None
    period: Period
    soft: bool
    limit_micro_usd: int
    settled_micro_usd: int
    held_micro_usd: int

    @property
    def remaining_micro_usd(self) -> int:
        """What can still be held; below zero where a limit was lowered under what is spent."""
        return self.limit_micro_usd - self.settled_micro_usd - self.held_micro_usd


@dataclass(slots=True)
class Admitted:
    """Held against every budget that applies. ``remaining_micro_usd`` is what the tightest hard budget has left after it,
    ``None`` where there is no hard budget. ``counted``: other requests are refused while its exchange is open."""

    remaining_micro_usd: int | None
    counted: bool = field(default=False, compare=False)


@dataclass(frozen=True, slots=True)
class OverBudget:
    """No room in this budget; nothing was held in any."""

    scope: Scope
    period: Period
    limit_micro_usd: int
    remaining_micro_usd: int
    cost_micro_usd: int
    resets_at: datetime | None


@dataclass(slots=True)
class Pace:
    """One limit and what counts against it now. ``recent`` requests were admitted within the last minute, the first of them
    at ``oldest``; ``open`` exchanges are going on."""

    scope: Scope
    key_id: str | None
    rpm: int | None
    concurrency: int | None
    recent: int
    oldest: datetime | None
    open: int

    def count(self, now: datetime) -> None:
        """One more request has been admitted."""
        self.recent += 1
        self.open += 1
        self.oldest = self.oldest or now


@dataclass(frozen=True, slots=True)
class TooFast:
    """The scope has had its requests of this minute, or its exchanges at a time; the other is ``None``."""

    scope: Scope
    rpm: int | None
    concurrency: int | None
    retry_after_seconds: int


@dataclass(frozen=True, slots=True)
class Earlier:
    """The charge that an idempotency key was first used for."""

    request_id: str
    body_digest: bytes
    state: State
    settled_micro_usd: int
    reserved_micro_usd: int


@dataclass(frozen=True, slots=True)
class Repeated:
    """The idempotency key has been used: for this same request, or ``other_body`` for another one."""

    earlier: Earlier
    other_body: bool


@dataclass(frozen=True, slots=True)
class KeyRefused:
    """The key is unknown, revoked or expired, or its team is archived, at the time of the hold."""


Decision = Admitted | OverBudget | TooFast | Repeated | KeyRefused

MINUTE = timedelta(seconds=60)


def admit(hold_micro_usd: int, balances: Iterable[Balance], now: datetime) -> Admitted | OverBudget:
    """Hold an amount against all of ``balances``, or against none.

    Where several hard budgets have no room, the one with the least left is named.
    """
    balances = list(balances)
    hard = [balance for balance in balances if not balance.soft]
    tightest = min(hard, key=lambda balance: balance.remaining_micro_usd, default=None)
    if tightest is not None and tightest.remaining_micro_usd < hold_micro_usd:
        return OverBudget(
            scope=tightest.scope,
            period=tightest.period,
            limit_micro_usd=tightest.limit_micro_usd,
            remaining_micro_usd=tightest.remaining_micro_usd,
            cost_micro_usd=hold_micro_usd,
            resets_at=periods.resets_at(tightest.period, now),
        )
    for balance in balances:
        balance.held_micro_usd += hold_micro_usd
    return Admitted(None if tightest is None else tightest.remaining_micro_usd)


def out_of_pace(paces: Iterable[Pace], now: datetime) -> TooFast | None:
    """The first limit that one more request would break; ``None`` if none."""
    for pace in paces:
        if pace.rpm is not None and pace.recent >= pace.rpm:
            free_at = (pace.oldest or now) + MINUTE
            return TooFast(pace.scope, pace.rpm, None, max(1, math.ceil((free_at - now).total_seconds())))
        if pace.concurrency is not None and pace.open >= pace.concurrency:
            # Nobody knows when an exchange ends; an image takes some seconds.
            return TooFast(pace.scope, None, pace.concurrency, 5)
    return None


def recognise(repeat: Repeatable, earlier: Earlier | None) -> Repeated | None:
    """Whether an idempotency key was used before; what was released may be tried again."""
    if earlier is None or earlier.state == "released":
        return None
    return Repeated(earlier, other_body=earlier.body_digest != repeat.body_digest)
