"""Who comes in, and with what: cookies, sessions, the origin of a change and its token. Only here is a request let through."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING

import structlog
from starlette.datastructures import QueryParams
from starlette.requests import ClientDisconnect, Request
from starlette.responses import RedirectResponse, Response

from proxy import tokens
from proxy.door import Throttled
from proxy.door import Wrong as WrongToken
from proxy.ledger.accounts import holder_of
from proxy.ledger.sessions import Holder, NoTeam, Session, end_session, find_session, open_session, see_session
from proxy.pages.desk import Desk, Visit
from proxy.pages.fields import FORM_BYTES_MAX, FieldError, FormError, parse_form
from proxy.pages.identity import Attempt, NoRole, ProviderError, admit

if TYPE_CHECKING:
    from proxy.pages.oidc import Provider

log = structlog.get_logger(__name__)

# The prefix makes a browser insist on TLS, this host and no other. On loopback there is no TLS to insist on.
_COOKIE = "__Host-beanmeter"
_LOOPBACK_COOKIE = "beanmeter"
_LOOPBACK = ("localhost", "127.0.0.1", "[::1]")

# Which attempt to sign in with the provider this browser began.
_TICKET_COOKIE = "__Host-beanmeter-oidc"
_LOOPBACK_TICKET_COOKIE = "beanmeter-oidc"

_TOKEN_BYTES = 32
_TOKEN_CHARACTERS_MAX = 64

# Time to find a second factor. The provider's own page is likely to give less.
TICKET_SECONDS = 600

# Where the provider sends the browser back to.
CALLBACK = ("sign-in", "oidc", "callback")


class NotFromHere(Exception):
    """A change that another site, or an old page, may have sent. Its text is for the person who did it."""


def session_token(request: Request) -> str | None:
    """The random token in the visitor's cookie."""
    return _read_cookie(request, _COOKIE, _LOOPBACK_COOKIE)


async def find_visitor(desk: Desk, token: str | None) -> Session | None:
    """Whose token this is."""
    if token is None:
        return None
    now, digest = desk.clock(), _digest(desk, token)
    session = await desk.database.ask(lambda connection: find_session(connection, digest, now))
    if session is not None and session.account is not None and desk.provider is None:
        # Whose word it was does not count any more.
        return None
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
    return await _begin(visit, await _credential_holder(visit, visit.form.get("credential", "").strip()), former)


async def begin_with_provider(visit: Visit, provider: Provider) -> Response:
    """Send the browser to the identity provider. Raises :class:`ProviderError`."""
    ends_at = int(visit.now.timestamp()) + TICKET_SECONDS
    ticket = f"{ends_at}.{secrets.token_urlsafe(_TOKEN_BYTES)}"
    url = await provider.begin(_address(visit, *CALLBACK), _attempt(visit.desk, ticket))
    response = RedirectResponse(url, 303)
    _set_cookie(visit.request, response, _TICKET_COOKIE, _LOOPBACK_TICKET_COOKIE, ticket, TICKET_SECONDS)
    return response


async def finish_with_provider(visit: Visit, provider: Provider, former: str | None) -> Response:
    """Begin a session for whom the provider sent back, and end the ``former`` one. Raises :class:`NotFromHere` and
    :class:`ProviderError`."""
    ticket = _read_cookie(visit.request, _TICKET_COOKIE, _LOOPBACK_TICKET_COOKIE)
    answer = _once(visit.request.query_params)
    attempt = None if ticket is None else _attempt(visit.desk, ticket)
    # The ticket is what the state was made from, so one with another time in it is another one.
    if (
        ticket is None
        or attempt is None
        or not hmac.compare_digest(answer.get("state", "").encode("utf-8"), attempt.state.encode("ascii"))
        or int(ticket.partition(".")[0]) <= visit.now.timestamp()
    ):
        raise NotFromHere("This sign-in was not begun in this browser, or too long ago. Begin it again, over HTTPS.")
    claims = await provider.finish(_address(visit, *CALLBACK), attempt, answer, visit.now)
    try:
        response = await _begin(visit, admit(claims, provider.terms), former)
    except NoTeam:
        raise NoRole("the teams that the ID token of this person names are not here, or are archived") from None
    forget_ticket(visit.request, response)
    return response


def forget_ticket(request: Request, response: Response) -> None:
    """An attempt is over, however it ended."""
    _delete_cookie(request, response, _TICKET_COOKIE, _LOOPBACK_TICKET_COOKIE)


async def sign_out(visit: Visit, token: str) -> Response:
    """End the session, here and not only in the browser."""
    await _end(visit.desk, token)
    response = await _after_sign_out(visit)
    _delete_cookie(visit.request, response, _COOKIE, _LOOPBACK_COOKIE)
    return response


