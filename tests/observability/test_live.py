"""A real Prometheus watches real gateways under traffic: every expression of every rule and panel works, and gives something.

Time runs thirty times faster there. The rules are those of deploy/prometheus, as Prometheus itself has read them, with windows,
intervals and offsets a thirtieth as long, and the gateways are scraped every second.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from proxy.money import MICRO_PER_USD
from tests.observability.expressions import HASTE, alternatives, chosen, hasten, uncompared
from tests.observability.programs import CONFIGURATION, DASHBOARDS
from tests.observability.prometheus import Fast, Prometheus, until
from tests.observability.scene import Scene, playing

# Of what was provoked, what has to be told by an alert: for longer than its `for`, by more than its threshold.
PROVOKED = {
    "BeanmeterBudgetNearlyUsed",
    "BeanmeterBudgetRefusing",
    "BeanmeterCostMismatch",
    "BeanmeterLedgerFailing",
    "BeanmeterLedgerUnreadable",
    "BeanmeterOutcomesWaiting",
    "BeanmeterOverrun",
    "BeanmeterUpstreamBreaksOff",
    "BeanmeterUpstreamCredentials",
    "BeanmeterUpstreamErrors",
}

# Of these, what fires only while the database is away.
FIRING_WHILE_AWAY = {"BeanmeterLedgerFailing", "BeanmeterLedgerUnreadable", "BeanmeterOutcomesWaiting"}

# What Grafana puts in place of its own variables, and of those of the dashboards where all is chosen.
VARIABLES = {"__range": "30m", "__interval": "1m", "__rate_interval": "2m", "job": ".*beanmeter.*", "team": ".*"}

# What marks the alerts of the rehearsal.
REHEARSAL = {"rehearsal": "yes"}


@dataclass(frozen=True)
class Watch:
    """What the tests look at. ``rules`` are those of the tree, as Prometheus has read them."""

    rules: list[dict[str, Any]]
    prometheus: Prometheus
    scene: Scene


@pytest.fixture(scope="module")
def watch(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Watch]:
    place = tmp_path_factory.mktemp("observability")
    # The tree's own configuration: whether its targets are there makes no difference to what it has read.
    with Prometheus(CONFIGURATION / "prometheus.yml", place / "as-it-is") as as_it_is:
        groups = as_it_is.groups()
    rules = [rule for group in groups for rule in group["rules"]]
    with playing(place) as scene:
        fast = Fast(scene.targets, [*map(faster, groups), rehearsal(rules)])
        # A reading is good for five minutes: there, ten seconds.
        with Prometheus(fast.write(place), place / "fast", "--query.lookback-delta=10s") as prometheus:
            # What a counter had before it was first read counts for nothing, so nobody asks before.
            assert until(lambda: len(prometheus.now("up offset 3s == 1")) == len(scene.targets))
            scene.ask_on()
            # The first outcomes are to be seen before the books are away.
            assert until(lambda: bool(prometheus.now("beanmeter:budget_used:ratio > 0.8")))
            with scene.without_database():
                # What never fires, the tests tell.
                firing = 'ALERTS{alertstate="firing", rehearsal=""}'
                until(lambda: labelled(prometheus, "alertname", firing) >= FIRING_WHILE_AWAY)
            # A rule that stands on others comes after them, by its interval. What never comes, the tests tell.
            expected = {rule["name"] for rule in rules}
            until(lambda: expected <= names(prometheus))
            yield Watch(rules, prometheus, scene)


def names(prometheus: Prometheus) -> set[str]:
    """The series that have been recorded, and the alerts of the rehearsal that have been active."""
    recorded = labelled(prometheus, "__name__", '{__name__=~"beanmeter:.+"}')
    return recorded | labelled(prometheus, "alertname", 'last_over_time(ALERTS{rehearsal="yes"}[10m])')


def labelled(prometheus: Prometheus, label: str, vector: str) -> set[str]:
    """The values of a label."""
    return {value for labels in prometheus.now(f"count by ({label}) ({vector})") for _, value in labels}


def faster(group: dict[str, Any]) -> dict[str, Any]:
    """A group as a file has it, from how the API tells it."""
    rules = []
    for rule in group["rules"]:
        kind = {"record": rule["name"]} if rule["type"] == "recording" else {"alert": rule["name"]}
        rules.append({**kind, "expr": hasten(rule["query"]), "labels": rule.get("labels", {})})
        if rule["type"] == "alerting":
            rules[-1] |= {"for": milliseconds(rule["duration"]), "annotations": rule["annotations"]}
    return {"name": group["name"], "interval": milliseconds(group["interval"]), "rules": rules}


def milliseconds(seconds: float) -> str:
    """So many seconds, faster."""
    return f"{int(1000 * seconds / HASTE)}ms"


def rehearsal(rules: list[dict[str, Any]]) -> dict[str, Any]:
    """Every alert with its comparisons taken out, so that all are active however well everything is."""
    alerts = [
        {
            "alert": rule["name"],
            "expr": hasten(uncompared(rule["query"])),
            "labels": {**rule["labels"], **REHEARSAL},
            "annotations": rule["annotations"],
        }
        for rule in rules
        if rule["type"] == "alerting"
    ]
    return {"name": "rehearsal", "interval": "1s", "rules": alerts}


def panels() -> Iterator[Any]:
    for path in sorted(DASHBOARDS.glob("*.json")):
        for panel in json.loads(path.read_text("utf-8"))["panels"]:
            for target in panel.get("targets", []):
                name = f"{path.stem}: {panel['title']}, {target['refId']}"
                yield pytest.param(target, id=name)


def test_every_rule_is_evaluated(watch: Watch) -> None:
    assert {rule["name"]: rule.get("lastError") for rule in watch.prometheus.rules() if rule["health"] != "ok"} == {}


def test_every_expression_of_a_rule_gives_something(watch: Watch) -> None:
    empty = []
    for rule in watch.rules:
        expression = rule["query"] if rule["type"] == "recording" else uncompared(rule["query"])
        for alternative in alternatives(hasten(expression)):
            if not watch.prometheus.lately(alternative, 30):
                empty.append(f"{rule['name']}: {alternative}")
    assert empty == []


def test_every_alert_says_what_it_is_about(watch: Watch) -> None:
    """Also those that don't fire: their text is filled in by the rehearsal."""
    alerts = {rule["name"] for rule in watch.rules if rule["type"] == "alerting"}
    told: dict[str, list[str]] = {}

    def all_told() -> bool:
        rehearsed = [rule for rule in watch.prometheus.rules() if rule.get("labels", {}).get("rehearsal")]
        told.update({rule["name"]: list(alert["annotations"].values()) for rule in rehearsed for alert in rule["alerts"]})
        return told.keys() == alerts

    assert until(all_told), alerts - told.keys()
    for text in (text for texts in told.values() for text in texts):
        # A template that fails stands there in angle brackets; a label that is not there leaves a gap.
        assert "<" not in text
        assert text == " ".join(text.split())


