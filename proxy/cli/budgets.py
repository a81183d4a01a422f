"""``beanmeter budget``: what a team or one of its keys may spend in a period."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.arguments import Json, SomeTeam, read
from proxy.cli.opening import actor, now, reading, writing
from proxy.cli.printing import print_json, print_table, say
from proxy.money import format_usd, parse_usd
from proxy.periods import Period

if TYPE_CHECKING:
    from sqlalchemy import Connection

app = typer.Typer(help="Budgets: set, list, remove.", no_args_is_help=True)

COLUMNS = (
    "team",
    "key_id",
    "scope",
    "period",
    "soft",
    "limit_micro_usd",
    "settled_micro_usd",
    "held_micro_usd",
    "remaining_micro_usd",
    "resets_at",
)

Scope = Annotated[
    str, typer.Argument(metavar="TEAM[/KEY_ID]", show_default=False, help="A team, or one of its keys as in design/key_01K...")
]
Per = Annotated[Period, typer.Option("--per", show_default=False, help="The UTC day, ISO week or month, or all time.")]


@app.command("set")
def set_(
    scope: Scope,
    usd: Annotated[str, typer.Argument(metavar="USD", show_default=False, help="The limit, such as 25 or 12.50.")],
    per: Per,
    soft: Annotated[bool, typer.Option("--soft", help="Never refuse: only count and show.")] = False,
    as_json: Json = False,
) -> None:
    """Make or replace a budget. What was spent in the running period counts."""
    from proxy.ledger import accounts

    limit_micro_usd = read("USD", lambda: parse_usd(usd))
    team, key_id = read("TEAM[/KEY_ID]", lambda: parse_scope(scope))
    with writing() as connection:
        accounts.set_budget(connection, team, key_id, per, limit_micro_usd, soft=soft, now=now(), actor=actor())
        row = _row(connection, team, key_id, per)
    if as_json:
        print_json(row)
    say(f"{scope} may spend {format_usd(limit_micro_usd)} USD {_spoken(per)}{', counted but never refused' if soft else ''}.")


@app.command("list")
def list_(team: SomeTeam = None, as_json: Json = False) -> None:
    """List budgets with what counts against them now."""
    from proxy.ledger import accounts

    with reading() as connection:
        if team is not None:
            accounts.show_team(connection, team)  # A mistyped name is an error, not an empty list.
        listed = rows(connection, team)
    if as_json:
        print_json(listed)
    else:
        print_table(COLUMNS, listed)


@app.command()
def remove(scope: Scope, per: Per, as_json: Json = False) -> None:
    """Take a budget away. What was spent stays in the books."""
    from proxy.ledger import accounts

    team, key_id = read("TEAM[/KEY_ID]", lambda: parse_scope(scope))
    with writing() as connection:
        row = _row(connection, team, key_id, per)
        accounts.remove_budget(connection, team, key_id, per, now=now(), actor=actor())
    if as_json:
        print_json(row)
    say(f"{scope} has no budget {_spoken(per)} any more.")


def rows(connection: Connection, team: str | None = None) -> list[dict[str, Any]]:
    """Budgets as rows of :data:`COLUMNS`, of one team or of all."""
    from proxy.ledger import reports

    return [{name: getattr(status, name) for name in COLUMNS} for status in reports.list_budgets(connection, now(), team=team)]


def _row(connection: Connection, team: str, key_id: str | None, period: Period) -> dict[str, Any] | None:
    """The one budget of a scope and period, if there is one."""
    return next((row for row in rows(connection, team) if (row["key_id"], row["period"]) == (key_id, period)), None)


def parse_scope(text: str) -> tuple[str, str | None]:
    """The team, and the key's id where the text names one. Raises ``ValueError`` with a message for the reader."""
    team, slash, key_id = text.partition("/")
    if not team or (slash and not key_id):
        raise ValueError(f"{text!r} names no team or no key: write TEAM, or TEAM/KEY_ID for one of its keys")
    return team, key_id or None


def _spoken(period: Period) -> str:
    return "in total" if period == "total" else f"per {period}"
