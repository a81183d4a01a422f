"""How long the pages of the dashboard take with a long history: 2 million charges of 40 teams with 120 keys in 90 days, in
all sizes and qualities, on SQLite and on PostgreSQL.

The books are written at the start of the measure, without the gateway, which takes most of its time.
"""

from __future__ import annotations

import random
import sqlite3
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from urllib.parse import quote

import psycopg

from bench.load import Failed
from bench.machines import ROOT, Machine, free_port, postgres, running, scratch
from bench.table import Row, run
from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.prices import shipped_card
from tests.pages.house import TOKEN, Visitor

CHARGES = 2_000_000
TEAMS = 40
KEYS_A_TEAM = 3
DAYS = 90
TIMES = 25

# One in so many failed, or broke off; so many are under way.
ONE_RELEASED_IN = 1_700
ONE_REVIEW_IN = 40_000
OPEN = 14

# The first has the most charges by far.
LARGEST = "team 00"
_LARGEST = f"/teams/{quote(LARGEST)}"
PAGES = {
    "overview": "",
    "its live part": "/figures",
    "the largest team": _LARGEST,
    "its spend of 90 days by size": f"{_LARGEST}?by=size&days=90",
    "its requests": f"{_LARGEST}/requests",
    "its released requests": f"{_LARGEST}/requests?state=released",
    "its requests in review": f"{_LARGEST}/requests?state=review",
    "its newest 2,500 requests as CSV": f"{_LARGEST}/requests.csv",
    "health": "/health",
}

COLUMNS = (
    "id, request_id, team_id, key_id, operation, model, size, quality, asked_size, asked_quality, stream, images_requested, "
    "images_delivered, state, hold_micro_usd, reserved_micro_usd, settled_micro_usd, basis, reason, upstream_status, "
    "price_card, created_at, deadline_at, finished_at"
)

_ROLLUPS = """
INSERT INTO rollups (
    day, team_id, key_id, model, operation, size, quality, requests, images, settled_micro_usd, reserved_micro_usd)
SELECT {day}, team_id, key_id, model, operation, size, quality, count(*), sum(images_delivered),
    sum(settled_micro_usd), sum(reserved_micro_usd)
FROM charges GROUP BY 1, 2, 3, 4, 5, 6, 7
"""

_TEAM_DAYS = """
INSERT INTO team_days (day, team_id, requests, images, settled_micro_usd, reserved_micro_usd)
SELECT day, team_id, sum(requests), sum(images), sum(settled_micro_usd), sum(reserved_micro_usd) FROM rollups GROUP BY 1, 2
"""

Owner = tuple[str, int]
Instant = Callable[[datetime], object]


def charges(owners: list[Owner], now: datetime, instant: Instant) -> Iterator[tuple[object, ...]]:
    """The rows of the charges, oldest first. Keys are the busier the earlier they stand in ``owners``."""
    dice = random.Random(7)
    card = shipped_card()
    ((model, prices),) = card.models.items()
    images = list(prices.micro_usd.items())
    first, step = now - timedelta(days=DAYS), (timedelta(days=DAYS) - timedelta(minutes=10)) / CHARGES
    for number in range(CHARGES):
        key_id, team_id = owners[int(len(owners) * dice.random() ** 1.5)]
        (size, quality), price = dice.choice(images)
        at = first + number * step
        begun, deadline, ended = instant(at), instant(at + timedelta(days=1)), instant(at + timedelta(seconds=30))
        image = (model, size, quality, size, quality, False, 1)
        operation = "edit" if dice.random() < 0.2 else "generation"
        row: tuple[object, ...] = (f"chg_{number:026}", f"req_{number:026}", team_id, key_id, operation, *image)
        if number >= CHARGES - OPEN:
            row += (0, "forwarded", price, price, 0, None, None, None, card.version, begun, deadline, None)
        elif number % ONE_REVIEW_IN == 0:
            row += (0, "review", price, price, 0, None, "no_answer", None, card.version, begun, deadline, ended)
        elif number % ONE_RELEASED_IN == 0:
            row += (0, "released", price, 0, 0, None, "upstream_error", 500, card.version, begun, deadline, ended)
        else:
            row += (1, "settled", price, 0, price, "requested", None, 200, card.version, begun, deadline, ended)
        yield row


def fill_sqlite(path: Path, owners: list[Owner], now: datetime) -> None:
    with closing(sqlite3.connect(path)) as books, books:
        # What is put into indexes in no order stays in memory.
        books.execute("PRAGMA cache_size = -800000")
        places = ", ".join("?" * len(COLUMNS.split(", ")))
        rows = charges(owners, now, lambda at: f"{at:%Y-%m-%d %H:%M:%S.%f}")
        books.executemany(f"INSERT INTO charges ({COLUMNS}) VALUES ({places})", rows)
        books.execute(_ROLLUPS.format(day="date(created_at)"))
        books.execute(_TEAM_DAYS)