def test_what_was_provoked_is_told(watch: Watch) -> None:
    fired: set[str] = set()

    def all_fired() -> bool:
        fired.update(labelled(watch.prometheus, "alertname", 'last_over_time(ALERTS{alertstate="firing", rehearsal=""}[10m])'))
        return fired >= PROVOKED

    assert until(all_fired), PROVOKED - fired


@pytest.mark.parametrize("target", list(panels()))
def test_every_panel_shows_something(watch: Watch, target: dict[str, Any]) -> None:
    expression = hasten(chosen(target["expr"], VARIABLES))
    for alternative in alternatives(expression):
        if target["instant"]:
            # A scrape that came too late leaves a gap of a moment.
            assert until(partial(watch.prometheus.shows, alternative)), alternative
        else:
            assert watch.prometheus.lately(alternative, 30), alternative


@pytest.mark.parametrize("path", sorted(DASHBOARDS.glob("*.json")), ids=lambda path: path.stem)
def test_every_choice_of_a_dashboard_has_something_to_choose(watch: Watch, path: Path) -> None:
    for variable in json.loads(path.read_text("utf-8"))["templating"]["list"]:
        if variable["type"] == "query":
            selector, label = variable["definition"].removeprefix("label_values(").removesuffix(")").rsplit(", ", 1)
            found = watch.prometheus.now(f"count by ({label}) ({chosen(selector, VARIABLES)})")
            assert found, variable["definition"]


@pytest.mark.parametrize("counted", ["beanmeter_spend_usd_total", "sum_over_time(beanmeter:spend_usd:increase1m[10m])"])
def test_what_is_counted_is_what_is_booked(watch: Watch, counted: str) -> None:
    """The last of these tests, for it ends the traffic: the counters of all processes, and the minutes they were cut into."""
    watch.scene.end()
    booked = sum(charge["settled_micro_usd"] for charge in watch.scene.charges()) / MICRO_PER_USD
    found: list[float] = []

    def agree() -> bool:
        found[:] = watch.prometheus.now(f"sum({counted})").values()
        return found == [pytest.approx(booked)]

    assert until(agree), (found, booked)
