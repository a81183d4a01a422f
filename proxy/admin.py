"""The operator's view of the books over HTTP, under ``/admin/v1``. It shows; changes are made with the command line.

Errors are RFC 9457 problems. Without an admin token there is nothing here.
"""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict
from datetime import UTC, date, datetime
from itertools import islice
from typing import Any

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import Route

from proxy import headers
from proxy.door import Closed, Door, Throttled, Wrong
from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database

PREFIX = "/admin/v1"

# What one answer holds of a listing that has no end; 'beanmeter charges' and 'beanmeter audit' have all of it.
ROWS_MAX = 1_000

Rows = Iterable[dict[str, Any]]


def make_admin(database: Database, door: Door, clock: Callable[[], datetime]) -> list[Route]:
    """The routes, all behind ``door``."""
    listings: dict[str, Callable[[Connection], Rows]] = {
        "teams": accounts.list_teams,
        "keys": accounts.list_keys,
        "budgets": lambda connection: map(_budget, reports.list_budgets(connection, clock())),
        "limits": accounts.list_limits,
        "reviews": lambda connection: reports.list_charges(connection, state="review"),
        "audit": reports.list_audit,
    }
    return [Route(f"{PREFIX}/{name}", _listing(database, door, read)) for name, read in listings.items()]


def _listing(database: Database, door: Door, read: Callable[[Connection], Rows]) -> Callable[[Request], Any]:
    def rows() -> list[dict[str, Any]]:
        with database.reading() as connection:
            return list(islice(read(connection), ROWS_MAX + 1))

    async def endpoint(request: Request) -> Response:
        address = request.client.host if request.client is not None else ""
        try:
            door.enter(headers.bearer(request.scope["headers"]), address, time.monotonic())
        except Closed:
            return _problem(404, "Not Found", "The admin API is closed: the operator has set no BEANMETER_ADMIN_TOKEN.")
        except Wrong:
            return _problem(
                401, "Unauthorized", "Send the admin token as 'Authorization: Bearer ...'.", ("www-authenticate", "Bearer")
            )
        except Throttled as throttled:
            seconds = throttled.retry_after_seconds
            return _problem(429, "Too Many Requests", "Too many wrong tokens from this address.", ("retry-after", str(seconds)))
        try:
            found = await asyncio.to_thread(rows)
        except (SQLAlchemyError, OSError):
            return _problem(
                503, "Service Unavailable", "The ledger can't be reached. Try again in a few seconds.", ("retry-after", "5")
            )
        return _json(200, {"data": found[:ROWS_MAX], "has_more": len(found) > ROWS_MAX}, "application/json")

    return endpoint


def _budget(status: reports.BudgetStatus) -> dict[str, Any]:
    return asdict(status) | {"remaining_micro_usd": status.remaining_micro_usd}


def _problem(status: int, title: str, detail: str, *more: tuple[str, str]) -> Response:
    response = _json(status, {"title": title, "status": status, "detail": detail}, "application/problem+json")
    response.headers.update(dict(more))
    return response


def _json(status: int, value: object, media_type: str) -> Response:
    response = Response(json.dumps(value, default=_plain), status, media_type=media_type)
    response.headers["cache-control"] = "no-store"
    return response


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    assert isinstance(value, date)
    return value.isoformat()