def fill_postgresql(url: str, owners: list[Owner], now: datetime) -> None:
    with psycopg.connect(url) as books:
        with books.cursor() as cursor, cursor.copy(f"COPY charges ({COLUMNS}) FROM STDIN") as copy:
            for row in charges(owners, now, lambda at: at):
                copy.write_row(row)
        books.execute(_ROLLUPS.format(day="(created_at AT TIME ZONE 'UTC')::date"))
        books.execute(_TEAM_DAYS)
    with psycopg.connect(url, autocommit=True) as books:
        # As autovacuum does, which the server of the tests is without.
        books.execute("VACUUM (ANALYZE)")


def fill(url: str, fill_charges: Callable[[list[Owner], datetime], None]) -> None:
    """Teams and their keys, their charges, and budgets, which count what was spent before them."""
    now = datetime.now(UTC)
    first = now - timedelta(days=DAYS)
    database = Database(url)
    migrate(database)
    teams = [f"team {number:02}" for number in range(TEAMS)]
    with database.writing() as connection:
        for team in teams:
            accounts.add_team(connection, team, now=first, actor="bench")
            for number in range(KEYS_A_TEAM):
                accounts.add_key(connection, team, name=f"key {number}", now=first, actor="bench")
        owners = connection.exec_driver_sql(
            "SELECT keys.id, team_id FROM keys JOIN teams ON teams.id = team_id ORDER BY teams.name, keys.name"
        ).all()
    fill_charges([(key_id, team_id) for key_id, team_id in owners], now)
    with database.writing() as connection:
        for number, team in enumerate(teams):
            accounts.set_budget(connection, team, None, "month", 10**13, soft=number % 5 == 0, now=now, actor="bench")
    database.close()


@contextmanager
def dashboard(url: str, directory: Path) -> Iterator[Machine]:
    """A gateway with its pages open. Nothing is sent upstream, and no review expires meanwhile."""
    port = free_port()
    environment = {
        "PYTHONPATH": str(ROOT),
        "BEANMETER_UPSTREAM_URL": "http://127.0.0.1:9/v1",
        "BEANMETER_UPSTREAM_KEY": "sk-beans-bench",
        "BEANMETER_DATABASE_URL": url,
        "BEANMETER_STATE_DIR": str(directory / "var"),
        "BEANMETER_ADMIN_TOKEN": TOKEN,
        "BEANMETER_REVIEW_HOURS": str(24 * (DAYS + 10)),
    }
    command = [sys.executable, "-m", "proxy.cli", "serve", "--port", str(port)]
    with running("Beanmeter", command, directory, port, ready_path="/readyz", environment=environment) as machine:
        yield machine


def look(machine: Machine) -> dict[str, dict[str, float]]:
    """Each page :data:`TIMES` times after a first time that does not count: milliseconds for its visitor, and of the gateway's
    CPU."""
    found: dict[str, dict[str, float]] = {}
    with Visitor(f"http://127.0.0.1:{machine.port}") as visitor:
        visitor.sign_in(TOKEN)
        for name, path in PAGES.items():
            visitor.get(path)
            taken_ms: list[float] = []
            cpu_seconds = machine.cpu_seconds()
            for _ in range(TIMES):
                started = time.perf_counter()
                answer = visitor.get(path)
                taken_ms.append(1000 * (time.perf_counter() - started))
                if answer.status_code != 200:
                    raise Failed(f"{path} answers {answer.status_code}")
            found[name] = {
                "least_ms": round(min(taken_ms), 1),
                "median_ms": round(statistics.median(taken_ms), 1),
                "cpu_ms": round(1000 * (machine.cpu_seconds() - cpu_seconds) / TIMES, 1),
            }
    return found


def on_sqlite() -> dict[str, dict[str, float]]:
    with scratch() as directory:
        path = directory / "beanmeter.db"
        url = f"sqlite:///{path}"
        fill(url, lambda owners, now: fill_sqlite(path, owners, now))
        with dashboard(url, directory) as machine:
            return look(machine)


def on_postgresql() -> dict[str, dict[str, float]]:
    with scratch() as directory, postgres() as server:
        fill(server.url, lambda owners, now: fill_postgresql(server.url, owners, now))
        with dashboard(server.url, directory) as machine:
            return look(machine)


def measure() -> list[Row]:
    databases = {"SQLite": on_sqlite(), "PostgreSQL": on_postgresql()}

    def reached(name: str) -> str:
        return "; ".join(
            f"{database} {pages[name]['least_ms']:.0f}, {pages[name]['median_ms']:.0f} ms, CPU {pages[name]['cpu_ms']:.0f} ms"
            for database, pages in databases.items()
        )

    return [
        Row(
            f"{name}, {CHARGES:,} charges: least and median of {TIMES}",
            "",
            reached(name),
            "",
            "shown",
            {database: pages[name] for database, pages in databases.items()},
        )
        for name in PAGES
    ]


if __name__ == "__main__":
    run(measure, seconds_max=1800)
