"""Callers without a valid key, who learn nothing."""

from __future__ import annotations

from datetime import timedelta

import pytest

from proxy import tokens
from proxy.ledger import accounts
from tests.bare import EDITS, GENERATIONS, JSON_TYPE, ask, order, post, request
from tests.live import UPSTREAM_KEY, LiveGateway, ScriptedUpstream, now
from tests.refusals.checks import MAX_BODY_BYTES, NO_KEY, refused
from tests.refusals.forms import FORM_TYPE, form


def bad_keys(gateway: LiveGateway) -> dict[str, list[str]]:
    """Values of Authorization, each a way of not having a key."""
    good = gateway.key
    slip = good[:-1] + ("a" if good[-1] != "a" else "b")
    with gateway.database.writing() as connection:
        accounts.add_team(connection, "old", now=now(), actor="test")
        archived = accounts.add_key(connection, "old", now=now(), actor="test").key
        accounts.archive_team(connection, "old", now=now(), actor="test")
        spent = accounts.add_key(connection, "red", lifetime=timedelta(0), now=now(), actor="test").key
        gone = accounts.add_key(connection, "red", now=now(), actor="test")
        accounts.revoke_key(connection, gone.id, now=now(), actor="test")
    return {
        "none": [],
        "empty": [""],
        "another scheme": [f"Basic {good}"],
        "no scheme": [good],
        "no token": ["Bearer"],
        "an empty token": ["Bearer "],
        "a tab between": [f"Bearer\t{good}"],
        "something behind it": [f"Bearer {good} x"],
        "two in one": [f"Bearer {good}, Bearer {good}"],
        "two of them": [f"Bearer {good}", f"Bearer {good}"],
        "not ASCII": [f"Bearer {good}\u00e9"],
        "the upstream's own key": [f"Bearer {UPSTREAM_KEY}"],
        "malformed": ["Bearer sk-bm-nonsense"],
        "mistyped": [f"Bearer {slip}"],
        "in capitals": [f"Bearer {good.upper()}"],
        "unknown": [f"Bearer {tokens.new_key()}"],
        "revoked": [f"Bearer {gone.key}"],
        "expired": [f"Bearer {spent}"],
        "of an archived team": [f"Bearer {archived}"],
    }


def test_a_caller_without_a_valid_key_learns_nothing(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    bodies = set()
    for values in bad_keys(gateway).values():
        credentials = [("Authorization", value) for value in values]
        for data in (
            request("POST", GENERATIONS, [JSON_TYPE, *credentials], order()),
            request("POST", GENERATIONS, [JSON_TYPE, *credentials], b"not even JSON"),
            request("POST", EDITS, [FORM_TYPE, *credentials], form()),
            request("POST", EDITS, credentials, b"?" * (MAX_BODY_BYTES + 1)),
            request("GET", "/v1/models", credentials),
            request("GET", "/v1/models/unheard-of", credentials),
            request("GET", "/v1/budget", credentials),
        ):
            bodies.add(refused(live, data, NO_KEY).body)
    assert len(bodies) == 1


@pytest.mark.parametrize("credentials", ["bearer {key}", "BEARER {key}", "Bearer   {key}", "Bearer {key}  "])
def test_a_key_may_be_given_so(live: tuple[LiveGateway, ScriptedUpstream], key: str, credentials: str) -> None:
    data = request("POST", GENERATIONS, [JSON_TYPE, ("Authorization", credentials.format(key=key))], order())
    assert ask(live[0], data).status == 200


@pytest.mark.parametrize("end", ["revoked", "archived", "expired"])
def test_a_key_that_the_gateway_remembers_is_asked_for_again_at_the_hold(
    live: tuple[LiveGateway, ScriptedUpstream], end: str
) -> None:
    gateway, _ = live
    key_id, caller = gateway.add_team(f"to be {end}")
    assert ask(gateway, post(caller, order())).status == 200
    with gateway.database.writing() as connection:
        if end == "archived":
            accounts.archive_team(connection, "to be archived", now=now(), actor="test")
        elif end == "revoked":
            accounts.revoke_key(connection, key_id, now=now(), actor="test")
        else:
            accounts.rotate_key(connection, key_id, overlap=timedelta(0), now=now(), actor="test")
    refused(live, post(caller, order()), NO_KEY)
