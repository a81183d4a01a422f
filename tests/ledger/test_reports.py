"""What is read from the books, against sums that are added up here one charge at a time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, date, datetime, timedelta
from itertools import combinations
from typing import Any

from sqlalchemy import Connection, event

from proxy import periods
from proxy.ledger.reports import (
    GROUPS,
    PAGE_ROWS,
    BudgetStatus,
    list_budgets,
    list_charges,
    read_figures,
    spend,
)
from tests.ledger.ledgers import NOON, ORDER, PRICE, Account, Ledger, released, reservation, reviewed, settled

SUMS = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")

FIRST = datetime(2026, 1, 30, tzinfo=UTC)
MICROSECOND = timedelta(microseconds=1)


def fill(ledger: Ledger, charges: int = 60) -> None:
    """Charges of three keys over a few weeks, around midnights, weeks and months, in every state."""
    chance = random.Random(1)
    red, blue = ledger.account("red"), ledger.account("blue")
    who = [red, blue, ledger.another_key("red")]
    for _ in range(charges):
        order = replace(
            ORDER,
            n=chance.choice([1, 4]),
            size=chance.choice(["auto", "1024x1024"]),
            quality=chance.choice(["low", "high"]),
            operation=chance.choice(["generation", "edit"]),
        )
        job = reservation(chance.choice(who), order, hold=PRICE * order.n)
        at = FIRST + timedelta(days=chance.randrange(35)) + chance.choice([0, 1, -1]) * MICROSECOND
        ledger.post([job], now=at)
        size = "2048x1152" if order.size == "auto" else None
        bookings = [[settled(job, chance.randrange(9_999), size=size)], [released(job)], [reviewed(job, 100)], []]
        ledger.post(bookings=chance.choice(bookings), now=at)
    ledger.check()


Rows = list[dict[str, Any]]


def naive(rows: Rows, by: tuple[str, ...], since: datetime | None, until: datetime | None) -> Rows:
    """What ``spend`` should say, from a list of all charges."""
    found: dict[tuple[Any, ...], list[int]] = {}
    for row in rows:
        if (since is not None and row["created_at"] < since) or (until is not None and row["created_at"] >= until):
            continue
        day = row["created_at"].date()
        named = {
            **row,
            "key": row["key_id"],
            "day": day,
            "week": day - timedelta(days=day.isoweekday() - 1),
            "month": date(day.year, day.month, 1),
        }
        sums = found.setdefault(tuple(named[name] for name in by), [0, 0, 0, 0])
        amounts = (1, row["images_delivered"], row["settled_micro_usd"], row["reserved_micro_usd"])
        sums[:] = [one + more for one, more in zip(sums, amounts, strict=True)]
    return [dict(zip((*by, *SUMS), (*group, *sums), strict=True)) for group, sums in sorted(found.items())]


# Spend

SPANS = [
    (None, None),
    (FIRST + timedelta(days=3), None),
    (None, FIRST + timedelta(days=20)),
    (FIRST + timedelta(days=2), FIRST + timedelta(days=31)),
    (FIRST + timedelta(days=3) - MICROSECOND, None),
    (FIRST + timedelta(days=3, microseconds=1), FIRST + timedelta(days=20, microseconds=1)),
    (None, FIRST + timedelta(days=20) - MICROSECOND),
    (FIRST + timedelta(days=99), None),
    (FIRST + timedelta(days=9), FIRST + timedelta(days=9)),
]


def test_spend_by_every_group_and_pair_is_what_the_charges_add_up_to(ledger: Ledger) -> None:
    fill(ledger)
    groupings = [(), *((name,) for name in GROUPS), *combinations(GROUPS, 2), GROUPS, GROUPS[::-1]]
    with ledger.database.reading() as connection:
        rows = list(list_charges(connection))
        assert {row["created_at"].month for row in rows} >= {1, 2, 3}
        for by in groupings:
            for since, until in SPANS:
                assert spend(connection, by, since=since, until=until) == naive(rows, by, since, until), (by, since, until)


def test_a_week_and_a_month_are_named_by_their_first_day(ledger: Ledger) -> None:
    account = ledger.account()
    for at in (datetime(2026, 12, 31, 23, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC), datetime(2027, 1, 4, tzinfo=UTC)):
        ledger.post([reservation(account)], now=at)
    with ledger.database.reading() as connection:
        weeks = {row["week"]: row["requests"] for row in spend(connection, ["week"])}
        months = {row["month"]: row["requests"] for row in spend(connection, ["month"])}
    assert weeks == {date(2026, 12, 28): 2, date(2027, 1, 4): 1}
    assert months == {date(2026, 12, 1): 1, date(2027, 1, 1): 2}


@contextmanager
def statements(connection: Connection) -> Iterator[list[str]]:
    """The SQL that runs on a connection within the block."""
    seen: list[str] = []

    def see(_connection: object, _cursor: object, statement: str, *_: object) -> None:
        seen.append(statement)

    event.listen(connection, "before_cursor_execute", see)
    try:
        yield seen
    finally:
        event.remove(connection, "before_cursor_execute", see)


def test_whole_days_are_read_from_the_daily_sums_alone(ledger: Ledger) -> None:
    within = FIRST + MICROSECOND
    for since, until, table in (
        (None, None, "rollups"),
        (FIRST, FIRST + timedelta(days=40), "rollups"),
        (within, None, "charges"),
        (None, within, "charges"),
    ):
        with ledger.database.reading() as connection, statements(connection) as seen:
            spend(connection, GROUPS, since=since, until=until)
        assert len(seen) == 1
        assert [name for name in ("rollups", "charges") if name in seen[0]] == [table]


def test_the_work_for_whole_days_does_not_grow_with_the_charges(ledger: Ledger) -> None:
    account = ledger.account()
    rows: list[int] = []
    for _ in range(2):
        ledger.post([reservation(account) for _ in range(100)])
        with ledger.database.reading() as connection:
            rows.append(connection.exec_driver_sql("SELECT count(*) FROM rollups").scalar_one())
            assert spend(connection, ["team"])[0]["requests"] == 100 * len(rows)
    assert rows == [1, 1]


def test_empty_books(ledger: Ledger) -> None:
    with ledger.database.reading() as connection:
        for by in ((), ("team",), GROUPS):
            for since in (None, FIRST, FIRST + MICROSECOND):
                assert spend(connection, by, since=since) == []
        assert list(list_charges(connection)) == []
        assert list_budgets(connection, NOON) == []
        figures = read_figures(connection, NOON)
        assert (figures.budgets, figures.open_charges) == ([], {"reserved": 0, "forwarded": 0, "review": 0})


# Charges


CHOICES: list[tuple[dict[str, Any], Callable[[dict[str, Any]], bool]]] = [
    ({}, lambda row: True),
    ({"team": "red"}, lambda row: row["team"] == "red"),
    ({"team": "nobody"}, lambda row: False),
    ({"state": "settled"}, lambda row: row["state"] == "settled"),
    ({"state": "review", "team": "blue"}, lambda row: (row["state"], row["team"]) == ("review", "blue")),
    ({"since": FIRST + timedelta(days=9)}, lambda row: row["created_at"] >= FIRST + timedelta(days=9)),
    ({"until": FIRST + timedelta(days=9)}, lambda row: row["created_at"] < FIRST + timedelta(days=9)),
    ({"since": FIRST, "until": FIRST}, lambda row: False),
]


def test_charges_are_chosen(ledger: Ledger) -> None:
    fill(ledger)
    with ledger.database.reading() as connection:
        every = list(list_charges(connection))
        assert len(every) == 60
        for chosen, keep in CHOICES:
            assert list(list_charges(connection, **chosen)) == [row for row in every if keep(row)], chosen
    assert every == sorted(every, key=lambda row: (row["created_at"], row["id"]))


def test_a_listing_of_many_pages_has_every_charge_once_in_order(ledger: Ledger) -> None:
    account = ledger.account()
    jobs = [reservation(account) for _ in range(2 * PAGE_ROWS + 7)]
    # The last page first: the order is that of the time, not that of the writing.
    ledger.post(jobs[PAGE_ROWS:], now=NOON + MICROSECOND)
    ledger.post(jobs[:PAGE_ROWS], now=NOON)
    with ledger.database.reading() as connection:
        assert [row["id"] for row in list_charges(connection)] == [job.charge_id for job in jobs]


def test_a_listed_charge_says_all_that_is_known(ledger: Ledger) -> None:
    account = ledger.account()
    job = reservation(account, replace(ORDER, size="auto", stream=True))
    booking = replace(
        settled(job, 53_000, size="2048x1152"), upstream_cost_micro_usd=1, upstream_request_id="up", input_tokens=2
    )
    ledger.post([job])
    ledger.post(bookings=[booking], now=NOON + MICROSECOND)
    with ledger.database.reading() as connection:
        [row] = list_charges(connection)
    assert row == {
        "id": job.charge_id,
        "request_id": job.request_id,
        "team": "red",
        "key_id": account.key_id,
        "operation": "generation",
        "model": "gpt-image-2",
        "size": "2048x1152",
        "quality": "high",
        "asked_size": "auto",
        "asked_quality": "high",
        "stream": True,
        "images_requested": 1,
        "images_delivered": 1,
        "state": "settled",
        "hold_micro_usd": PRICE,
        "reserved_micro_usd": 0,
        "settled_micro_usd": 53_000,
        "basis": "requested",
        "reason": "delivered",
        "upstream_status": 200,
        "upstream_cost_micro_usd": 1,
        "upstream_request_id": "up",
        "input_tokens": 2,
        "output_tokens": None,
        "price_card": "test",
        "created_at": NOON,
        "finished_at": NOON + MICROSECOND,
    }


# Budgets


def one_of_each(ledger: Ledger) -> tuple[Account, Account]:
    red, other = ledger.account("red"), ledger.another_key("red")
    ledger.account("blue")
    for period in reversed(periods.PERIODS):
        ledger.set_budget(10 * PRICE, period)
    ledger.set_budget(5, "day", team="blue", soft=True)
    ledger.set_budget(7 * PRICE, "week", key_id=red.key_id)
    return red, other


def test_budgets_are_shown_in_their_current_period(ledger: Ledger) -> None:
    red, other = one_of_each(ledger)
    ended, going_on = reservation(red), reservation(other)
    ledger.post([ended, going_on])
    ledger.post(bookings=[settled(ended, 9)])

    def shown(now: datetime, **chosen: str) -> list[tuple[object, ...]]:
        with ledger.database.reading() as connection:
            found = list_budgets(connection, now, **chosen)
        return [(one.team, one.scope, one.period, one.settled_micro_usd, one.held_micro_usd, one.resets_at) for one in found]

    monday, december = datetime(2026, 11, 23, tzinfo=UTC), datetime(2026, 12, 1, tzinfo=UTC)
    of_red = [
        ("red", "team", "day", 9, PRICE, monday),
        ("red", "team", "week", 9, PRICE, monday),
        ("red", "team", "month", 9, PRICE, december),
        ("red", "team", "total", 9, PRICE, None),
    ]
    of_key = ("red", "key", "week", 9, 0, monday)
    assert shown(NOON) == [("blue", "team", "day", 0, 0, monday), *of_red, of_key]
    assert shown(NOON, team="red") == [*of_red, of_key]
    assert shown(NOON, team="red", key_id=red.key_id) == [*of_red, of_key]
    assert shown(NOON, team="red", key_id=other.key_id) == of_red
    week = monday + timedelta(days=7)
    assert shown(monday, team="red") == [
        ("red", "team", "day", 0, 0, monday + timedelta(days=1)),
        ("red", "team", "week", 0, 0, week),
        ("red", "team", "month", 9, PRICE, december),
        ("red", "team", "total", 9, PRICE, None),
        ("red", "key", "week", 0, 0, week),
    ]


def test_what_remains_of_a_budget_can_be_below_zero() -> None:
    status = BudgetStatus("red", None, "team", "day", True, 10, 7, 5, None)
    assert status.remaining_micro_usd == -2


def test_the_figures_count_what_is_open(ledger: Ledger) -> None:
    red, _ = one_of_each(ledger)
    jobs = [reservation(red) for _ in range(6)]
    ledger.post(jobs)
    ledger.post(bookings=[settled(jobs[0]), released(jobs[1]), reviewed(jobs[2]), reviewed(jobs[3])])
    with ledger.database.reading() as connection:
        figures = read_figures(connection, NOON)
        assert figures.open_charges == {"reserved": 0, "forwarded": 2, "review": 2}
        assert figures.budgets == list_budgets(connection, NOON)
