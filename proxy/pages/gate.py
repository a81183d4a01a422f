"""Who comes in, and with what: cookies, sessions, the origin of a change and its token. Only here is a request let through."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Mapping

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response

from proxy import tokens
from proxy.door import Throttled
from proxy.door import Wrong as WrongToken
from proxy.ledger.accounts import holder_of
from proxy.ledger.sessions import SESSION_HOURS, Session, end_session, find_session, open_session, see_session
from proxy.pages.desk import Desk, Visit
from proxy.pages.fields import FORM_BYTES_MAX, FieldError, FormError, parse_form

# The prefix makes a browser insist on TLS, this host and no other. On loopback there is no TLS to insist on.
_COOKIE = "__Host-beanmeter"
_LOOPBACK_COOKIE = "beanmeter"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

_TOKEN_BYTES = 32
_TOKEN_CHARACTERS_MAX = 64


class NotFromHere(Exception):
    """A change that another site, or an old page, may have sent. Its text is for the person who did it."""


def session_token(request: Request) -> str | None:
    """The random token in the visitor's cookie."""
    token = request.cookies.get(_LOOPBACK_COOKIE if _is_loopback(request) else _COOKIE)
    return token if token is not None and token.isascii() and len(token) <= _TOKEN_CHARACTERS_MAX else None


async def find_visitor(desk: Desk, token: str | None) -> Session | None:
    """Whose token this is."""
    if token is None:
        return None
    now, digest = desk.clock(), _digest(desk, token)
    session = await desk.database.ask(lambda connection: find_session(connection, digest, now))
    if session is not None and session.stale(now):
        await desk.database.change(lambda connection: see_session(connection, digest, now))
    return session


def csrf_token(desk: Desk, token: str | None) -> str:
    """What each form of a session carries: nobody can make it who can't read the session's pages."""
    return "" if token is None else desk.door.seal(f"form:{token}").hex()


async def read_change(request: Request, csrf: str) -> Mapping[str, str]:
    """The fields of a form that was sent from one of our own pages. Raises :class:`NotFromHere` and :class:`FormError`."""
    origin = request.headers.get("origin", "")
    if not _is_here(origin, request.headers.get("host", "")):
        raise NotFromHere("This was not sent from a page of this gateway. Open the page again, at the gateway's own address.")
    if origin.startswith("http:") and not _is_loopback(request):
        raise NotFromHere("The dashboard is used over HTTPS, or on the gateway's own host: a cookie without TLS can be stolen.")
    kind, _, _ = request.headers.get("content-type", "").partition(";")
    if kind.strip().lower() != "application/x-www-form-urlencoded":
        raise FormError("This is not a form.")
    body = b""
    try:
        async for piece in request.stream():
            body += piece
            if len(body) > FORM_BYTES_MAX:
                raise FormError("That is longer than any form here.")
    except ClientDisconnect:
        raise FormError("The form ended before its end.") from None
    form = parse_form(body)
    if csrf and not hmac.compare_digest(form.get("csrf", "").encode("utf-8"), csrf.encode("ascii")):
        raise NotFromHere("This page was made before you signed in as you are now. Open it again and repeat the change.")
    return form


async def sign_in(visit: Visit, former: str | None) -> Response:
    """Begin a session with the credential typed in, and end the ``former`` one. Raises :class:`FieldError`."""
    desk, now = visit.desk, visit.now
    key_id = await _key_of(visit, visit.form.get("credential", "").strip())
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    digest = _digest(desk, token)
    await desk.database.change(lambda connection: open_session(connection, digest, key_id, now))
    if former is not None:
        await _end(desk, former)
    response = visit.go()
    loopback = _is_loopback(visit.request)
    response.set_cookie(
        _LOOPBACK_COOKIE if loopback else _COOKIE,
        token,
        max_age=SESSION_HOURS * 3600,
        httponly=True,
        secure=not loopback,
        samesite="lax",
    )
    return response


async def sign_out(visit: Visit, token: str) -> Response:
    """End the session, here and not only in the browser."""
    await _end(visit.desk, token)
    response = visit.go("sign-in", said="signed_out")
    loopback = _is_loopback(visit.request)
    response.delete_cookie(_LOOPBACK_COOKIE if loopback else _COOKIE, httponly=True, secure=not loopback, samesite="lax")
    return response


async def _key_of(visit: Visit, credential: str) -> str | None:
    """The id of a key that may be used; ``None`` for the admin token."""
    desk, now = visit.desk, visit.now
    address = visit.request.client.host if visit.request.client is not None else ""
    if tokens.is_well_formed(credential):
        key = tokens.digest(credential)
        holder = await desk.database.ask(lambda connection: holder_of(connection, key))
        if holder is not None and holder.valid(now):
            return holder.key_id
    try:
        desk.door.enter(credential, address, time.monotonic())
    except WrongToken:
        raise FieldError("credential", "This is neither the admin token nor a team key that works.") from None
    except Throttled as throttled:
        wait = throttled.retry_after_seconds
        raise FieldError("credential", f"Too many wrong tries from this address. Wait {wait} seconds.") from None
    return None


async def _end(desk: Desk, token: str) -> None:
    digest = _digest(desk, token)
    await desk.database.change(lambda connection: end_session(connection, digest))


def _digest(desk: Desk, token: str) -> bytes:
    # Made with the admin token: whoever changes that ends all sessions, and a copy of the database opens none.
    return desk.door.seal(f"session:{token}")


def _is_here(origin: str, host: str) -> bool:
    scheme, _, sender = origin.partition("://")
    # A reverse proxy may hand the host on without its port; cookies don't tell ports apart either.
    return scheme in ("http", "https") and bool(host) and host.lower() in (sender.lower(), _without_port(sender))


def _is_loopback(request: Request) -> bool:
    return _without_port(request.headers.get("host", "")) in _LOOPBACK


def _without_port(host: str) -> str:
    name, _, port = host.lower().rpartition(":")
    return name if name and port.isdigit() else host.lower()
