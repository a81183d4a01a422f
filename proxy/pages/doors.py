"""Signing in and out."""

from __future__ import annotations

from starlette.responses import Response

from proxy.pages import gate
from proxy.pages.desk import NOTHING_WRONG, Visit, Wrong
from proxy.pages.fields import FieldError


async def show(visit: Visit) -> Response:
    """Where somebody types a credential in."""
    return await visit.page("sign_in.html", wrong=NOTHING_WRONG)


async def enter(visit: Visit) -> Response:
    """Sign in. What was typed is a secret, and is not sent back."""
    try:
        return await gate.sign_in(visit, gate.session_token(visit.request))
    except FieldError as error:
        return await visit.page("sign_in.html", 422, wrong=Wrong("sign-in", {}, {error.field: error.message}))


async def leave(visit: Visit) -> Response:
    """Sign out."""
    token = gate.session_token(visit.request)
    assert token is not None
    return await gate.sign_out(visit, token)
