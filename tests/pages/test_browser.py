"""The pages in a real browser: a whole visit with the keyboard alone, and every page narrow and wide, light and dark."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Literal

import pytest

from proxy import demo
from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.simulator import SimulatorOptions
from tests.live import PATIENCE_SECONDS, now
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
        assert page.locator("#cost").inner_text() == "Nothing was charged."

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


# A PNG of one pixel.
PIXEL = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


def run(command: list[str], directory: Path, key: str) -> str:
    """What a program says that was copied from the playground."""
    environment = {**os.environ, "BEANMETER_KEY": key, "NO_PROXY": "*"}
    done = subprocess.run(command, cwd=directory, env=environment, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_an_edit_with_reference_images_and_the_same_in_code(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'books.db'}"
    key = with_key(url, "red")
    pictures = [tmp_path / f"image-{number}.png" for number in (1, 2)]
    for picture in pictures:
        picture.write_bytes(PIXEL)
    with serving(url, tmp_path) as site, a_browser() as browser, a_window(browser, site) as window:
        page = window.page
        sign_in(window, key)
        assert page.url.endswith("/dashboard/teams/red")
        window.go("/playground")
        window.type_into("#key", key)
        window.type_into("#prompt", '@the desk\'s "same"; in blue')
        page.fill("#n", "3")
        page.set_input_files("#images", pictures)
        window.press("#send")
        page.get_by_text("It cost $0.0177.").wait_for()
        curl, python, script = (page.locator(f"#as-{name}").inner_text() for name in ("curl", "python", "javascript"))
        # A program that is copied pays for what the page would, and keeps all of it.
        run([sys.executable, "-c", python], tmp_path, key)
        assert [(tmp_path / f"picture-{number}.png").read_bytes()[:4] for number in (1, 2, 3)] == [b"\x89PNG"] * 3
        paid = 2
        if shutil.which("curl") is not None:
            assert len(json.loads(run(["sh", "-c", curl], tmp_path, key))["data"]) == 3
            paid = 3
        # The SDK that this is for runs in tests/test_sdks.py.
        assert "answer.data.entries()" in script
        for code in (curl, python, script):
            assert [code.count(picture.name) for picture in pictures] == [1, 1]
        window.go("/teams/red/requests")
        assert page.locator("tbody").inner_text().count("3 of 3") == paid
        assert page.locator("tbody").inner_text().count("edit") == paid
        window.expect_quiet()


@contextmanager
def a_playground(directory: Path) -> Iterator[Window]:
    """The playground before a gateway, for a member of the team red, with a key of that team in its field."""
    url = f"sqlite:///{directory / 'books.db'}"
    key = with_key(url, "red")
    with serving(url, directory) as site, a_browser() as browser, a_window(browser, site) as window:
        sign_in(window, key)
        window.go("/playground")
        window.page.fill("#key", key)
        window.page.fill("#prompt", "a bean")
        yield window


def make(window: Window, prompt: str) -> None:
    window.page.fill("#prompt", prompt)
    window.page.locator("#send").click()


# What the page's own reader makes of a stream that comes in pieces of some bytes.
READ = """async ([text, size]) => {
  const bytes = new TextEncoder().encode(text);
  const body = new ReadableStream({
    start(pieces) {
      for (let at = 0; at < bytes.length; at += size) pieces.enqueue(bytes.slice(at, at + size));
      pieces.close();
    },
  });
  const found = [];
  for await (const event of events(body)) found.push(event);
  return found;
}"""


def test_a_stream_is_read_whatever_ends_its_lines_and_wherever_it_is_cut(tmp_path: Path) -> None:
    lines = [": hello", "", "event: a", 'data: {"bean":', "data: 1}", "", "", 'data: {"bean": "ü"}', "", "data: [DONE]", ""]
    # The last event may have no blank line after it.
    lines.append('data: {"bean": 3}')
    with a_playground(tmp_path) as window:
        for newline in ("\n", "\r\n", "\r"):
            for size in (1, 2, 3, 7, 1_000):
                for end in ("", newline, 2 * newline):
                    found = window.page.evaluate(READ, [newline.join(lines) + end, size])
                    assert found == [{"bean": 1}, {"bean": "ü"}, {"bean": 3}], (newline, size, end)
        make(window, "[[sim newline=cr]]")
        window.page.locator("#cost", has_text="It cost $0.0059.").wait_for()
        assert window.page.locator("#told").inner_text() == "Done."
        assert window.page.locator(".pictures img").count() == 1
        window.expect_quiet()


def test_what_cant_be_sent_is_said_at_its_field(tmp_path: Path) -> None:
    with a_playground(tmp_path) as window:
        page = window.page
        key = page.input_value("#key")
        page.fill("#key", "sk-bm-ключ")
        assert page.locator("#key[aria-invalid] + #key-told").inner_text().startswith("A key has only letters from a to z")
        page.locator("#price", has_text="$0.0059").wait_for()
        page.locator("#send").click()
        assert page.evaluate("document.activeElement.id") == "key"
        page.fill("#key", key)
        assert page.locator("#key:not([aria-invalid]) + #key-told").inner_text().startswith("Stays in this page's memory")

        page.set_input_files("#images", {"name": "notes.txt", "mimeType": "text/plain", "buffer": b"a bean"})
        told = page.locator("#images[aria-invalid] + #images-told")
        assert told.inner_text() == "notes.txt is not a PNG, JPEG or WebP file: choose others."
        page.locator("#send").click()
        page.set_input_files("#images", [])
        # Neither was sent.
        assert page.locator("#told").inner_text() == "The picture appears here."

        for number in ("", "11"):
            page.fill("#n", number)
            page.locator("#order:has(#n[aria-invalid]) #price", has_text="Write a whole number from 1 to 10.").wait_for()
        page.fill("#n", "1")
        page.locator("#order:has(#n:not([aria-invalid])) #price", has_text="$0.0059").wait_for()
        window.expect_quiet()


def test_what_became_of_a_request_is_told_in_words(tmp_path: Path) -> None:
    with a_playground(tmp_path) as window:
        page = window.page
        window.expected = ("status of 400", "status of 500", "status of 502", "net::ERR_")
        held = "$0.0000 so far, $0.0059 held until an operator has looked at it."
        for prompt, refused, cost in (
            ("[[sim error=500 body=html]]", "The answer was an error, status 500, without a word why.", held),
            ("[[sim reset=before-headers]]", "The image service broke off before it answered", held),
            ("[[sim cut=50%]]", "The connection broke. The gateway reads on", held),
            ("[[sim error=400]]", "safety system", "Nothing was charged."),
            ("[[sim json deliver=0]]", "", "Nothing was charged."),
        ):
            make(window, prompt)
            page.locator("#cost", has_text=cost).wait_for()
            assert page.locator("#cost").inner_text() == cost, prompt
            assert refused in page.locator("#refused").inner_text(), prompt
            assert page.locator("#refused").is_visible() == bool(refused), prompt

        # Of another team's request this visitor learns no cost: what is held there is called neither free nor booked.
        page.fill("#key", with_key(f"sqlite:///{tmp_path / 'books.db'}", "green"))
        window.expected += ("status of 404",)
        with page.expect_response("**/playground/cost?*"):
            make(window, "[[sim reset=before-headers]]")
        assert "broke off before it answered" in page.locator("#refused").inner_text()
        assert page.locator("#cost").inner_text() == ""
        make(window, "a bean")
        page.locator("#cost", has_text="It is booked to the key's own team.").wait_for()

        page.route("**/v1/images/generations", lambda route: route.abort())
        make(window, "a bean")
        page.locator("#refused", has_text="No answer came.").wait_for()
        window.expect_quiet()


def test_a_picture_elsewhere_is_a_link(tmp_path: Path) -> None:
    with a_playground(tmp_path) as window:
        page = window.page
        make(window, "[[sim url]]")
        page.locator("#cost", has_text="It cost $0.0059.").wait_for()
        link = page.locator(".pictures a")
        address = re.fullmatch(r"http://(127\.0\.0\.1:\d+)/\S+\.png", link.get_attribute("href") or "")
        assert address is not None
        assert (link.inner_text(), page.locator(".pictures img").count()) == (f"The picture is at {address[1]}", 0)
        # It leads to the web and nowhere else.
        assert page.evaluate("linkTo('javascript:alert(1)')") == "The picture's address can't be opened."
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
