"""What is asked with GET, over a real socket: models, the caller's budget, health, and the page of metrics."""

from __future__ import annotations

import asyncio
import json
import re
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import openai
import pytest
from prometheus_client import Metric
from prometheus_client.openmetrics import parser as openmetrics
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import update

from proxy import __version__, periods
from proxy.ledger import accounts, reviews
from proxy.ledger.schema import charges
from proxy.periods import PERIODS, Period
from tests.bare import EDITS, GENERATIONS, Reply, ask, order, post, request
from tests.live import (
    JSON,
    PRICE_MICRO_USD,
    SSE,
    UPSTREAM_KEY,
    Conversation,
    LiveGateway,
    ScriptedUpstream,
    chunked,
    completed,
    json_answer,
    live_gateway,
    now,
    wait_for,
    whole,
)
from tests.outage import database_away

MODEL = {"id": "gpt-image-2", "object": "model", "created": 0, "owned_by": "beansai"}


@pytest.fixture
def live(database_url: str, tmp_path: Path) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    with live_gateway(database_url, tmp_path) as parts:
        yield parts


def get(gateway: LiveGateway, path: str, *headers: tuple[str, str], key: str | None = None) -> Reply:
    return ask(gateway, request("GET", path, headers, key=key))


def get_json(gateway: LiveGateway, path: str, key: str) -> Any:
    reply = get(gateway, path, key=key)
    assert reply.status == 200
    assert reply.values("content-type") == ["application/json"]
    return json.loads(reply.body)


# Models


