"""Requests for which a budget or a rate has no room, and connections on which they come."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from proxy import periods
from proxy.errors import RateLimitExceeded
from proxy.ledger import accounts
from proxy.periods import Period
from tests.bare import EDITS, ask, order, post, request, send
from tests.live import PRICE_MICRO_USD, LiveGateway, ScriptedUpstream, now
from tests.refusals.checks import OVER_BUDGET, Refused, check, nothing_heard, refused
from tests.refusals.forms import FORM_TYPE, form

PERIODS: list[tuple[Period, str]] = [
    ("day", "per day"),
    ("week", "per week"),
    ("month", "per month"),
    ("total", "for all time"),
]


def reset_of(period: Period) -> str:
    at = periods.resets_at(period, datetime.now(UTC))
    return "" if at is None else f"It resets at {at:%Y-%m-%dT%H:%M:%SZ}."


@pytest.mark.parametrize(("period", "said"), PERIODS)
@pytest.mark.parametrize("scope", ["team", "key"])
def test_over_budget(live: tuple[LiveGateway, ScriptedUpstream], scope: str, period: Period, said: str) -> None:
    gateway, _ = live
    team = f"{scope} {period}"
    key_id, caller = gateway.add_team(team)
    gateway.set_budget(500_000, period, team=team, key_id=key_id if scope == "key" else None)
    assert ask(gateway, post(caller, order())).status == 200
    resets = {reset_of(period)}
    message = refused(live, post(caller, order(n=3)), OVER_BUDGET).error["message"]
    # Midnight can fall between the one and the other.
    resets.add(reset_of(period))
    assert f"The {scope}'s budget of $0.500000 {said} has $0.289300 left" in message
    assert "this request costs up to $0.632100" in message
    assert any(reset in message for reset in resets)
    assert ("resets" in message) == (period != "total")


def test_a_form_over_budget(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("forms")
    gateway.set_budget(PRICE_MICRO_USD - 1, team="forms")
    refused(live, post(caller, form(), EDITS, [FORM_TYPE]), OVER_BUDGET)
    gateway.set_budget(PRICE_MICRO_USD, team="forms")
    assert ask(gateway, post(caller, form(), EDITS, [FORM_TYPE])).status == 200
    refused(live, post(caller, form(), EDITS, [FORM_TYPE]), OVER_BUDGET)


@pytest.mark.parametrize(
    ("limits", "named"),
    [
        ({"day": 200_000, "month": 100_000}, "$0.100000 per month"),
        ({"day": 100_000, "month": 200_000}, "$0.100000 per day"),
        ({"day": 200_000, "week": 150_000, "month": 900_000, "total": 180_000}, "$0.150000 per week"),
        ({"day": 900_000, "total": 0}, "$0.000000 for all time"),
    ],
)
def test_the_tightest_budget_is_named(
    live: tuple[LiveGateway, ScriptedUpstream], limits: dict[Period, int], named: str
) -> None:
    gateway, _ = live
    team = f"tight {named.removeprefix('$')}"
    _, caller = gateway.add_team(team)
    for period, limit in limits.items():
        gateway.set_budget(limit, period, team=team)
    assert named in refused(live, post(caller, order()), OVER_BUDGET).error["message"]


def test_a_soft_budget_never_refuses_and_a_hard_one_beside_it_does(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("soft")
    gateway.set_budget(0, "day", team="soft", soft=True)
    assert ask(gateway, post(caller, order())).status == 200
    gateway.set_budget(PRICE_MICRO_USD, "month", team="soft")
    message = refused(live, post(caller, order()), OVER_BUDGET).error["message"]
    assert "$0.210700 per month has $0.000000 left" in message


def test_a_limit_that_is_lowered_counts_at_once(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("lowered")
    gateway.set_budget(10_000_000, team="lowered")
    assert ask(gateway, post(caller, order())).status == 200
    gateway.set_budget(100_000, team="lowered")
    message = refused(live, post(caller, order()), OVER_BUDGET).error["message"]
    assert "budget of $0.100000 per month has $0.000000 left" in message


@pytest.mark.parametrize(
    ("asked", "told"), [(-3, b"1"), (0, b"1"), (1, b"1"), (59, b"59"), (60, b"60"), (61, b"60"), (86_400, b"60")]
)
def test_nobody_is_told_to_wait_for_more_than_a_minute(asked: int, told: bytes) -> None:
    refusal = RateLimitExceeded("Too many requests.", asked)
    assert (refusal.status, refusal.type, refusal.code) == (429, "requests", "rate_limit_exceeded")
    assert refusal.headers == ((b"retry-after", told),)


def test_over_a_rate(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    _, caller = gateway.add_team("fast")
    with gateway.database.writing() as connection:
        accounts.set_limit(connection, "fast", None, rpm=0, now=now(), actor="test")
    with nothing_heard(live):
        reply = ask(gateway, post(caller, order()))
    (wait,) = reply.values("retry-after")
    check(reply, Refused(429, "rate_limit_exceeded", type="requests", headers={"retry-after": wait}))
    assert 1 <= int(wait) <= 60


def test_refusals_leave_the_connection_usable(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    gateway, _ = live
    refusals = [post(key, order(n=0)), post(key, b"{}"), request("GET", "/v1/none"), post("sk-bm-no", order())]
    replies = send(gateway, b"".join([*refusals, post(key, order())]), answers=5)
    assert [reply.status for reply in replies] == [400, 400, 404, 401, 200]
    identities = [reply.values("x-beanmeter-request-id")[0] for reply in replies]
    assert len(set(identities)) == 5
