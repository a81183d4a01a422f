"""Every page and every form, who may have it, and how a request comes to it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from typing import Literal

import structlog
from jinja2 import Environment
from sqlalchemy.exc import SQLAlchemyError
from starlette.requests import Request
from starlette.responses import RedirectResponse, Response
from starlette.routing import Route, Router
from starlette.types import Receive, Scope, Send

from proxy.pages import assets, doors, health, overview, playground, prices, requests, reviews, team
from proxy.pages import audit as changes
from proxy.pages.desk import Desk, Missing, Visit
from proxy.pages.fields import FormError
from proxy.pages.gate import CALLBACK, NotFromHere, csrf_token, find_visitor, read_change, session_token
from proxy.pages.rendering import make_environment, secure

# Who may have a page: anybody, whoever is signed in, members of the team named in the path and who sees all, or the latter
# alone. Of those who see all, viewers change nothing.
Access = Literal["anybody", "signed in", "team", "admin"]

log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Page:
    """A page, or what a form is sent to."""

    method: Literal["GET", "POST"]
    path: str
    access: Access
    answer: Callable[[Visit], Awaitable[Response]]


PAGES: tuple[Page, ...] = (
    Page("GET", "/sign-in", "anybody", doors.show),
    Page("POST", "/sign-in", "anybody", doors.enter),
    Page("GET", "/sign-in/oidc", "anybody", doors.begin),
    Page("GET", "/" + "/".join(CALLBACK), "anybody", doors.finish),
    Page("POST", "/sign-out", "signed in", doors.leave),
    Page("GET", "", "signed in", overview.home),
    Page("GET", "/figures", "admin", overview.figures),
    Page("GET", "/spend.csv", "admin", overview.spend_csv),
    Page("POST", "/teams", "admin", overview.add_team),
    Page("GET", "/teams/{team}", "team", team.show),
    Page("GET", "/teams/{team}/figures", "team", team.figures),
    Page("GET", "/teams/{team}/burn-down.csv", "team", team.burn_down_csv),
    Page("GET", "/teams/{team}/split.csv", "team", team.split_csv),
    Page("POST", "/teams/{team}/archive", "admin", team.archive),
    Page("POST", "/teams/{team}/keys", "admin", team.add_key),
    Page("POST", "/teams/{team}/keys/{key_id}/rotate", "team", team.rotate_key),
    Page("POST", "/teams/{team}/keys/{key_id}/revoke", "team", team.revoke_key),
    Page("POST", "/teams/{team}/budgets", "admin", team.set_budget),
    Page("POST", "/teams/{team}/budgets/remove", "admin", team.remove_budget),
    Page("POST", "/teams/{team}/limits", "admin", team.set_limit),
    Page("POST", "/teams/{team}/limits/remove", "admin", team.remove_limit),
    Page("GET", "/teams/{team}/requests", "team", requests.show),
    Page("GET", "/teams/{team}/requests.csv", "team", requests.export),
    Page("GET", "/reviews", "admin", reviews.show),
    Page("POST", "/reviews/{charge_id}/settle", "admin", reviews.settle),
    Page("POST", "/reviews/{charge_id}/release", "admin", reviews.release),
    Page("GET", "/prices", "signed in", prices.show),
    Page("GET", "/playground", "signed in", playground.show),
    Page("GET", "/playground/price", "signed in", playground.price),
    Page("GET", "/playground/cost", "signed in", playground.cost),
    Page("GET", "/audit", "admin", changes.show),
    Page("GET", "/health", "admin", health.show),
)


def make_router(prefix: str, desk: Desk) -> Router:
    """All pages below ``prefix``."""
    environment = make_environment(prefix)
    by_path = groupby(sorted(PAGES, key=lambda page: page.path), key=lambda page: page.path)
    routes = [Route(prefix + path, _Answer(prefix, desk, environment, list(pages))) for path, pages in by_path]
    routes.append(Route(prefix + "/static/{digest}/{name}", _static, methods=["GET"]))
    routes.append(Route(prefix + "/{rest:path}", _Answer(prefix, desk, environment, [])))
    return Router(routes, redirect_slashes=False)


class _Answer:
    """One path and its methods."""

    def __init__(self, prefix: str, desk: Desk, environment: Environment, pages: Sequence[Page]) -> None:
        self._prefix = prefix
        self._desk = desk
        self._environment = environment
        self._pages: dict[str, Page] = {page.method: page for page in pages}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        response = await self._answer(Request(scope, receive))
        await secure(response)(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        now = self._desk.clock()
        visit = Visit(self._prefix, self._desk, self._environment, request, None, "", {}, now)
        try:
            token = session_token(request)
            session = await find_visitor(self._desk, token)
            visit = replace(visit, session=session, csrf=csrf_token(self._desk, token) if session is not None else "")
            return await self._let_in(visit)
        except Missing:
            return await _problem(visit, 404, "There is nothing here", "Nothing is at this address, or nothing for you.")
        except NotFromHere as error:
            return await _problem(visit, 403, "This was not done", str(error))
        except FormError as error:
            return await _problem(visit, 400, "This was not done", str(error))
        except (SQLAlchemyError, OSError) as error:
            log.error("page_failed", page=request.scope["path"].removeprefix(self._prefix), cause=type(error).__name__)
            told = (
                "The ledger can't be reached, or did not answer in time. Look whether a change was made before you repeat it."
            )
            return await _problem(visit, 503, "The books are away", told)

    async def _let_in(self, visit: Visit) -> Response:
        request, session = visit.request, visit.session
        page = self._pages.get("GET" if request.method == "HEAD" else request.method)
        if page is not None and page.access == "anybody":
            return await self._go(visit, page)
        if session is None:
            return _to_sign_in(visit)
        # No name has a slash in it, so a slash that was hidden makes another path of this one.
        # Nor anything else in it that a database could choke on.
        hidden = b"%2f" in request.scope["raw_path"].lower()
        if not self._pages or hidden or not all(value.isprintable() for value in request.path_params.values()):
            raise Missing
        if not any(_may(visit, one) for one in self._pages.values()):
            raise Missing
        if page is None:
            response = await _problem(visit, 405, "This was not done", "This address is for something else.")
            response.headers["allow"] = ", ".join(sorted({*self._pages, *(("HEAD",) if "GET" in self._pages else ())}))
            return response
        if not _may(visit, page):
            raise Missing
        if page.method == "POST" and page.access != "signed in" and visit.sees_all and not visit.is_admin:
            return await _problem(visit, 403, "This was not done", "Your account sees everything here and changes nothing.")
        return await self._go(visit, page)

    async def _go(self, visit: Visit, page: Page) -> Response:
        if page.method == "POST":
            visit = replace(visit, form=await read_change(visit.request, visit.csrf))
        return await page.answer(visit)


def _may(visit: Visit, page: Page) -> bool:
    if page.access == "anybody" or visit.sees_all:
        return True
    if page.access == "team":
        return visit.named("team") in visit.teams
    return page.access == "signed in"


def _to_sign_in(visit: Visit) -> Response:
    if "hx-request" in visit.request.headers:
        # A part of a page that asks for itself is answered with a whole new page.
        return Response(status_code=401, headers={"hx-redirect": f"{visit.prefix}/sign-in"})
    return RedirectResponse(f"{visit.prefix}/sign-in", 303)


async def _problem(visit: Visit, status: int, title: str, told: str) -> Response:
    return await visit.page("problem.html", status, title=title, told=told)


async def _static(request: Request) -> Response:
    found = assets.serve(request.path_params["digest"], request.path_params["name"])
    return secure(found if found is not None else Response("There is no such file.\n", 404, media_type="text/plain"))
