"""``beanmeter key``: what a team's clients identify themselves with."""

from __future__ import annotations

from datetime import timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.arguments import Json, KeyId, SomeTeam, Team, read
from proxy.cli.opening import actor, now, reading, writing
from proxy.cli.printing import print_json, print_table, rfc_3339, say
from proxy.periods import parse_duration

if TYPE_CHECKING:
    from proxy.ledger.accounts import NewKey

app = typer.Typer(help="Team keys: add, list, revoke, rotate.", no_args_is_help=True)

COLUMNS = ("id", "team", "name", "last_four", "created_at", "expires_at", "revoked_at")


@app.command()
def add(
    team: Team,
    name: Annotated[str, typer.Option(metavar="NAME", help="What the key is for.", show_default=False)] = "",
    expires: Annotated[str | None, typer.Option(metavar="DURATION", help="Stop working after this long, such as 90d.")] = None,
    as_json: Json = False,
) -> None:
    """Make a key for a team. It is shown this once."""
    from proxy.ledger import accounts

    lifetime = None if expires is None else read("--expires", lambda: _lifetime(expires))
    with writing() as connection:
        key = accounts.add_key(connection, team, name=name, lifetime=lifetime, now=now(), actor=actor())
    _print_new(key, as_json)


@app.command("list")
def list_(team: SomeTeam = None, as_json: Json = False) -> None:
    """List keys, oldest first, without their secrets."""
    from proxy.ledger import accounts

    with reading() as connection:
        keys = accounts.list_keys(connection, team)
    if as_json:
        print_json(keys)
    else:
        print_table(COLUMNS, keys)


@app.command()
def revoke(key_id: KeyId, as_json: Json = False) -> None:
    """Stop a key from working."""
    from proxy.ledger import accounts

    with writing() as connection:
        key = accounts.revoke_key(connection, key_id, now=now(), actor=actor())
    if as_json:
        print_json(key)
    say(f"Revoked {key_id} of team {key['team']}.")


@app.command()
def rotate(
    key_id: KeyId,
    overlap: Annotated[str, typer.Option(metavar="DURATION", help="How long the old key goes on working.")] = "24h",
    as_json: Json = False,
) -> None:
    """Make a new key like this one, which goes on working for a while. The new one is shown this once."""
    from proxy.ledger import accounts

    both_work = read("--overlap", lambda: parse_duration(overlap))
    with writing() as connection:
        key = accounts.rotate_key(connection, key_id, overlap=both_work, now=now(), actor=actor())
    _print_new(key, as_json)
    say(f"The old key {key_id} works for another {overlap} at most.")


def _lifetime(text: str) -> timedelta:
    lifetime = parse_duration(text)
    if not lifetime:
        raise ValueError(f"{text!r} would make a key that has expired already: write a duration such as 90d")
    return lifetime


def _print_new(key: NewKey, as_json: bool) -> None:
    if as_json:
        print_json({"id": key.id, "team": key.team, "name": key.name, "key": key.key, "expires_at": key.expires_at})
        return
    until = "" if key.expires_at is None else f" It expires at {rfc_3339(key.expires_at)}."
    say(f"Made {key.id} for team {key.team}.{until} Keep the key now: it is not shown again.")
    print(key.key)
