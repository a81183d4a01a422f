"""A real browser: Debian's Chromium, driven by Playwright, that keeps every complaint of a page."""

from __future__ import annotations

import importlib.util
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, cast

import pytest

from tests.live import PATIENCE_SECONDS

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

# With this set, a test that can't have a browser fails instead of being skipped.
_REQUIRE_BROWSER = "TEST_REQUIRE_BROWSER"

# With this set to a directory, pictures of pages are left there: those of the documents come from such a run.
_PICTURES = "TEST_PICTURES"

_PROGRAMS = ("chromium", "chromium-browser", "google-chrome")

_AXE = (Path(__file__).parent / "vendor/axe.min.js").read_text("utf-8")
_RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa"]

# More stops than any page has.
_TABS_MAX = 200


@contextmanager
def a_browser() -> Iterator[Browser]:
    """A browser for as long as the block lasts; without one the test is skipped."""
    program = next(filter(None, map(shutil.which, _PROGRAMS)), None)
    reason = ""
    if program is None:
        reason = "there is no browser: on Debian and Ubuntu, apt install chromium"
    elif importlib.util.find_spec("playwright") is None:
        reason = "there is no Playwright: make install the development dependencies"
    if reason:
        if os.environ.get(_REQUIRE_BROWSER):
            pytest.fail(reason)
        pytest.skip(reason)
    from playwright.sync_api import sync_playwright

    # Chromium's sandbox does not start for root, as whom containers run tests; it only ever sees our own pages here.
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        try:
            yield browser
        finally:
            browser.close()


@dataclass
class Window:
    """A page in the browser, and what it complained of. ``expected`` is a part of what it may say."""

    page: Page
    site: str
    complaints: list[str] = field(default_factory=list)
    expected: tuple[str, ...] = ()

    def go(self, path: str = "") -> None:
        """Open a page below ``/dashboard``."""
        self.page.goto(f"{self.site}/dashboard{path}")

    def tab_to(self, selector: str) -> None:
        """Reach something with the keyboard alone."""
        for _ in range(_TABS_MAX):
            self.page.keyboard.press("Tab")
            if self.page.evaluate("selector => document.activeElement.matches(selector)", selector):
                return
        raise AssertionError(f"the keyboard does not come to {selector}")

    def type_into(self, selector: str, text: str) -> None:
        """Fill a field in with the keyboard alone."""
        self.tab_to(selector)
        self.page.keyboard.press("Control+A")
        self.page.keyboard.type(text)

    def press(self, selector: str) -> None:
        """Use a button or link with the keyboard alone."""
        self.tab_to(selector)
        self.page.keyboard.press("Enter")

    def follow(self, selector: str, path: str) -> None:
        """Use a link with the keyboard alone, and wait for where it leads."""
        self.press(selector)
        self.page.wait_for_url(f"{self.site}/dashboard{path}")

    def check(self, name: str) -> None:
        """Nothing for axe to find, nothing wider than the window, no complaint; a picture where they are wanted."""
        self.page.evaluate(f"{_AXE}; 0")
        found = self.page.evaluate("rules => axe.run(document, {runOnly: rules})", _RULES)
        violations = [(one["id"], [node["target"] for node in one["nodes"]]) for one in found["violations"]]
        assert violations == [], (name, violations)
        assert found["passes"]
        too_wide = self.page.evaluate("document.documentElement.scrollWidth - innerWidth")
        assert too_wide <= 0, f"{name} is {too_wide} pixels wider than the window"
        self.expect_quiet()
        if os.environ.get(_PICTURES):
            self.page.screenshot(path=Path(os.environ[_PICTURES]) / f"{name}.png")

    def expect_quiet(self) -> None:
        """No error in the console, and nothing that the policy forbids."""
        assert [one for one in self.complaints if not any(part in one for part in self.expected)] == []


@contextmanager
def a_window(browser: Browser, site: str, *, width: int = 1440, scheme: Literal["light", "dark"] = "light") -> Iterator[Window]:
    """A window of its own, without the cookies of others."""
    context = browser.new_context(viewport={"width": width, "height": 1000}, color_scheme=scheme)
    context.set_default_timeout(PATIENCE_SECONDS * 1000)
    try:
        page = context.new_page()
        window = Window(page, site)
        page.on("console", lambda message: window.complaints.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: window.complaints.append(str(error)))
        page.expose_function("violated", lambda told: window.complaints.append(told))
        page.add_init_script(
            "addEventListener('securitypolicyviolation', event => violated(`${event.violatedDirective} ${event.blockedURI}`))"
        )
        yield window
    finally:
        context.close()


def mark(page: Page) -> None:
    """Leave a mark on a page that a reload would wipe off."""
    page.evaluate("window.marked = true")


def is_marked(page: Page) -> bool:
    """Whether it is still the page that was marked."""
    return cast("bool", page.evaluate("window.marked === true"))


def pixels(page: Page, selector: str) -> Any:
    """How many different colours a canvas shows."""
    return page.evaluate(
        "selector => { const c = document.querySelector(selector); const d = c.getContext('2d')"
        ".getImageData(0, 0, c.width, c.height).data; const s = new Set(); "
        "for (let i = 0; i < d.length; i += 4) s.add(d[i] << 16 | d[i + 1] << 8 | d[i + 2]); return s.size; }",
        selector,
    )
