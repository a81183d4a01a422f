"""``beanmeter apply``: teams, budgets and limits from a file under version control."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.arguments import Json, read
from proxy.cli.failures import Failed
from proxy.cli.opening import actor, now, writing
from proxy.cli.printing import print_json, say
from proxy.money import format_usd

if TYPE_CHECKING:
    from proxy.ledger.declared import Budget, Change, DeclarationError, Limit, Scope, Terms

# Written by hand, and read by people; a larger file is another file.
_FILE_BYTES_MAX = 1 << 20


def apply(
    file: Annotated[Path, typer.Argument(metavar="FILE", show_default=False, help="Teams, budgets and limits in TOML.")],
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would change, and change nothing.")] = False,
    prune: Annotated[
        bool, typer.Option("--prune", help="Also remove budgets and limits that are not in the file, and archive such teams.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Bring teams, budgets and limits to what a file says. All of it, or nothing; what was spent stays as it is."""
    from proxy.ledger import declared

    text = read("FILE", lambda: _text(file))
    wanted = read("FILE", lambda: _declared(file, text))
    try:
        with writing() as connection:
            changes = declared.apply(connection, wanted, prune=prune, now=now(), actor=actor())
            if dry_run:
                # Made and taken back: a dry run fails where the real one would.
                connection.rollback()
    except declared.ImpossibleError as error:
        raise Failed(_located(file, text, error)) from None
    if as_json:
        print_json({"dry_run": dry_run, "changes": [asdict(change) for change in changes]})
    else:
        for change in changes:
            print(_line(change))
    say(_summary(len(changes), dry_run))


def _text(file: Path) -> str:
    try:
        with file.open("rb") as opened:
            data = opened.read(_FILE_BYTES_MAX + 1)
    except OSError as error:
        raise ValueError(f"{file}: {error.strerror}") from None
    if len(data) > _FILE_BYTES_MAX:
        raise ValueError(f"{file} is larger than {_FILE_BYTES_MAX} bytes")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{file} is not text in UTF-8") from None


def _declared(file: Path, text: str) -> dict[Scope, Terms]:
    from proxy.ledger.declared import DeclarationError, parse

    try:
        return parse(text)
    except DeclarationError as error:
        raise ValueError(_located(file, text, error)) from None


def _located(file: Path, text: str, error: DeclarationError) -> str:
    from proxy.ledger.declared import line_of

    line = line_of(text, error.place)
    return f"{file}: {error}" if line is None else f"{file}, line {line}: {error}"


def _line(change: Change) -> str:
    """A step as a line of a diff."""
    scope = change.team if change.key_id is None else f"{change.team}/{change.key_id}"
    subject, _, verb = change.action.partition(".")
    if subject == "team":
        return f"+ team {scope}" if verb == "add" else f"- team {scope}: archived"
    what = f"{subject} {scope}" if change.period is None else f"{subject} {scope} per {change.period}"
    if change.after is None:
        return f"- {what}: {_spoken(change.before)}"
    if change.before is None:
        return f"+ {what}: {_spoken(change.after)}"
    return f"~ {what}: {_spoken(change.before)} -> {_spoken(change.after)}"


def _spoken(terms: Budget | Limit | None) -> str:
    from proxy.ledger.declared import Budget

    assert terms is not None
    if isinstance(terms, Budget):
        return f"{format_usd(terms.limit_micro_usd)} USD{', soft' if terms.soft else ''}"
    parts = (("rpm", terms.rpm), ("concurrency", terms.concurrency))
    return ", ".join(f"{name} {value}" for name, value in parts if value is not None)


def _summary(count: int, dry_run: bool) -> str:
    if not count:
        return "Nothing to change."
    told = "1 change" if count == 1 else f"{count} changes"
    return f"{told}, not made: this is a dry run." if dry_run else f"{told} made."
