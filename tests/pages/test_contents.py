"""What pages show and what their forms change: the numbers of the books, in few queries, with every text as text."""

from __future__ import annotations

import csv
import io
import json
import re
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from hashlib import sha256
from html import unescape
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest
from sqlalchemy import Engine, event

from proxy import demo
from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.pages import requests
from proxy.pages.export import csv_response
from proxy.pages.routes import PAGES
from tests.live import PATIENCE_SECONDS, PRICE_MICRO_USD, now
from tests.pages.house import House, error_at, open_house, text_of

ROOT = Path(__file__).parent.parent.parent
TEMPLATES = sorted((ROOT / "proxy/pages/templates").glob("*.html"))
VENDOR = ROOT / "proxy/pages/static/vendor"

QUERIES_MAX = 12


@contextmanager
def statements() -> Iterator[list[str]]:
    """The statements that are asked for the event loop meanwhile."""
    seen: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if threading.current_thread().name.startswith("ledger-reader") and statement != "BEGIN":
            seen.append(statement)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield seen
    finally:
        event.remove(Engine, "before_cursor_execute", note)


@contextmanager
def parameters() -> Iterator[list[tuple[str, Any]]]:
    """The same with what they are asked for."""
    given: list[tuple[str, Any]] = []

    def note(_connection: Any, _cursor: Any, statement: str, values: Any, *_: Any) -> None:
        if threading.current_thread().name.startswith("ledger-reader") and statement != "BEGIN":
            given.append((statement, values))

    event.listen(Engine, "before_cursor_execute", note)
    try:
        yield given
    finally:
        event.remove(Engine, "before_cursor_execute", note)


def test_no_page_takes_more_than_its_queries(house: House) -> None:
    house.gateway.set_budget(10_000_000)
    house.order()
    charge_id = house.review()["id"]
    visitor = house.operator()
    for page in PAGES:
        if page.method == "GET":
            with statements() as seen:
                path = page.path.format(team="red")
                answer = visitor.get(path + ("?request_id=" + charge_id if path.endswith("/cost") else ""))
            assert answer.status_code in (200, 404, 422), (page.path, answer.text)
            assert 1 <= len(seen) <= QUERIES_MAX, (page.path, seen)
            # Sums come from the daily sums. Charges are looked at where they are few: open ones, an hour's, a page's, one.
            for statement in seen:
                if "FROM charges" in statement and "sum(" in statement.lower():
                    assert "charges.state IN" in statement, (page.path, statement)


# What lies behind a page of requests, however many there are: which index, by state and whether a key is named.
INDEXES = [
    *((state, key, "ix_charges_open") for state in ("reserved", "forwarded", "review") for key in (False, True)),
    *(("released", key, "ix_charges_released") for key in (False, True)),
    *((state, False, "ix_charges_team_id_created_at") for state in ("", "settled")),
    *((state, True, "ix_charges_key_id_created_at") for state in ("", "settled")),
]


def test_no_page_reads_all_charges_or_sums(home: House) -> None:
    visitor = home.operator()
    asked = [page.path.format(team="red") for page in PAGES if page.method == "GET"]
    filtered = [
        (f"/teams/red/requests{kind}?state={state}{f'&key_id={home.gateway.key_id}' if key else ''}{more}", index)
        for state, key, index in INDEXES
        for more in ("", "&since=7d", "&until=2026-01-01", "&since=30d&until=7d")
        for kind in ("", ".csv")
    ]
    with home.gateway.database.reading() as connection:
        driver: Any = connection.connection.driver_connection
        for path, index in [*((path, "") for path in asked), *filtered]:
            with statements() as seen, parameters() as given:
                visitor.get(path)
            assert len(seen) == len(given)
            plans = [driver.execute(f"EXPLAIN QUERY PLAN {one}", values).fetchall() for one, values in given]
            steps = [row[3] for plan in plans for row in plan]
            assert not [step for step in steps if re.match(r"SCAN (charges|rollups|team_days)", step)], (path, steps)
            # All teams' sums are read by day and team alone.
            assert not [one for one in seen if "FROM rollups" in one and "rollups.team_id = " not in one], path
            if index:
                (own,) = [step for step in steps if step.startswith("SEARCH charges")]
                assert f"USING INDEX {index} " in own, (path, own)


