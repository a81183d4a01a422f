"""Every fenced block of every document does what it shows, against one running demo, or says why it is not run.

A reader puts a key, an address or an id of their own into an example; here the demo's take the same places, those of
:data:`PLACEHOLDERS`. Commands run on a copy of the demo's books, so that no block depends on another.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import sqlite3
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import pytest
import yaml
from sqlalchemy import text

from proxy import demo as samples
from proxy.cli import main
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.prices import parse_card
from proxy.settings import load
from tests.markdown import DOCUMENTS, ROOT, Block, blocks_of, spans, table
from tests.observability.programs import CONFIGURATION
from tests.observability.programs import run as check
from tests.test_demo import key_of, visit

# What a reader may copy and run; what is printed, where lines after "$ " are run; and what is only there to be looked at.
RUN = {"sh", "python", "js", "json", "toml", "yaml", "sql"}
PRINTED = "text"
PICTURES = {"mermaid"}

ADDRESS = "http://127.0.0.1:8080"
KEY = "sk-bm-..."
KEY_ID = "KEY_ID"
CHARGE_ID = "CHARGE_ID"
PLACEHOLDERS = (ADDRESS, KEY, KEY_ID, CHARGE_ID)

# The month of the examples stands for the last one, of which the demo's history has a part on every day of the year.
MONTH_BEGINS, MONTH_ENDS = "2026-11-01", "2026-11-30"

# Long enough for a busy machine, short enough for a test that hangs.
PATIENCE_SECONDS = 120

# Charges in review that the examples may decide on.
REVIEWS = 3

BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def to_run(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.not_run is None]


def is_printed(block: Block) -> bool:
    return block.language == PRINTED and block.not_run is None and block.code.startswith("$ ")


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_block_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in RUN | {PRINTED} | PICTURES, f"{block}: say which language it is in"
    if block.language == "js":
        assert block.not_run, f"{block}: nothing here runs JavaScript: say which test makes these calls"
    if block.language == PRINTED:
        # The list of commands is held against the program in test_docs.py.
        seen = is_printed(block) or block.code.startswith(("Beanmeter, before", "beanmeter serve"))
        assert seen or block.not_run, f"{block}: begin with '$ ' and the command that prints this"


@pytest.mark.parametrize("block", [block for block in BLOCKS if block.language == "sh" and block.not_run], ids=str)
def test_shell_that_is_not_run_can_be_read_by_a_shell(block: Block) -> None:
    ran = subprocess.run(["/bin/sh", "-n", "-c", block.code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


# The demo, and what the placeholders stand for


@dataclass(frozen=True)
class Demo:
    """A running demo. ``books`` is a copy of its database, with charges in review."""

    greeting: tuple[str, ...]
    address: str
    key: str
    marketing: str
    token: str
    key_id: str
    reviews: tuple[str, ...]
    books: Path

    def filled(self, code: str) -> str:
        """An example with the demo's own in the places of the reader's."""
        code = code.replace(ADDRESS, self.address).replace(KEY, self.key).replace(KEY_ID, self.key_id)
        for charge in self.reviews:
            code = code.replace(CHARGE_ID, charge, 1)
        assert not any(placeholder in code for placeholder in PLACEHOLDERS)
        begins, ends = last_month()
        return code.replace(MONTH_BEGINS, str(begins)).replace(MONTH_ENDS, str(ends))

    def directory(self, path: Path) -> Path:
        """A working directory with books of its own."""
        shutil.copy(self.books, path / "beanmeter.db")
        return path

    def images_settled(self) -> int:
        """How many images the running demo has delivered to the key of the examples."""
        answer = httpx2.get(
            f"{self.address}/admin/v1/spend?by=key",
            headers={"authorization": f"Bearer {self.token}"},
            trust_env=False,
            timeout=PATIENCE_SECONDS,
        )
        return sum(row["images"] for row in answer.json()["data"])


def last_month() -> tuple[date, date]:
    """The first and the last day of the month before this one."""
    ends = datetime.now(UTC).date().replace(day=1) - timedelta(days=1)
    return ends.replace(day=1), ends


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    home = tmp_path_factory.mktemp("demo")
    with visit(home) as lines:
        key = key_of(lines, "design")
        address = next(found[1] for line in lines if (found := re.search(r"(http://127\.0\.0\.1:\d+)/v1$", line)))
        token = next(found[1] for line in lines if (found := re.search(r"sign in with (\S+),", line)))
        for _ in range(REVIEWS):
            order = {"model": "gpt-image-2", "prompt": "[[sim reset=before-headers]]", "size": "1024x1024", "quality": "low"}
            answer = httpx2.post(
                f"{address}/v1/images/generations",
                json=order,
                headers={"authorization": f"Bearer {key}"},
                trust_env=False,
                timeout=PATIENCE_SECONDS,
            )
            assert answer.status_code == 502
        books = home / "copy.db"
        with closing(sqlite3.connect(home / "beanmeter.db")) as source, closing(sqlite3.connect(books)) as copy:
            source.backup(copy)
            (key_id,) = copy.execute(
                "SELECT keys.id FROM keys JOIN teams ON teams.id = keys.team_id WHERE teams.name = 'design' "
                "AND keys.revoked_at IS NULL"
            ).fetchone()
            reviews = tuple(row[0] for row in copy.execute("SELECT id FROM charges WHERE state = 'review' ORDER BY id"))
        assert len(reviews) == REVIEWS
        yield Demo(tuple(lines), address, key, key_of(lines, "marketing"), token, key_id, reviews, books)


def environment(demo: Demo) -> dict[str, str]:
    """That of a reader's shell: our command in the path, the admin token at hand, no proxy in between."""
    mine = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    return {**mine, "PATH": f"{Path(sys.executable).parent}:{mine['PATH']}", "TOKEN": demo.token}


