"""Listings page by page: whole, in order, and unmoved by what is added meanwhile."""

from __future__ import annotations

import json
from base64 import urlsafe_b64encode
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest

from proxy.ledger import accounts, pages, reports
from proxy.ledger.decisions import Admitted
from proxy.ledger.pages import Page, Place, Turn
from tests.admin.office import Office
from tests.ledger.ledgers import NOON, Account, Ledger, reservation, reviewed, settled

LISTINGS = ("/teams", "/keys", "/budgets", "/limits", "/charges", "/reviews", "/spend?by=team,key,day", "/audit")


def fill(ledger: Ledger) -> list[Account]:
    """Three teams with a key each, budgets and limits of both, and charges of which two and two begin in one microsecond."""
    teams = [ledger.account(name) for name in ("red", "blue", "green")]
    for number, account in enumerate(teams):
        for key_id in (None, account.key_id):
            ledger.set_budget(10**9, team=account.team, key_id=key_id)
            with ledger.database.writing() as connection:
                accounts.set_limit(connection, account.team, key_id, rpm=1_000 + number, now=NOON, actor="test")
    for number in range(9):
        account = teams[number % 3]
        at = NOON + timedelta(microseconds=number // 2)
        job = reservation(account)
        (admitted,) = ledger.post([job], now=at)
        assert isinstance(admitted, Admitted)
        ledger.post([], [reviewed(job) if number % 3 else settled(job)], now=at)
    return teams


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger(database_url)
    yield opened
    opened.close()


def test_pages_of_any_size_are_the_whole(ledger: Ledger) -> None:
    fill(ledger)
    with ledger.database.reading() as connection:
        listings: dict[str, Any] = {
            "teams": lambda turn: pages.list_teams(connection, turn),
            "keys": lambda turn: pages.list_keys(connection, turn),
            "budgets": lambda turn: pages.list_budgets(connection, turn, NOON),
            "limits": lambda turn: pages.list_limits(connection, turn),
            "charges": lambda turn: pages.list_charges(connection, turn),
            "newest charges": lambda turn: pages.list_charges(connection, turn, newest_first=True),
            "charges of a span": lambda turn: pages.list_charges(connection, turn, since=NOON + timedelta(microseconds=2)),
            "audit": lambda turn: pages.list_audit(connection, turn),
            "newest audit": lambda turn: pages.list_audit(connection, turn, newest_first=True),
        }
        for name, listing in listings.items():
            whole = walk(listing, 1000)
            assert whole, name
            for size in (1, 2, 3, len(whole) - 1, len(whole), len(whole) + 1):
                assert walk(listing, size) == whole, (name, size)
        assert walk(listings["charges"], 4) == list(reports.list_charges(connection))
        assert walk(listings["newest charges"], 4) == list(reports.list_charges(connection))[::-1]
        assert walk(listings["audit"], 4) == list(reports.list_audit(connection))
        assert by_id(walk(listings["keys"], 2)) == by_id(accounts.list_keys(connection))
        assert sorted(walk(listings["teams"], 2), key=str) == sorted(accounts.list_teams(connection), key=str)
        assert sorted(walk(listings["limits"], 2), key=str) == sorted(accounts.list_limits(connection), key=str)
        assert sorted(walk(listings["budgets"], 2), key=str) == sorted(
            map(pages.budget_row, reports.list_budgets(connection, NOON)), key=str
        )


def walk(listing: Any, size: int) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    last: Place | None = None
    while True:
        page: Page = listing(Turn(size, last))
        assert len(page.rows) <= size
        rows += page.rows
        if page.last is None:
            return rows
        last = page.last


def by_id(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return sorted(rows, key=lambda row: str(row["id"]))


def test_what_is_added_meanwhile_moves_nothing(ledger: Ledger) -> None:
    red = fill(ledger)[0]
    with ledger.database.reading() as connection:
        before = [row["id"] for row in reports.list_charges(connection)]
        first = pages.list_charges(connection, Turn(4))
        newest = pages.list_charges(connection, Turn(4), newest_first=True)
    # One before all, one in the middle of what was shown, one behind.
    for at in (NOON - timedelta(days=1), NOON, NOON + timedelta(days=1)):
        ledger.post([reservation(red)], now=at)
    with ledger.database.reading() as connection:
        rest = [row["id"] for row in pages.list_charges(connection, Turn(1000, first.last)).rows]
        older = [row["id"] for row in pages.list_charges(connection, Turn(1000, newest.last), newest_first=True).rows]
    assert [row["id"] for row in first.rows] + rest[:-1] == before
    assert [row["id"] for row in newest.rows] + [one for one in older if one in before] == before[::-1]
    assert len(rest) == len(before) - 4 + 1


def test_a_page_reads_no_more_than_itself(tmp_path: Path) -> None:
    """The place is found by an index, and not by counting rows. SQLite says in words how it would go about it."""
    ledger = Ledger(f"sqlite:///{tmp_path / 'books.db'}")
    fill(ledger)
    seen: list[str] = []
    with ledger.database.reading() as connection:
        place = pages.list_charges(connection, Turn(2)).last
        raw: Any = connection.connection.driver_connection
        raw.set_trace_callback(seen.append)
        pages.list_charges(connection, Turn(2, place))
        raw.set_trace_callback(None)
        (query,) = [statement for statement in seen if statement.startswith("SELECT")]
        plan = " ".join(str(row[3]) for row in connection.exec_driver_sql(f"EXPLAIN QUERY PLAN {query}"))
    ledger.close()
    assert "SEARCH charges USING INDEX ix_charges_created_at" in plan


@pytest.mark.parametrize("path", LISTINGS)
def test_cursors_lead_from_page_to_page(office: Office, path: str) -> None:
    fill_office(office)
    name, given = split(path)
    whole = office.read(name, **given)["data"]
    assert len(whole) >= 2
    rows: list[dict[str, Any]] = []
    told: dict[str, str] = {}
    while True:
        page = office.read(name, **given, **told, limit=1)
        rows += page["data"]
        assert page["has_more"] == (page["next_cursor"] is not None)
        if page["next_cursor"] is None:
            break
        told = {"cursor": page["next_cursor"]}
    assert rows == whole


def fill_office(office: Office) -> None:
    """Two of everything."""
    _, blue = office.gateway.add_team("blue")
    for team in ("red", "blue"):
        office.change("PUT", f"/teams/{team}/budgets/month", limit_micro_usd=10**9)
        office.change("PUT", f"/teams/{team}/limit", rpm=1000)
    for key in (office.gateway.key, blue):
        office.gateway.client.headers["authorization"] = f"Bearer {key}"
        office.review()


def split(path: str) -> tuple[str, dict[str, str]]:
    """A path, and what it asks."""
    name, _, query = path.partition("?")
    return name, dict(part.split("=") for part in query.split("&") if part)


def cursor(*parts: object) -> str:
    return urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    ("path", "bad"),
    [
        ("/teams", "x"),
        ("/teams", "é"),
        ("/teams", "=" * 2001),
        ("/teams", cursor()),
        ("/teams", cursor("teams")),
        ("/teams", cursor("teams", 1, 2)),
        ("/teams", cursor("keys", 1)),
        ("/teams", cursor("teams", "1")),
        ("/teams", cursor("teams", True)),
        ("/teams", cursor("teams", 1.5)),
        ("/teams", cursor("teams", -1)),
        ("/teams", cursor("teams", 1 << 63)),
        ("/teams", cursor("teams", None)),
        ("/teams", cursor("teams", [1])),
        ("/keys", cursor("keys", 1)),
        ("/keys", cursor("keys", "a\0")),
        ("/keys", cursor("keys", "\ud800")),
        ("/charges", cursor("charges", 1)),
        ("/charges", cursor("charges", "chg", 1)),
        ("/charges", cursor("reviews", 1, "chg")),
        ("/spend?by=team", cursor("spend by day", "2026-11-22")),
        ("/audit", cursor({"a": "b"}, 1)),
    ],
)
def test_a_cursor_of_another_making_is_a_problem(shared: Office, path: str, bad: str) -> None:
    name, given = split(path)
    problem = shared.refused(400, "GET", name, params={**given, "cursor": bad})
    assert problem["field"] == "cursor"


def test_the_bounds_of_a_page(shared: Office) -> None:
    assert len(shared.read("/audit", limit=1)["data"]) == 1
    assert shared.read("/audit", limit=1000)["has_more"] is False
