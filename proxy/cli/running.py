"""``beanmeter serve``, ``demo``, ``simulator`` and ``migrate``: what runs, and what has to be done before it does."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from proxy.cli.arguments import Json
from proxy.cli.failures import Failed
from proxy.cli.opening import connect, read_settings
from proxy.cli.printing import print_json, say

if TYPE_CHECKING:
    from proxy.settings import Settings

Host = Annotated[str | None, typer.Option(metavar="HOST", help="The address to listen on.  [default: BEANMETER_HOST]")]
Port = Annotated[int | None, typer.Option(metavar="PORT", help="The port to listen on.  [default: BEANMETER_PORT]")]
Workers = Annotated[int | None, typer.Option(metavar="N", help="How many processes.  [default: BEANMETER_WORKERS]")]

SIMULATOR_PORT = 8081

# The cheapest that there is: whoever pastes it wants to see that it works.
SAMPLE = {"model": "gpt-image-2", "prompt": "a coffee bean on white", "size": "1024x1024", "quality": "low"}


def serve(host: Host = None, port: Port = None, workers: Workers = None) -> None:
    """Run the gateway."""
    from proxy import app, logs, pages
    from proxy.settings import SettingsError, cautions, load, load_card

    settings = read_settings(host=host, port=port, workers=workers)
    if settings.upstream_key is None:
        raise SettingsError(
            "no upstream key: set BEANMETER_UPSTREAM_KEY, or run 'beanmeter demo' to try it out with a simulated BeansAI"
        )
    load_card(settings)  # Settings are checked whole before the database is touched.
    has_teams = _prepare_books(settings)

    def ready(base_url: str) -> None:
        site = base_url.removesuffix("/v1")
        say(f"Beanmeter listens at {base_url}, metrics are at {site}/metrics")
        if settings.admin_token is not None:
            say(f"The dashboard is at {site}{pages.PREFIX}; sign in with the admin token or a team key")
        for caution in cautions(settings):
            say(caution)
        if not has_teams:
            say("There is no team yet. Make one: beanmeter team add NAME; beanmeter key add NAME")
        say("An image, with a team's key in the place of $KEY:")
        say(f"  curl {base_url}/images/generations -H \"Authorization: Bearer $KEY\" -H 'Content-Type: application/json' \\")
        say(f"       -d '{json.dumps(SAMPLE)}'")

    logs.configure(sys.stderr)
    options = {"host": host, "port": port, "workers": workers}
    raise typer.Exit(app.serve(settings, ready, lambda: load(os.environ, Path.cwd(), options)))


def demo(port: Port = None) -> None:
    """Try the gateway with a simulated BeansAI. Makes sample teams and sample history."""
    from proxy import demo, logs

    settings = read_settings(port=port)
    logs.configure(sys.stderr)
    try:
        demo.run(connect(settings), settings, lambda line: print(line, flush=True))
    except demo.BooksInUse as error:
        raise Failed(str(error)) from None


def simulator(
    port: Annotated[int, typer.Option(metavar="PORT", min=0, max=65_535, help="The port to listen on.")] = SIMULATOR_PORT,
) -> None:
    """Run the simulated BeansAI alone."""
    from proxy.simulator import run_simulator

    run_simulator(
        port=port,
        ready=lambda simulator: say(f"The simulated BeansAI listens at {simulator.base_url}; any key sk-beans-... will do"),
    )


def migrate(as_json: Json = False) -> None:
    """Bring the database to the newest schema."""
    from proxy.ledger import migrate as schema
    from proxy.ledger.schema import REVISION

    database = connect(read_settings())
    try:
        migrated = schema.migrate(database)
    finally:
        database.close()
    if as_json:
        print_json({"migrated": migrated, "revision": REVISION})
    say(f"The database {'was brought to' if migrated else 'is already at'} schema {REVISION}.")


def _prepare_books(settings: Settings) -> bool:
    """Bring the database up to date; whether there is a team. Sample history must not end up in the same sums as real money."""
    from proxy.demo import holds_samples
    from proxy.ledger.accounts import list_teams
    from proxy.ledger.migrate import migrate

    database = connect(settings)
    try:
        migrate(database)
        with database.reading() as connection:
            if holds_samples(connection):
                raise Failed(
                    "this database holds the sample history of 'beanmeter demo', which would mix with real spend: "
                    "set BEANMETER_DATABASE_URL to another, or delete it (sqlite: the file beanmeter.db and its -wal and -shm)"
                )
            return bool(list_teams(connection))
    finally:
        database.close()
