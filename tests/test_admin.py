"""The operator's view of the books, through a live gateway."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from proxy.admin import PREFIX
from proxy.door import FAILURES_MAX
from tests.live import ORDER, LiveGateway, ScriptedUpstream, live_gateway

TOKEN = "the-operators-token"
LISTINGS = ("teams", "keys", "budgets", "limits", "reviews", "audit")


@pytest.fixture
def open_gateway(tmp_path: Path) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    with live_gateway(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, {"BEANMETER_ADMIN_TOKEN": TOKEN}) as parts:
        yield parts


def ask(gateway: LiveGateway, name: str, token: str | None = TOKEN) -> httpx2.Response:
    headers = {} if token is None else {"authorization": f"Bearer {token}"}
    url = gateway.base_url.removesuffix("/v1") + f"{PREFIX}/{name}"
    return httpx2.get(url, headers=headers, trust_env=False)


def rows(gateway: LiveGateway, name: str) -> list[dict[str, Any]]:
    answer = ask(gateway, name)
    assert answer.status_code == 200
    assert answer.headers["cache-control"] == "no-store"
    found: list[dict[str, Any]] = answer.json()["data"]
    return found


def test_the_operator_sees_the_books(open_gateway: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = open_gateway
    gateway.set_budget(1_000_000)

    async def break_off(conversation: Any) -> None:
        await conversation.reset()

    upstream.script = break_off
    gateway.client.post("/images/generations", json=ORDER)
    charge = gateway.charge_when_ended()
    assert [row["name"] for row in rows(gateway, "teams")] == ["red"]
    assert [row["id"] for row in rows(gateway, "keys")] == [gateway.key_id]
    assert [row["held_micro_usd"] for row in rows(gateway, "budgets")] == [210_700]
    assert rows(gateway, "limits") == []
    assert [row["id"] for row in rows(gateway, "reviews")] == [charge["id"]]
    assert {row["action"] for row in rows(gateway, "audit")} >= {"team.add", "key.add", "budget.set"}
    assert gateway.key not in "".join(ask(gateway, name).text for name in LISTINGS)


@pytest.mark.parametrize("name", LISTINGS)
@pytest.mark.parametrize("token", [None, "wrong", "sk-bm-" + "a" * 39])
def test_nobody_else_does(open_gateway: tuple[LiveGateway, ScriptedUpstream], name: str, token: str | None) -> None:
    answer = ask(open_gateway[0], name, token)
    assert (answer.status_code, answer.headers["content-type"]) == (401, "application/problem+json")


def test_a_team_key_opens_nothing(open_gateway: tuple[LiveGateway, ScriptedUpstream]) -> None:
    assert ask(open_gateway[0], "teams", open_gateway[0].key).status_code == 401


def test_guessing_is_throttled(open_gateway: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = open_gateway
    assert [ask(gateway, "teams", "guess").status_code for _ in range(FAILURES_MAX)] == [401] * FAILURES_MAX
    throttled = ask(gateway, "teams", TOKEN)
    assert throttled.status_code == 429
    assert 1 <= int(throttled.headers["retry-after"]) <= 60


def test_without_a_token_the_operator_set_it_is_closed(tmp_path: Path) -> None:
    with live_gateway(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as (gateway, _):
        assert {ask(gateway, name, TOKEN).status_code for name in LISTINGS} == {404}
