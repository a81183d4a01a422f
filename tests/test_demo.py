"""The demo as a visitor meets it: one command, a line to paste, a picture, and the books that show what it cost."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy import demo
from proxy.ledger.reports import list_budgets, list_charges
from tests.ledger.ledgers import Ledger

ROOT = Path(__file__).parent.parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT)}
COMMAND = [sys.executable, "-m", "proxy.cli"]


@contextmanager
def visit(cwd: Path, *arguments: str) -> Iterator[list[str]]:
    """A demo that runs in ``cwd``, and the lines with which it greets; it is told to stop, and has to end well."""
    process = subprocess.Popen(
        [*COMMAND, "demo", "--port", "0", *arguments],
        cwd=cwd,
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    lines: list[str] = []
    try:
        for line in process.stdout:
            lines.append(line.rstrip("\n"))
            if line.startswith("Marketing"):
                break
        yield lines
    finally:
        process.send_signal(signal.SIGTERM)
        _, err = process.communicate()
    assert process.returncode == 0, err


def beanmeter(cwd: Path, *arguments: str) -> Any:
    ran = subprocess.run([*COMMAND, *arguments, "--json"], cwd=cwd, env=ENVIRONMENT, check=True, capture_output=True)
    return json.loads(ran.stdout)


def paste(cwd: Path, line: str) -> subprocess.CompletedProcess[str]:
    """Run a line as a visitor's shell does."""
    return subprocess.run(["/bin/sh", "-c", line], cwd=cwd, capture_output=True, text=True, check=False)


def curl_of(lines: list[str]) -> str:
    return next(line for line in lines if line.startswith("curl "))


def key_of(lines: list[str], team: str) -> str:
    line = next(line for line in lines if line.endswith(f"({team})"))
    found = re.search(r"sk-bm-[a-z2-7]{39}", line)
    assert found is not None
    return found[0]


@pytest.mark.skipif(shutil.which("curl") is None, reason="the line to paste needs curl")
def test_a_visit(tmp_path: Path) -> None:
    with visit(tmp_path) as lines:
        assert any(re.search(r"http://127\.0\.0\.1:\d+/v1$", line) for line in lines)
        assert any(line.endswith("/metrics") for line in lines)

        pasted = paste(tmp_path, curl_of(lines))
        assert (pasted.returncode, pasted.stdout, pasted.stderr) == (0, "", "")
        picture = (tmp_path / "image.png").read_bytes()
        assert picture.startswith(b"\x89PNG\r\n\x1a\n")
        assert [int.from_bytes(picture[at : at + 4], "big") for at in (16, 20)] == [1024, 1024]
        last = beanmeter(tmp_path, "charges", "--since", "1d", "--team", "design")[-1]
        assert (last["size"], last["quality"], last["state"], last["settled_micro_usd"]) == (
            "1024x1024",
            "low",
            "settled",
            5_900,
        )
        bill = next(line.split()[-1] for line in lines if line.startswith("  bill "))
        assert httpx2.get(bill, trust_env=False).json()["total_micro_usd"] == 5_900

        # Marketing can have a small picture, but not a good one.
        low = curl_of(lines).replace(key_of(lines, "design"), key_of(lines, "marketing"))
        refused = paste(tmp_path, low.replace('"low"', '"high"'))
        assert refused.returncode == 1
        assert "budget" in refused.stderr
        assert paste(tmp_path, low).returncode == 0

    with visit(tmp_path) as again:
        assert key_of(again, "design") != key_of(lines, "design")
        assert paste(tmp_path, curl_of(again)).returncode == 0
        port = re.search(r":(\d+)/", curl_of(again))
        earlier = re.sub(r":\d+/v1", f":{port[1]}/v1" if port else "", curl_of(lines))
        assert paste(tmp_path, earlier).returncode == 1
    books = Ledger(f"sqlite:///{tmp_path / 'beanmeter.db'}")
    books.check()
    books.close()


@pytest.fixture
def books(database_url: str) -> Iterator[Ledger]:
    found = Ledger(database_url)
    yield found
    found.close()


def test_the_sample_books_add_up(books: Ledger) -> None:
    now = datetime.now(UTC)
    demo.fill(books.database, now)
    with books.database.reading() as connection:
        rows = list(list_charges(connection))
        left = {status.team: status.remaining_micro_usd for status in list_budgets(connection, now)}
    books.check()
    assert len(rows) > 200
    assert {row["team"] for row in rows} == {"design", "marketing"}
    assert {row["state"] for row in rows} == {"settled", "released"}
    assert {row["operation"] for row in rows} == {"generation", "edit"}
    assert {row["basis"] for row in rows} == {"requested", "reported", None}
    assert now - demo.HISTORY <= rows[0]["created_at"]
    assert rows[-1]["finished_at"] < now
    assert now - rows[-1]["created_at"] < timedelta(days=7)
    assert 52_700 <= left["marketing"] < 210_700 < left["design"]


def test_a_second_start_finds_the_sample_books(books: Ledger) -> None:
    now = datetime.now(UTC)
    demo.fill(books.database, now)
    before = books.content()
    demo.fill(books.database, now + timedelta(days=1))
    assert books.content() == before


def test_the_demo_keeps_away_from_books_in_use(books: Ledger) -> None:
    books.account("red")
    before = books.content()
    with pytest.raises(demo.BooksInUse, match="BEANMETER_DATABASE_URL"):
        demo.fill(books.database, datetime.now(UTC))
    assert books.content() == before
