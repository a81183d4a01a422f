"""Signing in and out."""

from __future__ import annotations

import structlog
from starlette.responses import Response

from proxy.pages import gate
from proxy.pages.desk import NOTHING_WRONG, Missing, Visit, Wrong
from proxy.pages.fields import FieldError
from proxy.pages.identity import Away, NoRole, ProviderError

log = structlog.get_logger(__name__)


async def show(visit: Visit) -> Response:
    """Where somebody types a credential in, or goes to the identity provider."""
    return await visit.page("sign_in.html", wrong=NOTHING_WRONG)


async def enter(visit: Visit) -> Response:
    """Sign in. What was typed is a secret, and is not sent back."""
    try:
        return await gate.sign_in(visit, gate.session_token(visit.request))
    except FieldError as error:
        return await visit.page("sign_in.html", 422, wrong=Wrong("sign-in", {}, {error.field: error.message}))


async def begin(visit: Visit) -> Response:
    """To the identity provider."""
    if visit.desk.provider is None:
        raise Missing
    try:
        return await gate.begin_with_provider(visit, visit.desk.provider)
    except ProviderError as error:
        return await _not_signed_in(visit, error)


async def finish(visit: Visit) -> Response:
    """Back from the identity provider."""
    if visit.desk.provider is None:
        raise Missing
    try:
        return await gate.finish_with_provider(visit, visit.desk.provider, gate.session_token(visit.request))
    except ProviderError as error:
        response = await _not_signed_in(visit, error)
        gate.forget_ticket(visit.request, response)
        return response


async def leave(visit: Visit) -> Response:
    """Sign out."""
    token = gate.session_token(visit.request)
    assert token is not None
    return await gate.sign_out(visit, token)


async def _not_signed_in(visit: Visit, error: ProviderError) -> Response:
    """The cause is for the operator's log: it tells more of the provider and the settings than a stranger should know."""
    log.warning("sign_in_failed", cause=str(error))
    if isinstance(error, Away):
        told = "The identity provider can't be asked now. Try again later; if it stays so, tell the operator of this gateway."
        return await visit.page("problem.html", 502, title="You were not signed in", told=told)
    told = (
        "Your account has no role here, and no team of it is here. The operator of this gateway can give you one."
        if isinstance(error, NoRole)
        else "The identity provider did not vouch for you. Try again; if it stays so, tell the operator of this gateway."
    )
    return await visit.page("problem.html", 403, title="You were not signed in", told=told)
