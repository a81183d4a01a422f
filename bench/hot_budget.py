"""Reservations on one hard budget that everybody asks for: four processes, one PostgreSQL server, commits synced.

Beside it a plain conditional UPDATE of one row by 64 clients of pgbench on the same server, in turns. In the end the limit is
set a little above what is held, so that the four have to share what is left: not one reservation more may be admitted.
"""

from __future__ import annotations

import asyncio
import multiprocessing
import re
import statistics
import subprocess
import time
from dataclasses import dataclass
from datetime import UTC, datetime
from multiprocessing.queues import Queue
from multiprocessing.synchronize import Barrier
from pathlib import Path
from uuid import uuid4

import psycopg
from sqlalchemy import func, select

from bench.load import Failed
from bench.machines import open_books, postgres, scratch
from bench.table import Row, run, verdict
from proxy.ledger import accounts
from proxy.ledger.decisions import Admitted, OverBudget, Reservation
from proxy.ledger.engine import Database
from proxy.ledger.schema import balances, budgets, charges
from proxy.ledger.teller import Step, Teller
from proxy.prices import Order
from proxy.tokens import digest

PROCESSES = 4
IN_FLIGHT = 64
ROUNDS = 3
ROUND_SECONDS = 5

# For each process to be up, with its connection and its first commit behind it.
START_SECONDS_MAX = 60

# What is left for all of them in the end, in reservations.
LEFT = 1_000

RESERVATIONS_A_SECOND_MIN = 3_000
PRICE_MICRO_USD = 5_900
ORDER = Order("generation", "gpt-image-2", "1024x1024", "low", 1, False)


class Nobody:
    """Watches the teller, and keeps nothing."""

    def committed(self, step: Step, seconds: float) -> None:
        pass

    def failed(self, step: Step) -> None:
        raise Failed(f"a transaction to {step} failed")


@dataclass(frozen=True)
class Team:
    id: int
    key_id: str


@dataclass(frozen=True)
class Count:
    """What became of a process's reservations: all, and those admitted while the clock ran."""

    admitted: int
    refused: int
    timed: int


def reserve_for(url: str, team: Team, seconds: float, start: Barrier, counts: Queue[Count]) -> None:
    """The whole of a process: a teller with :data:`IN_FLIGHT` reservations at a time for so long, once all are ready."""
    counts.put(asyncio.run(_reserve_for(url, team, seconds, start)))


async def _reserve_for(url: str, team: Team, seconds: float, start: Barrier) -> Count:
    database = Database(url)
    teller = Teller(database, lambda: datetime.now(UTC), Nobody())
    teller.start()
    admitted = refused = timed = 0
    end_at = 0.0

    async def one() -> None:
        nonlocal admitted, refused, timed
        name = uuid4().hex
        job = Reservation(f"chg_{name}", f"req_{name}", team.id, team.key_id, ORDER, PRICE_MICRO_USD, "bench", 600.0)
        decision = await teller.reserve(job)
        if isinstance(decision, Admitted):
            admitted += 1
            timed += time.monotonic() < end_at
        elif isinstance(decision, OverBudget):
            refused += 1
        else:
            raise Failed(f"a reservation was answered with {decision}")

    async def keep_asking() -> None:
        while time.monotonic() < end_at:
            await one()

    await one()
    await asyncio.to_thread(start.wait, START_SECONDS_MAX)
    end_at = time.monotonic() + seconds
    await asyncio.gather(*(keep_asking() for _ in range(IN_FLIGHT)))
    await teller.close(10)
    database.close()
    return Count(admitted, refused, timed)


def all_reserve(url: str, team: Team, seconds: float) -> Count:
    """What became of the reservations of all processes together."""
    context = multiprocessing.get_context("spawn")
    start = context.Barrier(PROCESSES)
    counts: Queue[Count] = context.Queue()
    processes = [context.Process(target=reserve_for, args=(url, team, seconds, start, counts)) for _ in range(PROCESSES)]
    try:
        for process in processes:
            process.start()
        done = [counts.get(timeout=START_SECONDS_MAX + seconds + 10) for _ in processes]
        for process in processes:
            process.join(10)
    finally:
        for process in processes:
            process.kill()
    return Count(*(sum(getattr(count, name) for count in done) for name in ("admitted", "refused", "timed")))