def test_a_key_of_another_team_has_no_requests_here(house: House) -> None:
    other_id, other = house.gateway.add_team("green")
    house.order(other)
    house.gateway.charge_when_ended()
    visitor = house.operator()
    assert "1 of 1 settled" in visitor.shown(f"/teams/green/requests?key_id={other_id}")
    for key_id in (other_id, "nobody's"):
        for state in ("", "settled", "released", "review"):
            shown = visitor.shown(f"/teams/red/requests?key_id={key_id}&state={state}")
            assert "No request is like that." in shown


def test_the_overview_says_what_the_books_say(house: House) -> None:
    house.gateway.set_budget(10_000_000)
    green_id, green = house.gateway.add_team("green")
    house.gateway.set_budget(300_000, "day", team="green", key_id=green_id)
    house.order(n=1)
    house.gateway.charge_when_ended()
    visitor = house.operator()
    shown = visitor.shown("")
    assert "red $10.0000 per month $0.2107 $9.7893" in shown
    assert "green none; this month: $0.0000" in shown
    assert "Spent and held this month $0.2107" in shown
    assert "In review $0.0000 0 charges" in shown
    charge = house.review()
    live = visitor.shown("/figures")
    assert "In review $0.2107 1 charge" in live
    assert "red $10.0000 per month $0.4214 $9.5786" in live
    assert charge["id"] in visitor.get("/reviews").text
    assert house.order(green, n=2).status_code == 429
    assert house.visitor().client.post("/v1/images/generations").status_code == 401
    deadline = time.monotonic() + PATIENCE_SECONDS
    while "without a valid key invalid_api_key 1" not in (live := visitor.shown("/figures")):
        assert time.monotonic() < deadline, live
        time.sleep(0.1)
    assert f"green insufficient_quota 1 {now().date()}" in live


def cells(html: str, table: str) -> list[list[str]]:
    """A table's rows with the numbers that its chart is drawn from."""
    (found,) = re.findall(rf'<table id="{table}">.*?<tbody>(.*?)</tbody>', html, re.DOTALL)
    return [
        [re.search(r"<th[^>]*>(.*?)</th>", row, re.DOTALL)[1].strip(), *re.findall(r'data-value="(-?\d+)"', row)]  # type: ignore[index]
        for row in re.findall(r"<tr>(.*?)</tr>", found, re.DOTALL)
    ]


def rows(text: str) -> list[list[str]]:
    return list(csv.reader(io.StringIO(text)))


def test_chart_table_and_file_have_the_same_numbers(tmp_path: Path) -> None:
    url, at = f"sqlite:///{tmp_path / 'books.db'}", datetime.now(UTC)
    database = Database(url)
    migrate(database)
    demo.fill(database, at)
    with database.reading() as connection:
        first = at.date() - timedelta(days=29)
        spent = reports.spend(connection, ("team", "day"), since=datetime(first.year, first.month, first.day, tzinfo=UTC))
        sizes = reports.spend(connection, ("team", "size"), since=datetime(first.year, first.month, first.day, tzinfo=UTC))
        monthly = next(one for one in reports.list_budgets(connection, at) if one.team == "design")
    database.close()
    with open_house(url, tmp_path) as house:
        visitor = house.operator()
        html = visitor.get("").text
        file = rows(visitor.get("/spend.csv").text)
        assert cells(html, "days") == file[1:]
        head = [name.removesuffix(" micro_usd") for name in file[0][1:]]
        told = {(team, row[0]): int(amount) for row in file[1:] for team, amount in zip(head, row[1:], strict=True)}
        assert {place: amount for place, amount in told.items() if amount} == {
            (row["team"], row["day"].isoformat()): row["settled_micro_usd"] for row in spent if row["settled_micro_usd"]
        }
        html = visitor.get("/teams/design").text
        split = rows(visitor.get("/teams/design/split.csv?by=size&days=30").text)
        assert cells(html, "split-table") == [[row[0], row[3]] for row in split[1:]]
        assert {row[0]: int(row[3]) for row in split[1:]} == {
            row["size"]: row["settled_micro_usd"] for row in sizes if row["team"] == "design"
        }
        burned = rows(visitor.get("/teams/design/burn-down.csv").text)
        shown = cells(html, "burn-down")
        for (day, known, forecast), row in zip(burned[1:], shown, strict=True):
            assert [day, known] == [row[0], row[1] if known else ""]
            # What is to come goes by the clock, which has moved on by a moment: by less than a minute of a month.
            assert not forecast or abs(int(forecast) - int(row[-2])) <= int(forecast) / 40_000
        today = next(row for row in burned if row[0] == at.date().isoformat())
        assert today[1:] == [str(monthly.remaining_micro_usd)] * 2
        for by in ("quality", "operation", "key", "day"):
            file = rows(visitor.get(f"/teams/design/split.csv?by={by}&days=90").text)
            assert sum(int(row[3]) for row in file[1:]) > 0
            assert cells(visitor.get(f"/teams/design?by={by}&days=90").text, "split-table")


