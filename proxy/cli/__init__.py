"""The command line: its commands, wired together, and the way from an error to an exit status.

``--version`` and ``--help`` are asked for often and answered at once: this file and those of the commands load nothing that
takes long. What a command needs it loads inside the command.
"""

from __future__ import annotations

import io
import sys
from collections.abc import Sequence
from typing import Annotated

import typer

from proxy import __version__
from proxy.cli import apply, budgets, doctor, keys, limits, ping, prices, reports, reviews, running, teams
from proxy.cli.failures import explain

app = typer.Typer(
    name="beanmeter",
    help="A cost-metering reverse proxy for image generation.",
    epilog="Exit status: 0 done, 1 failed, 2 wrong usage, 3 wrong settings.",
    no_args_is_help=True,
    add_completion=False,
    # Plain text: errors stay on one line, and nothing has to be loaded for the sake of a frame.
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(running.serve)
app.command()(running.demo)
app.command()(running.simulator)
app.command()(running.migrate)
app.command()(doctor.doctor)
app.command()(ping.ping)
app.add_typer(teams.app, name="team")
app.add_typer(keys.app, name="key")
app.add_typer(budgets.app, name="budget")
app.add_typer(limits.app, name="limit")
app.command()(apply.apply)
app.command()(prices.prices)
app.command()(reports.spend)
app.command()(reports.charges)
app.add_typer(reviews.app, name="review")
app.command()(reviews.audit)


def _show_version(wanted: bool) -> None:
    if wanted:
        print(f"beanmeter {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    _version: Annotated[
        bool, typer.Option("--version", help="Show the version.", callback=_show_version, is_eager=True)
    ] = False,
) -> None:
    """A cost-metering reverse proxy for image generation."""


def main(arguments: Sequence[str] | None = None) -> None:
    """Run one command, of ``sys.argv`` unless ``arguments`` are given. Ends in ``SystemExit`` with the exit status."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            # A name that the terminal's encoding lacks is shown escaped; it is no reason to fail.
            stream.reconfigure(errors="backslashreplace")
    try:
        app(args=arguments, prog_name="beanmeter")
    except Exception as error:
        explained = explain(error)
        if explained is None:
            raise
        status, line = explained
        print(f"beanmeter: {line}", file=sys.stderr)
        raise SystemExit(status) from None
