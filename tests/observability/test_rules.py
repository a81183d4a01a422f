"""The rules by themselves: Prometheus' own checks, their unit tests, and the runbook that goes with them."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest

from tests.markdown import spans, table
from tests.observability.programs import CONFIGURATION, DASHBOARDS, ROOT, RUNBOOK, run
from tests.test_docs import commands, refusals

RULES = sorted((CONFIGURATION / "rules").glob("*.yml"))
UNIT_TESTS = sorted((CONFIGURATION / "tests").glob("*.yml"))

ALERTS = [
    (name, rest)
    for name, rest in re.findall(
        r"^ +- alert: (\w+)\n(.*?)(?=^ +- (?:alert|name): |\Z)",
        (CONFIGURATION / "rules" / "alerts.yml").read_text("utf-8"),
        re.MULTILINE | re.DOTALL,
    )
]
NAMES = [name for name, _ in ALERTS]
RECORDS = set(re.findall(r"- record: (\S+)", (CONFIGURATION / "rules" / "records.yml").read_text("utf-8")))

# Codes that have an alert of their own.
TOLD_ELSEWHERE = {
    "insufficient_quota",
    "ledger_unavailable",
    "storage_unavailable",
    "upstream_credentials",
    "upstream_failed",
    "upstream_unreachable",
}

# Who is told, by the labels of an alert.
RECEIVERS = {
    ("critical", "operator"): "on-call",
    ("warning", "operator"): "operators",
    ("critical", "finance"): "finance,on-call",
    ("warning", "finance"): "finance",
    ("info", "finance"): "finance",
}


def runbook() -> dict[str, str]:
    """What stands under each heading of the third level."""
    parts = re.split(r"^(#+) (.+)\n", RUNBOOK.read_text("utf-8"), flags=re.MULTILINE)[1:]
    return {title: text for marks, title, text in zip(parts[::3], parts[1::3], parts[2::3], strict=True) if marks == "###"}


def test_the_configuration_is_one_that_prometheus_takes() -> None:
    # It reads the rules as well, and its lint knows duplicates.
    assert "FAILED" not in run("promtool", "check", "config", "prometheus.yml")


def test_the_configuration_is_one_that_alertmanager_takes() -> None:
    run("amtool", "check-config", "alertmanager.yml")


@pytest.mark.parametrize("path", UNIT_TESTS, ids=lambda path: path.stem)
def test_the_unit_tests_of_the_rules(path: Path) -> None:
    run("promtool", "test", "rules", path)


@pytest.mark.parametrize("labels", RECEIVERS, ids="-".join)
def test_who_is_told(labels: tuple[str, str]) -> None:
    severity, audience = labels
    told = run(
        "amtool", "config", "routes", "test", "--config.file=alertmanager.yml", f"severity={severity}", f"audience={audience}"
    )
    assert told.strip() == RECEIVERS[labels]


@pytest.mark.parametrize(("name", "rest"), ALERTS, ids=NAMES)
def test_an_alert_says_how_urgent_it_is_and_what_to_do(name: str, rest: str) -> None:
    severity, audience = (re.search(rf"^          {label}: (\w+)$", rest, re.MULTILINE) for label in ("severity", "audience"))
    assert severity is not None
    assert audience is not None
    assert (severity[1], audience[1]) in RECEIVERS
    assert re.search(r'^          summary: ".+"$', rest, re.MULTILINE)
    assert re.search(r"^          description: >-\n            .+\.$", rest, re.MULTILINE | re.DOTALL)
    assert f"          runbook: docs/observability.md#{name.lower()}\n" in rest


def test_the_runbook_has_every_alert_and_no_other() -> None:
    assert [title for title in runbook() if title.startswith("Beanmeter")] == NAMES
    for name in NAMES:
        assert re.search(r"^1\. ", runbook()[name], re.MULTILINE), f"{name}: what to do, step by step"


def test_the_runbook_explains_every_record_and_no_other() -> None:
    assert set(re.findall(r"`(beanmeter:[\w:]+)`", RUNBOOK.read_text("utf-8"))) == RECORDS


def test_the_runbook_has_every_code_of_a_surge() -> None:
    named = [code for codes, _ in table(RUNBOOK, "BeanmeterRefusalsSurge") for code in spans(codes)]
    # Whoever left before anything was held is counted among the refusals, and is none.
    assert sorted(named) == sorted({refusal.code for refusal in refusals()} - TOLD_ELSEWHERE | {"client_gone"})


@pytest.mark.parametrize("path", [RUNBOOK, *RULES], ids=lambda path: path.name)
def test_every_command_and_log_line_that_is_named_exists(path: Path) -> None:
    text = " ".join(path.read_text("utf-8").split())
    known = dict(commands())
    for command in re.findall(r"[`(. ](beanmeter [a-z]+[^`().;:]*)", text):
        assert any(command.startswith(name) for name in known), command
    sources = "".join(source.read_text("utf-8") for source in (ROOT / "proxy").rglob("*.py"))
    for event in re.findall(r"(?:the event|log lines|[Ll]ook for|and for) [`\"]([a-z_]+)[`\"]", text):
        assert re.search(rf"log\.\w+\(\s*\"{event}\"", sources), event


def test_every_panel_that_is_named_exists() -> None:
    panels = [panel["title"] for path in DASHBOARDS.glob("*.json") for panel in json.loads(path.read_text("utf-8"))["panels"]]
    named = set(re.findall(r"(?<!\*)\*([A-Z][^*\n]+)\*(?!\*)", RUNBOOK.read_text("utf-8")))
    # A page of Prometheus' own.
    assert named - {"Targets"} <= set(panels)


def test_every_alert_has_a_unit_test_in_which_it_fires() -> None:
    fired = {name for path in UNIT_TESTS for name in re.findall(r'alertname="(\w+)"', path.read_text("utf-8"))}
    assert fired == set(NAMES)


def test_an_alert_that_holds_another_back_exists() -> None:
    named = re.findall(r"alertname =~? \"?(Beanmeter[^\]\"]+)", (CONFIGURATION / "alertmanager.yml").read_text("utf-8"))
    assert named
    for pattern in named:
        assert any(re.fullmatch(pattern, name) for name in NAMES), pattern


def test_a_line_is_no_longer_than_one_of_code() -> None:
    for path in [*RULES, *CONFIGURATION.glob("*.yml")]:
        assert max(map(len, path.read_text("utf-8").splitlines())) <= 128, path.name
