"""``beanmeter team``: who may have keys and budgets."""

from __future__ import annotations

import shlex
from typing import Annotated

import typer

from proxy.cli.arguments import Json, Team
from proxy.cli.opening import actor, now, reading, writing
from proxy.cli.printing import print_json, print_table, say

app = typer.Typer(help="Teams: add, list, show, archive.", no_args_is_help=True)

_COLUMNS = ("name", "created_at", "archived_at")


@app.command()
def add(name: Annotated[str, typer.Argument(metavar="NAME", show_default=False)], as_json: Json = False) -> None:
    """Make a team."""
    from proxy.ledger import accounts

    with writing() as connection:
        team = accounts.add_team(connection, name, now=now(), actor=actor())
    if as_json:
        print_json(team)
    say(f"Made team {name}. Give it a key: beanmeter key add {shlex.quote(name)}")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List all teams, archived ones too."""
    from proxy.ledger import accounts

    with reading() as connection:
        teams = accounts.list_teams(connection)
    if as_json:
        print_json(teams)
    else:
        print_table(_COLUMNS, teams)


@app.command()
def show(team: Team, as_json: Json = False) -> None:
    """Show one team with its keys and budgets."""
    from proxy.cli import budgets, keys
    from proxy.ledger import accounts

    with reading() as connection:
        shown = accounts.show_team(connection, team)
        shown["budgets"] = budgets.rows(connection, team)
    if as_json:
        print_json(shown)
        return
    print_table(_COLUMNS, [shown])
    print_table(keys.COLUMNS, shown["keys"])
    print_table(budgets.COLUMNS, shown["budgets"])


@app.command()
def archive(team: Team, as_json: Json = False) -> None:
    """Close a team: its keys stop working, its books stay."""
    from proxy.ledger import accounts

    with writing() as connection:
        archived = accounts.archive_team(connection, team, now=now(), actor=actor())
    if as_json:
        print_json(archived)
    say(f"Archived team {team}: none of its keys works any more.")