async def _after_sign_out(visit: Visit) -> Response:
    """The page to sign in, by way of the provider where that has a place to sign out and the person came from there."""
    desk, session = visit.desk, visit.session
    url = None
    if desk.provider is not None and session is not None and session.account is not None:
        try:
            url = await desk.provider.farewell(_address(visit, "sign-in"))
        except ProviderError as error:
            log.warning("provider_sign_out_failed", cause=str(error))
    if url is None:
        return visit.go("sign-in", said="signed_out")
    # The policy keeps a form, and whatever a form is redirected to, on this host. A page that goes on by itself is no form.
    response = await replace(visit, session=None).page("signed_out.html", url=url)
    response.headers["refresh"] = f"0; url={url}"
    return response


async def _begin(visit: Visit, holder: Holder, former: str | None) -> Response:
    token = secrets.token_urlsafe(_TOKEN_BYTES)
    digest = _digest(visit.desk, token)
    await visit.desk.database.change(lambda connection: open_session(connection, digest, holder, visit.now))
    if former is not None:
        await _end(visit.desk, former)
    # Always to the first page: an address that came with the request could be anybody's.
    response = visit.go()
    _set_cookie(visit.request, response, _COOKIE, _LOOPBACK_COOKIE, token, int(holder.hours * 3600))
    return response


async def _credential_holder(visit: Visit, credential: str) -> Holder:
    """Who has a key that may be used, or the admin token."""
    desk, now = visit.desk, visit.now
    address = visit.request.client.host if visit.request.client is not None else ""
    if tokens.is_well_formed(credential):
        key = tokens.digest(credential)
        holder = await desk.database.ask(lambda connection: holder_of(connection, key))
        if holder is not None and holder.valid(now):
            return Holder("member", key_id=holder.key_id)
    try:
        desk.door.enter(credential, address, time.monotonic())
    except WrongToken:
        raise FieldError("credential", "This is neither the admin token nor a team key that works.") from None
    except Throttled as throttled:
        wait = throttled.retry_after_seconds
        raise FieldError("credential", f"Too many wrong tries from this address. Wait {wait} seconds.") from None
    return Holder("admin")


async def _end(desk: Desk, token: str) -> None:
    digest = _digest(desk, token)
    await desk.database.change(lambda connection: end_session(connection, digest))


def _digest(desk: Desk, token: str) -> bytes:
    # Made with the admin token: whoever changes that ends all sessions, and a copy of the database opens none.
    return desk.door.seal(f"session:{token}")


def _attempt(desk: Desk, ticket: str) -> Attempt:
    # Made from the ticket, so that nothing has to be kept of those who begin: anybody may.
    return Attempt(*(desk.door.seal(f"{part}:{ticket}").hex() for part in ("state", "nonce", "verifier")))


def _once(query: QueryParams) -> dict[str, str]:
    """Parameters that are there once. What is there twice could be read in two ways."""
    return {name: values[0] for name in query if len(values := query.getlist(name)) == 1}


def _address(visit: Visit, *parts: str) -> str:
    """The whole address of a page, as the browser has it."""
    scheme = "http" if _is_loopback(visit.request) else "https"
    return f"{scheme}://{visit.request.headers.get('host', '')}{'/'.join([visit.prefix, *parts])}"


def _read_cookie(request: Request, name: str, loopback_name: str) -> str | None:
    value = request.cookies.get(loopback_name if _is_loopback(request) else name)
    return value if value is not None and value.isascii() and len(value) <= _TOKEN_CHARACTERS_MAX else None


def _set_cookie(request: Request, response: Response, name: str, loopback_name: str, value: str, seconds: int) -> None:
    loopback = _is_loopback(request)
    response.set_cookie(
        loopback_name if loopback else name, value, max_age=seconds, httponly=True, secure=not loopback, samesite="lax"
    )


def _delete_cookie(request: Request, response: Response, name: str, loopback_name: str) -> None:
    loopback = _is_loopback(request)
    response.delete_cookie(loopback_name if loopback else name, httponly=True, secure=not loopback, samesite="lax")


def _is_here(origin: str, host: str) -> bool:
    scheme, _, sender = origin.partition("://")
    # A reverse proxy may hand the host on without its port; cookies don't tell ports apart either.
    return scheme in ("http", "https") and bool(host) and host.lower() in (sender.lower(), _without_port(sender))


def _is_loopback(request: Request) -> bool:
    return _without_port(request.headers.get("host", "")) in _LOOPBACK


def _without_port(host: str) -> str:
    name, _, port = host.lower().rpartition(":")
    return name if name and port.isdigit() else host.lower()
