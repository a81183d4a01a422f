"""Ends what nobody is left to end: charges of processes that died, journals they left, reviews that nobody settled.

Any number of processes may sweep at once: everything is booked through a teller, and booking twice changes nothing.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, TypeVar

import structlog
from sqlalchemy import Connection, Row, and_, or_, select
from sqlalchemy.exc import SQLAlchemyError

from proxy.ledger.accounts import record
from proxy.ledger.decisions import Booking
from proxy.ledger.engine import Database
from proxy.ledger.journal import abandoned
from proxy.ledger.schema import charges
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

# What a read may take when the process ends; a database that hangs is not waited for.
THREAD_SECONDS = 5

Answer = TypeVar("Answer")

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
        """Sweep until cancelled."""
        while True:
            try:
                await self.replay()
                await self.sweep()
            except (SQLAlchemyError, OSError) as error:
                self._reachable_since = None
                log.warning("sweep_failed", cause=type(error).__name__)
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
        """End what is overdue; how many charges that were."""
        now = self._clock()
        rows = await _in_thread(self._read, now)
        if self._reachable_since is None:
            self._reachable_since = time.monotonic()
        if time.monotonic() - self._reachable_since < SETTLED_IN_SECONDS:
            return 0
        await asyncio.gather(*(self._teller.book(overdue_booking(row)) for row in rows))
        for row in rows:
            log.warning("charge_swept", charge=row.id, was=row.state)
        expired = [row for row in rows if row.state == "review"]
        if expired:
            await _in_thread(self._record, expired)
        return len(rows)

    def _record(self, expired: list[Row[Any]]) -> None:
        with self._database.writing() as connection:
            for row in expired:
                before = {"settled_micro_usd": row.settled_micro_usd, "reserved_micro_usd": row.reserved_micro_usd}
                after = {"settled_micro_usd": row.settled_micro_usd + row.reserved_micro_usd, "basis": "expired"}
                record(connection, "review.expire", row.id, before, after, self._clock(), "sweep")

    def _read(self, now: datetime) -> list[Row[Any]]:
        with self._database.reading() as connection:
            return find_overdue(connection, now, self._review_time)


async def _in_thread(work: Callable[..., Answer], *what: object) -> Answer:
    """Like :func:`asyncio.to_thread`, but whoever cancels waits a while for the thread: it has the database in use."""
    task = asyncio.ensure_future(asyncio.to_thread(work, *what))
    try:
        return await asyncio.shield(task)
    except asyncio.CancelledError:
        await asyncio.wait((task,), timeout=THREAD_SECONDS)
        raise


def find_overdue(connection: Connection, now: datetime, review_time: timedelta) -> list[Row[Any]]:
    """Charges whose exchange must be over and is not booked, and reviews whose time is up."""
    query = select(charges).where(
        or_(
            and_(charges.c.state.in_(("reserved", "forwarded")), charges.c.deadline_at < now - GRACE),
            and_(charges.c.state == "review", charges.c.finished_at < now - review_time),
        )
    )
    return list(connection.execute(query.order_by(charges.c.created_at).limit(FOUND_MAX)))


def overdue_booking(row: Row[Any]) -> Booking:
    """How the ledger ends a charge that :func:`find_overdue` found."""
    if row.state == "reserved":
        outcome = Outcome("released", 0, 0, 0, row.size, row.quality, None, "never_sent")
    elif row.state == "forwarded":
        # Sent, and whoever knew what came of it is gone.
        outcome = Outcome("review", 0, row.hold_micro_usd, 0, row.size, row.quality, None, "process_died")
    else:
        amount = row.settled_micro_usd + row.reserved_micro_usd
        outcome = Outcome("settled", amount, 0, row.images_delivered, row.size, row.quality, "expired", "review_expired")
    return Booking(row.id, row.team_id, outcome)
