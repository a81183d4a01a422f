"""What a long history costs: a request's latency and the time of ``spend`` with 2 million charges in the books, beside 2
thousand.

Both databases are of one organisation with the same teams, keys, images and ninety days, of which one is a thousand times
as busy. They are made once, in bench/.cache.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from datetime import UTC, datetime, timedelta
from pathlib import Path

from sqlalchemy import text

from bench.load import Failed, ask_in_turns, percentile_ms
from bench.machines import ROOT, gateway, open_books, scratch, upstream
from bench.table import Row, run, verdict
from proxy.ledger import accounts
from proxy.ledger.engine import Database
from proxy.ledger.reports import spend
from proxy.ledger.schema import REVISION

CACHE = Path(__file__).parent / ".cache"

FEW = 2_000
MANY = 2_000_000
DAYS = 90

WARM_UP = 100
TURNS = 40
REQUESTS_A_TURN = 20
SPENDS = 7

LATENCY_TIMES_MAX = 1.2
SPEND_TIMES_MAX = 5.0

# Five teams with two keys each; four sizes at three qualities, a fifth of them edits; the price of each at the day of writing.
TEAMS = 5
KEYS_A_TEAM = 2

# One statement, which writes in the order of time, so that most indexes grow at their end. Every key has every image.
_FILL = """
WITH RECURSIVE
    numbers (n) AS (SELECT 0 UNION ALL SELECT n + 1 FROM numbers WHERE n + 1 < :charges),
    images (place, size, quality, micro_usd) AS (VALUES
        (0, '1024x1024', 'low', 5900), (1, '1024x1024', 'medium', 52700), (2, '1024x1024', 'high', 210700),
        (3, '2048x1152', 'low', 4700), (4, '2048x1152', 'medium', 42400), (5, '2048x1152', 'high', 169500),
        (6, '3840x2160', 'low', 11100), (7, '3840x2160', 'medium', 100100), (8, '3840x2160', 'high', 400300),
        (9, '1152x2048', 'low', 4700), (10, '1152x2048', 'medium', 42400), (11, '1152x2048', 'high', 169500)),
    owners (place, key_id, team_id) AS (
        SELECT row_number() OVER (ORDER BY id) - 1, id, team_id FROM keys WHERE name LIKE 'history%')
INSERT INTO charges (
    id, request_id, team_id, key_id, operation, model, size, quality, asked_size, asked_quality, stream,
    images_requested, images_delivered, state, hold_micro_usd, reserved_micro_usd, settled_micro_usd, basis,
    upstream_status, price_card, created_at, deadline_at, finished_at)
SELECT
    printf('chg_%026d', n), printf('req_%026d', n), team_id, key_id,
    CASE WHEN n / :keys / 12 % 5 = 0 THEN 'edit' ELSE 'generation' END,
    'gpt-image-2', size, quality, size, quality, 0,
    1, 1, 'settled', micro_usd, 0, micro_usd, 'requested',
    200, 'bench', at, at, at
FROM (
    SELECT n, n % :keys AS owner, n / :keys % 12 AS image,
        strftime('%Y-%m-%d %H:%M:%S', :first + CAST(n AS REAL) / :charges * :seconds, 'unixepoch') || '.000000' AS at
    FROM numbers)
JOIN images ON images.place = image
JOIN owners ON owners.place = owner
"""

_ROLLUPS = """
INSERT INTO rollups (
    day, team_id, key_id, model, operation, size, quality, requests, images, settled_micro_usd, reserved_micro_usd)
SELECT date(created_at), team_id, key_id, model, operation, size, quality, count(*), sum(images_delivered),
    sum(settled_micro_usd), sum(reserved_micro_usd)