def run(demo: Demo, command: list[str], directory: Path) -> str:
    """Run a program as a reader would; what it prints."""
    ran = subprocess.run(
        command, cwd=directory, env=environment(demo), capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


def is_ours(line: str) -> bool:
    """A line that is one of our commands, with a file for its output at most, and nothing else that needs a shell."""
    return line.startswith("beanmeter ") and not re.search(r"[|<>$&;*`]", line.partition(" #")[0].partition(" > ")[0])


def run_ours(line: str, capsys: pytest.CaptureFixture[str]) -> str:
    """Run one of our commands in this process, which spares the start of another; what it prints, or has in a file."""
    line, _, file = line.partition(" > ")
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(shlex.split(line, comments=True)[1:])
    printed = capsys.readouterr()
    assert ended.value.code in (None, 0), f"{line}: {printed.err}"
    if file:
        Path(file).write_text(printed.out)
    return printed.out + printed.err


# What is run


@pytest.mark.parametrize("block", to_run("python"), ids=str)
def test_python(block: Block, demo: Demo, tmp_path: Path) -> None:
    assert ADDRESS in block.code
    code = demo.filled(block.code)
    before = demo.images_settled()
    printed = run(demo, [sys.executable, "-c", code], demo.directory(tmp_path))
    if "client.images." in code:
        assert demo.images_settled() > before
    for said in re.findall(r"#\s*prints (.+)$", block.code, re.MULTILINE):
        assert shape(said) in [shape(line) for line in printed.splitlines()]


@pytest.mark.parametrize("block", to_run("sh"), ids=str)
def test_sh(
    block: Block, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if "curl" in block.code and shutil.which("curl") is None:
        pytest.skip("the example needs curl")
    code = demo.filled(block.code)
    directory = demo.directory(tmp_path)
    found_on_the_bill = write_bill(directory) if "bill.csv" in code else None
    lines = [line for line in code.splitlines() if line.strip() and not line.startswith("#")]
    if not all(is_ours(line) for line in lines):
        printed = run(demo, ["/bin/sh", "-euc", code], directory)
        # Where a stream is asked for, it has to have come to its end.
        assert '"stream": true' not in code or "image_generation.completed" in printed
        if found_on_the_bill is not None:
            assert sorted(" ".join(line.split()[:-1]) for line in printed.splitlines()) == found_on_the_bill, printed
        return
    monkeypatch.chdir(directory)
    for line in lines:
        run_ours(line, capsys)


def write_bill(directory: Path) -> list[str]:
    """A bill with a line for each image, which differs from the books in each way that it can; how that is told, in order
    and without the last word, an amount."""
    with closing(sqlite3.connect(directory / "beanmeter.db")) as books:
        begins, ends = last_month()
        settled = (
            "SELECT id, request_id, settled_micro_usd, images_delivered FROM charges "
            "WHERE settled_micro_usd > 0 AND created_at BETWEEN ? AND ?"
        )
        charges = books.execute(settled, (str(begins), str(ends + timedelta(days=1)))).fetchall()
    dearer, twice, unbilled, *_ = (charge for charge in charges if charge[3] == 1)
    lines = [(request_id, cost // images) for _, request_id, cost, images in charges for _ in range(images)]
    assert len(lines) > len(charges)
    lines.remove(dearer[1:3])
    lines.remove(unbilled[1:3])
    lines += [(dearer[1], dearer[2] + 1), twice[1:3], ("req_of_somebody_else", 5_900)]
    rows = [f"{request_id},{cost / 1_000_000:.6f}" for request_id, cost in lines]
    (directory / "bill.csv").write_text("\n".join(["request_id,usd", *rows, ""]))
    return sorted(
        [
            f"differs: {dearer[0]} settled {dearer[2]} micro-USD; billed USD",
            f"differs: {twice[0]} settled {twice[2]} micro-USD; billed USD",
            f"in the books alone: {unbilled[0]}",
            "on the bill alone: req_of_somebody_else",
        ]
    )


def shape(line: str) -> str:
    """A printed line without what differs from one run to the next: amounts, instants, ids, widths of columns."""
    line = re.sub(r"\b(chg|key|req|bud|aud)_\w+", "ID", line)
    line = re.sub(r"[0-9a-f]{8,}|\d+(?:[.,]\d+)*", "N", line.replace("sk-bm-...", ""))
    return " ".join(re.sub(r"[─━┄-]{2,}", "", line).split())


def shapes(text: str) -> list[str]:
    """Those of the lines that have more than a rule in them."""
    return [found for line in text.splitlines() if (found := shape(line))]


def same_form(shown: Any, printed: Any) -> bool:
    """Whether two JSON values have the same names and kinds of values; of a list the first element counts."""
    if isinstance(shown, dict) and isinstance(printed, dict):
        return shown.keys() == printed.keys() and all(same_form(shown[name], printed[name]) for name in shown)
    if isinstance(shown, list) and isinstance(printed, list):
        return not shown or not printed or same_form(shown[0], printed[0])
    return type(shown) is type(printed) or None in (shown, printed)


@pytest.mark.parametrize("block", [block for block in BLOCKS if is_printed(block)], ids=str)
def test_what_is_printed(
    block: Block, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo.directory(tmp_path))
    write_files(block, demo, tmp_path)
    for command, shown in re.findall(r"^\$ (.+)\n((?:(?!\$ ).*\n)*)", block.code, re.MULTILINE):
        line = demo.filled(command).replace(".venv/bin/", "")
        printed = run_ours(line, capsys) if is_ours(line) else run(demo, ["/bin/sh", "-euc", line], tmp_path)
        if shown.startswith(("{", "[")):
            assert same_form(json.loads(shown), json.loads(printed))
            continue
        assert shapes(demo.filled(shown)) == shapes(printed), f"{command} does not print what is shown but\n{printed}"


def write_files(block: Block, demo: Demo, directory: Path) -> None:
    """The teams in a file that the same document shows, under the name that its commands use."""
    for other in blocks_of(block.path):
        if other.language == "toml" and "teams" in tomllib.loads(other.code):
            (directory / "teams.toml").write_text(demo.filled(other.code))


def test_the_columns_that_finance_is_told_of(
    demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(demo.directory(tmp_path))
    header = run_ours("beanmeter charges --since 1d --format csv", capsys).splitlines()[0].split(",")
    told = [name for names, _ in table(ROOT / "docs" / "finance.md", "Spend") for name in spans(names)]
    assert told
    assert set(told) <= set(header)


# What is read by the program


@pytest.mark.parametrize("block", to_run("toml"), ids=str)
def test_toml(
    block: Block, demo: Demo, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    names = tomllib.loads(block.code).keys()
    if "models" in names:
        assert parse_card(block.code).models
    elif "teams" in names:
        monkeypatch.chdir(demo.directory(tmp_path))
        write_files(block, demo, tmp_path)
        assert "change" in run_ours("beanmeter apply teams.toml --dry-run", capsys)
    else:
        (tmp_path / "beanmeter.toml").write_text(with_secret_files(block.code, tmp_path))
        load({}, tmp_path)


def with_secret_files(code: str, directory: Path) -> str:
    """Settings whose secrets are in files that are there."""
    for path in re.findall(r'^\w+_file = "([^"]+)"', code, re.MULTILINE):
        secret = directory / Path(path).name
        secret.write_text(
            "postgresql://beanmeter@db.internal/beanmeter" if "url" in path else "0123456789abcdef0123456789abcdef"
        )
        code = code.replace(path, str(secret))
    return code


@pytest.mark.parametrize("block", to_run("yaml"), ids=str)
def test_receivers_of_alerts(block: Block, tmp_path: Path) -> None:
    """In the place of the empty receivers of the same names in the configuration that is shipped."""
    shipped = yaml.safe_load((CONFIGURATION / "alertmanager.yml").read_text("utf-8"))
    receivers = {one["name"]: one for one in shipped["receivers"]}
    filled = {one["name"]: one for one in yaml.safe_load(block.code)["receivers"]}
    assert filled.keys() <= receivers.keys()
    (tmp_path / "alertmanager.yml").write_text(yaml.safe_dump({**shipped, "receivers": [*(receivers | filled).values()]}))
    check("amtool", "check-config", tmp_path / "alertmanager.yml")


@pytest.mark.parametrize("block", to_run("json"), ids=str)
def test_a_refusal(block: Block, demo: Demo) -> None:
    """Of the demo's team whose budget is nearly used, in the words that are shown."""
    order = {"model": "gpt-image-2", "prompt": "a bean", "size": "1024x1024", "quality": "high"}
    answer = httpx2.post(
        f"{demo.address}/v1/images/generations",
        json=order,
        headers={"authorization": f"Bearer {demo.marketing}"},
        trust_env=False,
        timeout=PATIENCE_SECONDS,
    )
    assert shape(answer.text) == shape(json.dumps(json.loads(block.code)))


@pytest.mark.parametrize("block", to_run("sql"), ids=str)
def test_checks_of_the_books(block: Block, database_url: str) -> None:
    """Queries that find nothing wrong in books that are right, and find what is damaged."""
    queries = [query for query in block.code.split(";") if query.strip()]
    damage = [
        "UPDATE balances SET settled_micro_usd = settled_micro_usd + 1",
        "UPDATE rollups SET settled_micro_usd = settled_micro_usd + 1",
    ]
    database = Database(database_url)
    try:
        migrate(database)
        samples.fill(database, datetime(2026, 11, 22, 12, tzinfo=UTC))
        with database.reading() as connection:
            assert [connection.execute(text(query)).all() for query in queries] == [[]] * len(queries)
        for statement, query in zip(damage, queries, strict=False):
            with database.writing() as connection:
                connection.execute(text(statement))
                assert connection.execute(text(query)).all()
                connection.rollback()
    finally:
        database.close()


# What the demo greets with


def as_any_visit_shows_it(line: str) -> str:
    """A line of the demo's greeting without what differs from one visit to the next."""
    line = re.sub(r"sk-bm-[a-z2-7]+(\.\.\.)?", "KEY", line)
    line = re.sub(r"\d+\.\d{6}", "USD", line)
    line = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", line)
    line = re.sub(r"sign in with \S+,", "sign in with TOKEN,", line)
    line = re.sub(r"^  \S*beanmeter ", "  beanmeter ", line)
    return re.sub(r"python3 -c '.*'", "python3 -c", line)


def test_the_demo_greets_as_it_is_shown(demo: Demo) -> None:
    (shown,) = [block for block in blocks_of(ROOT / "docs" / "using.md") if block.code.startswith("Beanmeter, before")]
    greeting = [as_any_visit_shows_it(line) for line in demo.greeting]
    assert [as_any_visit_shows_it(line) for line in shown.code.splitlines()] == greeting[1:]
