"""What a refusal looks like, and that nobody hears of the request."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import openai
from sqlalchemy import func, select

from proxy.ledger.schema import charges
from tests.bare import Reply, ask
from tests.live import PATIENCE_SECONDS, LiveGateway, ScriptedUpstream

MAX_BODY_BYTES = 100_000

# What is on every refusal, and nothing else unless it is asked for.
NAMES = ["content-type", "content-length", "x-request-id", "x-beanmeter-request-id", "x-beanmeter-error-source"]


@dataclass(frozen=True)
class Refused:
    """How a request is refused. ``headers`` are the refusal's own."""

    status: int
    code: str
    param: str | None = None
    type: str = "invalid_request_error"
    headers: Mapping[str, str] | None = None


def check(reply: Reply, expected: Refused) -> None:
    """The envelope with its four fields, and the headers, all of them."""
    own = dict(expected.headers or {})
    error = reply.error
    assert (reply.status, error["code"], error["param"], error["type"]) == (
        expected.status,
        expected.code,
        expected.param,
        expected.type,
    ), error
    assert list(error) == ["message", "type", "param", "code"]
    assert isinstance(error["message"], str)
    assert error["message"]
    assert sorted(reply.names) == sorted([*NAMES, *own])
    assert {name: reply.values(name)[0] for name in own} == own
    assert reply.values("content-type") == ["application/json"]
    assert reply.values("x-beanmeter-error-source") == ["gateway"]
    assert reply.values("x-request-id") == reply.values("x-beanmeter-request-id")
    assert re.fullmatch("req_[0-9A-Z]{26}", reply.values("x-request-id")[0])


@contextmanager
def nothing_heard(live: tuple[LiveGateway, ScriptedUpstream]) -> Iterator[None]:
    """Whatever happens in the block, the upstream sees no connection and no request of it, and the books no charge."""
    gateway, upstream = live

    def seen() -> tuple[int, int, int]:
        with gateway.database.reading() as connection:
            booked = connection.execute(select(func.count()).select_from(charges)).scalar_one()
        return upstream.connections, len(upstream.requests), booked

    before = seen()
    yield
    assert seen() == before


def refused(live: tuple[LiveGateway, ScriptedUpstream], data: bytes, expected: Refused) -> Reply:
    """Send a request that is refused before the upstream hears of it."""
    with nothing_heard(live):
        reply = ask(live[0], data)
        check(reply, expected)
    return reply


INVALID = {field: Refused(400, "invalid_value", field) for field in ("size", "quality", "n", "stream")}
TWICE = {field: Refused(400, "duplicate_parameter", field) for field in ("model", "size", "quality", "n", "stream")}
NO_MODEL = Refused(400, "missing_required_parameter", "model")
OTHER_MODEL = Refused(404, "model_not_found", "model")
NOT_JSON = Refused(400, "invalid_json")
NOT_A_FORM = Refused(400, "invalid_multipart")
OTHER_MEDIA = Refused(415, "unsupported_media_type")
TOO_LARGE = Refused(413, "request_too_large")
NO_KEY = Refused(401, "invalid_api_key", headers={"www-authenticate": "Bearer"})
NO_PATH = Refused(404, "unknown_url")
OVER_BUDGET = Refused(429, "insufficient_quota", type="insufficient_quota", headers={"x-should-retry": "false"})
LEDGER_AWAY = Refused(503, "ledger_unavailable", type="server_error", headers={"retry-after": "5"})
UNREACHABLE = Refused(502, "upstream_unreachable", type="server_error")
CREDENTIALS = Refused(502, "upstream_credentials", type="server_error", headers={"x-should-retry": "false"})
FAILED = Refused(502, "upstream_failed", type="server_error", headers={"x-should-retry": "false"})


def sdk(gateway: LiveGateway, key: str) -> openai.OpenAI:
    return openai.OpenAI(base_url=gateway.base_url, api_key=key, timeout=PATIENCE_SECONDS)
