"""Whether the gateway is well: its database, journal, open charges, upstream and prices."""

from __future__ import annotations

import asyncio
from datetime import timedelta
from typing import Any

from sqlalchemy import Connection
from starlette.responses import Response

from proxy import __version__
from proxy.ledger import overviews
from proxy.ledger.schema import OPEN_STATES, REVISION
from proxy.pages.desk import Visit
from proxy.pages.overview import samples

HOUR = timedelta(hours=1)


async def show(visit: Visit) -> Response:
    """The page. That it can be read at all says that the database answers: a session is looked up in it."""

    def read(connection: Connection) -> dict[str, Any]:
        opened = overviews.list_open(connection)
        by_state = {state: [one for one in opened if one.state == state] for state in OPEN_STATES}
        return {
            "opened": [
                (
                    state,
                    sum(one.charges for one in found),
                    sum(one.reserved_micro_usd for one in found),
                    min((one.oldest_at for one in found), default=None),
                )
                for state, found in by_state.items()
            ],
            "failures": overviews.list_failures(connection, visit.now - HOUR),
        }

    found = await visit.ask(read)
    desk = visit.desk
    journal = await asyncio.to_thread(samples, desk.metrics, desk.card, "beanmeter_journal_entries")
    return await visit.page(
        "health.html",
        **found,
        dialect="SQLite" if desk.database.dialect == "sqlite" else "PostgreSQL",
        revision=REVISION,
        journal=round(sum(value for _, value in journal)),
        card=desk.card,
        version=__version__,
    )