FROM charges GROUP BY 1, 2, 3, 4, 5, 6, 7
"""

_TEAM_DAYS = """
INSERT INTO team_days (day, team_id, requests, images, settled_micro_usd, reserved_micro_usd)
SELECT day, team_id, sum(requests), sum(images), sum(settled_micro_usd), sum(reserved_micro_usd) FROM rollups GROUP BY 1, 2
"""


def fill(path: Path, charges: int, now: datetime) -> None:
    """A database with so many charges over the last :data:`DAYS` days, and what is kept beside them."""
    unfinished = path.with_suffix(".unfinished")
    for leftover in path.parent.glob(f"{unfinished.name}*"):
        leftover.unlink()
    url = f"sqlite:///{unfinished}"
    open_books(url)
    first = now - timedelta(days=DAYS)
    database = Database(url)
    with database.writing() as connection:
        for team in range(TEAMS):
            accounts.add_team(connection, f"team {team}", now=first, actor="bench")
            for key in range(KEYS_A_TEAM):
                accounts.add_key(connection, f"team {team}", name=f"history {key}", now=first, actor="bench")
    with database.writing() as connection:
        values = {
            "charges": charges,
            "keys": TEAMS * KEYS_A_TEAM,
            "first": int(first.timestamp()),
            "seconds": int(timedelta(days=DAYS).total_seconds()) - 3600,
        }
        connection.execute(text(_FILL), values)
        connection.execute(text(_ROLLUPS))
        connection.execute(text(_TEAM_DAYS))
    with database.reading() as connection:
        (sums,) = spend(connection, ())
    database.close()
    if sums["requests"] != charges:
        raise Failed(f"{sums['requests']} charges are in the books that were to have {charges}")
    unfinished.rename(path)


def books(charges: int) -> Path:
    """The database with so many charges, made if it is not there."""
    CACHE.mkdir(exist_ok=True)
    path = CACHE / f"books-{REVISION}-{charges}.db"
    if not path.exists():
        fill(path, charges, datetime.now(UTC))
    return path


def new_key(url: str) -> str:
    """Of a team whose budget is checked; the key that the books were opened with is nobody's any more."""
    database = Database(url)
    with database.writing() as connection:
        key = accounts.add_key(connection, "bench", now=datetime.now(UTC), actor="bench").key
    database.close()
    return key


def latencies_seconds(urls: dict[int, str]) -> dict[int, list[float]]:
    """A client's requests through a gateway on each database, in turns, in seconds."""
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        beans = stack.enter_context(upstream(directory))
        machines = {
            charges: stack.enter_context(gateway(beans, directory, database_url=url, key=new_key(url)))
            for charges, url in urls.items()
        }
        return ask_in_turns(machines, turns=TURNS, requests_a_turn=REQUESTS_A_TURN, warm_up=WARM_UP)


def spend_command(url: str) -> None:
    environment = {**os.environ, "BEANMETER_DATABASE_URL": url, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "proxy.cli", "spend", "--by", "team,day", "--json"]
    with scratch() as directory:
        subprocess.run(command, check=True, cwd=directory, env=environment, stdout=subprocess.DEVNULL, timeout=120)


def spend_function(url: str) -> None:
    database = Database(url)
    with database.reading() as connection:
        assert spend(connection, ("team", "day"))
    database.close()


def spend_ms(urls: dict[int, str], spending: Callable[[str], None]) -> dict[int, float]:
    """Medians over runs in turns, after one that does not count."""
    seconds: dict[int, list[float]] = {charges: [] for charges in urls}
    for charges, url in [*urls.items()] * (SPENDS + 1):
        started = time.perf_counter()
        spending(url)
        seconds[charges].append(time.perf_counter() - started)
    return {charges: round(1000 * statistics.median(taken[1:]), 2) for charges, taken in seconds.items()}


def measure() -> list[Row]:
    urls = {charges: f"sqlite:///{books(charges)}" for charges in (FEW, MANY)}
    seconds = latencies_seconds(urls)
    p50 = {charges: percentile_ms(taken, 50) for charges, taken in seconds.items()}
    p99 = {charges: percentile_ms(taken, 99) for charges, taken in seconds.items()}
    command = spend_ms(urls, spend_command)
    function = spend_ms(urls, spend_function)
    name = f"{MANY:,} charges beside {FEW:,}"

    def compared(figures: dict[int, float], decimals: int) -> str:
        return f"{figures[MANY]:.{decimals}f} beside {figures[FEW]:.{decimals}f} ms: {figures[MANY] / figures[FEW]:.2f} x"

    return [
        Row(
            f"request latency at 1 client, {name}",
            f"p50 at most {LATENCY_TIMES_MAX:g} x",
            f"p50 {compared(p50, 2)}; p99 {compared(p99, 2)}",
            "",
            verdict(p50[MANY] <= LATENCY_TIMES_MAX * p50[FEW]),
            {"p50_ms": p50, "p99_ms": p99},
        ),
        Row(
            f"`beanmeter spend --by team,day`, {name}",
            f"at most {SPEND_TIMES_MAX:g} x",
            f"{compared(command, 0)}; without the start of the program {compared(function, 1)}",
            "",
            verdict(command[MANY] <= SPEND_TIMES_MAX * command[FEW]),
            {"command_ms": command, "function_ms": function},
        ),
    ]


if __name__ == "__main__":
    run(measure, seconds_max=420)
