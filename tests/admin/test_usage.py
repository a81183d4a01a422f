"""Prices, usage and costs, as tools read them: OpenAI's own client among them."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from proxy.inputs import read_query
from proxy.ledger import reports
from proxy.ledger.decisions import Booking
from proxy.outcomes import Outcome
from proxy.prices import Order, shipped_card
from proxy.usage import CostsQuery, ImagesQuery, read_costs, read_images
from tests.admin.office import TOKEN, Office, open_office
from tests.ledger.ledgers import NOON, Account, Ledger, reservation, settled
from tests.live import JSON, ORDER, PRICE_MICRO_USD, json_answer, whole

IMAGES = "/v1/organization/usage/images"
COSTS = "/v1/organization/costs"
DAY = 86_400


def seconds(at: datetime) -> int:
    return int(at.timestamp())


MIDNIGHT = seconds(NOON.replace(hour=0))


# Prices


def test_the_price_list(shared: Office) -> None:
    answer = shared.gateway.client.get("/prices")
    assert answer.status_code == 200
    listed = answer.json()
    card = shipped_card()
    assert (listed["version"], listed["currency"]) == (card.version, "usd")
    (model,) = card.models.values()
    assert {(row["size"], row["quality"]): row["price_micro_usd"] for row in listed["data"]} == model.micro_usd
    assert {
        "model": "gpt-image-2",
        "size": "3840x2160",
        "quality": "high",
        "price_micro_usd": 400_300,
        "price_usd": "0.400300",
        "megapixels": 8.2944,
    } in listed["data"]
    # The admin token reads it too.
    assert shared.read("/prices") == shared.client.get("/v1/prices").json() == listed


def test_the_aliases_are_on_the_price_list(tmp_path: Path) -> None:
    settings = {"BEANMETER_SIZE_ALIASES": "1536x1024=2016x1344"}
    with open_office(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, **settings) as office:
        assert office.gateway.client.get("/prices").json()["size_aliases"] == {"1536x1024": "2016x1344"}


# Sums by day


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    opened = Ledger(database_url)
    yield opened
    opened.close()


def fill(ledger: Ledger) -> list[Account]:
    """Two teams, the first with two keys, on three days of which the middle one is empty."""
    red, blue = ledger.account("red"), ledger.account("blue")
    other = ledger.another_key("red")
    orders = (
        (red, Order("generation", "gpt-image-2", "1024x1024", "high", 2, False), 421_400, NOON - timedelta(days=2)),
        (red, Order("edit", "gpt-image-2", "1024x1024", "low", 1, False), 5_900, NOON),
        (other, Order("generation", "bean-3", "480x1440", "low", 1, False), 1_600, NOON),
        (blue, Order("generation", "gpt-image-2", "1024x1024", "high", 1, False), PRICE_MICRO_USD, NOON),
    )
    for account, order, price, at in orders:
        job = reservation(account, order, hold=price)
        ledger.post([job], now=at)
        ledger.post([], [settled(job)], now=at)
    return [red, other, blue]


def images(ledger: Ledger, team: str | None = None, now: datetime = NOON, **query: Any) -> dict[str, Any]:
    checked = read_query(ImagesQuery, pairs(query))
    with ledger.database.reading() as connection:
        return read_images(connection, checked, team, now)


def costs(ledger: Ledger, team: str | None = None, now: datetime = NOON, **query: Any) -> dict[str, Any]:
    checked = read_query(CostsQuery, pairs(query))
    with ledger.database.reading() as connection:
        return read_costs(connection, checked, team, now)


def pairs(query: dict[str, Any]) -> list[tuple[str, str]]:
    return [(name, str(one)) for name, value in query.items() for one in (value if isinstance(value, list) else [value])]


def results(page: dict[str, Any], *names: str) -> list[list[tuple[Any, ...]]]:
    """What these fields are in each bucket."""
    return [sorted(tuple(row[name] for name in names) for row in bucket["results"]) for bucket in page["data"]]


def test_days_are_buckets_also_where_nothing_was_made(ledger: Ledger) -> None:
    fill(ledger)
    page = images(ledger, start_time=MIDNIGHT - 2 * DAY + 5)
    assert [(one["start_time"], one["end_time"]) for one in page["data"]] == [
        (MIDNIGHT + number * DAY, MIDNIGHT + (number + 1) * DAY) for number in (-2, -1, 0)
    ]
    assert (page["has_more"], page["next_page"]) == (False, None)
    assert results(page, "images", "num_model_requests") == [[(2, 1)], [], [(3, 3)]]
    # A day that the span touches counts whole, and what has not begun has no bucket.
    assert len(images(ledger, start_time=MIDNIGHT - 2 * DAY, end_time=MIDNIGHT)["data"]) == 2
    assert len(images(ledger, start_time=MIDNIGHT - 2 * DAY, end_time=MIDNIGHT + 1)["data"]) == 3
    assert images(ledger, start_time=MIDNIGHT + DAY)["data"] == []


@pytest.mark.parametrize(
    ("group_by", "names", "expected"),
    [
        ([], ["project_id", "model"], [(None, None)]),
        (["project_id"], ["project_id"], [("blue",), ("red",)]),
        (["model"], ["model"], [("bean-3",), ("gpt-image-2",)]),
        (["size", "quality"], ["size", "quality"], [("1024x1024", "high"), ("1024x1024", "low"), ("480x1440", "low")]),
        (["source"], ["source"], [("image.edit",), ("image.generation",)]),
        (["source", "source"], ["source", "user_id"], [("image.edit", None), ("image.generation", None)]),
    ],
)
def test_groups(ledger: Ledger, group_by: list[str], names: list[str], expected: list[tuple[Any, ...]]) -> None:
    fill(ledger)
    assert results(images(ledger, start_time=MIDNIGHT, group_by=group_by), *names) == [expected]
    assert results(costs(ledger, start_time=MIDNIGHT, group_by=group_by), *names) == [expected]


def test_keys_and_line_items(ledger: Ledger) -> None:
    red, other, blue = fill(ledger)
    by_key = costs(ledger, start_time=MIDNIGHT, group_by=["api_key_id"])
    amounts = {row["api_key_id"]: row["amount"] for row in by_key["data"][0]["results"]}
    assert amounts == {
        red.key_id: {"value": 0.0059, "currency": "usd", "micro_usd": 5_900},
        other.key_id: {"value": 0.0016, "currency": "usd", "micro_usd": 1_600},
        blue.key_id: {"value": 0.2107, "currency": "usd", "micro_usd": PRICE_MICRO_USD},
    }
    items = costs(ledger, start_time=MIDNIGHT, group_by=["line_item"])
    assert results(items, "line_item", "quantity", "quantity_unit") == [[("bean-3", 1, "images"), ("gpt-image-2", 2, "images")]]


@pytest.mark.parametrize(
    ("only", "made"),
    [
        ({"project_ids": ["red"]}, 2),
        ({"project_ids": ["red", "blue"]}, 3),
        ({"project_ids": ["green"]}, 0),
        ({"models": ["bean-3"]}, 1),
        ({"sizes": ["480x1440"]}, 1),
        ({"sources": ["image.edit"]}, 1),
        ({"sources": ["image.variation"]}, 0),
        ({"project_ids[]": ["red"], "sources[]": ["image.generation"]}, 1),
        ({"api_key_ids": ["key_none"]}, 0),
    ],
)
def test_filters(ledger: Ledger, only: dict[str, Any], made: int) -> None:
    fill(ledger)
    page = images(ledger, start_time=MIDNIGHT, **only)
    assert sum(row["images"] for bucket in page["data"] for row in bucket["results"]) == made


def test_a_team_sees_itself_alone(ledger: Ledger) -> None:
    _, _, blue = fill(ledger)
    every: list[dict[str, Any]] = [{}, {"project_ids": ["blue", "red"]}]
    for only in every:
        assert results(images(ledger, "blue", start_time=MIDNIGHT, group_by=["project_id"], **only), "project_id") == [
            [("blue",)]
        ]
    for other in ("red", "none"):
        assert results(images(ledger, "blue", start_time=MIDNIGHT, project_ids=[other]), "images") == [[]]
    assert results(costs(ledger, "red", start_time=MIDNIGHT, api_key_ids=[blue.key_id]), "amount") == [[]]


def test_pages_of_days_are_the_whole(ledger: Ledger) -> None:
    fill(ledger)
    query: dict[str, Any] = {"start_time": MIDNIGHT - 2 * DAY, "group_by": ["project_id"]}
    whole_page = images(ledger, **query)
    buckets: list[Any] = []
    told: dict[str, Any] = {}
    for _ in range(3):
        page = images(ledger, **query, **told, limit=1)
        buckets += page["data"]
        told = {"page": page["next_page"]}
    assert page["has_more"] is False
    assert buckets == whole_page["data"]
    # A page that was begun before midnight goes on after it.
    first = images(ledger, **query, limit=3)
    assert first["has_more"] is False
    later = images(ledger, now=NOON + timedelta(days=1), **query, limit=3)
    assert images(ledger, now=NOON + timedelta(days=1), **query, page=later["next_page"])["data"][0]["results"] == []


def test_the_costs_are_what_was_settled(ledger: Ledger) -> None:
    fill(ledger)
    red = ledger.another_key("red")
    open_job, mixed = reservation(red), reservation(red)
    ledger.post([open_job, mixed])
    booked = Outcome("settled", 7, 0, 1, "mixed", "mixed", "reported", "delivered")
    ledger.post([], [Booking(mixed.charge_id, mixed.team_id, booked, upstream_status=200)])
    page = costs(ledger, start_time=MIDNIGHT - 2 * DAY, group_by=["project_id", "size", "quality"], limit=180)
    with ledger.database.reading() as connection:
        spent = sum(row["settled_micro_usd"] for row in reports.spend(connection, ["team"]))
    assert sum(row["amount"]["micro_usd"] for bucket in page["data"] for row in bucket["results"]) == spent


# Over a socket


def test_openai_s_own_client_reads_them(office: Office) -> None:
    gateway = office.gateway
    office.upstream.answer(whole(200, JSON, json_answer(2)))
    assert gateway.client.post("/images/generations", json={**ORDER, "n": 2}).status_code == 200
    start = seconds(datetime.now(UTC) - timedelta(days=1))
    with openai.OpenAI(base_url=gateway.base_url, api_key="none", admin_api_key=TOKEN) as client:
        usage = client.admin.organization.usage.images(
            start_time=start, group_by=["project_id", "size"], project_ids=["red"], sources=["image.generation"], limit=31
        )
        (made,) = [row for bucket in usage.data for row in bucket.results]
        assert made.object == "organization.usage.images.result"
        assert (made.images, made.num_model_requests, made.project_id, made.size) == (2, 1, "red", "1024x1024")
        cost = client.admin.organization.usage.costs(start_time=start, group_by=["line_item"], api_key_ids=[gateway.key_id])
        (spent,) = [row for bucket in cost.data for row in bucket.results]
        assert spent.object == "organization.costs.result"
        assert spent.amount is not None
        assert (spent.amount.value, spent.amount.currency, spent.quantity) == (2 * PRICE_MICRO_USD / 1e6, "usd", 2)


def ask(office: Office, path: str, token: str | None) -> httpx2.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    url = office.gateway.base_url.removesuffix("/v1") + path
    return httpx2.get(url, headers=headers, trust_env=False)


def test_who_may_ask(office: Office) -> None:
    _, blue = office.gateway.add_team("blue")
    assert office.gateway.client.post("/images/generations", json=ORDER).status_code == 200
    start = seconds(datetime.now(UTC) - timedelta(days=1))
    for path in (f"{IMAGES}?start_time={start}", f"{COSTS}?start_time={start}&project_ids=red"):
        for token, seen in ((TOKEN, 1), (office.gateway.key, 1), (blue, 0)):
            answer = ask(office, path, token)
            assert answer.status_code == 200
            assert sum(len(bucket["results"]) for bucket in answer.json()["data"]) == seen
    for path in (f"{IMAGES}?start_time={start}", f"{COSTS}?start_time={start}", "/v1/prices"):
        for wrong in (None, "wrong", "sk-bm-wrong", office.gateway.key[:-1] + "?"):
            refused = ask(office, path, wrong)
            assert (refused.status_code, refused.json()["error"]["code"]) == (401, "invalid_api_key")
            assert ask(office, path, TOKEN).status_code == 200


def test_a_broken_team_key_uses_up_nobodys_tries(desk: Office) -> None:
    for _ in range(20):
        assert ask(desk, "/v1/prices", "sk-bm-broken").status_code == 401
    assert ask(desk, "/v1/prices", TOKEN).status_code == 200


def test_guessing_the_token_here_is_throttled_too(desk: Office) -> None:
    answers = [ask(desk, "/v1/prices", "guess") for _ in range(10)]
    assert answers[0].status_code == 401
    assert answers[-1].status_code == 429
    assert answers[-1].json()["error"]["code"] == "rate_limit_exceeded"
    assert 1 <= int(answers[-1].headers["retry-after"]) <= 60


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ("", "start_time"),
        ("start_time=", "start_time"),
        ("start_time=-1", "start_time"),
        ("start_time=1.5", "start_time"),
        ("start_time=1795305600000", "start_time"),
        ("start_time=99999999999999999999", "start_time"),
        ("start_time=2&start_time=3", "start_time"),
        ("start_time=2&end_time=2", "end_time"),
        ("start_time=2&end_time=1", "end_time"),
        ("start_time=2&bucket_width=1h", "bucket_width"),
        ("start_time=2&bucket_width=1m", "bucket_width"),
        ("start_time=2&limit=0", "limit"),
        ("start_time=2&limit=181", "limit"),
        ("start_time=2&group_by=user_id", "group_by"),
        ("start_time=2&group_by=project_id,size", "group_by"),
        ("start_time=2&user_ids=u", "user_ids"),
        ("start_time=2&sources=image.painting", "sources"),
        ("start_time=2&models=%00", "models"),
        ("start_time=2&" + "&".join(["models=m"] * 101), "models"),
        ("start_time=2&page=x", "page"),
        ("start_time=1795305600&page=WyJkYXlzIiwgMV0", "page"),
        ("start_time=2&page=WyJkYXlzIiwgOTAwMDAwMDBd", "page"),
    ],
)
def test_what_can_t_be_asked_names_its_parameter(shared: Office, query: str, param: str) -> None:
    for path in (IMAGES, COSTS):
        refused = ask(shared, f"{path}?{query}", TOKEN)
        assert refused.status_code == 400, refused.text
        error = refused.json()["error"]
        assert (error["code"], error["param"]) == ("invalid_value", param)
