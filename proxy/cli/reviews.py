"""``beanmeter review`` and ``beanmeter audit``: charges that a person has to decide on, and who decided what."""

from __future__ import annotations

from typing import Annotated

import typer

from proxy.cli.arguments import Json, Since, Until, read
from proxy.cli.opening import actor, now, reading, writing
from proxy.cli.printing import print_json, print_json_array, print_table, say
from proxy.cli.reports import span
from proxy.money import format_usd, parse_usd

app = typer.Typer(help="Charges in review: list, settle, release.", no_args_is_help=True)

ChargeId = Annotated[str, typer.Argument(metavar="CHARGE_ID", show_default=False, help="As 'beanmeter review list' shows it.")]

_SHOWN = (
    "id",
    "created_at",
    "team",
    "operation",
    "size",
    "quality",
    "images_requested",
    "images_delivered",
    "settled_micro_usd",
    "reserved_micro_usd",
    "reason",
    "upstream_status",
    "request_id",
)
_AUDITED = ("at", "actor", "action", "subject", "before", "after")


@app.command("list")
def list_(as_json: Json = False) -> None:
    """List what waits for a decision: what is known to be owed, and what is still held."""
    from proxy.ledger import reports

    with reading() as connection:
        rows = reports.list_charges(connection, state="review")
        if as_json:
            print_json_array(rows)
        else:
            print_table(_SHOWN, rows)


@app.command()
def settle(
    charge_id: ChargeId,
    usd: Annotated[str, typer.Option("--usd", metavar="USD", show_default=False, help="What it cost in all, as billed.")],
    as_json: Json = False,
) -> None:
    """Settle a charge at what the upstream's bill says. What stays of the hold is released."""
    from proxy.ledger import reviews

    micro_usd = read("--usd", lambda: parse_usd(usd))
    with writing() as connection:
        charge = reviews.settle(connection, charge_id, micro_usd, now=now(), actor=actor())
    if as_json:
        print_json(charge)
    say(f"{charge_id} is settled at {format_usd(micro_usd)} USD.")


@app.command()
def release(
    charge_id: ChargeId,
    reason: Annotated[str, typer.Option("--reason", show_default=False, help="Why it cost nothing; kept in the audit.")],
    as_json: Json = False,
) -> None:
    """Release a charge: it cost nothing."""
    from proxy.ledger import reviews

    with writing() as connection:
        charge = reviews.release(connection, charge_id, reason, now=now(), actor=actor())
    if as_json:
        print_json(charge)
    say(f"{charge_id} is released.")


def audit(since: Since = None, until: Until = None, as_json: Json = False) -> None:
    """List who changed what, oldest first. Rows are only ever added."""
    from proxy.ledger import reports

    first, last = span(since, until)
    with reading() as connection:
        rows = reports.list_audit(connection, since=first, until=last)
        if as_json:
            print_json_array(rows)
        else:
            print_table(_AUDITED, rows)
