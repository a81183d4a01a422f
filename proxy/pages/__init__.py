"""What people look at, under ``/dashboard``: overview, teams, prices, playground, audit and health. Without an admin token
there is nothing here. What makes pages is loaded with the first of them: a gateway that nobody looks at does not carry it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from datetime import datetime

from starlette.responses import PlainTextResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from proxy.door import Door
from proxy.ledger.engine import Database
from proxy.metrics import Metrics
from proxy.prices import PriceCard
from proxy.settings import OpenID

PREFIX = "/dashboard"


def make_pages(
    database: Database,
    door: Door,
    clock: Callable[[], datetime],
    card: PriceCard,
    aliases: Mapping[str, str],
    metrics: Metrics,
    openid: OpenID | None,
) -> list[Route]:
    """The routes. ``door`` keeps all of them closed where it opens for nobody; ``card`` and ``aliases`` are the prices and
    sizes in force; ``openid`` is another way to sign in."""
    house = _House(database, door, clock, card, aliases, metrics, openid)
    return [Route(PREFIX, house), Route(PREFIX + "/{rest:path}", house)]


class _House:
    """All pages as one ASGI application, made when it is first asked."""

    def __init__(
        self,
        database: Database,
        door: Door,
        clock: Callable[[], datetime],
        card: PriceCard,
        aliases: Mapping[str, str],
        metrics: Metrics,
        openid: OpenID | None,
    ) -> None:
        self._parts = (database, door, clock, card, aliases, metrics)
        self._openid = openid
        self._door = door
        self._pages: ASGIApp | None = None
        self._making = asyncio.Lock()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if not self._door.opens:
            closed = PlainTextResponse("The dashboard is closed: the operator has set no BEANMETER_ADMIN_TOKEN.\n", 404)
            await closed(scope, receive, send)
            return
        async with self._making:
            if self._pages is None:
                # Reading templates takes a moment, and requests of clients don't wait for it.
                self._pages = await asyncio.to_thread(self._make)
        await self._pages(scope, receive, send)

    def _make(self) -> ASGIApp:
        from proxy.pages.desk import Desk
        from proxy.pages.routes import make_router

        provider = None
        if self._openid is not None:
            from proxy.pages.oidc import Provider

            provider = Provider(self._openid)
        return make_router(PREFIX, Desk(*self._parts, provider))
