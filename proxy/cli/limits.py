"""``beanmeter limit``: how fast, and how much at once, a team or one of its keys may ask."""

from __future__ import annotations

from typing import Annotated

import typer

from proxy.cli.arguments import Json, SomeTeam, read
from proxy.cli.budgets import Scope, parse_scope
from proxy.cli.opening import actor, now, reading, writing
from proxy.cli.printing import print_json, print_table, say

app = typer.Typer(help="Limits: set, list, remove.", no_args_is_help=True)

COLUMNS = ("team", "key_id", "rpm", "concurrency")


@app.command("set")
def set_(
    scope: Scope,
    rpm: Annotated[int | None, typer.Option("--rpm", metavar="N", min=0, help="Requests in any 60 seconds.")] = None,
    concurrency: Annotated[int | None, typer.Option("--concurrency", metavar="N", min=0, help="Requests at a time.")] = None,
    as_json: Json = False,
) -> None:
    """Limit requests a minute, requests at a time, or both. What is not given stays as it is."""
    from proxy.ledger import accounts

    team, key_id = read("TEAM[/KEY_ID]", lambda: parse_scope(scope))
    if rpm is None and concurrency is None:
        raise typer.BadParameter("say what to limit", param_hint="'--rpm' / '--concurrency'")
    with writing() as connection:
        limit = accounts.set_limit(connection, team, key_id, rpm=rpm, concurrency=concurrency, now=now(), actor=actor())
    if as_json:
        print_json({"team": team, "key_id": key_id, **limit})
    say(f"{scope}: {_spoken(limit['rpm'], 'requests a minute')}, {_spoken(limit['concurrency'], 'at a time')}.")


@app.command("list")
def list_(team: SomeTeam = None, as_json: Json = False) -> None:
    """List limits."""
    from proxy.ledger import accounts

    with reading() as connection:
        rows = accounts.list_limits(connection, team)
    if as_json:
        print_json(rows)
    else:
        print_table(COLUMNS, rows)


@app.command()
def remove(scope: Scope, as_json: Json = False) -> None:
    """Take the limits of a team or a key away."""
    from proxy.ledger import accounts

    team, key_id = read("TEAM[/KEY_ID]", lambda: parse_scope(scope))
    with writing() as connection:
        accounts.remove_limit(connection, team, key_id, now=now(), actor=actor())
    if as_json:
        print_json({"team": team, "key_id": key_id, "rpm": None, "concurrency": None})
    say(f"{scope} has no limit any more.")


def _spoken(value: int | None, what: str) -> str:
    return f"any number {what}" if value is None else f"{value} {what}"
