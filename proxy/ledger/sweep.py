"""Ends what nobody is left to end: charges of processes that died, journals they left, reviews that nobody settled.

Any number of processes may sweep at once: everything is booked through a teller, and booking twice changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any

import structlog
from sqlalchemy import Connection, Row, select
from sqlalchemy.exc import SQLAlchemyError

from proxy.ledger import reviews
from proxy.ledger.decisions import Booking
from proxy.ledger.engine import Database
from proxy.ledger.journal import abandoned
from proxy.ledger.schema import IS_OPEN, charges
from proxy.ledger.teller import Teller
from proxy.outcomes import Outcome

INTERVAL_SECONDS = 5

# An exchange is over at its deadline, and booked a moment later. With the interval and the time below this stays within
# half a minute of the deadline.
GRACE = timedelta(seconds=12)

# When the database has been away, the living book what they kept before anybody looks for the dead.
SETTLED_IN_SECONDS = 10

# A batch of this many is booked before the next is read.
FOUND_MAX = 1_000

log = structlog.get_logger(__name__)


class Sweeper:
    """Sweeps now and then, from the start of a process to its end."""

    def __init__(
        self, database: Database, teller: Teller, clock: Callable[[], datetime], *, journals: Path, review_hours: float
    ) -> None:
        self._database = database
        self._teller = teller
        self._clock = clock
        self._journals = journals
        self._review_time = timedelta(hours=review_hours)
        self._reachable_since: float | None = None

    async def run(self) -> None:
        """Sweep until cancelled. Nothing that goes wrong in one round, or in one part of it, keeps the others from theirs."""
        while True:
            for part in (self.replay, self.sweep, self.expire):
                try:
                    await part()
                except (SQLAlchemyError, OSError) as error:
                    self._reachable_since = None
                    log.warning("sweep_failed", part=part.__name__, cause=type(error).__name__)
                except Exception:
                    log.exception("sweep_failed", part=part.__name__)
            await asyncio.sleep(INTERVAL_SECONDS)

    async def replay(self) -> int:
        """Book what dead processes left in their journals; how many outcomes that were."""
        with abandoned(self._journals) as bookings:
            # Nothing is removed before the last of them is in the books.
            await asyncio.gather(*map(self._teller.book, bookings))
        if bookings:
            log.warning("journal_replayed", outcomes=len(bookings))
        return len(bookings)

    async def sweep(self) -> int:
        """End what dead processes left open, however much that is; how many charges that were."""
        tried: set[str] = set()
        # A database that can be read and not written would have the same charges booked in every round.
        while not self._teller.behind:
            rows = await self._database.ask(lambda connection: find_overdue(connection, self._clock()))
            if self._reachable_since is None:
                self._reachable_since = time.monotonic()
            # What could not be booked is found again, and has its turn in the next round.
            if time.monotonic() - self._reachable_since < SETTLED_IN_SECONDS or tried.issuperset(row.id for row in rows):
                return len(tried)
            await asyncio.gather(*(self._teller.book(overdue_booking(row)) for row in rows))
            for row in rows:
                log.warning("charge_swept", charge=row.id, was=row.state)
            tried.update(row.id for row in rows)
            if len(rows) < FOUND_MAX:
                break
        return len(tried)

    async def expire(self) -> int:
        """Settle the reviews whose time is up at what they hold; how many that were."""
        ids = await self._database.ask(lambda connection: find_expired(connection, self._clock(), self._review_time))
        expired = 0
        for charge_id in ids:
            if await self._database.change(partial(reviews.expire, charge_id=charge_id, now=self._clock(), actor="sweep")):
                expired += 1
                log.warning("review_expired", charge=charge_id)
        return expired


def find_overdue(connection: Connection, now: datetime) -> list[Row[Any]]:
    """Charges whose exchange must be over and is not booked."""
    query = select(charges).where(IS_OPEN, charges.c.state.in_(("reserved", "forwarded")), charges.c.deadline_at < now - GRACE)
    return list(connection.execute(query.order_by(charges.c.created_at).limit(FOUND_MAX)))


def find_expired(connection: Connection, now: datetime, review_time: timedelta) -> list[str]:
    """The ids of reviews that nobody has settled within ``review_time``."""
    query = select(charges.c.id).where(IS_OPEN, charges.c.state == "review", charges.c.finished_at < now - review_time)
    return list(connection.scalars(query.order_by(charges.c.created_at).limit(FOUND_MAX)))


def overdue_booking(row: Row[Any]) -> Booking:
    """How the ledger ends a charge that :func:`find_overdue` found."""
    if row.state == "reserved":
        outcome = Outcome("released", 0, 0, 0, row.size, row.quality, None, "never_sent")
    else:
        # Sent, and whoever knew what came of it is gone.
        outcome = Outcome("review", 0, row.hold_micro_usd, 0, row.size, row.quality, None, "process_died")
    return Booking(row.id, row.team_id, outcome)
