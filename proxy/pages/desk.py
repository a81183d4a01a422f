"""What pages are made from, and one visit to a page: who it is, what was sent, and how it is answered."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import quote, urlencode

from jinja2 import Environment
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response

from proxy.door import Door
from proxy.ledger.accounts import AccountError, Remedy
from proxy.ledger.engine import Database
from proxy.ledger.sessions import Session
from proxy.metrics import Metrics
from proxy.pages.fields import FieldError
from proxy.pages.rendering import html
from proxy.prices import PriceCard

if TYPE_CHECKING:
    # What is behind it is loaded where a provider is named.
    from proxy.pages.oidc import Provider

Answer = TypeVar("Answer")


@dataclass(frozen=True, slots=True)
class Desk:
    """What a gateway has that pages show. ``provider`` is that of identities, where there is one."""

    database: Database
    door: Door
    clock: Callable[[], datetime]
    card: PriceCard
    aliases: Mapping[str, str]
    metrics: Metrics
    provider: Provider | None


# What helps with an error of the accounts, where people look.
_REMEDIES: Mapping[Remedy, str] = {
    "list_teams": "The overview has all of them, archived ones at its end.",
    "add_team": "Make it on the overview.",
    "list_keys": "The team's page lists its keys.",
    "add_key": "Make a new one in its place.",
    "list_budgets": "The team's page lists those there are.",
    "list_limits": "The team's page lists those there are.",
    "list_reviews": "The page of reviews has those that are left.",
}


class Missing(Exception):
    """There is nothing at this path, or nothing for this visitor: nobody learns which."""


@dataclass(frozen=True, slots=True)
class Wrong:
    """A form that could not be taken: which one, what was typed, and what is wrong at which field."""

    form: str
    typed: Mapping[str, str] = field(default_factory=dict)
    errors: Mapping[str, str] = field(default_factory=dict)


NOTHING_WRONG = Wrong("")


@dataclass(frozen=True, slots=True)
class Visit:
    """A request for a page, by somebody who may have it. ``session`` is ``None`` only before signing in."""

    prefix: str
    desk: Desk
    environment: Environment
    request: Request
    session: Session | None
    csrf: str
    form: Mapping[str, str]
    now: datetime

    @property
    def is_admin(self) -> bool:
        """Whether an operator is asking, who may change everything."""
        return self.session is not None and self.session.role == "admin"

    @property
    def sees_all(self) -> bool:
        """Whether this visitor sees what operators see: all teams, reviews, audit, health."""
        return self.session is not None and self.session.role != "member"

    @property
    def teams(self) -> tuple[str, ...]:
        """The teams of a member."""
        return () if self.session is None else self.session.teams

    @property
    def actor(self) -> str:
        """Who made a change, for its audit row."""
        assert self.session is not None
        if self.session.account is not None:
            return f"oidc:{self.session.account}"
        return "page:admin" if self.is_admin else f"page:team {self.teams[0]}"

    def named(self, name: str) -> str:
        """A part of the path."""
        value: str = self.request.path_params[name]
        return value

    def asked(self) -> dict[str, str]:
        """The query's parameters; of several with one name the last."""
        return dict(self.request.query_params)

    async def ask(self, read: Callable[[Connection], Answer]) -> Answer:
        """What the books say."""
        return await self.desk.database.ask(read)

    async def change(self, write: Callable[[Connection], Answer], field: str) -> Answer:
        """Change the books. Raises :class:`FieldError` at ``field`` for what can't be done."""
        try:
            return await self.desk.database.change(write)
        except AccountError as error:
            text = str(error)
            told = text if text.endswith("?") else f"{text}."
            help = "" if error.remedy is None else f" {_REMEDIES[error.remedy]}"
            raise FieldError(field, f"{told[:1].upper()}{told[1:]}{help}") from None
        except IntegrityError:
            raise FieldError(field, "Somebody else has just done the same. Look at the page again.") from None

    async def page(self, template: str, status: int = 200, **context: Any) -> Response:
        """A page from its template. Not in the event loop, where clients' streams go by."""
        around = {
            "visit": self,
            "now": self.now,
            "here": self.request.url.path,
            "said": self.request.query_params.get("said", ""),
        }
        return await asyncio.to_thread(html, self.environment, template, {**around, **context}, status)

    def go(self, *parts: str, **query: str) -> Response:
        """To another page, once something is done."""
        path = "/".join([self.prefix, *(quote(part, safe="") for part in parts)])
        return RedirectResponse(f"{path}?{urlencode(query)}" if query else path, 303)
