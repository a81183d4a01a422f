"""What can't be done says what to do next: as a command, as a request, or on which page, wherever its reader is."""

from __future__ import annotations

import re
from typing import get_args

import pytest

from proxy.admin import problems
from proxy.cli import failures
from proxy.ledger.accounts import AccountError, Remedy
from proxy.pages import desk
from tests.pages.house import TOKEN, House, error_at, text_of


@pytest.mark.parametrize("remedy", get_args(Remedy))
def test_every_remedy_is_in_the_words_of_each_surface(remedy: Remedy) -> None:
    error = AccountError("there is no such thing", remedy)
    assert failures.explain(error) == (1, f"there is no such thing; {failures._REMEDIES[remedy]}")
    assert "'beanmeter " in failures._REMEDIES[remedy]
    assert re.fullmatch(r"there is no such thing; (GET|POST) /admin/v1/.+", problems.tell(error))
    assert not re.search(r"beanmeter|--|/admin", desk._REMEDIES[remedy])


def test_a_page_names_pages_and_the_api_requests(home: House) -> None:
    visitor = home.operator()
    answer = visitor.post("/teams", {"name": "red"})
    told = "A team named 'red' exists already. The overview has all of them, archived ones at its end."
    assert error_at(answer.text, "name") == told
    bearer = {"authorization": f"Bearer {TOKEN}"}
    key = f"/admin/v1/keys/{home.gateway.key_id}"
    assert visitor.client.delete(key, headers=bearer).status_code == 200
    problem = visitor.client.post(f"{key}/rotate", json={}, headers=bearer)
    told = f"key {home.gateway.key_id} is revoked or expired; POST /admin/v1/teams/{{team}}/keys makes a new one"
    assert (problem.status_code, problem.json()["detail"]) == (409, told)
    answer = visitor.post(f"/teams/red/keys/{home.gateway.key_id}/rotate", {"overlap": "1h"})
    assert f"Key {home.gateway.key_id} is revoked or expired. Make a new one in its place." in text_of(answer.text)
