"""What a person may, by the claims of a token that was verified."""

from __future__ import annotations

import pytest

from proxy.pages.identity import NoRole, admit
from proxy.settings import OpenID

TERMS = OpenID(
    issuer="https://id.example",
    client_id="beanmeter",
    client_secret=None,
    scopes="openid",
    role_claim="groups",
    admin_values=frozenset({"admins"}),
    viewer_values=frozenset({"finance"}),
    team_claim="teams",
    session_hours=8,
)


def test_names_that_no_team_can_have_are_not_looked_for() -> None:
    # The second is half of a character: no database takes it, and the first one not everywhere.
    holder = admit({"sub": "mia", "teams": ["red\x00", "red\ud800", "red", "\u202e"]}, TERMS)
    assert (holder.role, list(holder.teams)) == ("member", ["red"])


def test_who_has_no_other_names_has_no_role() -> None:
    with pytest.raises(NoRole):
        admit({"sub": "mia", "teams": ["\ud800"]}, TERMS)
