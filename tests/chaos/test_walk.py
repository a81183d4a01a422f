"""A random walk over the money states in virtual time, beside a model that knows the rules and nothing of SQL."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from itertools import count
from pathlib import Path

from sqlalchemy import Connection, select

from proxy import periods
from proxy.ledger import accounts, reviews
from proxy.ledger.books import post
from proxy.ledger.decisions import Admitted, Booking, KeyRefused, OverBudget, Repeatable, Repeated, Reservation, TooFast
from proxy.ledger.journal import Journal, abandoned
from proxy.ledger.schema import balances, budgets, charges
from proxy.ledger.sweep import find_expired, find_overdue, overdue_booking
from proxy.outcomes import answered, unanswered, unsent
from proxy.prices import AUTO, DeliveredImage, Order, shipped_card
from proxy.taps import Delivery
from tests.chaos.model import Charge, Model, Scope
from tests.chaos.sizes import size
from tests.ledger.ledgers import NOON, Account, Ledger, check, reservation

STEPS = size(100_000, 1_000_000)

# What a transaction touched is looked at after each; everything is added up anew after so many.
AUDIT_TRANSACTIONS = size(300, 2_000)

CARD = shipped_card()
PRICES = CARD.models["gpt-image-2"]
TIMEOUT = timedelta(seconds=600)
REVIEW_TIME = timedelta(hours=72)


class Walk:
    """Does what chance says to a ledger and to the model, and compares them."""

    def __init__(self, ledger: Ledger, chance: random.Random, journals: Path) -> None:
        self.ledger = ledger
        self.chance = chance
        self.journals = journals
        self.model = Model()
        self.now = NOON
        self.steps = 0
        self.seen: Counter[object] = Counter()
        self.accounts = [ledger.account(team) for team in ("red", "green", "blue")]
        self.accounts += [ledger.another_key(team) for team in ("red", "green")]
        self.names: list[str] = []

    def run(self, steps: int) -> None:
        deeds: dict[Callable[[], None], int] = {
            self.trade: 60,
            self.set_budget: 4,
            self.remove_budget: 3,
            self.set_limit: 2,
            self.remove_limit: 3,
            self.resolve: 8,
            self.sweep: 4,
            self.replay: 1,
            self.replace_key: 1,
        }
        hasty = self.accounts[2]
        self.limit(hasty, (hasty.team_id, None), 20, None)
        self.post([self.order(hasty) for _ in range(30)], [])
        # Each at least once, in this order; then as it comes.
        script = [*deeds]
        for number in count(1):
            self.pass_time()
            deed = script.pop(0) if script else self.chance.choices([*deeds], [*deeds.values()])[0]
            deed()
            self.steps += deed != self.trade
            if self.steps >= steps or number % AUDIT_TRANSACTIONS == 0:
                self.audit()
            if self.steps >= steps:
                return

    def pass_time(self) -> None:
        """Mostly moments, now and then hours or days: periods have to end too."""
        (seconds,) = self.chance.choices([0, 1, 60, 3 * 3_600, 10 * 86_400], [30, 50, 15, 4, 1])
        self.now += timedelta(microseconds=round(self.chance.random() * seconds * 1_000_000))

    # What can happen

    def trade(self) -> None:
        """One batch of reservations and bookings, with bookings that come twice or for nothing among them."""
        jobs = self.chance.choice((1, 4, 32, 256, 256))
        reservations = [self.order() for _ in range(self.chance.randint(0, jobs))]
        going_on = list(self.model.open.values())
        ending = self.chance.sample(going_on, min(len(going_on), jobs - len(reservations)))
        bookings = [self.end(charge.job) for charge in ending]
        if ending and self.chance.random() < 0.2:
            bookings.append(self.end(self.chance.choice(ending).job))
        if self.names and self.chance.random() < 0.2:
            bookings.append(self.end(self.model.charges[self.chance.choice(self.names)].job))
        if self.chance.random() < 0.1:
            bookings.append(self.end(self.order()))
        self.steps += len(reservations) + len(bookings)
        self.post(reservations, bookings)

    def set_budget(self) -> None:
        account, scope = self.scope()
        period = self.chance.choice(periods.PERIODS)
        counted = sum(self.model.counted[scope, period, periods.start(period, self.now)])
        # From far too little to enough for a while; what counts already may be more than that.
        limit = max(0, counted + self.chance.choice((-10_000_000, 0, 30_000_000, 10**9, 10**10, 10**10)))
        soft = self.chance.random() < 0.2
        self.ledger.set_budget(limit, period, team=account.team, key_id=scope[1], soft=soft, now=self.now)
        self.model.budgets[scope, period] = (limit, soft)
        self.look([], {account.team_id})

    def remove_budget(self) -> None:
        account, scope = self.scope()
        period = self.chance.choice(periods.PERIODS)
        there = self.model.budgets.pop((scope, period), None) is not None

        def remove(connection: Connection) -> None:
            accounts.remove_budget(connection, account.team, scope[1], period, now=self.now, actor="test")

        self.change(remove, works=there)

    def set_limit(self) -> None:
        rpm, concurrency = self.chance.choice(((0, None), (20, None), (1_000, None), (None, 0), (None, 300), (200, 200)))
        self.limit(*self.scope(), rpm, concurrency)

    def limit(self, account: Account, scope: Scope, rpm: int | None, concurrency: int | None) -> None:
        def limit(connection: Connection) -> None:
            accounts.set_limit(connection, account.team, scope[1], rpm=rpm, concurrency=concurrency, now=self.now, actor="test")

        before = self.model.limits.get(scope, (None, None))
        self.model.limits[scope] = (before[0] if rpm is None else rpm, before[1] if concurrency is None else concurrency)
        self.change(limit, works=True)

    def remove_limit(self) -> None:
        account, scope = self.scope()
        there = self.model.limits.pop(scope, None) is not None

        def remove(connection: Connection) -> None:
            accounts.remove_limit(connection, account.team, scope[1], now=self.now, actor="test")

        self.change(remove, works=there)

    def resolve(self) -> None:
        """An operator's word on a charge: it counts for one in review, and for no other."""
        ids = list(self.model.reviews) if self.chance.random() < 0.9 else self.names
        if not ids:
            return
        charge = self.model.charges[self.chance.choice(ids)]
        job = charge.job
        amount = self.chance.choice((None, 0, charge.settled, job.hold_micro_usd, 2 * job.hold_micro_usd))

        def word(connection: Connection) -> None:
            if amount is None:
                reviews.release(connection, job.charge_id, "not on the bill", now=self.now, actor="test")
            else:
                reviews.settle(connection, job.charge_id, amount, now=self.now, actor="test")

        in_review = charge.state == "review"
        self.change(word, works=in_review)
        if in_review:
            self.model.resolve(charge, amount, self.now)
            self.seen["resolved"] += 1
        self.look([job.charge_id], {job.team_id})

    def sweep(self) -> None:
        """What is overdue, round by round, since a sweep reads only so much at a time; then the reviews whose time is up."""
        due, expired = self.model.overdue(self.now, TIMEOUT), self.model.expired(self.now, REVIEW_TIME)
        swept: set[str] = set()
        while len(swept) < len(due):
            with self.ledger.database.reading() as connection:
                bookings = [overdue_booking(row) for row in find_overdue(connection, self.now)]
            found = {booking.charge_id for booking in bookings}
            assert found
            assert found <= due - swept
            swept |= found
            self.post([], bookings)
        with self.ledger.database.reading() as connection:
            assert not find_overdue(connection, self.now)
        while expired:
            with self.ledger.database.reading() as connection:
                ids = find_expired(connection, self.now, REVIEW_TIME)
            assert ids
            assert expired.issuperset(ids)
            expired.difference_update(ids)
            self.expire([self.model.charges[name] for name in ids])
        self.seen["swept"] += len(due)

    def expire(self, reviewed: list[Charge]) -> None:
        """A second sweep comes too late, and changes nothing."""
        for first in (True, False):
            with self.ledger.database.writing() as connection:
                for charge in reviewed:
                    expired = reviews.expire(connection, charge.job.charge_id, now=self.now, actor="test")
                    assert expired == first
            reviewed_again = self.chance.sample(reviewed, min(len(reviewed), 5))
            if first:
                for charge in reviewed:
                    self.model.resolve(charge, charge.settled + charge.held, self.now)
                self.seen["expired"] += len(reviewed)
                self.look([charge.job.charge_id for charge in reviewed], {charge.job.team_id for charge in reviewed})
            reviewed = reviewed_again

    def replay(self) -> None:
        """The outcomes of a process that could not book them, and died; by two others, one after the other."""
        going_on = list(self.model.open.values())
        ends = [self.end(charge.job) for charge in self.chance.sample(going_on, min(len(going_on), 50))]
        for _ in range(2):
            journal = Journal(self.journals)
            for start in range(0, len(ends), 20):
                journal.write(ends[start : start + 20])
            journal.close()
            with abandoned(self.journals) as bookings:
                assert bookings == ends
                self.post([], bookings)
            # What was left is gone, and some of it may have ended meanwhile.
            assert not list(self.journals.iterdir())
            self.seen["replayed"] += len(ends)
            self.pass_time()

    def replace_key(self) -> None:
        place = self.chance.randrange(len(self.accounts))
        old = self.accounts[place]

        def revoke(connection: Connection) -> None:
            accounts.revoke_key(connection, old.key_id, now=self.now, actor="test")

        self.change(revoke, works=True)
        self.model.revoked.add(old.key_id)
        self.post([self.order(old)], [])
        self.accounts[place] = self.ledger.another_key(old.team)

    # What it is made of

    def scope(self) -> tuple[Account, Scope]:
        account = self.chance.choice(self.accounts)
        return account, (account.team_id, self.chance.choice((None, account.key_id)))

    def order(self, account: Account | None = None) -> Reservation:
        order = Order(
            operation=self.chance.choice(("generation", "edit")),
            model=PRICES.name,
            size=self.chance.choice((AUTO, "1024x1024", "2048x1152", "3840x2160")),
            quality=self.chance.choice((AUTO, *PRICES.qualities)),
            n=self.chance.choice((1, 1, 1, 2, 10)),
            stream=self.chance.random() < 0.5,
        )
        repeat = None
        if self.chance.random() < 0.1:
            repeat = Repeatable(*(bytes(31) + bytes([self.chance.randrange(most)]) for most in (256, 2)))
        payer = account or self.chance.choice(self.accounts)
        job = reservation(payer, order, hold=CARD.hold(order), timeout_seconds=TIMEOUT.total_seconds())
        return replace(job, repeat=repeat)

    def end(self, job: Reservation) -> Booking:
        """Any end that an exchange can have."""
        order, hold = job.order, job.hold_micro_usd
        kind = self.chance.random()
        if kind < 0.1:
            return Booking(job.charge_id, job.team_id, unsent(order))
        if kind < 0.2:
            return Booking(job.charge_id, job.team_id, unanswered(order, hold))
        image = DeliveredImage(
            size=self.chance.choice((None, "1024x1024", "3840x2160")), quality=self.chance.choice((None, *PRICES.qualities))
        )
        delivery = Delivery(
            images=(image,) * self.chance.choice((0, order.n // 2, order.n, order.n, order.n)),
            complete=self.chance.random() < 0.7,
            error=self.chance.random() < 0.2,
            understood=self.chance.random() < 0.9,
        )
        status = self.chance.choice((200, 200, 200, 400, 500))
        return Booking(job.charge_id, job.team_id, answered(CARD, order, hold, status, delivery), upstream_status=status)

    # How it is done, and compared

    def post(self, reservations: list[Reservation], bookings: list[Booking]) -> None:
        with self.ledger.database.writing() as connection:
            decisions = post(connection, reservations, bookings, self.now)
        for booking in bookings:
            self.model.book(booking, self.now)
            self.seen[booking.outcome.state] += 1
        for job, decision in zip(reservations, decisions, strict=True):
            expected = self.model.reserve(job, self.now)
            assert decision == expected or type(decision) is expected, job
            self.seen[type(decision)] += 1
            if isinstance(decision, Admitted):
                self.names.append(job.charge_id)
        jobs: list[Reservation | Booking] = [*reservations, *bookings]
        self.look([job.charge_id for job in jobs], {job.team_id for job in jobs})

    def change(self, deed: Callable[[Connection], None], *, works: bool) -> None:
        try:
            with self.ledger.database.writing() as connection:
                deed(connection)
        except accounts.AccountError:
            assert not works
        else:
            assert works

    def look(self, ids: list[str], team_ids: set[int]) -> None:
        """The charges that were touched, and what counts against every budget of their teams now."""
        wanted = sorted(set(ids))
        with self.ledger.database.reading() as connection:
            rows = {row.id: row for row in connection.execute(select(charges).where(charges.c.id.in_(wanted)))}
            query = select(budgets, balances).join(balances).where(budgets.c.team_id.in_(team_ids))
            counted = connection.execute(query).all()
        assert rows.keys() == {name for name in wanted if name in self.model.charges}
        for name, row in rows.items():
            charge = self.model.charges[name]
            assert (row.state, row.settled_micro_usd, row.reserved_micro_usd, row.images_delivered) == charge.booked
            assert row.created_at == charge.created_at
        for row in counted:
            scope = (row.team_id, row.key_id)
            assert [row.settled_micro_usd, row.held_micro_usd] == self.model.counted[scope, row.period, row.period_start]
            assert self.model.budgets[scope, row.period] == (row.limit_micro_usd, row.soft)

    def audit(self) -> None:
        """Every row of the ledger."""
        self.look([], {account.team_id for account in self.accounts})
        with self.ledger.database.reading() as connection:
            check(connection)
            rows = connection.execute(select(charges)).all()
        assert {row.id: (row.state, row.settled_micro_usd, row.reserved_micro_usd, row.images_delivered) for row in rows} == {
            name: charge.booked for name, charge in self.model.charges.items()
        }


def test_a_ledger_agrees_with_its_rules_at_every_step(ledger: Ledger, chance: random.Random, tmp_path: Path) -> None:
    walk = Walk(ledger, chance, tmp_path / "journal")
    walk.run(STEPS)
    print(walk.seen)
    decisions = {Admitted, OverBudget, TooFast, Repeated, KeyRefused}
    events = {"settled", "released", "review", "resolved", "swept", "expired", "replayed"}
    assert decisions | events <= walk.seen.keys(), "a walk that does not get about shows nothing"
