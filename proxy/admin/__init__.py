"""What an operator sees and changes over HTTP, under ``/admin/v1``: all that the command line can do, by the same functions of
the ledger. Without an admin token there is nothing here.
"""

from __future__ import annotations

import json
import time
from collections.abc import Awaitable, Callable, Mapping
from datetime import UTC, date, datetime
from functools import cache
from importlib import resources
from itertools import groupby

import structlog
from pydantic import BaseModel
from sqlalchemy import Connection
from sqlalchemy.exc import IntegrityError, SQLAlchemyError
from starlette.concurrency import run_in_threadpool
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.routing import Route
from starlette.types import Receive, Scope, Send

from proxy import headers
from proxy.admin.operations import OPERATIONS, Asked, Operation
from proxy.admin.problems import Problem, tell
from proxy.door import Closed, Door, Throttled, Wrong
from proxy.inputs import InputError, read_body, read_query
from proxy.ledger.accounts import AccountError
from proxy.ledger.engine import Database
from proxy.prices import PriceCard

PREFIX = "/admin/v1"

# The largest body there is takes a few hundred bytes.
BODY_BYTES_MAX = 64 * 1024

# The reference is read by people: it loads its one style sheet, and nothing else from anywhere.
REFERENCE_HEADERS = {
    "content-security-policy": "default-src 'none'; style-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'",
    "referrer-policy": "no-referrer",
    "x-content-type-options": "nosniff",
}

log = structlog.get_logger(__name__)

Answer = Callable[[Request], Awaitable[Response]]


def make_admin(
    database: Database, door: Door, clock: Callable[[], datetime], card: PriceCard, aliases: Mapping[str, str]
) -> list[Route]:
    """The routes, all behind ``door``. ``card`` and ``aliases`` are the prices and sizes in force."""
    desk = _Desk(database, clock, card, aliases)
    # The description has no secrets, and tools and people read it before they have a token; where the API is closed, it is too.
    described = {"/openapi.json": _document, "/docs": _reference, "/docs.css": _style}
    routes = [Route(PREFIX + path, _Resource(door, {"GET": answer}, guarded=False)) for path, answer in described.items()]
    by_path = groupby(sorted(OPERATIONS, key=lambda operation: operation.path), key=lambda operation: operation.path)
    for path, operations in by_path:
        answers: dict[str, Answer] = {operation.method: desk.answering(operation) for operation in operations}
        routes.append(Route(PREFIX + path, _Resource(door, answers)))
    return [*routes, *(Route(PREFIX + path, _Resource(door, {})) for path in ("", "/{rest:path}"))]


class _Resource:
    """One path and its methods: an ASGI application that lets nobody past ``door`` without the token."""

    def __init__(self, door: Door, answers: Mapping[str, Answer], *, guarded: bool = True) -> None:
        self._door = door
        self._answers = answers
        self._guarded = guarded

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        request = Request(scope, receive)
        try:
            response = await self._answer(request)
        except Problem as problem:
            response = problem.response()
        await response(scope, receive, send)

    async def _answer(self, request: Request) -> Response:
        if self._guarded:
            self._let_in(request)
        elif not self._door.opens:
            raise _closed()
        # No name has a slash in it, so a slash that was hidden makes another path of this one.
        if not self._answers or b"%2f" in request.scope["raw_path"].lower():
            raise Problem(404, f"There is nothing at this path. {PREFIX}/openapi.json describes all there is.")
        answer = self._answers.get("GET" if request.method == "HEAD" else request.method)
        if answer is None:
            allow = ", ".join(sorted({*self._answers, *(("HEAD",) if "GET" in self._answers else ())}))
            raise Problem(405, f"This path takes {allow}.", headers={"allow": allow})
        return await answer(request)

    def _let_in(self, request: Request) -> None:
        address = request.client.host if request.client is not None else ""
        try:
            self._door.enter(headers.bearer(request.scope["headers"]), address, time.monotonic())
        except Closed:
            raise _closed() from None
        except Wrong:
            told = "Send the admin token as 'Authorization: Bearer ...'."
            raise Problem(401, told, headers={"www-authenticate": "Bearer"}) from None
        except Throttled as throttled:
            wait = {"retry-after": str(throttled.retry_after_seconds)}
            raise Problem(429, "Too many wrong tokens from this address.", headers=wait) from None


