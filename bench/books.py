"""What stands in the books after a measure: speed with a booking lost on the way would be none."""

from __future__ import annotations

import time
from contextlib import closing

from sqlalchemy import func, select

from bench.load import Failed
from proxy.ledger.engine import Database
from proxy.ledger.schema import charges

# What was asked for last is still on its way when a load ends.
BOOKING_SECONDS_MAX = 30


def check(database_url: str, answers: int) -> None:
    """Raises :class:`Failed` unless every charge has ended, and every answer is settled. What is cut off with the end of a load
    is settled too, or released where it was not sent yet."""
    deadline = time.monotonic() + BOOKING_SECONDS_MAX
    while not (counts := count_charges(database_url)).keys() <= {"settled", "released"} or counts.get("settled", 0) < answers:
        if time.monotonic() > deadline:
            raise Failed(f"after {answers} answers, each of which was to be settled, the books have {counts}")
        time.sleep(0.2)


def count_charges(database_url: str) -> dict[str, int]:
    """How many charges are in each state."""
    with closing(Database(database_url)) as database, database.reading() as connection:
        rows = connection.execute(select(charges.c.state, func.count().label("charges")).group_by(charges.c.state))
        return {row.state: row.charges for row in rows}


def sum_charges(database_url: str) -> int:
    """What all charges together are settled at, in micro-USD."""
    with closing(Database(database_url)) as database, database.reading() as connection:
        return int(connection.execute(select(func.coalesce(func.sum(charges.c.settled_micro_usd), 0))).scalar_one())