# Forms


def test_an_operator_makes_a_team_its_keys_budgets_and_limits(house: House) -> None:
    visitor = house.operator()
    assert visitor.done("/teams", {"name": "blue"}).headers["location"] == "/dashboard/teams/blue?said=team_added"
    made = visitor.done("/teams/blue/keys", {"name": "website", "expires": "90d"})
    (key,) = re.findall(r"sk-bm-[a-z2-7]{39}", made.text)
    assert made.headers["cache-control"] == "no-store"
    page = visitor.get("/teams/blue").text
    assert key not in page
    (key_id,) = set(re.findall(r"key_[0-9A-Z]{26}", page))
    visitor.done("/teams/blue/budgets", {"usd": "$60", "period": "month", "key_id": ""})
    visitor.done("/teams/blue/budgets", {"usd": "0.5", "period": "day", "key_id": key_id, "soft": "on"})
    visitor.done("/teams/blue/limits", {"rpm": "60", "concurrency": "", "key_id": ""})
    shown = visitor.shown("/teams/blue")
    assert "The whole team $60.0000 per month $60.0000 Remove" in shown
    assert "Key website $0.5000 per day, soft $0.5000 Remove" in shown
    assert "The whole team 60 requests a minute Remove" in shown
    assert house.order(key).status_code == 200
    visitor.done("/teams/blue/budgets/remove", {"period": "month", "key_id": ""})
    visitor.done("/teams/blue/limits/remove", {"key_id": ""})
    shown = visitor.shown("/teams/blue")
    assert "$60.0000" not in shown
    assert "60 requests" not in shown
    rotated = visitor.done(f"/teams/blue/keys/{key_id}/rotate", {"overlap": "1h"})
    (other,) = re.findall(r"sk-bm-[a-z2-7]{39}", rotated.text)
    assert {house.order(one).status_code for one in (key, other)} == {200}
    visitor.done(f"/teams/blue/keys/{key_id}/revoke")
    visitor.done("/teams/blue/archive", {"name": "blue"})
    with house.gateway.database.reading() as connection:
        changes = [(row["actor"], row["action"]) for row in reports.list_audit(connection) if row["actor"] == "page:admin"]
    assert [action for _, action in changes] == [
        "team.add",
        "key.add",
        "budget.set",
        "budget.set",
        "limit.set",
        "budget.remove",
        "limit.remove",
        # The successor has the key's own budget.
        "key.add",
        "budget.set",
        "key.rotate",
        "key.revoke",
        "team.archive",
    ]
    assert "page:admin team.archive blue" in visitor.shown("/audit")


def test_a_member_changes_the_own_key_alone(house: House) -> None:
    with house.gateway.database.writing() as connection:
        other = accounts.add_key(connection, "red", name="other", now=now(), actor="test")
    visitor = house.member()
    page = visitor.get("/teams/red").text
    assert f"/keys/{house.gateway.key_id}/rotate" in page
    assert f"/keys/{other.id}/" not in page
    assert "Make the key" not in page
    assert "Set a budget" not in page
    assert visitor.post(f"/teams/red/keys/{other.id}/revoke").status_code == 404
    assert visitor.done(f"/teams/red/keys/{house.gateway.key_id}/rotate").status_code == 201
    with house.gateway.database.reading() as connection:
        assert {row["actor"] for row in reports.list_audit(connection) if row["action"] == "key.rotate"} == {"page:team red"}