def find_team(url: str, key: str) -> Team:
    database = Database(url)
    with database.reading() as connection:
        holder = accounts.holder_of(connection, digest(key))
    database.close()
    assert holder is not None
    return Team(holder.team_id, holder.key_id)


def held_micro_usd(url: str) -> int:
    """What is held against the budget. Raises :class:`Failed` where that is not the sum of the charges that are open."""
    database = Database(url)
    with database.reading() as connection:
        held = int(connection.execute(select(func.sum(balances.c.held_micro_usd))).scalar_one())
        summed = int(connection.execute(select(func.sum(charges.c.reserved_micro_usd))).scalar_one())
    database.close()
    if held != summed:
        raise Failed(f"{held} micro-USD are held against the budget, and {summed} by charges")
    return held


def limit_to(url: str, micro_usd: int) -> None:
    database = Database(url)
    with database.writing() as connection:
        connection.execute(budgets.update().values(limit_micro_usd=micro_usd))
    database.close()


# The plain way


def lay_out_plain(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE plain (id integer PRIMARY KEY, held bigint NOT NULL, most bigint NOT NULL)")
        connection.execute("INSERT INTO plain VALUES (1, 0, 1000000000000)")


def update_plainly(url: str, pgbench: Path, directory: Path) -> float:
    """Conditional UPDATEs a second of 64 clients."""
    script = directory / "plain.sql"
    script.write_text("UPDATE plain SET held = held + 1 WHERE id = 1 AND held + 1 <= most;\n")
    command: list[str | Path] = [pgbench, "--no-vacuum", "--protocol=prepared", f"--client={IN_FLIGHT}", f"--jobs={PROCESSES}"]
    command += [f"--time={ROUND_SECONDS}", f"--file={script}", url]
    done = subprocess.run(command, check=True, capture_output=True, text=True, timeout=60)
    found = re.search(r"^tps = ([\d.]+)", done.stdout, re.MULTILINE)
    assert found is not None
    return float(found[1])


def measure() -> list[Row]:
    with scratch() as directory, postgres() as server:
        team = find_team(server.url, open_books(server.url))
        lay_out_plain(server.url)
        rates: list[float] = []
        plain: list[float] = []
        for _ in range(ROUNDS):
            rates.append(all_reserve(server.url, team, ROUND_SECONDS).timed / ROUND_SECONDS)
            plain.append(update_plainly(server.url, server.programs / "pgbench", directory))
        limit = held_micro_usd(server.url) + LEFT * PRICE_MICRO_USD
        limit_to(server.url, limit)
        last = all_reserve(server.url, team, ROUND_SECONDS)
        over = held_micro_usd(server.url) - limit
    rate, plain_rate = statistics.median(rates), statistics.median(plain)
    exact = over == 0 and last.admitted == LEFT and last.refused > 0
    return [
        Row(
            f"reservations on one hot budget, {PROCESSES} processes, PostgreSQL",
            f"{RESERVATIONS_A_SECOND_MIN:,}/s, none over the limit",
            f"{rate:,.0f}/s; with room for {LEFT:,} more, {last.admitted:,} admitted and {last.refused:,} refused, "
            f"{max(0, over) / 1e6:.6f} USD over the limit",
            f"a plain conditional UPDATE, {IN_FLIGHT} clients: {plain_rate:,.0f}/s",
            verdict(rate >= RESERVATIONS_A_SECOND_MIN and exact),
            {"rounds_a_second": rates, "plain_rounds_a_second": plain, "over_micro_usd": over, "last_admitted": last.admitted},
        )
    ]


if __name__ == "__main__":
    run(measure, seconds_max=180)
