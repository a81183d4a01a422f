"""Bookings that nobody waits for: when they are written, and that each is safe until then."""

from __future__ import annotations

import asyncio
import os
from dataclasses import replace
from pathlib import Path

from proxy.ledger.books import lock_teams
from proxy.ledger.decisions import Admitted, Reservation
from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.ledger.notes import NOTES_MAX
from proxy.ledger.teller import BATCH_JOBS_MAX, Teller
from tests.ledger.ledgers import Account, Ledger, reservation, settled
from tests.ledger.tellers import PATIENCE_SECONDS, at_work, states, until
from tests.outage import database_away


async def noted(teller: Teller, job: Reservation) -> None:
    """Leave a booking, and wait for its note alone."""
    left = teller.leave(settled(job))
    assert left is not None
    assert await left.noted


def test_what_is_left_goes_along_with_the_next_reservation(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    first, second = reservation(account), reservation(account)
    ledger.post([first])

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, log):
            await noted(teller, first)
            assert isinstance(await teller.reserve(second), Admitted)
            assert list(states(ledger).values()) == ["settled", "forwarded"]
            await until(lambda: log.commits == ["reserve", "book"])

    asyncio.run(scenario())
    assert not list((tmp_path / "journal").iterdir())


def test_what_is_left_is_booked_without_company(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    jobs = [reservation(account) for _ in range(2)]
    ledger.post(jobs)

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, log):
            await noted(teller, jobs[0])
            await until(lambda: log.commits == ["book"])
            assert teller.leave(settled(jobs[1])) is not None
            await teller.settled(PATIENCE_SECONDS)
            assert list(states(ledger).values()) == ["settled"] * 2

    asyncio.run(scenario())


def test_more_is_left_at_once_than_a_batch_takes(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    jobs = [reservation(account) for _ in range(BATCH_JOBS_MAX + 10)]
    ledger.post(jobs)

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, log):
            await asyncio.gather(*(noted(teller, job) for job in jobs))
            # Each is told of when its batch has come to its end.
            await until(lambda: len(log.commits) >= 2)
            assert not teller._unbooked_yet
            assert log.commits == ["book"] * 2

    asyncio.run(scenario())
    assert set(states(ledger).values()) == {"settled"}


def test_what_is_left_at_the_end_of_a_process_is_booked(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    job = reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, _):
            assert teller.leave(settled(job)) is not None

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"]
    assert not list((tmp_path / "journal").iterdir())


def test_what_is_left_while_the_thread_is_stuck_is_made_safe(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    job = reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, _):
            with Database(ledger.url).writing() as connection:
                lock_teams(connection, [account.team_id])
                await noted(teller, job)
                kept = {file.suffix: file for file in (tmp_path / "journal").iterdir()}
                line = kept[".notes"].read_bytes().rstrip(b"\0")
                assert job.charge_id.encode() in line
                await until(lambda: job.charge_id.encode() in kept[".journal"].read_bytes())
                await until(lambda: kept[".notes"].read_bytes().rstrip(b"\0") == b"\0" + line[1:])

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"]


def test_what_finds_no_place_for_a_note_is_booked_all_the_same(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    jobs = [reservation(account) for _ in range(NOTES_MAX + 1)]
    ledger.post(jobs)

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, _):
            lefts = [teller.leave(settled(job)) for job in jobs]
            assert None not in lefts
            told = [await left.noted for left in lefts if left is not None]
            assert told == [True] * NOTES_MAX + [False]
            assert lefts[-1] is not None
            await asyncio.wait_for(lefts[-1].booked, PATIENCE_SECONDS)
            assert states(ledger)[jobs[-1].charge_id] == "settled"

    asyncio.run(scenario())
    assert set(states(ledger).values()) == {"settled"}


def test_what_a_disk_refuses_to_note_is_booked_all_the_same(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    job = reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal")
        async with at_work(ledger.url, journal) as (teller, log):
            left = teller.leave(settled(job))
            assert left is not None
            journal._notes.close()
            assert not await left.noted
            await asyncio.wait_for(left.booked, PATIENCE_SECONDS)
            await until(lambda: log.commits == ["book"])
            journal._notes._file = os.open(os.devnull, os.O_RDONLY)

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"]


def test_what_is_left_by_one_who_is_ended_at_that_moment_is_booked(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    job = reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, log):
            leaving = asyncio.create_task(noted(teller, job))
            await asyncio.sleep(0)
            leaving.cancel()
            await asyncio.wait((leaving,))
            await until(lambda: log.commits == ["book"])

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"]


def test_one_that_can_not_be_written_down_keeps_no_other_from_the_books(
    ledger: Ledger, account: Account, tmp_path: Path
) -> None:
    good, bad = reservation(account), reservation(account)
    ledger.post([good, bad])

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, _):
            # Half a character: no file and no database takes it.
            lefts = [teller.leave(settled(good)), teller.leave(replace(settled(bad), upstream_request_id="\ud800"))]
            for left in lefts:
                assert left is not None
                assert not await asyncio.wait_for(left.noted, PATIENCE_SECONDS)
                await asyncio.wait_for(left.booked, PATIENCE_SECONDS)

    asyncio.run(scenario())
    assert states(ledger)[good.charge_id] == "settled"


def test_nothing_is_left_that_can_not_be_noted(ledger: Ledger, account: Account) -> None:
    job = reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, _):
            assert teller.leave(settled(job)) is None

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["forwarded"]


def test_nothing_is_left_while_the_database_is_away(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    jobs = [reservation(account) for _ in range(2)]
    ledger.post(jobs)
    ledger.close()

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, _):
            with database_away(ledger.url):
                await teller.book(settled(jobs[0]))
                assert teller.behind
                assert teller.leave(settled(jobs[1])) is None
                await teller.book(settled(jobs[1]))

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"] * 2
