"""The books: every step from every state, batches, long random walks, many processes. After each, the auditor."""

from __future__ import annotations

import asyncio
import multiprocessing
import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, insert, or_, select, update
from sqlalchemy.exc import IntegrityError

from proxy import periods
from proxy.ledger import accounts
from proxy.ledger.books import post
from proxy.ledger.decisions import NEXT, Admitted, Booking, Decision, KeyRefused, OverBudget, Reservation, State
from proxy.ledger.schema import balances, budgets, charges, rollups
from proxy.outcomes import Ending, Outcome
from proxy.prices import AUTO
from tests.ledger.ledgers import (
    NOON,
    ORDER,
    PRICE,
    Account,
    Counted,
    Ledger,
    check,
    content,
    released,
    reservation,
    reviewed,
    settled,
)
from tests.ledger.traffic import Counts, send_traffic, traffic_process

ENDINGS: dict[Ending, Callable[[Reservation], Booking]] = {"settled": settled, "released": released, "review": reviewed}


def in_state(ledger: Ledger, account: Account, state: State) -> Reservation:
    """A charge in this state."""
    job = reservation(account)
    assert ledger.post([job]) == [Admitted(None)]
    if state in ENDINGS:
        ledger.post(bookings=[ENDINGS[state](job)])
    elif state == "reserved":
        with ledger.database.writing() as connection:
            connection.execute(update(charges).where(charges.c.id == job.charge_id).values(state=state))
    return job


