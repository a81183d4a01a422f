"""The documents say what the code does: every setting, command, path, metric, refusal and log event, no other, and links that
lead somewhere. That their examples run is seen in test_blocks.py."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import pytest
import typer
from prometheus_client import CollectorRegistry
from prometheus_client.metrics import MetricWrapperBase
from prometheus_client.parser import text_string_to_metric_families
from pydantic import SecretStr

import proxy
import proxy.app
from proxy import pages
from proxy.admin import PREFIX
from proxy.admin.operations import OPERATIONS
from proxy.cli import app
from proxy.errors import Refusal
from proxy.ledger.reports import BudgetStatus, Figures
from proxy.ledger.schema import metadata
from proxy.metrics import Metrics
from proxy.pages.routes import PAGES
from proxy.settings import SECRETS, Settings
from tests import rooms
from tests.markdown import (
    DOCUMENTS,
    README,
    REFERENCE,
    ROOT,
    anchors,
    blocks_of,
    name_of,
    prose,
    section,
    span,
    spans,
    table,
)

# What is documented


def default_shown(field: str) -> str | None:
    """A default as the table shows it; ``None`` for one that it puts in words."""
    value = Settings.model_fields[field].get_default(call_default_factory=True)
    if value is None or value == {}:
        return None
    if isinstance(value, bool):
        return str(value).lower()
    return value.get_secret_value() if isinstance(value, SecretStr) else str(value)


def test_every_setting_is_documented_with_its_default() -> None:
    documented = {span(name): next(iter(spans(default)), None) for name, default, _ in table(REFERENCE, "Settings")}
    assert documented == {f"BEANMETER_{field.upper()}": default_shown(field) for field in Settings.model_fields}
    assert set(re.findall(r"BEANMETER_[A-Z_]+_FILE", section(REFERENCE, "Settings"))) == {
        f"BEANMETER_{field.upper()}_FILE" for field in SECRETS
    }


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
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
    (listed,) = [block for block in blocks_of(REFERENCE) if block.code.startswith("beanmeter serve")]
    documented = {}
    for line in listed.code.splitlines():
        words = re.match(r"beanmeter( [a-z]+)+", line)
        assert words is not None, line
        documented[words[0]] = set(re.findall(r"(?<![\w-])--?[a-z]+(?:-[a-z]+)*", line))
    assert documented == dict(commands())


def commands_named(path: Path) -> Iterator[str]:
    """What stands in code spans, and in lines of shell, from the name of our command on."""
    yield from (one for one in spans(prose(path)) if one.startswith("beanmeter "))
    for block in blocks_of(path):
        if block.language == "sh":
            # After -u it is the user of that name.
            yield from re.findall(r"(?:^|(?<!-u)\s|/)(beanmeter [a-z][^\n|]*)", re.sub(r"#.*", "", block.code))


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_document_names_a_command_or_option_that_does_not_exist(path: Path) -> None:
    known = dict(commands())
    for named in commands_named(path):
        found = [command for command in known if re.match(rf"{command}(?= |$)", named)]
        assert found, f"{path.name} names {named!r}: there is no such command"
        assert set(re.findall(r"(?<= )--?[a-z][a-z-]*", named)) <= known[found[0]] | {"--help"}, named


def test_who_follows_the_readme_from_a_checkout_finds_the_program() -> None:
    """make puts it into .venv/bin alone: that stands before its name, or in the path of the shell by then."""
    lines = [line for block in blocks_of(README) if block.language in ("sh", "text") for line in block.code.splitlines()]
    commands = [number for number, line in enumerate(lines) if re.match(r"(\$ )?beanmeter ", line)]
    in_path = [number for number, line in enumerate(lines) if ".venv/bin:$PATH" in line]
    assert commands
    assert min(in_path, default=len(lines)) < min(commands)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_a_document_says_how_to_get_the_clients_that_it_shows(path: Path) -> None:
    words = path.read_text("utf-8")
    for needed, command in (("from openai import", "pip install openai"), ('from "openai"', "npm install openai")):
        assert needed not in words or command in words.partition(needed)[0], f"{path.name} shows it before {command!r}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_document_names_a_make_target_that_does_not_exist(path: Path) -> None:
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text("utf-8"), re.MULTILINE))
    shell = "\n".join(block.code for block in blocks_of(path) if block.language == "sh")
    named = re.findall(r"^make ([a-z]+)", "\n".join([*spans(prose(path)), shell]), re.MULTILINE)
    assert set(named) <= targets


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
    budgets = [
        BudgetStatus("x", None, "team", "month", False, 1, 0, 0, None),
        BudgetStatus("x", "k", "key", "day", False, 1, 0, 0, None),
    ]
    page, _ = metrics.page("text/plain", "x", Figures(budgets, {"review": 1}, 0.0))
    return {
        family.name: {name for sample in family.samples for name in sample.labels} - {"le"}
        for family in text_string_to_metric_families(page.decode("utf-8"))
    }


def test_every_metric_is_documented_with_its_labels() -> None:
    rows = {span(name): spans(labels) for name, labels, _ in table(REFERENCE, "Metrics")}
    documented = {name.removesuffix("_total"): labels for name, labels in rows.items()}
    assert {name: set(labels) for name, labels in documented.items()} == metrics_page(documented)


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_document_names_a_metric_that_does_not_exist(path: Path) -> None:
    known = {span(name) for name, _, _ in table(REFERENCE, "Metrics")}
    assert set(re.findall(r"\bbeanmeter_[a-z_]+", path.read_text("utf-8"))) <= known


def refusals(parent: type[Refusal] = Refusal) -> Iterator[type[Refusal]]:
    for child in parent.__subclasses__():
        if hasattr(child, "code"):
            yield child
        yield from refusals(child)


def test_every_refusal_is_documented_with_its_status_and_type() -> None:
    rows = table(REFERENCE, "Refusals")
    documented = {(span(code), int(status), span(kind)) for code, status, kind, _ in rows}
    assert documented == {(refusal.code, refusal.status, refusal.type) for refusal in refusals()}
    assert len(rows) == len(documented)


def test_callers_are_told_what_to_do_about_every_refusal() -> None:
    told = [code for codes, _ in table(ROOT / "docs" / "using.md", "Errors") for code in spans(codes)]
    assert sorted(told) == sorted(refusal.code for refusal in refusals())


def test_every_header_that_is_ours_is_documented() -> None:
    sources = "".join(path.read_text("utf-8") for path in (ROOT / "proxy").glob("*.py"))
    ours = set(re.findall(r'b"(x-(?:beanmeter|should)-[a-z-]+[a-z])"', sources))
    documented = {span(header) for header, _, _ in table(REFERENCE, "Headers")}
    assert ours == {header for header in documented if header.startswith("x-")}


def test_every_operation_of_the_admin_api_is_documented() -> None:
    documented = [span(name) for name, _ in table(ROOT / "docs" / "admin-api.md", "What there is")]
    assert sorted(documented) == sorted(f"{operation.method} {PREFIX}{operation.path}" for operation in OPERATIONS)


def test_every_path_is_documented() -> None:
    source = (ROOT / "proxy" / "endpoints.py").read_text("utf-8")
    served = {f"GET {path}" for path in re.findall(r'Route\("(/[^"]+)"', source)}
    served |= {"POST /v1/images/generations", "POST /v1/images/edits", f"... {PREFIX}/...", f"... {pages.PREFIX}/..."}
    served |= {f"GET {PREFIX}/docs", f"GET {PREFIX}/openapi.json"}
    assert sorted(span(path) for path, _, _ in table(REFERENCE, "Paths")) == sorted(served)


def test_every_page_is_documented_with_who_may_see_it() -> None:
    documented = {span(page): access for page, access, _ in table(REFERENCE, "Pages")}
    assert documented == {f"{page.method} {pages.PREFIX}{page.path}": page.access for page in PAGES}


def events_logged() -> Iterator[tuple[str, str]]:
    """The name and level of every event that the program can log, from its own calls."""
    for path in (ROOT / "proxy").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if (
                isinstance(node, ast.Call)
                and isinstance(node.func, ast.Attribute)
                and isinstance(node.func.value, ast.Name)
                and node.func.value.id == "log"
                and isinstance(node.args[0], ast.Constant)
                and isinstance(node.args[0].value, str)
            ):
                yield node.args[0].value, "error" if node.func.attr == "exception" else node.func.attr


def test_every_log_event_is_documented_with_its_level() -> None:
    documented = {(span(event), level) for event, levels, _ in table(REFERENCE, "Log events") for level in levels.split(", ")}
    assert documented == set(events_logged())


def test_the_floors_are_those_of_the_code() -> None:
    floors = re.findall(r"^- floor (\d+): (.+?) -- (.+?)(?=^- floor|\Z)", proxy.__doc__ or "", re.MULTILINE | re.DOTALL)
    assert floors
    expected = [[number, rooms.replace("``", "`"), " ".join(job.split())] for number, rooms, job in floors]
    documented = section(ROOT / "docs" / "architecture.md", "Rooms and floors")
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in documented.splitlines() if re.match(r"\| \d", line)]
    assert rows == expected


def test_the_picture_of_the_house_is_drawn_from_its_floors() -> None:
    assert rooms.PICTURE.read_text("utf-8") == rooms.drawn(), "draw it anew: python -m tests.rooms"


def test_every_table_of_the_database_is_documented() -> None:
    documented = [name for names, _ in table(ROOT / "docs" / "architecture.md", "The database") for name in spans(names)]
    assert sorted(documented) == sorted(metadata.tables)


# What is pointed at


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_leads_somewhere(path: Path) -> None:
    pictures = re.findall(r'\bsrc(?:set)?="([^"]+)"', prose(path))
    for target in [*re.findall(r"\]\(([^)\s]+)\)", prose(path)), *pictures]:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        there = (path.parent / name).resolve() if name else path
        assert there.exists(), f"{path.name} points to {target}, which is not there"
        assert there.is_relative_to(ROOT)
        assert not anchor or anchor in anchors(there), f"{path.name} points to {target}, and there is no such heading"


def test_every_document_can_be_found() -> None:
    for index in (ROOT / "README.md", ROOT / "docs" / "decisions" / "README.md"):
        room = ROOT / "docs" if index.parent == ROOT else index.parent
        linked = {(index.parent / link).resolve() for link in re.findall(r"\]\(([^)#\s]+)", prose(index))}
        assert {path for path in room.glob("*.md") if path != index} <= linked, f"{name_of(index)} lists the documents: add it"


def names_of_tests(path: Path) -> set[str]:
    tree = ast.parse(path.read_text("utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)}


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_file_and_test_that_is_named_exists(path: Path) -> None:
    words = re.sub(r"https://\S+", "", path.read_text("utf-8"))
    for name, test in re.findall(r"\b((?:tests|proxy|bench|docs)/[\w/.-]+\.\w+)(?:::(\w+))?", words):
        assert (ROOT / name).exists(), f"{path.name} names {name}, which is not there"
        assert not test or test in names_of_tests(ROOT / name), f"{name} has no test {test}"


def faults() -> list[list[str]]:
    path = ROOT / "docs" / "faults.md"
    kinds = re.findall(r"^## (.+)$", path.read_text("utf-8"), re.MULTILINE)
    return [list(row) for kind in kinds for row in table(path, kind)]


def test_every_fault_is_shown_by_a_test() -> None:
    for fault, _, shown in faults():
        assert re.fullmatch(r"(`tests/[\w/]+\.py::test_\w+`(<br>|$))+", shown), f"{fault}: name the test that shows it"


def test_the_main_faults_are_told_in_the_readme_as_in_their_own_document() -> None:
    told = [list(row) for row in table(ROOT / "README.md", "When something breaks")]
    assert told
    assert [row for row in told if row not in faults()] == []


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
    named = {name for path in sources for name in re.findall(r"\bdocs/[\w/-]+\.md", path.read_text("utf-8"))}
    assert named
    assert {name for name in named if not (ROOT / name).exists()} == set()


# How it reads


def test_headings_go_down_one_step_at_a_time() -> None:
    for path in DOCUMENTS:
        depths = [len(marks) for marks in re.findall(r"^(#+) ", prose(path), re.MULTILINE)]
        assert depths[0] == 1
        assert 1 not in depths[1:]
        assert all(after - before <= 1 for before, after in pairwise(depths))
