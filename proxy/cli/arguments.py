"""Options and arguments that several commands share, and how their text is read. A value that can't be read is wrong usage."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, TypeVar

import typer

Value = TypeVar("Value")

Json = Annotated[bool, typer.Option("--json", help="Print one JSON value on standard output, and nothing else there.")]
Team = Annotated[str, typer.Argument(metavar="TEAM", show_default=False)]
SomeTeam = Annotated[str | None, typer.Argument(metavar="TEAM", show_default=False, help="Only this team's.")]
KeyId = Annotated[str, typer.Argument(metavar="KEY_ID", show_default=False, help="As 'beanmeter key list' shows it.")]
Since = Annotated[
    str | None,
    typer.Option(metavar="WHEN", help="From then on: a day (2026-11-22), a time (2026-11-22T15:00:00Z) or how long ago (7d)."),
]
Until = Annotated[str | None, typer.Option(metavar="WHEN", help="Up to then; a day is included whole.")]


def read(name: str, parse: Callable[[], Value]) -> Value:
    """What ``parse`` makes of the argument or option ``name``; its ``ValueError`` is the usage error's message."""
    try:
        return parse()
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint=f"'{name}'") from None
