"""Teams, keys, budgets and limits: every change, what is refused, and the audit row of each."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Connection, select, text

from proxy import tokens
from proxy.ledger import accounts
from proxy.ledger.accounts import AccountError, KeyHolder
from proxy.ledger.decisions import Admitted, KeyRefused, OverBudget
from proxy.ledger.reports import list_budgets
from proxy.ledger.schema import audit, balances, keys
from tests.ledger.ledgers import NOON, PRICE, Ledger, released, reservation, settled

DAY = timedelta(days=1)


def holder(ledger: Ledger, key: str) -> KeyHolder | None:
    with ledger.database.reading() as connection:
        return accounts.holder_of(connection, tokens.digest(key))


def trail(ledger: Ledger) -> list[tuple[str, str, Any, Any]]:
    """The audit rows as (action, subject, before, after)."""
    with ledger.database.reading() as connection:
        rows = connection.execute(select(audit).order_by(audit.c.id)).all()
    assert {row.actor for row in rows} == {"test"}
    return [(row.action, row.subject, *(state and json.loads(state) for state in (row.before, row.after))) for row in rows]


# Teams


def test_names_that_a_team_can_have(ledger: Ledger) -> None:
    names = ["a", "7", "red", "R&D", "Team Rot 2", "a.b_c@d+e-f", "Ümläut", "デザイン", "x" * 64, "a.", "a_", "C++"]
    for name in names:
        account = ledger.account(name)
        ledger.set_budget(PRICE, team=name)
        with ledger.database.reading() as connection:
            assert accounts.show_team(connection, name)["keys"][0]["id"] == account.key_id
    with ledger.database.reading() as connection:
        assert {team["name"] for team in accounts.list_teams(connection)} == set(names)


def test_names_that_a_team_cannot_have(ledger: Ledger) -> None:
    wrong = [
        "",
        " ",
        " a",
        "a ",
        "-a",
        ".a",
        "_",
        "_a",
        "a-",
        "a/b",
        "a\n",
        "a\nb",
        "a\0b",
        "a,b",
        'a"b',
        "a\\",
        "a)",
        "x" * 65,
        "🫘",
    ]
    before = ledger.content()
    for name in wrong:
        with pytest.raises(AccountError, match="can't be a team's name"), ledger.database.writing() as connection:
            accounts.add_team(connection, name, now=NOON, actor="test")
    assert ledger.content() == before


def test_a_name_is_taken_for_ever(ledger: Ledger) -> None:
    ledger.account("red")
    with ledger.database.writing() as connection:
        accounts.archive_team(connection, "red", now=NOON, actor="test")
    with pytest.raises(AccountError, match="exists already"):
        ledger.account("red")


Change = Callable[[Connection, str], object]


def _key_of_blue(connection: Connection) -> str:
    found: str = connection.scalars(select(keys.c.id).where(keys.c.team_id == 2)).one()
    return found


REFUSED_CHANGES: list[tuple[Change, str]] = [
    (lambda c, _: accounts.show_team(c, "rde"), "there is no team named 'rde'; did you mean 'red'?"),
    (
        lambda c, _: accounts.archive_team(c, "qqqq", now=NOON, actor="test"),
        "there is no team named 'qqqq' (add_team)",
    ),
    (lambda c, _: accounts.add_key(c, "gone", now=NOON, actor="test"), "team 'gone' is archived"),
    (lambda c, _: accounts.add_key(c, "red", name="x" * 65, now=NOON, actor="test"), "at most 64 printable characters"),
    (lambda c, _: accounts.add_key(c, "red", name="a\tb", now=NOON, actor="test"), "at most 64 printable characters"),
    (lambda c, _: accounts.revoke_key(c, "key_x", now=NOON, actor="test"), "there is no key 'key_x' (list_keys)"),
    (lambda c, _: accounts.rotate_key(c, "key_x", overlap=DAY, now=NOON, actor="test"), "there is no key 'key_x'"),
    (lambda c, _: accounts.list_keys(c, "blau"), "there is no team named 'blau'"),
    (
        lambda c, _: accounts.set_budget(c, "red", _key_of_blue(c), "day", 1, soft=False, now=NOON, actor="test"),
        "is not of team 'red' (list_keys)",
    ),
    (
        lambda c, key: accounts.set_budget(c, "blue", key, "day", 1, soft=False, now=NOON, actor="test"),
        "is not of team 'blue'",
    ),
    (
        lambda c, _: accounts.remove_budget(c, "red", None, "week", now=NOON, actor="test"),
        "red has no budget per week (list_budgets)",
    ),
    (
        lambda c, key: accounts.remove_budget(c, "red", key, "day", now=NOON, actor="test"),
        "has no budget per day",
    ),
    (lambda c, _: accounts.set_limit(c, "red", None, now=NOON, actor="test"), "say what to limit"),
    (lambda c, _: accounts.set_limit(c, "red", None, rpm=-1, now=NOON, actor="test"), "a whole number from 0"),
    (lambda c, _: accounts.remove_limit(c, "red", None, now=NOON, actor="test"), "red has no limit"),
]


def test_a_change_that_cannot_be_made_says_what_to_do_and_changes_nothing(ledger: Ledger) -> None:
    key_id = ledger.account("red").key_id
    ledger.account("blue")
    ledger.account("gone")
    ledger.set_budget(PRICE, "day")
    with ledger.database.writing() as connection:
        accounts.archive_team(connection, "gone", now=NOON, actor="test")
    before = ledger.content()
    for change, message in REFUSED_CHANGES:
        with pytest.raises(AccountError) as refused, ledger.database.writing() as connection:
            change(connection, key_id)
        assert message in f"{refused.value} ({refused.value.remedy})"
        assert ledger.content() == before, message


# Keys


def test_the_database_holds_no_secret(ledger: Ledger, tmp_path: Path) -> None:
    secrets = [ledger.account().key]
    with ledger.database.writing() as connection:
        [row] = accounts.list_keys(connection)
        secrets.append(accounts.rotate_key(connection, row["id"], overlap=DAY, now=NOON, actor="test").key)
        stored = {(row.digest, row.last_four) for row in connection.execute(select(keys))}
    assert stored == {(tokens.digest(secret), secret[-4:]) for secret in secrets}
    assert all(holder(ledger, secret) for secret in secrets)
    with ledger.database.reading() as connection:
        if connection.dialect.name == "sqlite":
            everything = b"".join(path.read_bytes() for path in tmp_path.iterdir())
        else:
            tables = connection.scalars(text("SELECT tablename FROM pg_tables WHERE schemaname = 'public'")).all()
            rows = [connection.scalars(text(f'SELECT t::text FROM "{table}" t')).all() for table in tables]
            everything = repr(rows).encode()
    assert b"key.rotate" in everything, "the search looks where the rows are"
    for secret in secrets:
        # Neither whole nor its half that would let the rest be guessed.
        assert secret.removeprefix(tokens.KEY_PREFIX)[:20].encode() not in everything


def test_a_key_expires_at_its_instant(ledger: Ledger) -> None:
    account = ledger.account(lifetime=DAY)
    found = holder(ledger, account.key)
    assert found == KeyHolder(account.key_id, account.team_id, "red", NOON + DAY, None, None)
    assert [found.valid(NOON + DAY + timedelta(microseconds=late)) for late in (-1, 0, 1)] == [True, False, False]
    assert holder(ledger, tokens.new_key()) is None


@pytest.mark.parametrize(
    ("lifetime", "at", "overlap", "old_ends", "new_ends"),
    [
        pytest.param(None, NOON, DAY, NOON + DAY, None, id="never expires"),
        pytest.param(None, NOON, 0 * DAY, NOON, None, id="no overlap"),
        pytest.param(10 * DAY, NOON + 4 * DAY, DAY, NOON + 5 * DAY, NOON + 14 * DAY, id="the new one lives as long again"),
        pytest.param(10 * DAY, NOON + 9 * DAY, 5 * DAY, NOON + 10 * DAY, NOON + 19 * DAY, id="the old one is not prolonged"),
    ],
)
def test_rotation_lets_the_old_key_work_for_a_while(
    ledger: Ledger, lifetime: timedelta | None, at: datetime, overlap: timedelta, old_ends: datetime, new_ends: datetime | None
) -> None:
    account = ledger.account(lifetime=lifetime)
    with ledger.database.writing() as connection:
        new = accounts.rotate_key(connection, account.key_id, overlap=overlap, now=at, actor="test")
    old = holder(ledger, account.key)
    assert old is not None
    assert old.expires_at == old_ends
    assert (new.team, new.expires_at) == ("red", new_ends)
    fresh = holder(ledger, new.key)
    assert fresh is not None
    assert fresh.expires_at == new_ends
    assert fresh.valid(at)
    just_before, then = old_ends - timedelta(microseconds=1), old_ends
    assert isinstance(ledger.post([reservation(account)], now=just_before)[0], Admitted)
    assert ledger.post([reservation(account)], now=then) == [KeyRefused()]


def test_a_key_is_rotated_once(ledger: Ledger) -> None:
    account = ledger.account("red")
    with ledger.database.writing() as connection:
        successor = accounts.rotate_key(connection, account.key_id, overlap=DAY, now=NOON, actor="test")
        with pytest.raises(accounts.AccountError, match=successor.id):
            accounts.rotate_key(connection, account.key_id, overlap=DAY, now=NOON, actor="test")


def test_a_key_that_does_not_work_is_not_rotated(ledger: Ledger) -> None:
    expired, revoked, archived = ledger.account(lifetime=DAY), ledger.another_key("red"), ledger.account("gone")
    with ledger.database.writing() as connection:
        accounts.revoke_key(connection, revoked.key_id, now=NOON, actor="test")
        accounts.archive_team(connection, "gone", now=NOON, actor="test")
    before = ledger.content()
    for account in (expired, revoked, archived):
        with pytest.raises(AccountError), ledger.database.writing() as connection:
            accounts.rotate_key(connection, account.key_id, overlap=DAY, now=NOON + DAY, actor="test")
    assert ledger.content() == before


def test_a_rotation_beside_a_revocation_makes_no_key(ledger: Ledger) -> None:
    account = ledger.account()
    refused: list[AccountError] = []

    def rotate() -> None:
        try:
            with ledger.database.writing() as connection:
                accounts.rotate_key(connection, account.key_id, overlap=DAY, now=NOON, actor="test")
        except AccountError as error:
            refused.append(error)

    rotation = threading.Thread(target=rotate)
    with ledger.database.writing() as connection:
        accounts.revoke_key(connection, account.key_id, now=NOON, actor="test")
        rotation.start()
        # On SQLite nobody can be seen to wait; a moment lets it come as far as it can.
        wait_for_a_waiter(ledger) if connection.dialect.name == "postgresql" else rotation.join(0.05)
    rotation.join()
    assert len(refused) == 1
    with ledger.database.reading() as connection:
        assert [key["id"] for key in accounts.list_keys(connection)] == [account.key_id]


def wait_for_a_waiter(ledger: Ledger) -> None:
    """Come back when somebody waits for a lock of a transaction that is going on."""
    for _ in range(1_000):
        with ledger.database.reading() as connection:
            if connection.scalar(text("SELECT count(*) FROM pg_locks WHERE NOT granted")):
                return
        time.sleep(0.01)
    raise AssertionError("nobody waits")


def test_what_is_ended_twice_ended_the_first_time(ledger: Ledger) -> None:
    account = ledger.account()
    for later in (0 * DAY, DAY):
        with ledger.database.writing() as connection:
            key = accounts.revoke_key(connection, account.key_id, now=NOON + later, actor="test")
            team = accounts.archive_team(connection, "red", now=NOON + later, actor="test")
        assert (key["revoked_at"], team["archived_at"]) == (NOON, NOON)
    assert [action for action, *_ in trail(ledger)] == ["team.add", "key.add", "key.revoke", "team.archive"]


# Budgets


def test_a_new_budget_counts_what_the_running_period_has_seen(ledger: Ledger) -> None:
    account, other = ledger.account(), ledger.another_key()
    long_ago, last_week, today = datetime(2025, 1, 1, tzinfo=NOON.tzinfo), NOON - 7 * DAY, NOON
    jobs = [reservation(who) for who in (account, other) for _ in range(3)]
    for job, now in zip(jobs, (long_ago, last_week, today) * 2, strict=True):
        ledger.post([job], now=now)
    ledger.post(bookings=[settled(jobs[0], 1), settled(jobs[1], 20), released(jobs[3]), settled(jobs[5], 300)])
    for period in ("day", "week", "month", "total"):
        ledger.set_budget(10 * PRICE, period)
        ledger.set_budget(10 * PRICE, period, key_id=account.key_id)
    with ledger.database.reading() as connection:
        counted = {
            (one.scope, one.period): (one.settled_micro_usd, one.held_micro_usd) for one in list_budgets(connection, NOON)
        }
    assert counted == {
        ("team", "day"): (300, PRICE),
        ("team", "week"): (300, PRICE),
        ("team", "month"): (320, 2 * PRICE),
        ("team", "total"): (321, 2 * PRICE),
        ("key", "day"): (0, PRICE),
        ("key", "week"): (0, PRICE),
        ("key", "month"): (20, PRICE),
        ("key", "total"): (21, PRICE),
    }
    ledger.check()


def test_replacing_a_budget_keeps_what_counts_against_it(ledger: Ledger) -> None:
    account = ledger.account()
    ledger.set_budget(2 * PRICE, "day")
    first, second = reservation(account), reservation(account)
    assert ledger.post([first]) == [Admitted(PRICE)]
    ledger.set_budget(PRICE - 1, "day")
    assert ledger.post([second]) == [OverBudget("team", "day", PRICE - 1, -1, PRICE, NOON.replace(hour=0) + DAY)]
    ledger.set_budget(0, "day", soft=True)
    assert ledger.post([second]) == [Admitted(None)]
    with ledger.database.reading() as connection:
        [budget] = list_budgets(connection, NOON)
    assert (budget.soft, budget.held_micro_usd, budget.remaining_micro_usd) == (True, 2 * PRICE, -2 * PRICE)
    ledger.check()


def test_a_budget_taken_away_and_set_again_counts_all_of_the_period(ledger: Ledger) -> None:
    account = ledger.account()
    jobs = [reservation(account) for _ in range(3)]
    ledger.set_budget(PRICE)
    ledger.post(jobs[:1])
    with ledger.database.writing() as connection:
        accounts.remove_budget(connection, "red", None, "total", now=NOON, actor="test")
        assert connection.execute(select(balances)).all() == []
    assert ledger.post(jobs[1:2]) == [Admitted(None)]
    ledger.post(bookings=[settled(jobs[0], 5)])
    ledger.set_budget(2 * PRICE)
    assert ledger.post(jobs[2:]) == [OverBudget("team", "total", 2 * PRICE, PRICE - 5, PRICE, None)]
    ledger.check()


# The audit


def test_every_change_leaves_what_was_before_and_after(ledger: Ledger) -> None:
    account = ledger.account(lifetime=DAY)
    ledger.set_budget(5, "day")
    ledger.set_budget(7, "day", soft=True)
    ledger.set_budget(9, key_id=account.key_id)
    with ledger.database.writing() as connection:
        accounts.remove_budget(connection, "red", None, "day", now=NOON, actor="test")
        accounts.set_limit(connection, "red", None, rpm=3, now=NOON, actor="test")
        accounts.set_limit(connection, "red", None, concurrency=2, now=NOON, actor="test")
        accounts.remove_limit(connection, "red", None, now=NOON, actor="test")
        new = accounts.rotate_key(connection, account.key_id, overlap=timedelta(hours=1), now=NOON, actor="test")
        accounts.revoke_key(connection, new.id, now=NOON, actor="test")
        accounts.archive_team(connection, "red", now=NOON, actor="test")
    noon, tomorrow, soon = (at.isoformat() for at in (NOON, NOON + DAY, NOON + timedelta(hours=1)))
    team = {"name": "red", "created_at": noon, "archived_at": None}
    key = {
        "id": account.key_id,
        "team": "red",
        "name": "",
        "last_four": account.key[-4:],
        "created_at": noon,
        "expires_at": tomorrow,
        "revoked_at": None,
    }
    other = key | {"id": new.id, "last_four": new.key[-4:]}
    five, seven = ({"period": "day", "limit_micro_usd": limit, "soft": limit == 7} for limit in (5, 7))
    nine = {"period": "total", "limit_micro_usd": 9, "soft": False}
    three, both = {"rpm": 3, "concurrency": None}, {"rpm": 3, "concurrency": 2}
    assert trail(ledger) == [
        ("team.add", "red", None, team),
        ("key.add", account.key_id, None, key),
        ("budget.set", "red", None, five),
        ("budget.set", "red", five, seven),
        ("budget.set", f"red/{account.key_id}", None, nine),
        ("budget.remove", "red", seven, None),
        ("limit.set", "red", None, three),
        ("limit.set", "red", three, both),
        ("limit.remove", "red", both, None),
        ("key.add", new.id, None, other),
        ("budget.set", f"red/{new.id}", None, nine),
        ("key.rotate", account.key_id, key, key | {"expires_at": soon}),
        ("key.revoke", new.id, other, other | {"revoked_at": noon}),
        ("team.archive", "red", team, team | {"archived_at": noon}),
    ]