def test_a_rotation_is_no_way_to_a_budget_that_begins_anew(house: House) -> None:
    key_id, rotation = house.gateway.key_id, f"/teams/red/keys/{house.gateway.key_id}/rotate"

    def set_budget(*, soft: bool) -> None:
        with house.gateway.database.writing() as connection:
            accounts.set_budget(connection, "red", key_id, "month", 12_000, soft=soft, now=now(), actor="test")

    set_budget(soft=False)
    visitor = house.member()
    refusal = visitor.post(rotation, {"overlap": "1h"})
    assert refusal.status_code == 422
    assert "has a budget of its own" in refusal.text
    with house.gateway.database.reading() as connection:
        assert len(accounts.list_keys(connection, "red")) == 1
    # One that refuses nothing is no reason, and an operator may.
    set_budget(soft=True)
    assert visitor.done(rotation, {"overlap": "1h"}).status_code == 201


def test_a_key_is_changed_on_its_own_teams_page(home: House) -> None:
    home.gateway.add_team("green")
    visitor = home.operator()
    assert visitor.post(f"/teams/green/keys/{home.gateway.key_id}/revoke").status_code == 404
    assert home.order().status_code == 200


def test_reviews_are_settled_and_released(house: House) -> None:
    first, second = house.review(), house.review()
    visitor = house.operator()
    page = visitor.get("/reviews").text
    assert page.index(first["id"]) < page.index(second["id"])
    visitor.done(f"/reviews/{first['id']}/settle", {"usd": "0.1"})
    visitor.done(f"/reviews/{second['id']}/release", {"reason": "not on the bill"})
    ended = {row["id"]: (row["state"], row["settled_micro_usd"], row["basis"]) for row in house.gateway.charges()}
    assert ended == {first["id"]: ("settled", 100_000, "operator"), second["id"]: ("released", 0, None)}
    late = visitor.post(f"/reviews/{first['id']}/settle", {"usd": "0.2"})
    assert (late.status_code, "is settled, not in review" in text_of(late.text)) == (422, True)
    assert visitor.post("/reviews/chg_of_nobody/settle", {"usd": "1"}).status_code == 404
    assert "Nothing is in review." in visitor.shown("/reviews")


WRONG = [
    ("/teams", {"name": ""}, "name", "Fill this in."),
    ("/teams", {"name": "-x"}, "name", "'-x' can't be a team's name"),
    ("/teams", {"name": "red"}, "name", "exists already"),
    ("/teams", {"name": "a\0b"}, "name", "printable characters"),
    ("/teams/red/keys", {"name": "x" * 65}, "name", "at most 64"),
    ("/teams/red/keys", {"expires": "soon"}, "expires", "is not a duration"),
    ("/teams/red/keys", {"expires": "0d"}, "expires", "longer than nothing"),
    ("/teams/red/budgets", {"usd": "many", "period": "month"}, "usd", "is not an amount in USD"),
    ("/teams/red/budgets", {"usd": "-1", "period": "month"}, "usd", "is not an amount in USD"),
    ("/teams/red/budgets", {"usd": "1", "period": "year"}, "period", "Choose one of"),
    ("/teams/red/budgets", {"usd": "1", "period": "day", "key_id": "nobody's"}, "key_id", "there is no key"),
    ("/teams/red/limits", {"rpm": "", "concurrency": ""}, "rpm", "at least one"),
    ("/teams/red/limits", {"rpm": "1.5"}, "rpm", "whole number"),
    ("/teams/red/limits", {"rpm": "1", "concurrency": "٣"}, "concurrency", "whole number"),
    ("/teams/red/archive", {"name": "rde"}, "name", "Type red"),
]


