"""The documents say what the code does: every setting, command, metric and refusal, no other, links that lead somewhere, and
examples that run."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import cache
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr
from sqlalchemy import text

import proxy
import proxy.app
from proxy import demo
from proxy.admin import PREFIX
from proxy.admin.operations import OPERATIONS
from proxy.cli import app, main
from proxy.errors import Refusal
from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.reports import BudgetStatus, Figures
from proxy.metrics import Metrics
from proxy.prices import parse_card
from proxy.settings import SECRETS, Settings
from proxy.simulator import SimulatorOptions, running_simulator
from tests.live import LiveGateway, Loop
from tests.test_demo import visit

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")])

# What a reader may copy and run, and what is only there to be looked at.
CODE = {"sh", "python", "js", "json", "toml", "sql"}
PICTURES = {"text", "mermaid"}

# What stands in the examples for the reader's own.
BASE_URL = "http://127.0.0.1:8080/v1"
KEY = "sk-bm-..."


# Reading Markdown


@dataclass(frozen=True)
class Block:
    """A fenced block. ``not_run`` is the reason that stands above it, if one does."""

    path: Path
    line: int
    language: str
    code: str
    not_run: str | None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> Iterator[Block]:
    found = re.finditer(
        r"^(?:<!-- not run: (?P<reason>[^\n]+) -->\n)?```(?P<language>\S*)\n(?P<code>.*?)^```$",
        path.read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
    for block in found:
        line = block.string.count("\n", 0, block.start("language")) + 1
        yield Block(path, line, block["language"], block["code"], block["reason"])


BLOCKS = [block for path in DOCUMENTS for block in blocks_of(path)]


def to_run(language: str) -> list[Block]:
    return [block for block in BLOCKS if block.language == language and block.not_run is None]


@cache
def prose(path: Path) -> str:
    """A document without its fenced blocks."""
    return re.sub(r"^```.*?^```$", "", path.read_text("utf-8"), flags=re.MULTILINE | re.DOTALL)


def section(path: Path, title: str) -> str:
    """What stands under a heading, up to the next one."""
    found = re.search(rf"^#+ {re.escape(title)}\n(.*?)(?=^#|\Z)", path.read_text("utf-8"), re.MULTILINE | re.DOTALL)
    assert found is not None, f"{path.name} has no section {title!r}"
    return found[1]


def table(path: Path, title: str) -> list[list[str]]:
    """The cells of the one table of a section, without its head."""
    lines = [line for line in section(path, title).splitlines() if line.startswith("|")]
    # A bar inside of code is written with a backslash before it.
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]] for line in lines]
    assert len(rows) > 2, f"{title!r} has no table"
    assert len({len(row) for row in rows}) == 1, f"a row of {title!r} has more or fewer cells than its head"
    return rows[2:]


def spans(cell: str) -> list[str]:
    """What stands in code spans."""
    return re.findall(r"`([^`]+)`", cell)


def span(cell: str) -> str:
    (found,) = spans(cell)
    return found


def anchors(path: Path) -> set[str]:
    """The names that headings can be linked by."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


# What is documented


