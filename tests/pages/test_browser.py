"""The pages in a real browser: a whole visit with the keyboard alone, and every page narrow and wide, light and dark."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from proxy import demo
from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.simulator import SimulatorOptions
from tests.live import now
from tests.pages.browser import Window, a_browser, a_window, is_marked, mark, pixels
from tests.pages.house import TOKEN, serving

# A picture takes long enough for its previews to be seen.
SIMULATED = SimulatorOptions(image_seconds=0.4, preview_seconds=0.3)


def sign_in(window: Window, credential: str) -> None:
    window.go()
    window.type_into("[name=credential]", credential)
    window.page.keyboard.press("Enter")
    window.page.get_by_role("button", name="Sign out").wait_for()


def test_a_visit_with_the_keyboard_alone(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    with (
        serving(url, tmp_path, options=SIMULATED) as site,
        a_browser() as browser,
        a_window(browser, site) as window,
        a_window(browser, site) as overview,
    ):
        page = window.page
        sign_in(window, TOKEN)
        window.type_into("#team-name", "blue & co")
        page.keyboard.press("Enter")
        page.get_by_text("The team was made").wait_for()

        window.type_into("#key-name", "playground")
        page.keyboard.press("Enter")
        key = page.locator("#new-key").inner_text()
        assert re.fullmatch(r"sk-bm-[a-z2-7]{39}", key)
        window.follow("main [role=button]", "/teams/blue%20%26%20co")
        window.type_into("#budget-usd", "0.25")
        page.keyboard.press("Enter")
        page.get_by_text("The budget was set").wait_for()
        team_page = page.url.partition("?")[0]

        # An overview that is left open shows what comes, without a reload.
        sign_in(overview, TOKEN)
        row = overview.page.get_by_role("region", name="Teams").locator("tbody tr")
        assert "$0.2500" in row.inner_text()
        mark(overview.page)

        window.follow("a[href$='/playground']", "/playground")
        window.type_into("#key", key)
        window.type_into("#prompt", "a bean's <b>desk</b>")
        page.get_by_text("$0.0059, which leaves $0.2441 of $0.2500").wait_for()
        window.press("#send")
        page.locator(".preview img").wait_for()
        picture = page.locator("a[download]")
        picture.wait_for()
        page.get_by_text("It cost $0.0059.").wait_for()
        assert page.locator(".pictures figure").get_attribute("data-previews") == "2"
        assert page.evaluate("document.querySelector('.pictures img').naturalWidth") == 1024
        with page.expect_download() as downloading:
            window.press("a[download]")
        assert downloading.value.suggested_filename == "beanmeter-1.png"
        assert Path(downloading.value.path()).read_bytes().startswith(b"\x89PNG")
        assert "bean'\\''s" in page.locator("#as-curl").inner_text()
        assert key not in page.content()

        overview.page.locator("#figures").get_by_text("$0.2441").first.wait_for()
        assert is_marked(overview.page)
        overview.expect_quiet()

        # The dearest size has no room: the refusal names the budget.
        for field, choice in (("#size", "3840x2160"), ("#quality", "high")):
            window.tab_to(field)
            page.keyboard.type(choice)
        page.get_by_text(re.compile(r"\$0\.\d{4}, which leaves -\$")).wait_for()
        window.expected = ("429", "401")
        window.press("#send")
        page.get_by_text("budget of $0.250000 per month has $0.244100 left").wait_for()

        page.goto(team_page)
        assert "$0.0059" in page.get_by_role("region", name="Budgets of the team").inner_text()
        mark(page)
        window.press(".menu summary")
        window.press("form[action$='/revoke'] button")
        page.get_by_text("The key was revoked").wait_for()

        window.follow("a[href$='/playground']", "/playground")
        window.type_into("#key", key)
        window.type_into("#prompt", "another bean")
        refused = page.get_by_text("Incorrect API key")

        def is_refused() -> bool:
            window.press("#send")
            page.locator("#send:enabled").wait_for()
            return refused.count() > 0

        # A revocation may go unnoticed for some seconds.
        for _ in range(60):
            if is_refused():
                break
            page.wait_for_timeout(250)
        assert refused.count() > 0

        window.press("header form button")
        page.get_by_text("You are signed out").wait_for()
        page.goto(team_page)
        assert page.url.endswith("/dashboard/sign-in")
        window.expect_quiet()


def test_an_edit_with_a_reference_image(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    key = with_key(url, "red")
    picture = tmp_path / "bean.png"
    # A PNG of one pixel.
    picture.write_bytes(
        bytes.fromhex(
            "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
            "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
        )
    )
    with serving(url, tmp_path, options=SIMULATED) as site, a_browser() as browser, a_window(browser, site) as window:
        sign_in(window, key)
        assert window.page.url.endswith("/dashboard/teams/red")
        window.go("/playground")
        window.type_into("#key", key)
        window.type_into("#prompt", "the same, in blue")
        window.page.set_input_files("#images", picture)
        assert "/images/edits" in window.page.locator("#as-curl").inner_text()
        window.press("#send")
        window.page.get_by_text("It cost $0.0059.").wait_for()
        window.go("/teams/red/requests")
        assert "edit" in window.page.locator("tbody").inner_text()
        window.expect_quiet()


def test_a_page_left_open_asks_to_sign_in_once_its_session_is_over(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    key = with_key(url, "red")
    with serving(url, tmp_path) as site, a_browser() as browser, a_window(browser, site) as window:
        sign_in(window, key)
        database = Database(url)
        with database.writing() as connection:
            for row in accounts.list_keys(connection):
                accounts.revoke_key(connection, row["id"], now=now(), actor="test")
        database.close()
        window.page.wait_for_url(f"{site}/dashboard/sign-in")
        window.page.get_by_role("heading", name="Sign in").wait_for()
        window.expected = ("401",)
        window.expect_quiet()


def with_key(url: str, team: str) -> str:
    database = Database(url)
    migrate(database)
    with database.writing() as connection:
        accounts.add_team(connection, team, now=now(), actor="test")
        key = accounts.add_key(connection, team, now=now(), actor="test").key
    database.close()
    return key


def with_samples(url: str) -> str:
    """Six weeks of two teams; the key of one."""
    database = Database(url)
    migrate(database)
    demo.fill(database, datetime.now(UTC))
    with database.writing() as connection:
        key = accounts.add_key(connection, demo.DESIGN.team, name="playground", now=now(), actor="test").key
        assert list(reports.list_charges(connection))
    database.close()
    return key


@pytest.mark.parametrize(("width", "scheme"), [(1440, "light"), (1440, "dark"), (360, "light"), (360, "dark")])
def test_every_page_narrow_and_wide_light_and_dark(tmp_path: Path, width: int, scheme: Literal["light", "dark"]) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    key = with_samples(url)
    with (
        serving(url, tmp_path, options=SIMULATED) as site,
        a_browser() as browser,
        a_window(browser, site, width=width, scheme=scheme) as window,
    ):
        page, kind = window.page, f"{width}-{scheme}"
        window.go()
        window.check(f"sign-in-{kind}")
        sign_in(window, TOKEN)
        for name, path in {
            "overview": "",
            "team": "/teams/design",
            "requests": "/teams/design/requests",
            "reviews": "/reviews",
            "prices": "/prices?size=1500x1000",
            "audit": "/audit",
            "health": "/health",
        }.items():
            window.go(path)
            for chart in page.locator("canvas").all():
                assert chart.evaluate("canvas => canvas.width") > 0
            if name in ("overview", "team"):
                # Lines, bars, words: an empty canvas has one colour.
                assert pixels(page, "canvas") > 3
                for details in page.locator("details").all():
                    details.evaluate("one => { one.open = true }")
                window.check(f"{name}-open-{kind}")
                window.go(path)
            window.check(f"{name}-{kind}")
        window.go("/teams/design")
        window.page.fill("#budget-usd", "many")
        window.expected = ("422", "404")
        window.page.get_by_role("button", name="Set the budget").click()
        page.get_by_text("is not an amount in USD").wait_for()
        window.check(f"wrong-{kind}")
        window.go("/nothing")
        window.check(f"nothing-{kind}")
        window.go("/playground")
        page.fill("#key", key)
        page.fill("#prompt", "a coffee bean on a desk")
        page.get_by_text("which leaves").wait_for()
        page.locator("#send").click()
        page.get_by_text("It cost $").wait_for()
        window.check(f"playground-{kind}")
