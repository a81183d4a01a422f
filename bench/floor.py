"""What a request of a single client takes at the least: the same gateway with books that write nothing, and with books that
sync one row to the disk for each reservation. ``python -m bench.floor``.

Neither is of use to anybody: they show how much of what is added can be the ledger's at all.
"""

from __future__ import annotations

import asyncio
import queue
import sqlite3
import sys
import threading
from contextlib import ExitStack
from unittest.mock import patch

from bench.load import ask_in_turns, percentile_ms
from bench.machines import gateway, scratch, upstream
from proxy.cli import main
from proxy.ledger.decisions import Admitted, Booking, Decision, Reservation
from proxy.ledger.teller import Left, Teller

WARM_UP = 200
TURNS = 100
REQUESTS_A_TURN = 20

_ADMITTED = Admitted(10**9)


def _left(teller: Teller, _: Booking) -> Left:
    loop = teller._loop
    left = Left(loop.create_future(), loop.create_future())
    left.noted.set_result(True)
    left.booked.set_result(None)
    return left


def _admitted(teller: Teller, _: Reservation) -> asyncio.Future[Decision]:
    held: asyncio.Future[Decision] = teller._loop.create_future()
    held.set_result(_ADMITTED)
    return held


class _OneRow:
    """A thread that writes a row of one column, and answers once it is synced."""

    def __init__(self) -> None:
        self._waiting: queue.SimpleQueue[tuple[Teller, str, asyncio.Future[Decision]]] = queue.SimpleQueue()
        threading.Thread(target=self._run, daemon=True).start()

    def reserve(self, teller: Teller, job: Reservation) -> asyncio.Future[Decision]:
        held: asyncio.Future[Decision] = teller._loop.create_future()
        self._waiting.put((teller, job.charge_id, held))
        return held

    def _run(self) -> None:
        file = sqlite3.connect("floor.db", isolation_level=None)
        for statement in ("PRAGMA journal_mode = WAL", "PRAGMA synchronous = FULL", "CREATE TABLE charges (id TEXT)"):
            file.execute(statement)
        while True:
            teller, charge_id, held = self._waiting.get()
            file.execute("INSERT INTO charges VALUES (?)", (charge_id,))
            teller._loop.call_soon_threadsafe(held.set_result, _ADMITTED)


def serve(books: str) -> None:
    """``beanmeter`` with these books, by its own arguments."""
    reserve = _admitted if books == "nothing" else _OneRow().reserve
    # Unbound, so that each is told its teller.
    with patch.object(Teller, "leave", _left), patch.object(Teller, "reserve", lambda teller, job: reserve(teller, job)):
        main()


def measure() -> list[str]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        beans = stack.enter_context(upstream(directory))
        machines = [beans, stack.enter_context(gateway(beans, directory, name="the books"))]
        for name, books in (("one synced row", "row"), ("nothing written", "nothing")):
            program = ("-m", "bench.floor", books)
            machines.append(stack.enter_context(gateway(beans, directory, name=name, program=program)))
        by_name = {machine.name: machine for machine in machines}
        seconds = ask_in_turns(by_name, turns=TURNS, requests_a_turn=REQUESTS_A_TURN, warm_up=WARM_UP)
    direct = seconds.pop(beans.name)
    return [
        f"{name}: adds " + ", ".join(f"{percentile_ms(through, p) - percentile_ms(direct, p):.2f} ms at p{p}" for p in (50, 99))
        for name, through in seconds.items()
    ]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        serve(sys.argv.pop(1))
    else:
        print("\n".join(measure()))
