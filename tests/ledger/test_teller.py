"""The one writer of a process: what it gathers, what it does while the database is away, and that it forgets nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psycopg
import pytest
from structlog.testing import capture_logs

from proxy.ledger import statements
from proxy.ledger.books import lock_teams
from proxy.ledger.decisions import Admitted, Booking, OverBudget
from proxy.ledger.engine import Database
from proxy.ledger.journal import SUFFIX, Journal
from proxy.ledger.teller import BATCH_JOBS_MAX, LedgerDown, Step, Teller
from tests.ledger.ledgers import NOON, PRICE, Account, Ledger, released, reservation, reviewed, settled
from tests.ledger.tellers import all_of, at_work, states, until
from tests.ledger.traffic import Log
from tests.ledger.wire import Cut, Wire
from tests.outage import database_away

# Gathering


@pytest.mark.parametrize(("jobs", "transactions"), [(1, 1), (100, 2), (2 * BATCH_JOBS_MAX, 3)])
def test_what_waits_goes_into_few_transactions(ledger: Ledger, account: Account, jobs: int, transactions: int) -> None:
    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, log):
            with ledger.database.writing() as connection:
                lock_teams(connection, [account.team_id])
                # The first of them waits for this transaction, and the others for the first.
                reserved = [teller.reserve(reservation(account)) for _ in range(jobs)]
            decisions = await all_of(reserved)
        left = [decision.remaining_micro_usd for decision in decisions if isinstance(decision, Admitted)]
        assert left == [(1000 - number) * PRICE for number in range(1, jobs + 1)], "in the order in which they came"
        assert -(-jobs // BATCH_JOBS_MAX) <= len(log.commits) <= transactions
        assert set(log.commits) == {"reserve"}
        assert log.failures == []

    asyncio.run(scenario())


def test_nothing_to_do_is_no_transaction(ledger: Ledger, account: Account) -> None:
    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, log):
            for _ in range(3):
                job = reservation(account)
                await teller.reserve(job)
                await teller.book(settled(job))
            await asyncio.sleep(0.2)
            assert log.commits == ["reserve", "book"] * 3
        assert log.commits == ["reserve", "book"] * 3

    asyncio.run(scenario())


def test_bookings_and_reservations_share_a_transaction(ledger: Ledger, account: Account) -> None:
    ledger.set_budget(PRICE)
    first, second = reservation(account), reservation(account)
    ledger.post([first])

    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, log):
            with ledger.database.writing() as connection:
                lock_teams(connection, [account.team_id])
                blocked = teller.reserve(reservation(account))
                await until(lambda: teller._waiting.empty())
                waiting: list[Awaitable[object]] = [teller.reserve(second), teller.book(released(first))]
            assert isinstance(await blocked, OverBudget)
            assert await all_of(waiting) == [Admitted(0), None]
        assert log.commits == ["reserve", "reserve", "book"]

    asyncio.run(scenario())


def test_waking_the_thread_splits_no_batch(ledger: Ledger, account: Account) -> None:
    jobs = [reservation(account) for _ in range(20)]

    async def scenario() -> list[Step]:
        async with at_work(ledger.url) as (teller, log):
            with ledger.database.writing() as connection:
                lock_teams(connection, [account.team_id])
                held = [teller.reserve(jobs[0])]
                await until(lambda: teller._waiting.empty())
                for job in jobs[1:]:
                    held.append(teller.reserve(job))
                    await teller.settled(0)
                    teller._waiting.put(None)
            await all_of(held)
        return log.commits

    # That of the first, for which the others waited, and theirs; or all have come before the thread had looked twice.
    assert asyncio.run(scenario()) in (["reserve"], ["reserve"] * 2)


# Away


def test_a_reservation_while_the_database_is_away_is_refused_and_forgotten(ledger: Ledger, account: Account) -> None:
    async def scenario() -> None:
        refused, later = reservation(account), reservation(account)
        with database_away(ledger.url):
            teller_at_work = at_work(ledger.url)
            teller, log = await teller_at_work.__aenter__()
            results = await all_of([teller.reserve(refused)])
            assert [type(result) for result in results] == [LedgerDown]
            assert log.failures == ["reserve"]
        assert isinstance(await teller.reserve(later), Admitted)
        await teller_at_work.__aexit__(None, None, None)
        assert states(ledger) == {later.charge_id: "forwarded"}

    asyncio.run(scenario())


def test_bookings_wait_for_the_database_and_are_written_once(ledger: Ledger, account: Account) -> None:
    jobs = [reservation(account) for _ in range(300)]
    ledger.post(jobs)
    ledger.close()

    async def scenario() -> None:
        with database_away(ledger.url):
            teller_at_work = at_work(ledger.url)
            teller, log = await teller_at_work.__aenter__()
            booked = [teller.book(book(job)) for job, book in zip(jobs, [settled, released, reviewed] * 100, strict=True)]
            # The same end again, as a replay of a journal brings it.
            booked.append(teller.book(settled(jobs[0])))
            await until(lambda: len(teller._unwritten) == len(booked))
            assert not any(one.done() for one in booked)
            assert set(log.failures) == {"book"}
        assert await all_of(booked) == [None] * len(booked)
        assert len(teller._unwritten) == 0
        await teller_at_work.__aexit__(None, None, None)
        assert list(states(ledger).values()) == ["settled", "released", "review"] * 100

    asyncio.run(scenario())


def test_with_a_journal_an_exchange_need_not_wait_for_the_database(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    job = reservation(account)
    ledger.post([job])
    ledger.close()

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal")
        with database_away(ledger.url):
            teller_at_work = at_work(ledger.url, journal)
            teller, _ = await teller_at_work.__aenter__()
            assert await all_of([teller.book(settled(job))]) == [None]
            assert not journal.empty
            assert len(teller._unwritten) == 1
        await until(lambda: journal.empty)
        await teller_at_work.__aexit__(None, None, None)
        assert states(ledger) == {job.charge_id: "settled"}

    asyncio.run(scenario())
    assert not list(tmp_path.rglob(f"*{SUFFIX}"))


def waits_for_a_lock(database_url: str) -> bool:
    with psycopg.connect(database_url, autocommit=True) as connection:
        row = connection.execute("SELECT count(*) FROM pg_locks WHERE NOT granted").fetchone()
        return row is not None and row[0] > 0


@pytest.mark.postgres
@pytest.mark.parametrize("cut", ["before", "after", "late"])
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_reservation_whose_commit_was_not_answered_is_never_held_for_ever(ledger: Ledger, account: Account, cut: Cut) -> None:
    async def scenario() -> None:
        with Wire(ledger.url) as wire:
            first, lost, later = (reservation(account) for _ in range(3))
            refused = reservation(account, hold=10**12)
            async with at_work(wire.url) as (teller, log):
                assert isinstance(await teller.reserve(first), Admitted)
                with ledger.database.writing() as connection:
                    lock_teams(connection, [account.team_id])
                    wire.cut_next_commit(cut)
                    waiting = [teller.reserve(lost), teller.reserve(refused)]
                assert [type(result) for result in await all_of(waiting)] == [LedgerDown] * 2
                assert set(log.failures) == {"reserve"}
                if cut == "late":
                    await until(lambda: waits_for_a_lock(ledger.url))
                    wire.deliver()
                await until(lambda: len(teller._unwritten) == 0 and "book" in log.commits)
                assert isinstance(await teller.reserve(later), Admitted)
            expected = {first.charge_id: "forwarded", lost.charge_id: "released", later.charge_id: "forwarded"}
            if cut == "before":
                del expected[lost.charge_id]
            assert states(ledger) == expected

    asyncio.run(scenario())


@pytest.mark.postgres
@pytest.mark.parametrize("cut", ["before", "after", "late"])
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_booking_whose_commit_was_not_answered_is_written_once(ledger: Ledger, account: Account, cut: Cut) -> None:
    jobs = [reservation(account) for _ in range(3)]
    ledger.post(jobs)

    async def scenario() -> None:
        with Wire(ledger.url) as wire:
            async with at_work(wire.url) as (teller, log):
                wire.cut_next_commit(cut)
                booked = [teller.book(settled(jobs[0], 5)), teller.book(reviewed(jobs[1], 7)), teller.book(released(jobs[2]))]
                await until(lambda: log.failures)
                if cut == "late":
                    await until(lambda: waits_for_a_lock(ledger.url))
                    wire.deliver()
                assert await all_of(booked) == [None] * 3
        assert list(states(ledger).values()) == ["settled", "review", "released"]

    asyncio.run(scenario())


# Poison


def below_zero(job: Booking) -> Booking:
    return replace(job, outcome=replace(job.outcome, settled_micro_usd=-1))


def larger_than_a_column(job: Booking) -> Booking:
    return replace(job, output_tokens=1 << 63)


@pytest.mark.parametrize("spoil", [below_zero, larger_than_a_column])
def test_a_booking_that_cannot_be_written_keeps_no_other_out(
    ledger: Ledger, account: Account, spoil: Callable[[Booking], Booking]
) -> None:
    jobs = [reservation(account) for _ in range(5)]
    ledger.post(jobs)

    async def scenario() -> None:
        new = reservation(account)
        with capture_logs() as logs:
            async with at_work(ledger.url) as (teller, log):
                with ledger.database.writing() as connection:
                    lock_teams(connection, [account.team_id])
                    booked = [teller.book(settled(job)) for job in jobs[:2]]
                    booked += [teller.book(spoil(settled(jobs[2]))), *(teller.book(settled(job)) for job in jobs[3:])]
                    reserved = teller.reserve(new)
                assert await all_of(booked) == [None] * 5
                assert isinstance(await reserved, Admitted)
                assert log.failures == ["book"]
        (told,) = (entry for entry in logs if entry["event"] == "ledger_rejected")
        assert told["charges"] == [jobs[2].charge_id]
        assert [(outcome["charge"], outcome["state"], outcome["images"]) for outcome in told["outcomes"]] == [
            (jobs[2].charge_id, "settled", 1)
        ]
        held = {jobs[2].charge_id, new.charge_id}
        assert states(ledger) == {job.charge_id: "forwarded" if job.charge_id in held else "settled" for job in [*jobs, new]}

    asyncio.run(scenario())


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_the_journal_keeps_what_is_not_booked_yet_beside_one_that_never_can_be(
    ledger: Ledger, account: Account, tmp_path: Path
) -> None:
    """After an outage the batch has to be written one by one, and the network fails again in between."""
    jobs = [reservation(account) for _ in range(3)]
    ledger.post(jobs)

    async def scenario() -> None:
        with Wire(ledger.url) as wire:
            journal = Journal(tmp_path)
            async with at_work(wire.url, journal) as (teller, _):
                with database_away(ledger.url):
                    bookings = [settled(jobs[0]), below_zero(settled(jobs[1])), settled(jobs[2])]
                    assert await all_of([teller.book(job) for job in bookings]) == [None] * 3
                    # The first of them by itself passes, and the one behind the bad one is cut off for a while.
                    wire.cut_next_commit("before", spare=1, stay_down=True)
                await until(lambda: wire.down and len(teller._unwritten) == 1)
                assert not journal.empty
                wire.down = False
                await until(lambda: journal.empty)
                assert len(teller._unwritten) == 0
        assert list(states(ledger).values()) == ["settled", "forwarded", "settled"]

    asyncio.run(scenario())


def test_a_moment_without_memory_says_nothing_against_what_was_to_be_booked(
    ledger: Ledger, account: Account, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    jobs = [reservation(account) for _ in range(2)]
    ledger.post(jobs)
    write, left = statements.write, [None]

    def write_at_last(*what: Any) -> Any:
        if left:
            left.pop()
            raise MemoryError
        return write(*what)

    monkeypatch.setattr("proxy.ledger.books.write", write_at_last)

    async def scenario() -> None:
        async with at_work(ledger.url, Journal(tmp_path / "journal")) as (teller, log):
            assert await all_of([teller.book(settled(job)) for job in jobs]) == [None] * 2
            assert log.failures == ["book"]
            await until(lambda: not teller.behind)

    asyncio.run(scenario())
    assert set(states(ledger).values()) == {"settled"}


def test_a_reservation_that_cannot_be_written_is_refused_alone(ledger: Ledger, account: Account) -> None:
    first = reservation(account)
    ledger.post([first])

    async def scenario() -> None:
        good = [reservation(account) for _ in range(3)]
        twice = replace(reservation(account), request_id=first.request_id)
        async with at_work(ledger.url) as (teller, log):
            results = await all_of([teller.reserve(job) for job in (good[0], twice, *good[1:])])
            assert [type(result) for result in results] == [Admitted, LedgerDown, Admitted, Admitted]
            assert log.failures == ["reserve"]
        assert states(ledger).keys() == {first.charge_id, *(job.charge_id for job in good)}

    asyncio.run(scenario())


# Nobody waits


def test_a_booking_is_written_and_a_reservation_withdrawn_when_nobody_waits_any_more(ledger: Ledger, account: Account) -> None:
    jobs = [reservation(account) for _ in range(3)]
    ledger.post(jobs[:1])

    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, log):
            with ledger.database.writing() as connection:
                lock_teams(connection, [account.team_id])
                leaving: list[asyncio.Future[Any]] = [teller.book(settled(jobs[0])), teller.reserve(jobs[1])]
                for one in leaving:
                    assert one.cancel()
                staying = teller.reserve(jobs[2])
            assert isinstance(await staying, Admitted)
            assert log.failures == []

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled", "forwarded"]


@pytest.mark.parametrize("withdrawn", [True, False], ids=["withdrawn", "its time is over"])
def test_a_reservation_given_up_while_it_is_committed_holds_nothing(ledger: Ledger, account: Account, withdrawn: bool) -> None:
    job = reservation(account)

    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, _):
            with ledger.database.writing() as connection:
                lock_teams(connection, [account.team_id])
                held = teller.reserve(job)
                # By now the teller has taken the job, and waits for the team.
                await asyncio.sleep(0.2)
                if withdrawn:
                    assert held.cancel()
                else:
                    teller.expire(held)
                    with pytest.raises(LedgerDown):
                        await held

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["released"]


def test_a_booking_that_takes_its_time_is_made_safe_beside_it(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    job = reservation(account)
    ledger.post([job])

    async def scenario() -> None:
        teller = Teller(ledger.database, lambda: NOON, Log(), Journal(tmp_path / "journal"))
        teller.start()
        with Database(ledger.url).writing() as connection:
            lock_teams(connection, [account.team_id])
            booked = teller.book(settled(job))
            await teller.secure(settled(job))
            await booked
            (file,) = (tmp_path / "journal").glob("*.journal")
            assert job.charge_id.encode() in file.read_bytes()
            assert list(states(ledger).values()) == ["forwarded"]
        await teller.close(30)

    asyncio.run(scenario())
    assert list(states(ledger).values()) == ["settled"]
    assert list((tmp_path / "journal").iterdir()) == [], "what is booked waits no longer"


def test_a_reservation_withdrawn_when_it_was_just_committed_is_let_go(ledger: Ledger, account: Account) -> None:
    """Its answer and the end of its patience can come in the same moment."""
    job = reservation(account)

    async def scenario() -> None:
        async with at_work(ledger.url) as (teller, log):
            answer = teller.reserve(job)
            await until(answer.done)
            teller.withdraw(job, answer)
            await until(lambda: "book" in log.commits)

    asyncio.run(scenario())
    assert states(ledger) == {job.charge_id: "released"}


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_bookings_of_one_charge_that_differ_are_each_made_safe(ledger: Ledger, account: Account, tmp_path: Path) -> None:
    """An exchange's own, and that of a sweep that thought it dead."""
    job = reservation(account)
    ledger.post([job])
    own, swept = settled(job), reviewed(job)

    async def scenario() -> None:
        journal = Journal(tmp_path / "journal")
        async with at_work(ledger.url, journal) as (teller, _):
            with ledger.database.writing() as connection:
                lock_teams(connection, [account.team_id])
                booked = [teller.book(own), teller.book(swept)]
                await teller.secure(own)
                await teller.secure(swept)
                assert await all_of(booked) == [None] * 2
                (file,) = (tmp_path / "journal").glob("*.journal")
                content = file.read_bytes()
                assert (content.count(b'"state":"settled"'), content.count(b'"state":"review"')) == (1, 1)
            await until(lambda: journal.empty)

    asyncio.run(scenario())
    assert states(ledger) == {job.charge_id: "settled"}
