"""The end of a teller: what waits is written, or made safe, or said; and it ends, whatever is stuck."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from structlog.testing import capture_logs

from proxy.ledger.books import lock_teams
from proxy.ledger.decisions import Admitted, Booking
from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.ledger.teller import LedgerDown, Teller
from tests.ledger.ledgers import NOON, Account, Ledger, reservation, settled
from tests.ledger.tellers import PATIENCE_SECONDS, all_of, at_work, states, until
from tests.ledger.traffic import Log
from tests.outage import database_away


@contextmanager
def stuck_disk(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Whoever writes to a journal waits until the block is over."""
    free = threading.Event()
    write = Journal.write

    def write_when_free(self: Journal, bookings: Iterable[Booking]) -> None:
        assert free.wait(PATIENCE_SECONDS), "whoever waits for this disk waits for ever"
        write(self, bookings)

    monkeypatch.setattr(Journal, "write", write_when_free)
    try:
        yield
    finally:
        free.set()


def test_closing_writes_what_waits(ledger: Ledger, account: Account) -> None:
    jobs = [reservation(account) for _ in range(300)]
    ledger.post(jobs)

    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, _):
            booked = [teller.book(settled(job)) for job in jobs]
            reserved = teller.reserve(reservation(account))
        assert await all_of(booked) == [None] * 300
        assert isinstance(await reserved, Admitted)
        assert [type(result) for result in await all_of([teller.reserve(reservation(account))])] == [LedgerDown]

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"] * 300 + ["forwarded"]


def test_closing_without_a_database_says_what_is_lost(ledger: Ledger, account: Account) -> None:
    job = reservation(account)
    ledger.post([job])
    ledger.close()

    async def scenario() -> None:
        with database_away(ledger.url), capture_logs() as logs:
            database = Database(ledger.url)
            teller = Teller(database, lambda: NOON, Log())
            teller.start()
            booked = teller.book(settled(job, 1234))
            await until(lambda: teller._unwritten)
            await teller.close(0.2)
            database.close()
        assert not booked.done()
        lost = [entry for entry in logs if entry["event"] == "booking_lost"]
        assert [(entry["charge"], entry["settled_micro_usd"]) for entry in lost] == [(job.charge_id, 1234)]

    asyncio.run(scenario())


def test_a_job_is_carried_out_after_its_loop_has_closed(ledger: Ledger, account: Account) -> None:
    job, later = reservation(account), reservation(account)
    ledger.post([job])
    database, log = Database(ledger.url), Log()
    teller = Teller(database, lambda: NOON, log)

    async def leave_at_once() -> None:
        teller.start()
        with ledger.database.writing() as connection:
            lock_teams(connection, [account.team_id])
            leaving.extend([teller.book(settled(job)), teller.reserve(later)])
            asyncio.get_running_loop().call_soon(asyncio.get_running_loop().stop)

    leaving: list[asyncio.Future[Any]] = []
    asyncio.run(leave_at_once())
    asyncio.run(teller.close(PATIENCE_SECONDS))
    database.close()
    assert states(ledger) == {job.charge_id: "settled", later.charge_id: "forwarded"}


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_a_stuck_thread_has_not_come_to_is_safe_when_the_process_ends(
    ledger: Ledger, account: Account, tmp_path: Path
) -> None:
    jobs = [reservation(account) for _ in range(3)]
    ledger.post(jobs)

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal")
        database = Database(ledger.url)
        teller = Teller(database, lambda: NOON, Log(), journal)
        teller.start()
        with ledger.database.writing() as connection:
            lock_teams(connection, [account.team_id])
            teller.book(settled(jobs[0]))
            await until(lambda: teller._waiting.empty())
            for job in jobs[1:]:
                teller.book(settled(job))
            await teller.close(0.1)
            (file,) = (tmp_path / "journal").glob("*.journal")
            assert file.read_bytes().count(b'"state":"settled"') == len(jobs)
        await asyncio.to_thread(teller._thread.join, PATIENCE_SECONDS)
        database.close()

    asyncio.run(scenario())
    assert set(states(ledger).values()) == {"settled"}


# More exchanges than an event loop has threads of its own.
@pytest.mark.parametrize("exchanges", [1, 40])
def test_closing_ends_though_database_and_disk_are_stuck(
    ledger: Ledger, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchanges: int
) -> None:
    jobs = [reservation(account) for _ in range(exchanges)]
    ledger.post(jobs)
    monkeypatch.setattr("proxy.ledger.teller.LAST_SECONDS", 0.1)

    async def scenario() -> None:
        teller = Teller(ledger.database, lambda: NOON, Log(), Journal(tmp_path / "journal"))
        teller.start()
        with stuck_disk(monkeypatch), Database(ledger.url).writing() as connection:
            lock_teams(connection, [account.team_id])
            bookings = [settled(job) for job in jobs]
            booked = [teller.book(booking) for booking in bookings]
            securing = [asyncio.create_task(teller.secure(booking)) for booking in bookings]
            await until(teller._journal_lock.locked)
            async with asyncio.timeout(PATIENCE_SECONDS / 2):
                await teller.close(0.1)
            assert not any(one.done() for one in booked)
        await all_of([*securing, *booked])
        await asyncio.to_thread(teller._thread.join)

    asyncio.run(scenario())
    assert set(states(ledger).values()) == {"settled"}


def test_a_stuck_disk_keeps_nobody_from_a_ledger_that_is_well(
    ledger: Ledger, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A booking took its time once, and is on its way to the journal when it is in the books already."""
    job, later = reservation(account), reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, _):
            with stuck_disk(monkeypatch):
                with ledger.database.writing() as connection:
                    lock_teams(connection, [account.team_id])
                    booking = settled(job)
                    booked = teller.book(booking)
                    securing = asyncio.create_task(teller.secure(booking))
                    await until(teller._journal_lock.locked)
                assert await all_of([booked]) == [None]
                async with asyncio.timeout(PATIENCE_SECONDS / 2):
                    assert isinstance(await teller.reserve(later), Admitted)
            await securing
            # What it has written then is cleared though nothing else is to be done.
            (kept,) = (tmp_path / "journal").glob("*.journal")
            await until(lambda: not kept.read_bytes().rstrip(b"\0"))

    asyncio.run(scenario())
    assert states(ledger) == {job.charge_id: "settled", later.charge_id: "forwarded"}
    assert not list((tmp_path / "journal").iterdir())


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_what_is_withdrawn_from_a_stuck_thread_is_safe_when_the_process_ends(
    ledger: Ledger, account: Account, tmp_path: Path
) -> None:
    """Its reservation may be committed once the process is gone: nothing may stay held for it."""
    job = reservation(account)

    async def scenario() -> None:
        database = Database(ledger.url)
        teller = Teller(database, lambda: NOON, Log(), Journal(tmp_path / "journal"))
        teller.start()
        answer = teller.reserve(job)
        await answer
        with ledger.database.writing() as connection:
            lock_teams(connection, [account.team_id])
            teller.reserve(reservation(account))
            await until(teller._waiting.empty)
            teller.withdraw(job, answer)
            await teller.close(0.1)
            (file,) = (tmp_path / "journal").glob("*.journal")
            assert file.read_bytes().count(b'"state":"released"') == 1
            assert job.charge_id.encode() in file.read_bytes()
        await asyncio.to_thread(teller._thread.join, PATIENCE_SECONDS)
        database.close()

    asyncio.run(scenario())
    assert states(ledger)[job.charge_id] == "released"
