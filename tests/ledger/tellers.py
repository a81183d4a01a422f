"""A teller at work on a ledger, and ways to wait for what it does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.ledger.teller import Teller
from tests.ledger.ledgers import NOON, Ledger
from tests.ledger.traffic import Log

# What takes longer than this won't come.
PATIENCE_SECONDS = 30


@asynccontextmanager
async def at_work(url: str, journal: Journal | None = None) -> AsyncIterator[tuple[Teller, Log]]:
    """A teller on a database of its own, and what it reports."""
    database, log = Database(url), Log()
    teller = Teller(database, lambda: NOON, log, journal)
    teller.start()
    try:
        yield teller, log
    finally:
        await teller.close(PATIENCE_SECONDS)
        database.close()


async def all_of(futures: Sequence[Awaitable[object]]) -> list[object]:
    async with asyncio.timeout(PATIENCE_SECONDS):
        return await asyncio.gather(*futures, return_exceptions=True)


async def until(true: Callable[[], object]) -> None:
    async with asyncio.timeout(PATIENCE_SECONDS):
        while not true():  # noqa: ASYNC110 -- what is waited for happens in a thread or in a database
            await asyncio.sleep(0.01)


def states(ledger: Ledger) -> dict[str, str]:
    found = {charge_id: row["state"] for charge_id, row in ledger.charges().items()}
    ledger.close()
    return found
