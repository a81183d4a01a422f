"""Tellers with traffic of their own, in this process or in others, and what became of it."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import astuple, dataclass, replace
from uuid import uuid4

from proxy.ledger.decisions import Admitted
from proxy.ledger.engine import Database
from proxy.ledger.teller import LedgerDown, Step, Teller
from tests.ledger.ledgers import NOON, Account, released, reservation, settled


class Log:
    """Keeps what a teller reports."""

    def __init__(self) -> None:
        self.commits: list[Step] = []
        self.failures: list[Step] = []

    def committed(self, step: Step, seconds: float) -> None:
        self.commits.append(step)

    def failed(self, step: Step) -> None:
        self.failures.append(step)


@dataclass(frozen=True)
class Counts:
    """How many reservations were admitted, refused for want of room, or met an unreachable ledger; how many ended."""

    admitted: int = 0
    refused: int = 0
    failed: int = 0
    booked: int = 0

    def __add__(self, other: Counts) -> Counts:
        return Counts(*(mine + its for mine, its in zip(astuple(self), astuple(other), strict=True)))


async def send_traffic(urls: Sequence[str], account: Account, requests: int, *, book: bool) -> Counts:
    """So many requests at once through a teller for each URL. With ``book`` every second one is settled, the others are
    released; without, all stay held."""

    async def one(teller: Teller, number: int) -> Counts:
        # Processes count their jobs alike, so the ids need something of their own.
        name = uuid4().hex
        job = replace(reservation(account), charge_id=f"chg_{name}", request_id=f"req_{name}")
        try:
            decision = await teller.reserve(job)
        except LedgerDown:
            return Counts(failed=1)
        if not isinstance(decision, Admitted):
            return Counts(refused=1)
        if book:
            await teller.book((settled, released)[number % 2](job))
        return Counts(admitted=1, booked=int(book))

    databases = [Database(url) for url in urls]
    tellers = [Teller(database, lambda: NOON, Log()) for database in databases]
    for teller in tellers:
        teller.start()
    try:
        counts = await asyncio.gather(*(one(teller, number) for number in range(requests) for teller in tellers))
    finally:
        for teller, database in zip(tellers, databases, strict=True):
            await teller.close(10)
            database.close()
    return sum(counts, Counts())


def traffic_process(url: str, account: Account, requests: int) -> Counts:
    """Traffic in waves from one teller, as the whole of a process."""

    async def waves() -> Counts:
        return sum([await send_traffic([url], account, requests // 3, book=True) for _ in range(3)], Counts())

    return asyncio.run(waves())