def test_models(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = live
    assert get_json(gateway, "/v1/models", gateway.key) == {"object": "list", "data": [MODEL]}
    assert get_json(gateway, "/v1/models/gpt-image-2", gateway.key) == MODEL
    unknown = get(gateway, "/v1/models/dall-e-3", key=gateway.key)
    assert (unknown.status, unknown.error["code"], unknown.error["param"]) == (404, "model_not_found", "model")
    assert "gpt-image-2" in unknown.error["message"]
    with openai.OpenAI(base_url=gateway.base_url, api_key=gateway.key) as client:
        assert [model.id for model in client.models.list()] == ["gpt-image-2"]
        assert client.models.retrieve("gpt-image-2").owned_by == "beansai"
        with pytest.raises(openai.NotFoundError):
            client.models.retrieve("dall-e-3")
    assert (upstream.connections, gateway.charges()) == (0, [])


def test_the_models_of_another_price_card(tmp_path: Path) -> None:
    cell = '{ low = "0.01", high = "0.02" }'
    models = "".join(
        f'[models.{name}]\nqualities = ["low", "high"]\n[models.{name}.usd_per_image]\n"512x512" = {cell}\n'
        for name in ("bean-1", "bean-2")
    )
    (tmp_path / "card.toml").write_text(f'version = "2026-11"\n{models}')
    settings = {"BEANMETER_PRICES": str(tmp_path / "card.toml")}
    with live_gateway(f"sqlite:///{tmp_path}/beanmeter.db", tmp_path, settings) as (gateway, _):
        page = get_json(gateway, "/v1/models", gateway.key)
        assert [model["id"] for model in page["data"]] == ["bean-1", "bean-2"]
        assert get_json(gateway, "/v1/models/bean-2", gateway.key)["id"] == "bean-2"
        assert get(gateway, "/v1/models/gpt-image-2", key=gateway.key).status == 404
        assert gateway.metric('beanmeter_price_card_info{version="2026-11"}') == 1


# The caller's budget


def resets(period: Period, at: datetime) -> str | None:
    when = periods.resets_at(period, at)
    return None if when is None else f"{when:%Y-%m-%dT%H:%M:%SZ}"


def row(scope: str, period: Period, limit: int, settled: int, held: int, at: datetime, *, soft: bool = False) -> dict[str, Any]:
    return {
        "scope": scope,
        "period": period,
        "soft": soft,
        "limit_micro_usd": limit,
        "settled_micro_usd": settled,
        "held_micro_usd": held,
        "remaining_micro_usd": limit - settled - held,
        "resets_at": resets(period, at),
    }


def budgets_are(gateway: LiveGateway, key: str, key_id: str, rows: Callable[[datetime], list[dict[str, Any]]]) -> None:
    """The page is the caller's, with these rows as they stand at the time of the request."""
    before = datetime.now(UTC)
    page = get_json(gateway, "/v1/budget", key)
    # Midnight can fall into the request.
    expected = [{"team": "red", "key_id": key_id, "budgets": rows(at)} for at in (before, datetime.now(UTC))]
    assert page in expected


def test_a_team_without_a_budget(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    budgets_are(gateway, gateway.key, gateway.key_id, lambda at: [])


def test_budgets_of_every_scope_and_period(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = live
    _, blue = gateway.add_team("blue")
    for limit, period in enumerate(reversed(PERIODS), start=1):
        gateway.set_budget(limit * 1_000_000, period)
        gateway.set_budget(limit * 10_000_000, period, key_id=gateway.key_id, soft=period == "week")
    gateway.set_budget(7, "day", team="blue")

    def rows(settled: int, held: int) -> Callable[[datetime], list[dict[str, Any]]]:
        return lambda at: [
            row(scope, period, limit * unit, settled, held, at, soft=scope == "key" and period == "week")
            for scope, unit in (("team", 1_000_000), ("key", 10_000_000))
            for limit, period in zip((4, 3, 2, 1), PERIODS, strict=True)
        ]

    budgets_are(gateway, gateway.key, gateway.key_id, rows(0, 0))
    assert ask(gateway, post(gateway.key, order())).status == 200
    budgets_are(gateway, gateway.key, gateway.key_id, rows(PRICE_MICRO_USD, 0))
    # What is not known yet stays held.
    upstream.script = cut_off
    assert ask(gateway, post(gateway.key, order(n=2))).status == 502
    budgets_are(gateway, gateway.key, gateway.key_id, rows(PRICE_MICRO_USD, 2 * PRICE_MICRO_USD))
    # Nobody sees another team's.
    assert [one["limit_micro_usd"] for one in get_json(gateway, "/v1/budget", blue)["budgets"]] == [7]


def test_a_soft_budget_that_is_overspent(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    gateway.set_budget(100_000, "day", soft=True)
    assert ask(gateway, post(gateway.key, order())).status == 200
    budgets_are(
        gateway, gateway.key, gateway.key_id, lambda at: [row("team", "day", 100_000, PRICE_MICRO_USD, 0, at, soft=True)]
    )


async def cut_off(conversation: Conversation) -> None:
    await conversation.close()


# Health


def test_health(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    for path in ("/livez", "/readyz"):
        assert (get(gateway, path).status, get(gateway, path).body) == (200, b"ok\n")
    with database_away(gateway.database_url):
        assert get(gateway, "/livez").status == 200
        away = get(gateway, "/readyz")
        assert away.status == 503
        assert b"ledger" in away.body
        assert gateway.database_url.encode() not in away.body
    assert get(gateway, "/readyz").status == 200


# Metrics

# Every metric, with its type and the names of its labels.
METRICS = {
    "beanmeter_requests_total": ("counter", {"team", "operation", "outcome"}),
    "beanmeter_refusals_total": ("counter", {"team", "code"}),
    "beanmeter_images_total": ("counter", {"team", "model", "operation", "size", "quality"}),
    "beanmeter_spend_usd_total": ("counter", {"team", "model", "operation", "size", "quality"}),
    "beanmeter_budget_limit_usd": ("gauge", {"team", "period"}),
    "beanmeter_budget_settled_usd": ("gauge", {"team", "period"}),
    "beanmeter_budget_held_usd": ("gauge", {"team", "period"}),
    "beanmeter_key_budget_used_ratio": ("gauge", {"team", "period"}),
    "beanmeter_charges_open": ("gauge", {"state"}),
    "beanmeter_oldest_review_hours": ("gauge", set()),
    "beanmeter_request_duration_seconds": ("histogram", {"operation", "outcome"}),
    "beanmeter_first_byte_seconds": ("histogram", {"operation"}),
    "beanmeter_overhead_seconds": ("histogram", {"stage"}),
    "beanmeter_inflight_requests": ("gauge", {"operation"}),
    "beanmeter_upstream_responses_total": ("counter", {"operation", "status_class"}),
    "beanmeter_upstream_rate_limited_total": ("counter", {"operation"}),
    "beanmeter_internal_errors_total": ("counter", {"where"}),
    "beanmeter_response_bytes_total": ("counter", {"operation"}),
    "beanmeter_ledger_commit_seconds": ("histogram", {"step"}),
    "beanmeter_ledger_failures_total": ("counter", {"step"}),
    "beanmeter_journal_entries": ("gauge", set()),
    "beanmeter_overrun_total": ("counter", set()),
    "beanmeter_upstream_cost_mismatch_total": ("counter", set()),
    "beanmeter_price_card_info": ("gauge", {"version"}),
    "beanmeter_build_info": ("gauge", {"version"}),
}

FORMATS: dict[str, tuple[str, str, Callable[[str], Any]]] = {
    "text": ("*/*", "text/plain", text_string_to_metric_families),
    "openmetrics": (
        "application/openmetrics-text; version=1.0.0",
        "application/openmetrics-text",
        openmetrics.text_string_to_metric_families,
    ),
}

Samples = dict[tuple[str, tuple[tuple[str, str], ...]], float]


def scrape(gateway: LiveGateway, form: str = "text") -> list[Metric]:
    accept, kind, parse = FORMATS[form]
    reply = get(gateway, "/metrics", ("Accept", accept))
    assert reply.status == 200
    assert reply.values("content-type")[0].startswith(kind)
    return list(parse(reply.body.decode()))


def samples(families: list[Metric]) -> Samples:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value for family in families for sample in family.samples
    }


def of(found: Samples, name: str) -> dict[tuple[str, ...], float]:
    """A metric's values by its labels' values, in the order of the labels' names."""
    return {tuple(value for _, value in labels): amount for (sample, labels), amount in found.items() if sample == name}


def make_traffic(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """One of everything: settled, released and in review, an edit, a stream, a dearer image, a stated cost, and refusals."""
    gateway, upstream = live
    gateway.set_budget(2_000_000, "day")
    gateway.set_budget(9_000_000, "total")
    gateway.set_budget(1, "day", key_id=gateway.key_id, soft=True)

    def asked(path: str, status: int, **changes: Any) -> None:
        assert ask(gateway, post(gateway.key, order(**changes), path)).status == status

    upstream.answer(whole(200, [*JSON, ("X-Request-Cost-Micro-Usd", "1")], json_answer(2)))
    asked(GENERATIONS, 200, n=2)
    upstream.answer(chunked(200, SSE, [completed("edit", size="1024x1024", quality="high")]))
    asked(EDITS, 200, stream=True, quality="low")
    upstream.answer(whole(400, JSON, b'{"error":{"message":"no","type":"x","param":null,"code":null}}'))
    asked(GENERATIONS, 400)
    upstream.script = cut_off
    asked(GENERATIONS, 502)
    asked(GENERATIONS, 400, n=0)
    asked(GENERATIONS, 429, n=10, size="3840x2160")
    assert ask(gateway, post("sk-bm-nonsense", order())).status == 401
    assert get(gateway, "/v1/none").status == 404


@pytest.mark.parametrize("form", FORMATS)
def test_every_metric_is_on_the_page(live: tuple[LiveGateway, ScriptedUpstream], form: str) -> None:
    gateway, _ = live
    make_traffic(live)
    with database_away(gateway.database_url):
        assert ask(gateway, post(gateway.key, order())).status == 503
    families = scrape(gateway, form)
    found: dict[str, tuple[str, set[str]]] = {}
    for family in families:
        name = family.name + ("_total" if family.type == "counter" else "")
        if name.startswith("beanmeter_"):
            found[name] = (family.type, {label for sample in family.samples for label in sample.labels} - {"le"})
            assert family.documentation.endswith(".")
    assert found == METRICS
    assert samples(families).keys() == samples(scrape(gateway, "text")).keys()


def test_the_values_after_traffic(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    make_traffic(live)
    found = samples(scrape(gateway))
    assert of(found, "beanmeter_requests_total") == {
        ("generation", "settled", "red"): 1,
        ("edit", "settled", "red"): 1,
        ("generation", "released", "red"): 1,
        ("generation", "review", "red"): 1,
    }
    assert of(found, "beanmeter_refusals_total") == {
        ("invalid_value", "red"): 1,
        ("insufficient_quota", "red"): 1,
        ("upstream_failed", "red"): 1,
        ("invalid_api_key", ""): 1,
        ("unknown_url", ""): 1,
    }
    images = {
        ("gpt-image-2", "generation", "high", "1024x1024", "red"): 2.0,
        ("gpt-image-2", "edit", "high", "1024x1024", "red"): 1.0,
    }
    assert of(found, "beanmeter_images_total") == images
    price = PRICE_MICRO_USD / 1_000_000
    assert of(found, "beanmeter_spend_usd_total") == pytest.approx({image: n * price for image, n in images.items()})
    assert of(found, "beanmeter_budget_limit_usd") == {("day", "red"): 2, ("total", "red"): 9}
    for name, images_counted in (("settled", 3), ("held", 1)):
        amount = pytest.approx(images_counted * price)
        assert of(found, f"beanmeter_budget_{name}_usd") == {("day", "red"): amount, ("total", "red"): amount}
    assert of(found, "beanmeter_charges_open") == {("reserved",): 0, ("forwarded",): 0, ("review",): 1}
    assert of(found, "beanmeter_request_duration_seconds_count") == {
        ("generation", "settled"): 1,
        ("edit", "settled"): 1,
        ("generation", "released"): 1,
        ("generation", "review"): 1,
    }
    assert of(found, "beanmeter_first_byte_seconds_count") == {("generation",): 2, ("edit",): 1}
    assert of(found, "beanmeter_upstream_responses_total") == {
        ("generation", "2xx"): 1,
        ("generation", "4xx"): 1,
        ("edit", "2xx"): 1,
    }
    assert of(found, "beanmeter_response_bytes_total")[("edit",)] == len(completed("edit", size="1024x1024", quality="high"))
    assert of(found, "beanmeter_upstream_rate_limited_total") == {("generation",): 0, ("edit",): 0}
    assert set(of(found, "beanmeter_internal_errors_total").values()) == {0}
    assert of(found, "beanmeter_inflight_requests") == {("generation",): 0, ("edit",): 0}
    assert of(found, "beanmeter_overrun_total") == {(): 1}
    assert of(found, "beanmeter_upstream_cost_mismatch_total") == {(): 1}
    assert of(found, "beanmeter_journal_entries") == {(): 0}
    assert of(found, "beanmeter_build_info") == {(__version__,): 1}
    ((version,),) = of(found, "beanmeter_price_card_info")
    assert {charge["price_card"] for charge in gateway.charges()} == {version}
    commits = of(found, "beanmeter_ledger_commit_seconds_count")
    assert commits[("reserve",)] == 5
    assert commits[("book",)] == 4


def test_the_upstreams_own_rate_limit_is_told_from_its_other_refusals(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = live
    for status in (429, 400, 429):
        upstream.answer(whole(status, JSON, b'{"error": {"message": "no"}}'))
        assert ask(gateway, post(gateway.key, order())).status == status
    found = samples(scrape(gateway))
    assert of(found, "beanmeter_upstream_rate_limited_total") == {("generation",): 2, ("edit",): 0}
    assert of(found, "beanmeter_upstream_responses_total") == {("generation", "4xx"): 3}


def test_a_review_grows_old_until_it_is_decided(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = live
    assert of(samples(scrape(gateway)), "beanmeter_oldest_review_hours") == {(): 0}
    upstream.script = cut_off
    for hours in (30, 20):
        (request_id,) = ask(gateway, post(gateway.key, order())).values("x-beanmeter-request-id")
        charge = gateway.charge_when_ended(request_id)
        assert charge["state"] == "review"
        with gateway.database.writing() as connection:
            aged = update(charges).where(charges.c.id == charge["id"]).values(finished_at=now() - timedelta(hours=hours))
            connection.execute(aged)
    (age,) = of(samples(scrape(gateway)), "beanmeter_oldest_review_hours").values()
    assert age == pytest.approx(30, abs=0.1)
    oldest = gateway.charges()[0]["id"]
    with gateway.database.writing() as connection:
        reviews.release(connection, oldest, reason="not on the bill", now=now(), actor="test")
    (age,) = of(samples(scrape(gateway)), "beanmeter_oldest_review_hours").values()
    assert age == pytest.approx(20, abs=0.1)


def test_of_the_keys_budgets_the_fullest_shows(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    with gateway.database.writing() as connection:
        other = accounts.add_key(connection, "red", now=now(), actor="test")
    gateway.set_budget(4 * PRICE_MICRO_USD, "day", key_id=gateway.key_id)
    gateway.set_budget(8 * PRICE_MICRO_USD, "day", key_id=other.id)
    assert of(samples(scrape(gateway)), "beanmeter_key_budget_used_ratio") == {("day", "red"): 0}
    for _ in range(2):
        assert ask(gateway, post(other.key, order())).status == 200
    assert ask(gateway, post(gateway.key, order())).status == 200
    found = scrape(gateway)
    assert of(samples(found), "beanmeter_key_budget_used_ratio") == {("day", "red"): 0.25}
    assert of(samples(found), "beanmeter_budget_limit_usd") == {}
    assert not any(gateway.key_id in str(sample.labels) for family in found for sample in family.samples)


@pytest.mark.parametrize(
    ("where", "broken", "status", "states"),
    [
        ("request", "proxy.gateway.open_order", 500, []),
        ("exchange", "proxy.exchange.open_tap", 502, ["review"]),
        ("answer", "proxy.exchange.answered", 200, ["review"]),
        ("endpoint", "proxy.endpoints.list_budgets", 500, []),
    ],
)
def test_a_defect_is_counted(
    live: tuple[LiveGateway, ScriptedUpstream],
    where: str,
    broken: str,
    status: int,
    states: list[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Nothing else than a defect leads there, so the test puts one in. What may have been made is never released for it."""
    gateway, _ = live

    def defect(*_: Any, **__: Any) -> Any:
        raise KeyError("nobody thought of this")

    monkeypatch.setattr(broken, defect)
    if where == "endpoint":
        assert get(gateway, "/v1/budget", key=gateway.key).status == status
    else:
        assert ask(gateway, post(gateway.key, order())).status == status
    wait_for(lambda: [charge["state"] for charge in gateway.charges()] == states or None)
    counted = of(samples(scrape(gateway)), "beanmeter_internal_errors_total")
    assert {name for (name,), count in counted.items() if count == 1} == {where}
    assert sum(counted.values()) == 1


def test_an_exchange_is_counted_while_it_goes_on(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = live
    go_on = asyncio.Event()

    async def wait(conversation: Conversation) -> None:
        await go_on.wait()
        await conversation.write(whole(200, JSON, json_answer()))

    async def release() -> None:
        go_on.set()

    upstream.script = wait
    with gateway.connect() as connection:
        connection.sendall(post(gateway.key, order()))
        wait_for(lambda: upstream.requests or None)
        heard_at = time.monotonic()
        found = samples(scrape(gateway))
        assert of(found, "beanmeter_inflight_requests") == {("generation",): 1}
        assert of(found, "beanmeter_charges_open") == {("reserved",): 0, ("forwarded",): 1, ("review",): 0}
        assert of(found, "beanmeter_requests_total") == {}
        waited = time.monotonic() - heard_at
        gateway.loop.run(release())
        connection.recv(1)
    gateway.charge_when_ended()
    wait_for(lambda: of(samples(scrape(gateway)), "beanmeter_inflight_requests") == {("generation",): 0} or None)
    # The first byte is waited for from the hold on, and not from when the upstream has begun.
    assert of(samples(scrape(gateway)), "beanmeter_first_byte_seconds_sum")[("generation",)] >= waited


def test_money_on_the_page_is_the_ledgers(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """Another process, or a command, changes the books, and the next scrape shows it."""
    gateway, _ = live
    assert of(samples(scrape(gateway)), "beanmeter_budget_limit_usd") == {}
    gateway.set_budget(2_500_000, "week")
    assert of(samples(scrape(gateway)), "beanmeter_budget_limit_usd") == {("week", "red"): 2.5}


@pytest.mark.parametrize("form", FORMATS)
def test_the_page_answers_while_the_database_is_away(live: tuple[LiveGateway, ScriptedUpstream], form: str) -> None:
    gateway, _ = live
    make_traffic(live)
    with database_away(gateway.database_url):
        found = samples(scrape(gateway, form))
        failures = of(samples(scrape(gateway, form)), "beanmeter_ledger_failures_total")
    assert of(found, "beanmeter_requests_total")[("edit", "settled", "red")] == 1
    assert of(found, "beanmeter_build_info") == {(__version__,): 1}
    # What is not known is not there; a zero would be a lie.
    for name in ("budget_limit_usd", "budget_settled_usd", "budget_held_usd", "charges_open"):
        assert of(found, f"beanmeter_{name}") == {}
    assert failures[("read",)] == 2
    assert of(samples(scrape(gateway, form)), "beanmeter_charges_open")[("review",)] == 1


@pytest.mark.parametrize("form", FORMATS)
def test_the_page_shows_no_secret(live: tuple[LiveGateway, ScriptedUpstream], form: str) -> None:
    gateway, _ = live
    make_traffic(live)
    canary = "canary-7f3a"
    for body in (order(prompt=canary, user=canary), order(model=canary), order(size=canary), canary.encode()):
        ask(gateway, post(gateway.key, body, f"{GENERATIONS}?{canary}"))
    get(gateway, f"/v1/{canary}", key=f"sk-bm-{canary}")
    accept = FORMATS[form][0]
    page = get(gateway, "/metrics", ("Accept", accept)).body.decode()
    for secret in (canary, gateway.key, gateway.key_id, UPSTREAM_KEY, gateway.database_url):
        assert secret not in page
    assert re.search(r"sk-|req_|chg_", page) is None


def test_the_page_needs_no_key_and_takes_any(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    for path in ("/livez", "/readyz", "/metrics"):
        for key in (None, gateway.key, "sk-bm-nonsense"):
            assert get(gateway, path, key=key).status == 200
