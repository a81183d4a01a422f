"""Pages that are left open: what is charged meanwhile comes into their tables and charts, and everything else stays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.ledger import accounts
from proxy.ledger.engine import Database
from tests.live import ORDER, PATIENCE_SECONDS, PRICE_MICRO_USD, now
from tests.pages.browser import Window, a_browser, a_window, is_marked, mark
from tests.pages.house import TOKEN, serving
from tests.pages.test_browser import sign_in, with_key

# What a chart draws, and what the table beside it has, by series: whole micro-USD, nothing for an empty cell.
_DRAWN = """canvas => Chart.getChart(canvas).data.datasets.map(
    one => [one.label, one.data.map(value => value === null ? null : Math.round(value * 1e6))])"""
_WRITTEN = """canvas => {
    const table = document.getElementById(canvas.dataset.table);
    const heads = [...table.tHead.rows[0].cells].slice(1, 1 + Number(canvas.dataset.columns || 99));
    return heads.map((head, place) => [head.textContent.trim(), [...table.tBodies[0].rows].map(row => {
        const value = row.cells[place + 1].dataset.value;
        return value === undefined ? null : Number(value);
    })]);
}"""
# All that would grow if a page were made anew again and again.
_SIZE = "[Object.keys(Chart.instances).length, document.querySelectorAll('*').length]"


def charts(window: Window) -> dict[str | None, Any]:
    """What each chart draws, by its table; the same as the table has."""
    found = {}
    for canvas in window.page.locator("canvas").all():
        found[canvas.get_attribute("data-table")] = canvas.evaluate(_DRAWN)
        assert canvas.evaluate(_DRAWN) == canvas.evaluate(_WRITTEN)
    return found


def total(series: list[Any]) -> int:
    return sum(amount for _, amounts in series for amount in amounts)


def wait_for(window: Window, text: str) -> None:
    """Until the live part says so."""
    window.page.locator("#figures").get_by_text(text).first.wait_for()


def polled(window: Window) -> None:
    """Until the page has renewed itself once more."""
    with window.page.expect_response("**/figures*"):
        pass
    window.page.wait_for_timeout(100)


@pytest.mark.parametrize("path", ["", "/teams/red?by=quality&days=7"])
def test_charts_follow_what_is_charged(tmp_path: Path, path: str) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    key = with_key(url, "red")
    database = Database(url)
    with database.writing() as connection:
        accounts.set_budget(connection, "red", None, "month", 10_000_000, soft=False, now=now(), actor="test")
    database.close()
    with serving(url, tmp_path) as site, a_browser() as browser, a_window(browser, site) as window:

        def order() -> None:
            headers = {"authorization": f"Bearer {key}"}
            answer = httpx2.post(
                f"{site}/v1/images/generations", json=ORDER, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False
            )
            assert answer.status_code == 200

        order()
        sign_in(window, TOKEN)
        window.go(path)
        page = window.page
        wait_for(window, "$0.2107")
        before = charts(window)
        page.evaluate("charts = [...document.querySelectorAll('canvas')].map(canvas => Chart.getChart(canvas).id)")
        page.locator("details").first.evaluate("one => { one.open = true }")
        page.locator("#figures .scroll").first.focus()
        page.evaluate("focused = document.activeElement")
        mark(page)

        order()
        wait_for(window, "$0.4214")
        polled(window)
        after = charts(window)
        assert before.keys() == after.keys()
        if path:
            assert total(after["split-table"]) == 2 * PRICE_MICRO_USD
            assert after["burn-down"] != before["burn-down"]
        else:
            assert [total(found["days"]) for found in (before, after)] == [PRICE_MICRO_USD, 2 * PRICE_MICRO_USD]
        assert is_marked(page)
        assert page.evaluate(
            "charts.every((id, place) => Chart.getChart(document.querySelectorAll('canvas')[place]).id === id)"
        )
        assert page.locator("details").first.evaluate("one => one.open")
        assert page.evaluate("document.activeElement === focused && focused.isConnected")

        size = page.evaluate(_SIZE)
        for _ in range(3):
            polled(window)
        assert page.evaluate(_SIZE) == size
        window.expect_quiet()


def test_a_first_charge_brings_its_chart(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    key = with_key(url, "red")
    with serving(url, tmp_path) as site, a_browser() as browser, a_window(browser, site) as window:
        sign_in(window, key)
        wait_for(window, "Nothing was spent in these days.")
        headers = {"authorization": f"Bearer {key}"}
        httpx2.post(f"{site}/v1/images/generations", json=ORDER, headers=headers, timeout=PATIENCE_SECONDS, trust_env=False)
        window.page.locator("#split-table").wait_for()
        polled(window)
        assert total(charts(window)["split-table"]) == PRICE_MICRO_USD
        window.expect_quiet()