def _closed() -> Problem:
    return Problem(404, "The admin API is closed: the operator has set no BEANMETER_ADMIN_TOKEN.")


class _Desk:
    """Where requests are read, and what they ask for is done."""

    def __init__(self, database: Database, clock: Callable[[], datetime], card: PriceCard, aliases: Mapping[str, str]) -> None:
        self._database = database
        self._clock = clock
        self._card = card
        self._aliases = aliases

    def answering(self, operation: Operation) -> Answer:
        """What answers the operation's requests."""

        async def answer(request: Request) -> Response:
            asked = await self._read(operation, request)

            def work(connection: Connection) -> bytes:
                return json.dumps(operation.run(connection, asked), default=_plain).encode("ascii")

            try:
                body = await (self._database.change(work) if operation.writes else self._database.ask(work))
            except InputError as error:
                raise Problem(400, f"{error.message}.", error.field) from None
            except AccountError as error:
                raise Problem(409, tell(error)) from None
            except IntegrityError:
                raise Problem(409, "Somebody else changed the same thing at the same time. Look at it again.") from None
            except (SQLAlchemyError, OSError) as error:
                log.error("ledger_failed", operation=operation.name, cause=type(error).__name__)
                told = "The ledger can't be reached, or did not answer in time. Look whether it was done before you try again."
                raise Problem(503, told, headers={"retry-after": "5"}) from None
            return _fresh(Response(body, operation.status, media_type="application/json"))

        return answer

    async def _read(self, operation: Operation, request: Request) -> Asked:
        try:
            query = read_query(operation.query, request.query_params.multi_items())
        except InputError as error:
            raise Problem(400, f"{error.message}.", error.field) from None
        body = None if operation.body is None else await _read_body(operation.body, request)
        return Asked(request.path_params, query, body, self._clock(), self._card, self._aliases)


async def _read_body(model: type[BaseModel], request: Request) -> BaseModel:
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/json" or "content-encoding" in request.headers:
        raise Problem(415, "Send JSON, with 'Content-Type: application/json' and no Content-Encoding.")
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > BODY_BYTES_MAX:
                raise Problem(413, f"A body has at most {BODY_BYTES_MAX} bytes here.")
        return read_body(model, body)
    except ClientDisconnect:
        raise Problem(400, "The body ended before its end.") from None
    except InputError as error:
        # What could be read, and says something that is not accepted, is no mistake of form.
        raise Problem(400 if error.field is None else 422, f"{error.message}.", error.field) from None


# The API's own description


async def _document(_request: Request) -> Response:
    return _fresh(Response(await run_in_threadpool(_document_text), media_type="application/json"))


async def _reference(_request: Request) -> Response:
    return Response(await run_in_threadpool(_reference_text), media_type="text/html", headers=REFERENCE_HEADERS)


async def _style(_request: Request) -> Response:
    style = resources.files("proxy").joinpath("admin/reference.css").read_text("utf-8")
    return Response(style, media_type="text/css", headers=REFERENCE_HEADERS)


@cache
def _document_text() -> bytes:
    # Loaded once somebody asks: what describes the API takes more memory than what serves it.
    from proxy.admin.document import describe

    return json.dumps(describe(PREFIX)).encode("ascii")


@cache
def _reference_text() -> bytes:
    from proxy.admin.reference import render

    return render(json.loads(_document_text())).encode("utf-8")


def _fresh(response: Response) -> Response:
    response.headers["cache-control"] = "no-store"
    response.headers["x-content-type-options"] = "nosniff"
    return response


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return value.astimezone(UTC).isoformat().replace("+00:00", "Z")
    assert isinstance(value, date)
    return value.isoformat()