def default_shown(field: str) -> str | None:
    """A default as the table shows it; ``None`` for one that it puts in words."""
    value = Settings.model_fields[field].get_default(call_default_factory=True)
    if value is None or value == {}:
        return None
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {span(name): next(iter(spans(default)), None) for name, default, _ in table(README, "Settings")}
    assert documented == {f"BEANMETER_{field.upper()}": default_shown(field) for field in Settings.model_fields}
    assert set(re.findall(r"BEANMETER_[A-Z_]+_FILE", section(README, "Settings"))) == {
        f"BEANMETER_{field.upper()}_FILE" for field in SECRETS
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_names_a_setting_that_does_not_exist(path: Path) -> None:
    fields = {*Settings.model_fields, *(f"{field}_file" for field in SECRETS), "config"}
    assert set(re.findall(r"BEANMETER_[A-Z_]+", path.read_text("utf-8"))) <= {f"BEANMETER_{field.upper()}" for field in fields}


def commands() -> Iterator[tuple[str, set[str]]]:
    """Every command with its options, as Typer has them."""

    def walk(path: str, command: object) -> Iterator[tuple[str, set[str]]]:
        below = getattr(command, "commands", None)
        if below is None:
            options = {name for param in getattr(command, "params", ()) for name in param.opts if name.startswith("-")}
            yield path, options - {"--help", "-h"}
            return
        for name, child in below.items():
            yield from walk(f"{path} {name}", child)

    return walk("beanmeter", typer.main.get_command(app))


def test_every_command_is_documented_with_its_options() -> None:
    (listed,) = [block for block in blocks_of(README) if block.code.startswith("beanmeter serve")]
    documented = {}
    for line in listed.code.splitlines():
        words = re.match(r"beanmeter( [a-z]+)+", line)
        assert words is not None, line
        documented[words[0]] = set(re.findall(r"(?<![\w-])--?[a-z]+(?:-[a-z]+)*", line))
    assert documented == dict(commands())


def metrics_page(labels: dict[str, list[str]]) -> dict[str, set[str]]:
    """The metrics on the page of a gateway that has seen traffic, with their labels. ``labels`` by name are those to use."""
    metrics = Metrics(CollectorRegistry())
    for instrument in vars(metrics).values():
        if isinstance(instrument, MetricWrapperBase):
            (described,) = instrument.describe()
            used = labels.get(described.name)
            if used:
                # Raises where the instrument has other labels than those.
                instrument.labels(**dict.fromkeys(used, "x"))
    budget = BudgetStatus("x", None, "team", "month", False, 1, 0, 0, None)
    page, _ = metrics.page("text/plain", "x", Figures([budget], {"review": 1}))
    return {
        family.name: {name for sample in family.samples for name in sample.labels} - {"le"}
        for family in text_string_to_metric_families(page.decode("utf-8"))
    }


def test_every_metric_is_documented_with_its_labels() -> None:
    rows = {span(name): spans(labels) for name, labels, _ in table(README, "Metrics")}
    documented = {name.removesuffix("_total"): labels for name, labels in rows.items()}
    assert {name: set(labels) for name, labels in documented.items()} == metrics_page(documented)


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_no_document_names_a_metric_that_does_not_exist(path: Path) -> None:
    known = {span(name) for name, _, _ in table(README, "Metrics")}
    assert set(re.findall(r"\bbeanmeter_[a-z_]+", path.read_text("utf-8"))) <= known


def refusals(parent: type[Refusal] = Refusal) -> Iterator[type[Refusal]]:
    for child in parent.__subclasses__():
        if hasattr(child, "code"):
            yield child
        yield from refusals(child)


def test_every_refusal_is_documented_with_its_status_and_type() -> None:
    rows = table(README, "Refusals")
    documented = {(span(code), int(status), span(kind)) for code, status, kind, _ in rows}
    assert documented == {(refusal.code, refusal.status, refusal.type) for refusal in refusals()}
    assert len(rows) == len(documented)


def test_every_operation_of_the_admin_api_is_documented() -> None:
    documented = [span(name) for name, _ in table(ROOT / "docs" / "admin-api.md", "What there is")]
    assert sorted(documented) == sorted(f"{operation.method} {PREFIX}{operation.path}" for operation in OPERATIONS)


def test_the_floors_are_those_of_the_code() -> None:
    floors = re.findall(r"^- floor (\d+): (.+?) -- (.+?)(?=^- floor|\Z)", proxy.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert floors
    expected = [[number, rooms.replace("``", "`"), " ".join(job.split())] for number, rooms, job in floors]
    documented = section(ROOT / "docs" / "architecture.md", "Rooms and floors")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in documented.splitlines() if re.match(r"\| \d", line)]
    assert rows == expected


# What is pointed at


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{path.name} points to {target}, which is not there"
        assert there.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(there), f"{path.name} points to {target}, and there is no such heading"


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_every_file_and_test_that_is_named_exists(path: Path) -> None:
    for name, test in re.findall(r"\b((?:tests|proxy|bench|docs)/[\w/.-]+\.\w+)(?:::(\w+))?", path.read_text("utf-8")):
        assert (ROOT / name).exists(), f"{path.name} names {name}, which is not there"
        assert not test or test in names_of_tests(ROOT / name), f"{name} has no test {test}"


def test_every_fault_is_shown_by_a_test() -> None:
    for fault, _, shown in table(README, "Faults"):
        assert re.fullmatch(r"(`tests/[\w/]+\.py::test_\w+`(<br>|$))+", shown), f"{fault}: name the test that shows it"


def test_every_constant_that_is_named_is_in_its_file() -> None:
    rows = table(ROOT / "docs" / "architecture.md", "What a slow client costs")
    for _, where in rows:
        (link,) = re.findall(r"\]\(\.\./([\w/.]+)\)", where)
        names = [name for name in spans(where) if name.isupper()]
        assert names
        for name in names:
            assert re.search(rf"^{name} = ", (ROOT / link).read_text("utf-8"), re.MULTILINE), f"{link} has no {name}"


def test_every_document_that_the_code_names_exists() -> None:
    sources = [*(ROOT / "proxy").rglob("*.py"), *(ROOT / "migrations").rglob("*.py"), ROOT / "pyproject.toml"]
    named = {name for path in sources for name in re.findall(r"\bdocs/\w+\.md", path.read_text("utf-8"))}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


# What can be run


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_every_example_is_run_or_says_why_not(block: Block) -> None:
    assert block.language in CODE | PICTURES, "say which language it is in"
    if block.language == "js":
        assert block.not_run, "nothing here runs JavaScript: say which test makes these calls"


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway with a key, in front of the simulator."""
    directory = tmp_path_factory.mktemp("gateway")
    loop = Loop()
    running = running_simulator(SimulatorOptions())
    simulator = loop.run(running.__aenter__())
    try:
        with LiveGateway(loop, f"sqlite:///{directory / 'beanmeter.db'}", simulator.base_url, directory) as gateway:
            yield gateway
    finally:
        loop.run(running.__aexit__(None, None, None))
        loop.close()


def run_against(gateway: LiveGateway, command: list[str], cwd: Path) -> str:
    """Run a program with the examples' address and key replaced; what it prints."""
    environment = {name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")}
    command = [part.replace(BASE_URL, gateway.base_url).replace(KEY, gateway.key) for part in command]
    ran = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout


@pytest.mark.parametrize("block", to_run("python"), ids=str)
def test_python(block: Block, gateway: LiveGateway, tmp_path: Path) -> None:
    assert BASE_URL in block.code
    assert KEY in block.code
    before = len(gateway.charges())
    printed = run_against(gateway, [sys.executable, "-c", block.code], tmp_path)
    assert printed.split() == ["image_generation.partial_image"] * 2 + ["image_generation.completed"]
    assert (tmp_path / "bean.png").read_bytes().startswith(b"\x89PNG")
    assert [charge["state"] for charge in gateway.charges()[before:]] == ["settled"] * 3


def calls_curl(block: Block) -> bool:
    return block.code.startswith("curl ")


@pytest.mark.skipif(shutil.which("curl") is None, reason="the example needs curl")
@pytest.mark.parametrize("block", [block for block in to_run("sh") if calls_curl(block)], ids=str)
def test_curl(block: Block, gateway: LiveGateway, tmp_path: Path) -> None:
    before = len(gateway.charges())
    assert "event: image_generation.completed" in run_against(gateway, ["/bin/sh", "-c", block.code], tmp_path)
    assert [charge["state"] for charge in gateway.charges()[before:]] == ["settled"]


@pytest.mark.parametrize("block", [block for block in to_run("sh") if not calls_curl(block)], ids=str)
def test_commands(block: Block, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(tmp_path)
    for line in block.code.splitlines():
        program, *arguments = shlex.split(line, comments=True)
        assert program == "beanmeter", f"{line}: only our own commands can be tried here"
        if "KEY_ID" in line:
            key_id = first_key(tmp_path)
            arguments = [argument.replace("KEY_ID", key_id) for argument in arguments]
        with pytest.raises(SystemExit) as ended:
            main(arguments)
        assert ended.value.code in (None, 0), f"{line}: {capsys.readouterr().err}"


def first_key(directory: Path) -> str:
    database = Database(f"sqlite:///{directory / 'beanmeter.db'}")
    try:
        with database.reading() as connection:
            key_id: str = accounts.list_keys(connection)[0]["id"]
    finally:
        database.close()
    return key_id


@pytest.mark.parametrize("block", to_run("json"), ids=str)
def test_json(block: Block) -> None:
    assert json.loads(block.code)


@pytest.mark.parametrize("block", to_run("toml"), ids=str)
def test_a_price_card(block: Block) -> None:
    assert parse_card(block.code).models


@pytest.mark.parametrize("block", to_run("sql"), ids=str)
def test_checks_of_the_books(block: Block, database_url: str) -> None:
    queries = [query for query in block.code.split(";") if query.strip()]
    damage = [
        "UPDATE balances SET settled_micro_usd = settled_micro_usd + 1",
        "UPDATE rollups SET settled_micro_usd = settled_micro_usd + 1",
    ]
    database = Database(database_url)
    try:
        migrate(database)
        demo.fill(database, datetime(2026, 11, 22, 12, tzinfo=UTC))
        with database.reading() as connection:
            assert [connection.execute(text(query)).all() for query in queries] == [[]] * len(queries)
        for statement, query in zip(damage, queries, strict=False):
            with database.writing() as connection:
                connection.execute(text(statement))
                assert connection.execute(text(query)).all()
                connection.rollback()
    finally:
        database.close()


# What is shown


def as_any_visit_shows_it(line: str) -> str:
    """A line of the demo's greeting without what differs from one visit to the next."""
    line = re.sub(r"sk-bm-[a-z2-7]+(\.\.\.)?", "KEY", line)
    line = re.sub(r"\d+\.\d{6}", "USD", line)
    line = re.sub(r"127\.0\.0\.1:\d+", "ADDRESS", line)
    line = re.sub(r"sign in with \S+,", "sign in with TOKEN,", line)
    line = re.sub(r"^  \S*beanmeter ", "  beanmeter ", line)
    return re.sub(r"python3 -c '.*'", "python3 -c", line)


def test_the_demo_greets_as_it_is_shown(tmp_path: Path) -> None:
    (shown,) = [block for block in blocks_of(README) if block.code.startswith("Beanmeter, before")]
    with visit(tmp_path) as lines:
        greeting = [as_any_visit_shows_it(line) for line in lines]
    assert [as_any_visit_shows_it(line) for line in shown.code.splitlines()] == greeting[1:]


def test_headings_go_down_one_step_at_a_time() -> None:
    for path in DOCUMENTS:
        depths = [len(marks) for marks in re.findall(r"^(#+) ", prose(path), re.MULTILINE)]
        assert depths[0] == 1
        assert 1 not in depths[1:]
        assert all(after - before <= 1 for before, after in pairwise(depths))
