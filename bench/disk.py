"""What a charge takes of the disk: in the tables and indexes of both databases, and in PostgreSQL's write-ahead log.

Charges go through the books as they do in a gateway: held in one transaction and booked in another, in batches of several
sizes. PostgreSQL is vacuumed as often as autovacuum would. Sizes are for a million charges, reckoned from those that were
written, less what an empty database takes.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import psycopg

from bench.hot_budget import ORDER, PRICE_MICRO_USD, Team, find_team
from bench.machines import open_books, postgres, scratch
from bench.table import Row, run
from proxy.ledger.books import post
from proxy.ledger.decisions import Booking, Reservation
from proxy.ledger.engine import Database
from proxy.outcomes import Outcome
from proxy.tokens import new_request_id

CHARGES = 100_000
BATCH = 32
# Autovacuum comes when a fifth of a table has changed.
VACUUM_EVERY = 20_000
WAL_CHARGES = 4_000
WAL_BATCHES = (1, 8, 64)

# What is between two charges: 10,000 images a minute.
PACE = timedelta(milliseconds=6)
IMAGE_SECONDS = 30.0

BOOKED = Outcome("settled", PRICE_MICRO_USD, 0, 1, ORDER.size, ORDER.quality, "requested", "completed")


def write(database: Database, team: Team, charges: int, batch: int, now: datetime) -> datetime:
    """So many charges, held and booked in batches; the time after the last."""
    for _ in range(charges // batch):
        jobs = []
        for _ in range(batch):
            now += PACE
            request_id = new_request_id(now)
            charge_id = request_id.replace("req_", "chg_")
            jobs.append(
                Reservation(charge_id, request_id, team.id, team.key_id, ORDER, PRICE_MICRO_USD, "bench", IMAGE_SECONDS)
            )
        bookings = [Booking(job.charge_id, team.id, BOOKED, 200, None, f"req_{os.urandom(16).hex()}", 60, 196) for job in jobs]
        with database.posting() as connection:
            post(connection, jobs, [], now)
        with database.posting() as connection:
            post(connection, [], bookings, now)
    return now


def on_sqlite(directory: Path) -> dict[str, float]:
    path = directory / "beanmeter.db"
    url = f"sqlite:///{path}"
    team = find_team(url, open_books(url))
    empty = path.stat().st_size
    database = Database(url)
    write(database, team, CHARGES, BATCH, datetime.now(UTC))
    # The last connection writes back what is in the log ahead of the file.
    database.close()
    return {"bytes_a_charge": (path.stat().st_size - empty) / CHARGES}


def on_postgresql() -> dict[str, float]:
    with postgres() as server, psycopg.connect(server.url, autocommit=True) as look:
        team = find_team(server.url, open_books(server.url))

        def ask(question: str) -> float:
            (answer,) = look.execute(question).fetchone() or (0,)
            return float(answer)

        database = Database(server.url)
        empty = ask(TOTAL)
        now = datetime.now(UTC)
        for _ in range(CHARGES // VACUUM_EVERY):
            now = write(database, team, VACUUM_EVERY, BATCH, now)
            look.execute("VACUUM (ANALYZE) charges")
        found = {
            "bytes_a_charge": (ask(TOTAL) - empty) / CHARGES,
            "table_bytes_a_charge": ask("SELECT pg_relation_size('charges')") / CHARGES,
            "indexes_bytes_a_charge": ask("SELECT pg_indexes_size('charges')") / CHARGES,
        }
        for batch in WAL_BATCHES:
            # A page that is written for the first time since a checkpoint goes into the log whole.
            for name, prepare in (("wal", "SELECT 1"), ("wal_after_checkpoint", "CHECKPOINT")):
                look.execute(prepare)
                found[f"{name}_bytes_a_charge_{batch}"] = log_bytes(ask, partial(write_more, database, team, batch))
        database.close()
    return found


def write_more(database: Database, team: Team, batch: int) -> None:
    write(database, team, WAL_CHARGES, batch, datetime.now(UTC) + timedelta(hours=1))


def log_bytes(ask: Callable[[str], float], act: Callable[[], None]) -> float:
    before = ask(WAL)
    act()
    return (ask(WAL) - before) / WAL_CHARGES


TOTAL = "SELECT pg_database_size(current_database())"
WAL = "SELECT pg_wal_lsn_diff(pg_current_wal_insert_lsn(), '0/0')"


def measure() -> list[Row]:
    with scratch() as directory:
        sqlite = on_sqlite(directory)
    postgresql = on_postgresql()
    wal = ", ".join(
        f"{postgresql[f'wal_bytes_a_charge_{batch}']:,.0f} in batches of {batch} "
        f"({postgresql[f'wal_after_checkpoint_bytes_a_charge_{batch}']:,.0f} after a checkpoint)"
        for batch in WAL_BATCHES
    )
    return [
        Row(
            "disk for a million charges, SQLite",
            "",
            f"{sqlite['bytes_a_charge']:,.0f} MB",
            "",
            "shown",
            sqlite,
        ),
        Row(
            "disk for a million charges, PostgreSQL",
            "",
            f"{postgresql['bytes_a_charge']:,.0f} MB: {postgresql['table_bytes_a_charge']:,.0f} MB of rows, "
            f"{postgresql['indexes_bytes_a_charge']:,.0f} MB of indexes",
            "",
            "shown",
            postgresql,
        ),
        Row("PostgreSQL's write-ahead log, bytes a charge", "", wal, "", "shown", {}),
    ]


if __name__ == "__main__":
    run(measure, seconds_max=600)