@pytest.mark.parametrize(("path", "fields", "name", "told"), WRONG, ids=lambda value: value if isinstance(value, str) else "")
def test_what_is_wrong_is_said_at_its_field_and_what_was_typed_stays(
    home: House, path: str, fields: dict[str, str], name: str, told: str
) -> None:
    visitor = home.operator()
    answer = visitor.post(path, fields)
    assert answer.status_code == 422
    assert told.lower() in error_at(answer.text, name).lower()
    for typed in fields.values():
        if typed and typed.isprintable() and name not in ("period", "key_id"):
            assert f'value="{typed}"' in answer.text.replace("&#39;", "'")
    with home.gateway.database.reading() as connection:
        assert not [row for row in reports.list_audit(connection) if row["actor"].startswith("page:")]


@pytest.mark.parametrize(
    ("field", "value", "told"),
    [
        ("since", "yesterday", "is not a point in time"),
        ("until", "2026-13-01", "is not in the calendar"),
        ("state", "x", "Choose"),
    ],
)
def test_a_filter_that_is_wrong_is_said_at_its_field(home: House, field: str, value: str, told: str) -> None:
    answer = home.member().get(f"/teams/red/requests?{field}={value}")
    assert answer.status_code == 422
    assert told in error_at(answer.text, field)
    wrong_size = home.member().get("/prices?size=large")
    assert "Write width x height" in error_at(wrong_size.text, "size")
    assert 'value="large"' in wrong_size.text


# Requests


def test_requests_are_filtered_and_read_page_by_page(house: House, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(requests, "ROWS", 2)
    made = [house.order().headers["x-beanmeter-request-id"] for _ in range(5)]
    for request_id in made:
        house.gateway.charge_when_ended(request_id)
    visitor = house.member()
    seen, path = [], "/teams/red/requests?state=settled&since=1d"
    while path:
        page = visitor.get(path).text
        seen.append(re.findall(r"req_[0-9A-Z]{26}", page))
        following = re.search(r'href="/dashboard([^"]+)" rel="next"', page)
        path = following[1].replace("&amp;", "&") if following else ""
    assert seen == [made[4:2:-1], made[2:0:-1], made[:1]]
    assert "No request is like that." in visitor.shown("/teams/red/requests?state=review")
    file = rows(visitor.get("/teams/red/requests.csv?state=settled").text)
    assert [row[1] for row in file[1:]] == made[::-1]
    assert {row[-1] for row in file[1:]} == {str(PRICE_MICRO_USD)}
    assert visitor.get("/teams/red/requests?cursor=made-up").status_code == 422


# Prices and the playground


def test_the_price_of_an_order_and_its_cost(house: House) -> None:
    visitor = house.member()
    query = "model=gpt-image-2&size=1024x1024&quality=high"
    assert visitor.get(f"/playground/price?{query}&n=3").json() == {"hold_micro_usd": 3 * PRICE_MICRO_USD, "at_most": False}
    auto = visitor.get("/playground/price?model=gpt-image-2&size=1024x1024&quality=auto&n=1").json()
    assert auto == {"hold_micro_usd": PRICE_MICRO_USD, "at_most": True}
    for wrong, field in ((f"{query}&n=11", "n"), (f"{query}&n=0", "n"), (f"{query}&n=", "n"), ("model=x", "model")):
        answer = visitor.get(f"/playground/price?{wrong}")
        assert (answer.status_code, answer.json()["field"]) == (200, field)
        if field == "n":
            assert answer.json()["message"] == "Write a whole number from 1 to 10."
    request_id = house.order().headers["x-beanmeter-request-id"]
    house.gateway.charge_when_ended(request_id)
    cost = visitor.get(f"/playground/cost?request_id={request_id}").json()
    assert (cost["state"], cost["settled_micro_usd"]) == ("settled", PRICE_MICRO_USD)
    _, green = house.gateway.add_team("green")
    for missing in (house.member(green).get(f"/playground/cost?request_id={request_id}"), visitor.get("/playground/cost")):
        assert missing.status_code == 404


def test_the_prices_with_aliases_and_a_size_in_mind(tmp_path: Path) -> None:
    settings = {"BEANMETER_SIZE_ALIASES": "1536x1024=2016x1344"}
    with open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **settings) as house:
        shown = house.member().shown("/prices?size=1500+x+1000")
        assert "For 1500x1000 take 2016x1344 of gpt-image-2." in shown
        assert "1536x1024 2016x1344" in shown
        assert "1024x1024 1.05 $0.0059" in shown


