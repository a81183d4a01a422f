"""What nobody types: odd values in every query, cursors that were tampered with, forms from elsewhere, and two at once."""

from __future__ import annotations

import base64
import json
import threading
from typing import Any

import pytest

from proxy.ledger import reports
from proxy.pages.routes import PAGES
from tests.pages.house import House, Visitor

ODD = [
    *("%00", "%0d%0aset-cookie:a=b", "%ED%A0%80", "%FF", "%F0%9F%92%A9", "../../etc/passwd", "%2e%2e%2f", "'", "' OR 1=1--"),
    *('"><script>alert(1)</script>', "=1+1", "-1", "0", "1e9", "NaN", "9" * 200, "x" * 200, "%D9%A3", "{{7*7}}"),
    *("0001-01-01", "9999-12-31", "999999999d", "99999999999999999d", "1969-12-31", "2026-02-30"),
]
NAMES = (
    *("budget", "by", "days", "state", "key_id", "since", "until", "cursor"),
    *("size", "model", "quality", "n", "request_id", "said"),
)


def test_odd_values_break_no_page(home: House) -> None:
    home.order()
    home.gateway.charge_when_ended()
    visitor = home.operator()
    for page in PAGES:
        if page.method != "GET":
            continue
        path = page.path.format(team="red")
        for odd in ODD:
            asked = "&".join(f"{name}={odd}" for name in NAMES)
            alone = [f"{name}={odd}" for name in NAMES if path.endswith("/requests")]
            for query in (asked, *alone):
                answer = visitor.get(f"{path}?{query}")
                assert answer.status_code in (200, 303, 404, 422), (path, query[:80], answer.text[:300])
                assert "<script>alert" not in answer.text
                assert "set-cookie" not in answer.headers


def cursor(*parts: Any) -> str:
    return base64.urlsafe_b64encode(json.dumps(parts).encode()).decode().rstrip("=")


@pytest.mark.parametrize(
    "made_up",
    [
        cursor("page-requests", 0, "x"),
        cursor("page-requests", 10**30, "x"),
        cursor("page-requests", -(10**30), "x"),
        cursor("page-requests", 1e308, "x"),
        cursor("page-requests", True, "x"),
        cursor("page-requests", "1", 1),
        cursor("page-requests", 1, "a\0b"),
        cursor("page-requests", 1, "\ud800"),
        cursor("page-audit", 1),
        cursor("page-audit", 10**30),
        cursor("page-audit", -1),
        cursor(),
        "e30",
        "=" * 50,
        "A" * 5000,
    ],
)
def test_a_cursor_that_was_tampered_with_is_a_page_or_a_plain_no(house: House, made_up: str) -> None:
    visitor = house.operator()
    assert visitor.get(f"/teams/red/requests?cursor={made_up}").status_code in (200, 422)
    assert visitor.get(f"/audit?cursor={made_up}").status_code in (200, 404)


def test_two_operators_who_make_the_same_team_at_once(house: House) -> None:
    visitors = [house.operator() for _ in range(4)]
    answers: list[int] = []

    def make(visitor: Visitor) -> None:
        answers.append(visitor.post("/teams", {"name": "twice"}).status_code)

    threads = [threading.Thread(target=make, args=(visitor,)) for visitor in visitors]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(answers) == [303, 422, 422, 422]
    with house.gateway.database.reading() as connection:
        assert [row["subject"] for row in reports.list_audit(connection) if row["action"] == "team.add"].count("twice") == 1


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": ""},
        {"origin": "http://127.0.0.1.evil.example"},
    ],
)
def test_a_form_from_elsewhere_changes_nothing(home: House, headers: dict[str, str]) -> None:
    visitor = home.operator()
    assert visitor.post("/teams", {"name": "blue"}, headers=headers).status_code == 403
    assert visitor.post("/teams", {"name": "blue", "csrf": "0" * 64}).status_code == 403
    assert "blue" not in visitor.shown("")


def test_a_live_part_without_a_session_leads_to_the_door(home: House) -> None:
    visitor = home.operator()
    for path in ("/figures", "/teams/red/figures?by=size&days=30"):
        assert home.visitor().get(path).status_code == 303
        asked = home.visitor().get(path, headers={"hx-request": "true"})
        assert (asked.status_code, asked.headers["hx-redirect"], asked.text) == (401, "/dashboard/sign-in", "")
    visitor.done("/sign-out")
    assert visitor.get("/figures", headers={"hx-request": "true"}).status_code == 401