def test_every_step_from_every_state(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(0, soft=True)
    for state, afters in NEXT.items():
        for ending, book in ENDINGS.items():
            job = in_state(ledger, account, state)
            before = ledger.content()
            # Another amount than the one in the books, so that a booking which must change nothing would be seen.
            booking = book(replace(job, hold_micro_usd=PRICE - 1))
            ledger.post(bookings=[booking])
            if ending in afters:
                assert ledger.charges()[job.charge_id]["state"] == ending, (state, ending)
                before = ledger.content()
                ledger.post(bookings=[booking], now=NOON + timedelta(days=1))
            assert ledger.content() == before, f"{state} to {ending}, for the second time or against the rules"
            ledger.check()


def test_the_first_end_counts_where_one_batch_brings_several(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(PRICE)
    job = reservation(account)
    ledger.post([job])
    ledger.post(bookings=[reviewed(job, 1000), settled(job, 2000), released(job), settled(job, 3000)])
    charge = ledger.charges()[job.charge_id]
    assert (charge["state"], charge["settled_micro_usd"], charge["reserved_micro_usd"]) == ("settled", 2000, 0)
    ledger.check()


def test_a_booking_of_an_unknown_charge_changes_nothing(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(PRICE)
    before = ledger.content()
    for job in (reservation(account), reservation(replace(account, team_id=99))):
        for book in ENDINGS.values():
            assert ledger.post(bookings=[book(job)]) == []
    assert ledger.content() == before


def test_what_was_known_of_the_answer_outlives_a_review(ledger: Ledger) -> None:
    job = reservation(ledger.account())
    known: dict[str, Any] = {
        "upstream_status": 200,
        "upstream_cost_micro_usd": 5,
        "upstream_request_id": "up_1",
        "input_tokens": 7,
        "output_tokens": 9,
    }
    ledger.post([job])
    ledger.post(bookings=[replace(reviewed(job), **known)])
    ledger.post(bookings=[Booking(job.charge_id, job.team_id, settled(job).outcome)])
    charge = ledger.charges()[job.charge_id]
    assert {name: charge[name] for name in known} == known
    assert charge["state"] == "settled"


# Batches


def test_decisions_come_in_the_order_of_the_reservations(ledger: Ledger) -> None:
    red, blue, revoked = ledger.account("red"), ledger.account("blue"), ledger.another_key("red")
    ledger.set_budget(2 * PRICE, "day", team="red")
    with ledger.database.writing() as connection:
        accounts.revoke_key(connection, revoked.key_id, now=NOON, actor="test")
    jobs = [reservation(account) for account in (red, blue, revoked, red, red, blue, revoked)]
    assert ledger.post(jobs) == [
        Admitted(PRICE),
        Admitted(None),
        KeyRefused(),
        Admitted(0),
        OverBudget("team", "day", 2 * PRICE, 0, PRICE, datetime(2026, 11, 23, tzinfo=UTC)),
        Admitted(None),
        KeyRefused(),
    ]
    assert list(ledger.charges()) == [jobs[place].charge_id for place in (0, 1, 3, 5)]
    ledger.check()


@pytest.mark.parametrize("book", [released, lambda job: settled(job, 0), lambda job: reviewed(job, 0, held=0)])
def test_what_a_booking_gives_back_has_room_in_the_same_batch(ledger: Ledger, book: Callable[[Reservation], Booking]) -> None:
    account = ledger.account()
    ledger.set_budget(PRICE)
    first, second, third = (reservation(account) for _ in range(3))
    assert ledger.post([first]) == [Admitted(0)]
    assert ledger.post([second, third], [book(first)]) == [Admitted(0), OverBudget("team", "total", PRICE, 0, PRICE, None)]
    ledger.check()


def test_a_dearer_image_than_was_held_is_booked_whole_and_takes_the_room_of_others(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(3 * PRICE)
    first, second = reservation(account), reservation(account)
    ledger.post([first])
    assert ledger.post([second], [settled(first, 4 * PRICE)]) == [OverBudget("team", "total", 3 * PRICE, -PRICE, PRICE, None)]
    ledger.check()


def test_many_teams_and_keys_in_one_batch(ledger: Ledger) -> None:
    first = [ledger.account(f"team {number}") for number in range(12)]
    every = [*first, *(ledger.another_key(account.team) for account in first)]
    for number, account in enumerate(first):
        ledger.set_budget((number + 1) * PRICE, "month", team=account.team)
        ledger.set_budget(2 * PRICE, "week", team=account.team, key_id=account.key_id)
    jobs = [reservation(account) for _ in range(4) for account in every]
    decisions = ledger.post(jobs)
    admitted = [job for job, decision in zip(jobs, decisions, strict=True) if isinstance(decision, Admitted)]
    for number, account in enumerate(first):
        with_first = sum(job.key_id == account.key_id for job in admitted)
        in_team = sum(job.team_id == account.team_id for job in admitted)
        # The two keys take turns; the first may have two, and the other, without a budget of its own, asks four times.
        assert with_first == min(2, number // 2 + 1)
        assert in_team == min(number + 1, 6)
    ledger.check()
    ledger.post(
        bookings=[book(job) for job, book in zip(admitted, [settled, released, reviewed] * len(admitted), strict=False)]
    )
    ledger.check()


def test_a_key_that_may_not_spend_at_the_time_of_the_hold_leaves_nothing_in_the_books(ledger: Ledger) -> None:
    good, gone = ledger.account("red"), ledger.account("gone")
    revoked = ledger.another_key("red")
    expired = ledger.another_key("red", lifetime=timedelta(hours=1))
    with ledger.database.writing() as connection:
        accounts.revoke_key(connection, revoked.key_id, now=NOON, actor="test")
        accounts.archive_team(connection, "gone", now=NOON, actor="test")
    ledger.set_budget(PRICE, "day", team="red")
    ledger.set_budget(PRICE, "day", team="gone")
    before = ledger.content()
    refused = [
        revoked,
        expired,
        gone,
        replace(good, key_id="key_unknown"),
        replace(good, team_id=99),
        replace(good, key_id=gone.key_id),
    ]
    at = NOON + timedelta(hours=1)
    assert ledger.post([reservation(account) for account in refused], now=at) == [KeyRefused()] * len(refused)
    assert ledger.content() == before
    assert ledger.post([reservation(expired)], now=at - timedelta(microseconds=1)) == [Admitted(0)]


def test_a_booking_of_an_archived_team_is_written(ledger: Ledger) -> None:
    job = reservation(ledger.account())
    ledger.post([job])
    with ledger.database.writing() as connection:
        accounts.archive_team(connection, "red", now=NOON, actor="test")
    ledger.post(bookings=[settled(job)])
    assert ledger.charges()[job.charge_id]["state"] == "settled"


# Periods


def test_a_charge_stays_in_the_period_in_which_it_was_reserved(ledger: Ledger) -> None:
    account = ledger.account()
    sunday, monday = datetime(2026, 11, 22, 23, 59, 59, 999_999, tzinfo=UTC), datetime(2026, 11, 23, tzinfo=UTC)
    ledger.set_budget(PRICE, "day", now=sunday)
    ledger.set_budget(PRICE, "week", now=sunday)
    late, early, none_left = (reservation(account) for _ in range(3))
    assert ledger.post([late], now=sunday) == [Admitted(0)]
    assert ledger.post([early], now=monday) == [Admitted(0)]
    assert isinstance(ledger.post([none_left], [settled(late)], monday)[0], OverBudget)
    assert isinstance(ledger.post([none_left], [released(early)], monday)[0], Admitted)
    ledger.check()


def test_two_clocks_that_disagree_about_midnight_lose_nothing(ledger: Ledger) -> None:
    """A budget that is set by the one counts what the other reserved, on both sides of midnight."""
    account = ledger.account()
    before, after = datetime(2026, 11, 30, 23, 59, 59, tzinfo=UTC), datetime(2026, 12, 1, 0, 0, 1, tzinfo=UTC)
    jobs = [reservation(account) for _ in range(6)]
    for job, now in zip(jobs, (before, after, after, before), strict=False):
        assert ledger.post([job], now=now) == [Admitted(None)]
    for period in ("day", "week", "month", "total"):
        ledger.set_budget(9 * PRICE, period, now=before)
    ledger.check()
    assert isinstance(ledger.post([jobs[4]], [settled(jobs[1])], after)[0], Admitted)
    assert isinstance(ledger.post([jobs[5]], now=before)[0], Admitted)
    ledger.check()
    ledger.post(bookings=[released(job) for job in jobs], now=after)
    ledger.check()


# A walk of many steps


@dataclass
class Walk:
    """A random history of a few teams, all in one transaction, with a clock that crosses periods and at times steps back."""

    connection: Connection
    accounts: Sequence[Account]
    chance: random.Random
    now: datetime = datetime(2026, 2, 26, 12, tzinfo=UTC)

    def __post_init__(self) -> None:
        self.open: list[Reservation] = []
        self.ended: list[Reservation] = []
        self.decisions: Counter[type] = Counter()
        self.endings: Counter[str] = Counter()

    def step(self) -> None:
        self._let_time_pass()
        if self.chance.random() < 0.15:
            self._change_budgets()
            check(self.connection)
        else:
            self._post()

    def _let_time_pass(self) -> None:
        seconds = self.chance.choice([0, 0.000001, 1, 60, 3_600, 40_000, 90_000, 900_000])
        self.now += timedelta(seconds=seconds)
        # Another host's clock is a little behind, and midnight lies in between.
        if self.chance.random() < 0.1:
            self.now -= timedelta(hours=1)

    def _change_budgets(self) -> None:
        account = self.chance.choice(self.accounts)
        period = self.chance.choice(periods.PERIODS)
        key_id = self.chance.choice([None, account.key_id])
        try:
            if self.chance.random() < 0.3:
                accounts.remove_budget(self.connection, account.team, key_id, period, now=self.now, actor="test")
                return
        except accounts.AccountError:
            pass
        limit = self.chance.choice([0, 1, 3, 10, 40]) * PRICE + self.chance.randrange(2)
        soft = self.chance.random() < 0.2
        accounts.set_budget(self.connection, account.team, key_id, period, limit, soft=soft, now=self.now, actor="test")

    def _post(self) -> None:
        reservations = [self._reservation() for _ in range(self.chance.randrange(4))]
        bookings = [self._booking() for _ in range(self.chance.randrange(4)) if len(self.open) > 5]
        decisions = post(self.connection, reservations, bookings, self.now)
        counted = check(self.connection)
        self.open += [job for job, decision in zip(reservations, decisions, strict=True) if isinstance(decision, Admitted)]
        self.decisions.update(map(type, decisions))
        self.endings.update(booking.outcome.state for booking in bookings)
        for job, decision in zip(reservations, decisions, strict=True):
            self._check_decision(job, decision, counted)

    def _reservation(self) -> Reservation:
        n = self.chance.choice([1, 1, 2, 10])
        size, quality = self.chance.choice([AUTO, "1024x1024", "2048x1152"]), self.chance.choice([AUTO, "low", "high"])
        order = replace(ORDER, n=n, size=size, quality=quality, operation=self.chance.choice(["generation", "edit"]))
        return reservation(self.chance.choice(self.accounts), order, hold=n * self.chance.choice([1, 5_900, PRICE]))

    def _booking(self) -> Booking:
        again = not self.open or (self.ended and self.chance.random() < 0.2)
        job = self.chance.choice(self.ended if again else self.open)
        hold, n = job.hold_micro_usd, job.order.n
        known = self.chance.randrange(n + 1)
        size = self.chance.choice(["1024x1024", "2048x1152", "mixed"]) if job.order.size == AUTO else job.order.size
        quality = "low" if job.order.quality == AUTO else job.order.quality
        outcome = self.chance.choice(
            [
                Outcome("settled", hold // n * known, 0, known, size, quality, "reported", "delivered"),
                Outcome("settled", hold + 1, 0, n, size, quality, "reported", "delivered"),
                Outcome("released", 0, 0, 0, job.order.size, job.order.quality, None, "failed_upstream"),
                Outcome("review", hold // n * known, hold // n * (n - known), known, size, quality, "reported", "cut"),
            ]
        )
        if not again and outcome.state != "review":
            self.open.remove(job)
            self.ended.append(job)
        return Booking(job.charge_id, job.team_id, outcome)

    def _check_decision(self, job: Reservation, decision: Decision, counted: Counted) -> None:
        """Nobody is admitted where that exceeds a budget, and nobody is refused for nothing."""
        applying = or_(budgets.c.key_id.is_(None), budgets.c.key_id == job.key_id)
        left: dict[tuple[str, str], int] = {}
        for budget in self.connection.execute(
            select(budgets).where(budgets.c.team_id == job.team_id, applying, ~budgets.c.soft)
        ):
            start = periods.start(budget.period, self.now)
            scope = "team" if budget.key_id is None else "key"
            spent = sum(counted[budget.team_id, budget.key_id, budget.period, start])
            left[scope, budget.period] = budget.limit_micro_usd - spent
        # Later ones of the batch can have taken more, never given back.
        if isinstance(decision, Admitted):
            assert min(left.values(), default=0) >= 0
            assert (decision.remaining_micro_usd is None) == (not left)
            assert not left or min(left.values()) <= (decision.remaining_micro_usd or 0)
        else:
            assert isinstance(decision, OverBudget)
            assert decision.remaining_micro_usd < job.hold_micro_usd == decision.cost_micro_usd
            assert left[decision.scope, decision.period] <= decision.remaining_micro_usd


@pytest.mark.parametrize("seed", range(1))
def test_after_every_step_of_a_walk_the_books_add_up(ledger: Ledger, seed: int) -> None:
    teams = [ledger.account(name) for name in ("red", "blue")]
    walkers = [*teams, ledger.another_key("red")]
    with ledger.database.writing() as connection:
        walk = Walk(connection, walkers, random.Random(seed))
        for _ in range(250):
            walk.step()
    assert walk.decisions.keys() == {Admitted, OverBudget}
    assert walk.endings.keys() == {"settled", "released", "review"}
    ledger.check()


# What can't be


IMPOSSIBLE: list[dict[str, Any]] = [
    {"state": "paid"},
    {"operation": "variation"},
    {"basis": "guessed"},
    {"images_requested": 0},
    {"images_requested": 11},
    {"images_delivered": -1},
    {"hold_micro_usd": 0, "reserved_micro_usd": 0},
    {"reserved_micro_usd": -1},
    {"reserved_micro_usd": PRICE + 1},
    {"reserved_micro_usd": PRICE - 1},
    {"settled_micro_usd": -1},
    {"settled_micro_usd": 1},
    {"finished_at": NOON},
    {"state": "settled", "basis": "requested", "finished_at": NOON},
    {"state": "settled", "reserved_micro_usd": 0, "finished_at": NOON},
    {"state": "settled", "reserved_micro_usd": 0, "basis": "requested"},
    {"state": "released", "finished_at": NOON},
    {"state": "released", "reserved_micro_usd": 0, "settled_micro_usd": 1, "finished_at": NOON},
    {"state": "review"},
    {"key_id": "key_unknown"},
    {"team_id": 99},
]


def test_the_database_refuses_a_charge_that_cannot_be(ledger: Ledger) -> None:
    job = reservation(ledger.account())
    ledger.post([job])
    for changes in IMPOSSIBLE:
        with pytest.raises(IntegrityError), ledger.database.writing() as connection:
            connection.execute(update(charges).values(**changes))


def test_the_database_refuses_sums_and_limits_below_zero(ledger: Ledger) -> None:
    job = reservation(ledger.account())
    ledger.set_budget(PRICE)
    ledger.post([job])
    columns = [balances.c.settled_micro_usd, balances.c.held_micro_usd, budgets.c.limit_micro_usd]
    columns += [rollups.c[name] for name in ("requests", "images", "settled_micro_usd", "reserved_micro_usd")]
    for column in columns:
        with pytest.raises(IntegrityError), ledger.database.writing() as connection:
            connection.execute(update(column.table).values({column: -1}))
    for key_id in (None, job.key_id):
        row = {"team_id": job.team_id, "key_id": key_id, "period": "day", "limit_micro_usd": 1, "soft": False}
        with pytest.raises(IntegrityError), ledger.database.writing() as connection:
            connection.execute(insert(budgets), [row | {"created_at": NOON}] * 2)
    ledger.check()


def test_an_exception_after_the_posting_takes_all_of_it_back(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(PRICE)
    first, second = reservation(account), reservation(account)
    ledger.post([first])
    before = ledger.content()

    def fail_late() -> None:
        with ledger.database.writing() as connection:
            post(connection, [second], [settled(first, 1)], NOON)
            assert content(connection) != before
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail_late()
    assert ledger.content() == before


# Many at once

HOLDS = 40


def test_several_tellers_never_overspend_one_budget(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(HOLDS * PRICE)
    counts = asyncio.run(send_traffic([ledger.url] * 3, account, 30, book=False))
    assert (counts.admitted, counts.refused) == (HOLDS, 3 * 30 - HOLDS)
    assert counts.failed == 0
    assert len(ledger.charges()) == HOLDS
    ledger.check()


def test_several_processes_never_overspend_one_budget_while_it_is_changed(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(HOLDS * PRICE, "day")
    spawn = multiprocessing.get_context("spawn")
    with spawn.Pool(4) as pool:
        running = pool.starmap_async(traffic_process, [(ledger.url, account, 60)] * 4)
        changes = 0
        while not running.ready():
            changes += 1
            ledger.set_budget((10 + changes % 30) * PRICE, "day")
            with ledger.database.writing() as connection:
                accounts.set_budget(connection, "red", None, "total", HOLDS * PRICE, soft=False, now=NOON, actor="test")
                check(connection)
                if changes % 3 == 0:
                    accounts.remove_budget(connection, "red", None, "total", now=NOON, actor="test")
            running.wait(0.01)
        counts = sum(running.get(), Counts())
    assert counts.failed == 0
    assert counts.admitted + counts.refused == 4 * 60
    assert counts.admitted == counts.booked == len(ledger.charges())
    assert {row["state"] for row in ledger.charges().values()} == {"settled", "released"}
    assert changes > 3
    ledger.check()
