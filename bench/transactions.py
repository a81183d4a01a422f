"""The books' own transaction, without a gateway: what a batch of one and of sixteen takes, on SQLite and on PostgreSQL.

``python -m bench.transactions``. Wall time at the median, and CPU of this process a job.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from contextlib import ExitStack
from datetime import UTC, datetime

from bench.machines import BUDGET_MICRO_USD, postgres, scratch
from proxy.ledger.books import post
from proxy.ledger.decisions import Booking, Reservation
from tests.ledger.ledgers import Ledger, reservation, settled

JOBS = 800
BATCHES = (1, 16)


def measure(url: str) -> list[str]:
    ledger = Ledger(url)
    account = ledger.account()
    ledger.set_budget(BUDGET_MICRO_USD)
    rows = []
    for batch in BATCHES:
        taken: dict[str, list[tuple[float, float]]] = {"reserve": [], "book": []}
        for _ in range(JOBS // batch):
            jobs = [reservation(account) for _ in range(batch)]
            taken["reserve"].append(transaction(ledger, jobs, []))
            taken["book"].append(transaction(ledger, [], [settled(job) for job in jobs]))
        for step, times in taken.items():
            wall = 1000 * statistics.median(wall for wall, _ in times)
            cpu = 1e6 * statistics.mean(cpu for _, cpu in times) / batch
            rows.append(f"{ledger.database.dialect}, {batch} at a time, {step}: {wall:.2f} ms, {cpu:.0f} µs CPU a job")
    ledger.check()
    ledger.close()
    return rows


def transaction(ledger: Ledger, jobs: Sequence[Reservation], bookings: Sequence[Booking]) -> tuple[float, float]:
    """The wall and CPU seconds of one."""
    wall, cpu = time.perf_counter(), time.thread_time()
    with ledger.database.posting() as connection:
        post(connection, jobs, bookings, datetime.now(UTC))
    return time.perf_counter() - wall, time.thread_time() - cpu


if __name__ == "__main__":
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        for url in (f"sqlite:///{directory / 'beanmeter.db'}", stack.enter_context(postgres()).url):
            print("\n".join(measure(url)))
