"""What is asked with GET: models, prices, the caller's budget and usage, health, metrics. Nothing here holds or sends."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from datetime import UTC, datetime
from typing import Any, TypeVar

from sqlalchemy import Connection
from sqlalchemy.exc import SQLAlchemyError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, PlainTextResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy import admin, headers, pages, usage
from proxy.door import Closed, Door, Throttled, Wrong
from proxy.errors import (
    SOURCE_HEADER,
    InvalidApiKey,
    InvalidValue,
    LedgerUnavailable,
    MethodNotAllowed,
    ModelNotFound,
    RateLimitExceeded,
    Refusal,
    UnknownUrl,
)
from proxy.inputs import InputError, read_query
from proxy.keyring import Keyring
from proxy.ledger.accounts import KeyHolder
from proxy.ledger.engine import Database
from proxy.ledger.migrate import require_current
from proxy.ledger.reports import BudgetStatus, Figures, list_budgets, read_figures
from proxy.metrics import NO_TEAM, Metrics
from proxy.prices import PriceCard
from proxy.settings import OpenID
from proxy.tokens import KEY_PREFIX, new_request_id

Clock = Callable[[], datetime]

_DaysQuery = TypeVar("_DaysQuery", usage.ImagesQuery, usage.CostsQuery)

_NAMING = tuple(f"{prefix}/".encode("ascii") for prefix in (admin.PREFIX, pages.PREFIX))


def make_endpoints(
    database: Database,
    keyring: Keyring,
    card: PriceCard,
    metrics: Metrics,
    clock: Clock,
    door: Door,
    aliases: Mapping[str, str],
    openid: OpenID | None,
) -> ASGIApp:
    """The application for everything but the priced paths."""
    endpoints = _Endpoints(database, keyring, card, metrics, clock, door, aliases)
    app = Starlette(
        routes=[
            Route("/livez", endpoints.livez),
            Route("/readyz", endpoints.readyz),
            Route("/metrics", endpoints.metrics_page),
            Route("/v1/models", endpoints.models),
            Route("/v1/models/{model}", endpoints.model),
            Route("/v1/budget", endpoints.budget),
            Route("/v1/prices", endpoints.prices),
            Route("/v1/organization/usage/images", endpoints.images),
            Route("/v1/organization/costs", endpoints.costs),
            *admin.make_admin(database, door, clock, card, aliases),
            *pages.make_pages(database, door, clock, card, aliases, metrics, openid),
        ],
        exception_handlers={
            Refusal: endpoints.refuse,
            404: endpoints.unknown,
            405: endpoints.not_allowed,
            500: endpoints.failed,
        },
    )
    # A trailing slash is another path, and a redirect would make an SDK send its key a second time.
    app.router.redirect_slashes = False
    return _exact(app)


def _exact(app: ASGIApp) -> ASGIApp:
    async def exact(scope: Scope, receive: Receive, send: Send) -> None:
        # The router matches the decoded path; a path that needed decoding is another spelling. Paths of operators and
        # pages have names in them, which no other spelling can say.
        if scope["type"] == "http" and b"%" in scope["raw_path"] and not scope["raw_path"].startswith(_NAMING):
            scope = {**scope, "path": "/%"}
        await app(scope, receive, send)

    return exact


class _Endpoints:
    def __init__(
        self,
        database: Database,
        keyring: Keyring,
        card: PriceCard,
        metrics: Metrics,
        clock: Clock,
        door: Door,
        aliases: Mapping[str, str],
    ) -> None:
        self._database = database
        self._keyring = keyring
        self._card = card
        self._metrics = metrics
        self._clock = clock
        self._door = door
        self._aliases = aliases

    async def livez(self, _request: Request) -> Response:
        return PlainTextResponse("ok\n")

    async def readyz(self, _request: Request) -> Response:
        try:
            await self._database.ask(require_current)
        except (SQLAlchemyError, OSError, RuntimeError):
            return PlainTextResponse("the ledger can't be reached, or is not at this release's schema\n", 503)
        return PlainTextResponse("ok\n")

    async def metrics_page(self, request: Request) -> Response:
        figures: Figures | None = None
        try:
            figures = await self._database.ask(lambda connection: read_figures(connection, self._clock()))
        except (SQLAlchemyError, OSError):
            self._metrics.failed("read")
        page, content_type = self._metrics.page(request.headers.get("accept", ""), self._card.version, figures)
        return Response(page, headers={"content-type": content_type})

    async def models(self, request: Request) -> Response:
        await self._caller(request)
        return JSONResponse({"object": "list", "data": [_model(name) for name in self._card.models]})

    async def model(self, request: Request) -> Response:
        await self._caller(request)
        name = request.path_params["model"]
        if name not in self._card.models:
            raise ModelNotFound(f"This gateway has no price for that model; it serves {', '.join(self._card.models)}.")
        return JSONResponse(_model(name))

    async def budget(self, request: Request) -> Response:
        caller = await self._caller(request)
        try:
            budgets = await self._database.ask(
                lambda connection: list_budgets(connection, self._clock(), team=caller.team, key_id=caller.key_id)
            )
        except (SQLAlchemyError, OSError) as error:
            raise LedgerUnavailable from error
        return JSONResponse({"team": caller.team, "key_id": caller.key_id, "budgets": [_budget(row) for row in budgets]})

    async def prices(self, request: Request) -> Response:
        await self._team_seen(request)
        return JSONResponse(usage.list_prices(self._card, self._aliases))

    async def images(self, request: Request) -> Response:
        query, team = await self._days_asked(usage.ImagesQuery, request)
        return await self._sums(lambda connection: usage.read_images(connection, query, team, self._clock()))

    async def costs(self, request: Request) -> Response:
        query, team = await self._days_asked(usage.CostsQuery, request)
        return await self._sums(lambda connection: usage.read_costs(connection, query, team, self._clock()))

    async def refuse(self, request: Request, error: Exception) -> Response:
        """A refusal, as the gateway answers it."""
        assert isinstance(error, Refusal)
        self._metrics.refused(NO_TEAM, error.code)
        identity = new_request_id(self._clock()).encode("ascii")
        response = Response(b"" if request.method == "HEAD" else error.body(), error.status)
        response.raw_headers = [
            (b"content-type", b"application/json"),
            (b"content-length", b"%d" % len(error.body())),
            (b"x-request-id", identity),
            (b"x-beanmeter-request-id", identity),
            SOURCE_HEADER,
            *error.headers,
        ]
        return response

    async def unknown(self, request: Request, _error: Exception) -> Response:
        return await self.refuse(request, UnknownUrl())

    async def not_allowed(self, request: Request, _error: Exception) -> Response:
        return await self.refuse(request, MethodNotAllowed("GET, HEAD"))

    async def failed(self, _request: Request, _error: Exception) -> Response:
        self._metrics.internal_errors.labels("endpoint").inc()
        error = {"message": "The gateway failed; its log has the details.", "type": "server_error", "param": None}
        return JSONResponse({"error": {**error, "code": "internal_error"}}, 500, headers=dict([_text(SOURCE_HEADER)]))

    async def _caller(self, request: Request) -> KeyHolder:
        return await self._keyring.holder(request.scope["headers"])

    async def _team_seen(self, request: Request) -> str | None:
        """The team of the caller's key, which sees its own; ``None`` for the admin token, which sees all."""
        token = headers.bearer(request.scope["headers"])
        # A client with a broken key must not use up the tries of an operator behind the same address.
        if token is None or token.startswith(KEY_PREFIX):
            return (await self._caller(request)).team
        try:
            self._door.enter(token, request.client.host if request.client is not None else "", time.monotonic())
        except (Closed, Wrong):
            raise InvalidApiKey from None
        except Throttled as throttled:
            raise RateLimitExceeded("Too many wrong tokens from this address.", throttled.retry_after_seconds) from None
        return None

    async def _days_asked(self, model: type[_DaysQuery], request: Request) -> tuple[_DaysQuery, str | None]:
        team = await self._team_seen(request)
        try:
            return read_query(model, request.query_params.multi_items()), team
        except InputError as error:
            raise InvalidValue(f"{error.message}.", error.field or "") from None

    async def _sums(self, read: Callable[[Connection], dict[str, Any]]) -> Response:
        try:
            return JSONResponse(await self._database.ask(read))
        except InputError as error:
            raise InvalidValue(f"{error.message}.", error.field or "") from None
        except (SQLAlchemyError, OSError) as error:
            raise LedgerUnavailable from error


def _text(header: tuple[bytes, bytes]) -> tuple[str, str]:
    return header[0].decode("ascii"), header[1].decode("ascii")


def _model(name: str) -> dict[str, Any]:
    # The price card does not say when a model was made, and the clients' types want a number.
    return {"id": name, "object": "model", "created": 0, "owned_by": "beansai"}


def _budget(row: BudgetStatus) -> dict[str, Any]:
    return {
        "scope": row.scope,
        "period": row.period,
        "soft": row.soft,
        "limit_micro_usd": row.limit_micro_usd,
        "settled_micro_usd": row.settled_micro_usd,
        "held_micro_usd": row.held_micro_usd,
        "remaining_micro_usd": row.remaining_micro_usd,
        "resets_at": None if row.resets_at is None else f"{row.resets_at.astimezone(UTC):%Y-%m-%dT%H:%M:%SZ}",
    }
