"""The dashboards by themselves: what Grafana would do without a word, such as laying one panel over another."""

from __future__ import annotations

import json
import re
from itertools import combinations
from pathlib import Path
from typing import Any

import pytest

from tests.observability.programs import DASHBOARDS, ROOT

PATHS = sorted(DASHBOARDS.glob("*.json"))
PROVISIONING = ROOT / "deploy" / "grafana" / "provisioning"

# Grafana's own, in panels that may use them.
BUILT_IN = {"__range", "__interval", "__rate_interval"}

# Ids of units as Grafana has them.
UNITS = {"short", "currencyUSD", "percentunit", "s", "h", "Bps", "ops"}


@pytest.fixture(params=PATHS, ids=lambda path: path.stem)
def dashboard(request: pytest.FixtureRequest) -> dict[str, Any]:
    path: Path = request.param
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def shown(dashboard: dict[str, Any]) -> list[dict[str, Any]]:
    """The panels, without the rows that part them."""
    return [panel for panel in dashboard["panels"] if panel["type"] != "row"]


def test_both_dashboards_are_there() -> None:
    found = [json.loads(path.read_text("utf-8")) for path in PATHS]
    assert [one["uid"] for one in found] == ["beanmeter-operations", "beanmeter-spend"]
    assert all(one["schemaVersion"] >= 39 and "beanmeter" in one["tags"] and one["description"] for one in found)
    # An id of another Grafana's database would overwrite whatever has it in this one.
    assert all("id" not in one for one in found)


def test_every_panel_has_an_id_a_title_and_a_word_on_what_it_shows(dashboard: dict[str, Any]) -> None:
    ids = [panel["id"] for panel in dashboard["panels"]]
    assert len(set(ids)) == len(ids)
    titles = [panel["title"] for panel in shown(dashboard)]
    assert len(set(titles)) == len(titles)
    for panel in shown(dashboard):
        assert panel["title"]
        assert panel["description"].endswith(".")


def test_no_panel_lies_over_another_or_beside_the_page(dashboard: dict[str, Any]) -> None:
    places = [panel["gridPos"] for panel in dashboard["panels"]]
    for place in places:
        assert place["w"] > 0
        assert place["h"] > 0
        assert 0 <= place["x"] <= 24 - place["w"]
    for one, other in combinations(places, 2):
        beside = one["x"] + one["w"] <= other["x"] or other["x"] + other["w"] <= one["x"]
        below = one["y"] + one["h"] <= other["y"] or other["y"] + other["h"] <= one["y"]
        assert beside or below, (one, other)


def test_every_figure_has_its_unit(dashboard: dict[str, Any]) -> None:
    for panel in shown(dashboard):
        assert panel["fieldConfig"]["defaults"]["unit"] in UNITS, panel["title"]


def test_every_query_goes_to_the_chosen_source_and_fleet(dashboard: dict[str, Any]) -> None:
    variables = {variable["name"]: variable for variable in dashboard["templating"]["list"]}
    assert variables["datasource"]["type"] == "datasource"
    for panel in shown(dashboard):
        assert len({target["refId"] for target in panel["targets"]}) == len(panel["targets"])
        for target in panel["targets"]:
            assert target["datasource"] == {"type": "prometheus", "uid": "${datasource}"}
            used = set(re.findall(r"\$(\w+)", target["expr"]))
            assert "job" in used
            assert used <= BUILT_IN | variables.keys()
            assert target["instant"] != target["range"]


def test_a_bar_is_never_narrower_than_what_is_recorded(dashboard: dict[str, Any]) -> None:
    for panel in shown(dashboard):
        if any("[$__interval]" in target["expr"] for target in panel["targets"]):
            assert panel["interval"] == "1m", panel["title"]


def test_grafana_is_told_where_the_dashboards_and_the_data_are() -> None:
    provider = (PROVISIONING / "dashboards" / "beanmeter.yml").read_text("utf-8")
    assert re.search(r"^ +path: /var/lib/grafana/dashboards$", provider, re.MULTILINE)
    sources = (PROVISIONING / "datasources" / "prometheus.yml").read_text("utf-8")
    assert re.findall(r"^ +type: (\w+)$", sources, re.MULTILINE) == ["prometheus", "alertmanager"]
