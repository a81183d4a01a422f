"""What is agreed on with an identity provider, and what its word about a person means here: nothing said is nothing allowed.
Pure; how it is spoken to is in ``oidc``.

- ``ProviderError``: nobody was signed in; its text is for the log and tells the operator what to do
  - ``Away``: the provider did not answer, or with nothing that could be used
  - ``Refused``: the provider did not sign this person in, or its word does not hold
  - ``NoRole``: the provider says nothing of this person that opens anything
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from proxy.ledger.sessions import Holder
from proxy.settings import PREFIX, OpenID

# What the standard allows for a subject; an address is no longer than that either.
ACCOUNT_PART_CHARACTERS_MAX = 255

# No name of a team is longer: what is can't be one, and need not be looked for.
TEAM_CHARACTERS_MAX = 64

# A token has room for some thousand short names, and a database is asked for so many at once.
TEAMS_NAMED_MAX = 1_000


class ProviderError(Exception):
    """Nobody was signed in."""


class Away(ProviderError):
    """The provider did not answer, or with nothing that could be used."""


class Refused(ProviderError):
    """The provider did not sign this person in, or its word does not hold."""


class NoRole(ProviderError):
    """The provider says nothing of this person that opens anything."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """What one attempt to sign in is known by: ``state`` to us and the browser, ``nonce`` to the token as well, ``verifier``
    (43 characters or more) to us alone until the code is redeemed."""

    state: str
    nonce: str
    verifier: str


def admit(claims: Mapping[str, Any], terms: OpenID) -> Holder:
    """Who begins a session, by the claims of a token that was verified. Of several roles the first of admin, viewer and
    member. Raises :class:`NoRole`."""
    account = _account(claims)
    said = values_of(claims, terms.role_claim)
    if said & terms.admin_values:
        return Holder("admin", account=account, hours=terms.session_hours)
    if said & terms.viewer_values:
        return Holder("viewer", account=account, hours=terms.session_hours)
    named = set() if terms.team_claim is None else values_of(claims, terms.team_claim)
    teams = sorted(name for name in named if 0 < len(name) <= TEAM_CHARACTERS_MAX and name.isprintable())[:TEAMS_NAMED_MAX]
    if not teams:
        raise NoRole(
            f"the ID token of {account} has no value of {PREFIX}OIDC_ADMIN_VALUES or {PREFIX}OIDC_VIEWER_VALUES in the claim "
            f"{terms.role_claim!r}, and names no team; look at what the provider puts into it, and for which scopes"
        )
    return Holder("member", account=account, teams=teams, hours=terms.session_hours)


def values_of(claims: Mapping[str, Any], name: str) -> set[str]:
    """The texts of a claim: one, or those of a list; of anything else none. A name with dots is looked for as it is, and then
    as a path into objects."""
    value: object = claims.get(name)
    if value is None:
        value = claims
        for part in name.split("."):
            value = value.get(part) if isinstance(value, Mapping) else None
    texts = value if isinstance(value, list) else [value]
    return {text for text in texts if isinstance(text, str)}


def _account(claims: Mapping[str, Any]) -> str:
    """The subject, for the audit: it never changes. The address beside it is for people, and only where the provider does not
    say that it is unverified."""
    subject = claims.get("sub")
    if not _fits(subject):
        raise Refused(f"the subject of the ID token is empty, not printable, or over {ACCOUNT_PART_CHARACTERS_MAX} characters")
    address = None if claims.get("email_verified") in (False, "false") else claims.get("email")
    return f"{subject} ({address})" if _fits(address) else str(subject)


def _fits(text: object) -> bool:
    return isinstance(text, str) and 0 < len(text) <= ACCOUNT_PART_CHARACTERS_MAX and text.isprintable()
