"""An operator's office for tests: a live gateway with the admin API open, and a client that has the token."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from proxy.admin import PREFIX, answers
from proxy.admin.operations import OPERATIONS, Operation
from tests.live import ORDER, PATIENCE_SECONDS, LiveGateway, ScriptedUpstream, live_gateway

TOKEN = "the-operators-token"


@dataclass
class Office:
    """A gateway with one team, ``red``, and whoever has the admin token."""

    gateway: LiveGateway
    upstream: ScriptedUpstream
    client: httpx2.Client

    def ask(self, method: str, path: str, **options: Any) -> httpx2.Response:
        """Ask the admin API, with the token unless ``headers`` say otherwise. What succeeds has the shape that is described,
        with no field more or less."""
        answer = self.client.request(method, f"{PREFIX}{path}", **options)
        operation = _operation(method, path.partition("?")[0])
        if operation is not None and answer.is_success:
            assert answer.status_code == operation.status
            getattr(answers, operation.answer).model_validate_json(answer.content)
        return answer

    def read(self, path: str, **query: Any) -> Any:
        """The answer to a GET that has to succeed."""
        answer = self.ask("GET", path, params=query)
        assert answer.status_code == 200, answer.text
        assert answer.headers["content-type"] == "application/json"
        assert answer.headers["cache-control"] == "no-store"
        return answer.json()

    def rows(self, path: str, **query: Any) -> list[dict[str, Any]]:
        """All rows of a listing that fits on a page."""
        page = self.read(path, **query)
        assert (page["has_more"], page["next_cursor"]) == (False, None)
        found: list[dict[str, Any]] = page["data"]
        return found

    def change(self, method: str, path: str, status: int = 200, **body: Any) -> Any:
        """The answer to a change that has to succeed."""
        answer = self.ask(method, path, json=body)
        assert answer.status_code == status, answer.text
        assert answer.headers["cache-control"] == "no-store"
        return answer.json()

    def refused(self, status: int, method: str, path: str, **options: Any) -> dict[str, Any]:
        """The problem that a request is answered with."""
        answer = self.ask(method, path, **options)
        assert answer.status_code == status, answer.text
        assert answer.headers["content-type"] == "application/problem+json"
        problem: dict[str, Any] = answer.json()
        assert (problem["status"], problem["type"]) == (status, "about:blank")
        assert problem["title"]
        assert problem["detail"]
        return problem

    def review(self) -> dict[str, Any]:
        """A charge that nobody knows the cost of."""

        async def break_off(conversation: Any) -> None:
            await conversation.reset()

        script, self.upstream.script = self.upstream.script, break_off
        answer = self.gateway.client.post("/images/generations", json=ORDER)
        self.upstream.script = script
        charge = self.gateway.charge_when_ended(answer.headers["x-beanmeter-request-id"])
        assert charge["state"] == "review"
        return charge


def _operation(method: str, path: str) -> Operation | None:
    def leads_to(operation: Operation) -> bool:
        return operation.method == method and bool(re.fullmatch(re.sub(r"\{\w+\}", "[^/]+", operation.path), path))

    return next(filter(leads_to, OPERATIONS), None)


@contextmanager
def open_office(database_url: str, directory: Path, **settings: str) -> Iterator[Office]:
    with live_gateway(database_url, directory, {"BEANMETER_ADMIN_TOKEN": TOKEN, **settings}) as (gateway, upstream):
        client = httpx2.Client(
            base_url=gateway.base_url.removesuffix("/v1"),
            headers={"authorization": f"Bearer {TOKEN}"},
            timeout=PATIENCE_SECONDS,
            trust_env=False,
        )
        with client:
            yield Office(gateway, upstream, client)
