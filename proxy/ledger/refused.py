"""How often requests were refused, by all processes together. A refusal costs nothing and waits for nothing: each process
counts its own in memory, and adds them to the books now and then. A crash takes the count of its last seconds with it."""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable
from datetime import datetime

import structlog
from sqlalchemy import Connection, Date, bindparam, text
from sqlalchemy.exc import SQLAlchemyError

from proxy import periods
from proxy.ledger.engine import Database

INTERVAL_SECONDS = 3

_ADD = text(
    """INSERT INTO refusals (day, team, code, times) VALUES (:day, :team, :code, :times)
    ON CONFLICT (day, team, code) DO UPDATE SET times = refusals.times + excluded.times"""
).bindparams(bindparam("day", type_=Date()))

log = structlog.get_logger(__name__)


class Refused:
    """What one process counts: by team, empty where no valid key was shown, and code. Both are of closed sets, so what is
    kept while the database is away is bounded too."""

    def __init__(self) -> None:
        self._counted: Counter[tuple[str, str]] = Counter()

    def count(self, team: str, code: str) -> None:
        """One more. To be called in the event loop, as everything here."""
        self._counted[team, code] += 1

    async def run(self, database: Database, clock: Callable[[], datetime]) -> None:
        """Bring what was counted into the books, again and again, until cancelled."""
        while True:
            await asyncio.sleep(INTERVAL_SECONDS)
            try:
                await self.note(database, clock)
            except Exception:  # Whatever it is, the next are counted all the same.
                log.exception("refusals_not_noted")

    async def note(self, database: Database, clock: Callable[[], datetime]) -> None:
        """Bring what was counted into the books. What can't be brought now stays for the next time."""
        counted, self._counted = self._counted, Counter()
        if not counted:
            return
        try:
            await database.change(lambda connection: add_refusals(connection, counted, clock()))
        except (SQLAlchemyError, OSError) as error:
            self._counted.update(counted)
            log.warning("refusals_not_noted", cause=type(error).__name__)


def add_refusals(connection: Connection, counted: Counter[tuple[str, str]], now: datetime) -> None:
    """Add to the sums of the UTC day of ``now``."""
    day = periods.start("day", now)
    # Always in one order: so no two processes wait for each other in a circle.
    rows = [{"day": day, "team": team, "code": code, "times": times} for (team, code), times in sorted(counted.items())]
    connection.execute(_ADD, rows)
