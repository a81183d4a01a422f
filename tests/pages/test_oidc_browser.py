"""Signing in by way of an OpenID provider in a real browser, with its cookies, redirects and policies."""

from __future__ import annotations

from pathlib import Path

import pytest

from proxy.ledger import accounts
from tests.live import now
from tests.pages.browser import Window, a_browser, a_window
from tests.pages.house import open_house
from tests.pages.provider import CLIENT_ID, Provider, a_provider


def come_in(window: Window, provider: Provider) -> None:
    """From the page to sign in to the provider's, and back as whoever is there."""
    window.press("#provider")
    window.page.wait_for_url(f"{provider.origin}/authorize?**")
    window.press("#continue")


def test_in_and_out_with_the_keyboard_alone(tmp_path: Path) -> None:
    with (
        a_provider() as provider,
        open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **provider.settings()) as house,
        a_browser() as browser,
        a_window(browser, house.site) as window,
    ):
        provider.sites.add(house.site)
        page = window.page

        # Who asks for a page comes to the one to sign in, and from there to the provider's.
        provider.person = {"sub": "ada-1", "email": "ada@example.com", "groups": ["admins"]}
        window.go("/audit")
        window.check("sign-in-with-a-provider")
        come_in(window, provider)
        page.wait_for_url(f"{house.site}/dashboard")
        assert "code=" not in page.url
        window.type_into("#team-name", "green")
        page.keyboard.press("Enter")
        page.get_by_text("The team was made").wait_for()
        window.follow("a[href$='/audit']", "/audit")
        assert "oidc:ada-1 (ada@example.com)" in page.locator("tbody").inner_text()

        # Nothing that a script could read, and nothing of the attempt any more.
        cookies = {cookie["name"]: cookie for cookie in page.context.cookies(house.site)}
        assert cookies.keys() == {"beanmeter"}
        assert (cookies["beanmeter"]["httpOnly"], cookies["beanmeter"]["sameSite"]) == (True, "Lax")

        # Out of both, and back.
        window.press("header form button")
        page.wait_for_url(f"{provider.origin}/end-session?**")
        assert provider.ended[0]["client_id"] == CLIENT_ID
        window.press("#back")
        page.wait_for_url(f"{house.site}/dashboard/sign-in")
        window.go("/audit")
        assert page.url == f"{house.site}/dashboard/sign-in"
        assert page.context.cookies(house.site) == []

        # Somebody without a role is told so, and may try again as somebody else.
        provider.person = {"sub": "otto-2", "groups": ["staff"]}
        window.expected = ("403",)
        come_in(window, provider)
        page.get_by_text("Your account has no role here").wait_for()
        window.check("no-role")
        provider.person = {"sub": "mia-3", "beanmeter": {"teams": ["green", "red"]}}
        window.follow("main a", "/sign-in")
        come_in(window, provider)
        page.get_by_role("heading", name="Your teams").wait_for()
        window.check("teams")
        window.follow("main a[href$='/green']", "/teams/green")
        page.get_by_role("heading", name="green").wait_for()
        window.follow("header nav a", "")
        window.expect_quiet()


@pytest.mark.parametrize("width", [360, 1440])
def test_what_a_viewer_sees(tmp_path: Path, width: int) -> None:
    with (
        a_provider() as provider,
        open_house(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **provider.settings()) as house,
        a_browser() as browser,
        a_window(browser, house.site, width=width) as window,
    ):
        provider.sites.add(house.site)
        with house.gateway.database.writing() as connection:
            accounts.add_key(connection, "red", now=now(), actor="test")
        house.review()
        provider.person = {"sub": "vera-2", "groups": ["finance"]}
        window.go("/sign-in/oidc")
        window.press("#continue")
        window.page.wait_for_url(f"{house.site}/dashboard")
        for name, path in {"overview": "", "team": "/teams/red", "reviews": "/reviews", "audit": "/audit"}.items():
            window.go(path)
            window.check(f"viewer-{name}-{width}")
            # One can leave, and there is nothing else to press that changes anything.
            assert window.page.locator("form[method=post]").count() == 1