def test_health_says_what_is_open_and_what_went_wrong(house: House) -> None:
    house.review()
    shown = house.operator().shown("/health")
    assert "Journal 0 outcomes wait" in shown
    assert "review 1 $0.2107" in shown
    assert "no answer - 1" in shown


# Texts


@pytest.mark.parametrize(
    "name",
    ["<script>alert(1)</script>", '"><img src=x onerror=alert(1)>', "{{ 7*7 }}", "=1+1", "@SUM(A1)", "🫘 bean", "فريق التصميم"],
)
def test_every_text_is_shown_as_text(home: House, name: str) -> None:
    visitor = home.operator()
    with home.gateway.database.writing() as connection:
        key = accounts.add_key(connection, "red", name=name, now=now(), actor=f"{name} by test")
    home.order(key.key)
    home.gateway.charge_when_ended()
    charge = home.review()
    visitor.done(f"/reviews/{charge['id']}/release", {"reason": name})
    for path in ("/teams/red?by=key", "/teams/red/requests", "/audit"):
        html = visitor.get(path).text
        assert name in unescape(html), path
        assert "<script>alert" not in html
        assert "<img src=x" not in html
        assert "49" not in re.findall(r"<bdi>(.*?)</bdi>", html)
    file = visitor.get("/teams/red/requests.csv").text
    assert not re.search(r"(^|,)[=+@-]", file, re.MULTILINE)


@pytest.mark.parametrize("name", ["a b & c+d@e.f", "فريق", "équipe"])
def test_a_teams_name_is_found_in_its_path(house: House, name: str) -> None:
    visitor = house.operator()
    location = visitor.done("/teams", {"name": name}).headers["location"]
    assert location == f"/dashboard/teams/{quote(name, safe='')}?said=team_added"
    assert name in visitor.shown(location.removeprefix("/dashboard"))
    key = re.findall(r"sk-bm-[a-z2-7]{39}", visitor.done(f"/teams/{quote(name, safe='')}/keys").text)[0]
    house.member(key)
    for part in ("", "/requests", "/figures"):
        assert visitor.get(f"/teams/{quote(name, safe='')}{part}").status_code == 200
    for other in ("%00", "a%2Fb", "a%0Ab", "%C3%28", "x" * 300):
        assert visitor.get(f"/teams/{other}").status_code == 404


def test_a_formula_in_a_file_is_text() -> None:
    body = bytes(csv_response("x", ["=a"], [["=1+1", "+1", "-1", "@x", "\tx", -1, None, "plain"]]).body).decode("utf-8")
    assert rows(body) == [["'=a"], ["'=1+1", "'+1", "'-1", "'@x", "'\tx", "-1", "", "plain"]]


# Files


@pytest.mark.parametrize("path", TEMPLATES, ids=lambda path: path.name)
def test_no_template_has_a_script_or_style_of_its_own(path: Path) -> None:
    html = path.read_text("utf-8")
    assert not re.search(
        r"<style|\sstyle=|\son[a-z]+=|javascript:|<script(?![^>]*\ssrc=)|\|\s*safe|https?://", html, re.IGNORECASE
    )


def test_what_is_vendored_is_as_it_was_released() -> None:
    listed = dict(line.split("  ")[::-1] for line in (VENDOR / "checksums.txt").read_text("ascii").splitlines())
    found = {path.name: sha256(path.read_bytes()).hexdigest() for path in VENDOR.iterdir() if path.suffix in (".js", ".css")}
    assert listed == found
    for name in found:
        assert (VENDOR / f"{name.partition('.')[0]}.LICENSE").exists()
        assert f"`{name}`" in (VENDOR / "README.md").read_text("utf-8")


def test_a_gateway_that_nobody_looks_at_carries_no_pages() -> None:
    program = "import sys, json, proxy.worker; print(json.dumps(sorted(sys.modules)))"
    ran = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True, check=True)
    modules = set(json.loads(ran.stdout))
    assert "proxy.pages" in modules
    assert not {"jinja2", "proxy.pages.routes", "proxy.pages.rendering"} & modules
