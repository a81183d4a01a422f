"""``beanmeter spend`` and ``beanmeter charges``: what was spent, summed up and one by one."""

from __future__ import annotations

import difflib
from datetime import datetime
from typing import Annotated, Literal

import typer

from proxy.cli.arguments import Json, Since, Until, read
from proxy.cli.opening import now, reading
from proxy.cli.printing import print_csv, print_json, print_json_array, print_json_lines, print_table
from proxy.periods import parse_when

_SUMS = ("requests", "images", "settled_micro_usd", "reserved_micro_usd")

# What fits a screen; the other formats have every column.
_SHOWN = (
    "created_at",
    "team",
    "operation",
    "size",
    "quality",
    "images_requested",
    "images_delivered",
    "state",
    "reserved_micro_usd",
    "settled_micro_usd",
    "id",
)


def spend(
    by: Annotated[
        str, typer.Option(metavar="COLUMNS", help="Of team, key, model, operation, size, quality, day, week, month.")
    ] = "team",
    since: Since = None,
    until: Until = None,
    style: Annotated[Literal["table", "json", "csv"], typer.Option("--format")] = "table",
    as_json: Json = False,
) -> None:
    """Sum up what was spent. By team, or by the columns that you name."""
    from proxy.ledger import reports

    groups = read("--by", lambda: _parse_groups(by, reports.GROUPS))
    first, last = span(since, until)
    with reading() as connection:
        rows = reports.spend(connection, groups, since=first, until=last)
    columns = (*groups, *_SUMS)
    if as_json or style == "json":
        print_json(rows)
    elif style == "csv":
        print_csv(columns, rows)
    else:
        print_table(columns, rows, {groups[0]: "total"} | {name: sum(row[name] for row in rows) for name in _SUMS})


def charges(
    team: Annotated[str | None, typer.Option(metavar="TEAM")] = None,
    state: Annotated[Literal["reserved", "forwarded", "settled", "released", "review"] | None, typer.Option()] = None,
    since: Since = None,
    until: Until = None,
    style: Annotated[Literal["table", "json", "jsonl", "csv"], typer.Option("--format")] = "table",
    as_json: Json = False,
) -> None:
    """List what was charged, request by request. Oldest first; a request that was refused is not among them."""
    from proxy.ledger import accounts, reports

    first, last = span(since, until)
    with reading() as connection:
        if team is not None:
            accounts.show_team(connection, team)  # A mistyped name is an error, not an empty list.
        rows = reports.list_charges(connection, team=team, state=state, since=first, until=last)
        if as_json or style == "json":
            print_json_array(rows)
        elif style == "jsonl":
            print_json_lines(rows)
        elif style == "csv":
            print_csv(reports.CHARGE_COLUMNS, rows)
        else:
            print_table(_SHOWN, rows)


def span(since: str | None, until: str | None) -> tuple[datetime | None, datetime | None]:
    """The moments that ``--since`` (inclusive) and ``--until`` (exclusive) mean."""
    at = now()
    first = None if since is None else read("--since", lambda: parse_when(since, at, end=False))
    last = None if until is None else read("--until", lambda: parse_when(until, at, end=True))
    return first, last


def _parse_groups(text: str, known: tuple[str, ...]) -> tuple[str, ...]:
    groups = tuple(dict.fromkeys(name.strip() for name in text.split(",")))
    for name in groups:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"did you mean {near[0]!r}? " if near else ""
            raise ValueError(f"there is no column {name!r}: {hint}Give one or more of {','.join(known)}")
    return groups
