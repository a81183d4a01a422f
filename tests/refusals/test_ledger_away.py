"""Requests while the ledger is away."""

from __future__ import annotations

from proxy import tokens
from tests.bare import EDITS, GENERATIONS, JSON_TYPE, ask, order, post, request
from tests.live import LiveGateway, ScriptedUpstream
from tests.outage import database_away
from tests.refusals.checks import LEDGER_AWAY, NO_KEY, check
from tests.refusals.forms import FORM_TYPE, form


def test_a_key_that_the_gateway_does_not_know_yet(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    with database_away(gateway.database_url):
        for caller in (gateway.key, tokens.new_key()):
            check(ask(gateway, post(caller, order())), LEDGER_AWAY)
            check(ask(gateway, request("GET", "/v1/models", key=caller)), LEDGER_AWAY)
        # What is misspelled is refused without the ledger.
        check(ask(gateway, post(gateway.key[:-1], order())), NO_KEY)
    gateway.database.close()
    assert (gateway.charges(), upstream.connections) == ([], 0)
    assert ask(gateway, post(gateway.key, order())).status == 200


def test_a_key_that_the_gateway_remembers(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    assert ask(gateway, request("GET", "/v1/models", key=gateway.key)).status == 200
    with database_away(gateway.database_url):
        for path, kind, body in ((GENERATIONS, JSON_TYPE, order()), (EDITS, FORM_TYPE, form())):
            check(ask(gateway, post(gateway.key, body, path, [kind])), LEDGER_AWAY)
    gateway.database.close()
    assert (gateway.charges(), upstream.connections) == ([], 0)
    assert ask(gateway, post(gateway.key, order())).status == 200
    assert [charge["state"] for charge in gateway.charges()] == ["settled"]


def test_a_ledger_that_was_written_to_before(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = own
    assert ask(gateway, post(gateway.key, order())).status == 200
    gateway.settle()
    with database_away(gateway.database_url):
        check(ask(gateway, post(gateway.key, order())), LEDGER_AWAY)
    gateway.database.close()
    assert len(gateway.charges()) == len(upstream.requests) == 1
    assert ask(gateway, post(gateway.key, order())).status == 200
    assert [charge["state"] for charge in gateway.charges()] == ["settled", "settled"]


def test_a_budget_while_the_ledger_is_away(own: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = own
    assert ask(gateway, request("GET", "/v1/budget", key=gateway.key)).status == 200
    with database_away(gateway.database_url):
        check(ask(gateway, request("GET", "/v1/budget", key=gateway.key)), LEDGER_AWAY)
    gateway.database.close()
