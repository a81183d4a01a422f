"""Small JSON generations of 32 clients at once, on PostgreSQL and with two workers, beside Portkey.

Whether two workers bring more than one depends on the cores that they have: the load and the upstream need one each, so
that with fewer than :data:`CORES_MIN` the comparison is shown and not judged.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import asdict

from bench import books
from bench.load import Median, Wrk, take_turns
from bench.machines import gateway, open_books, portkey, postgres, scratch, upstream
from bench.small import CLIENTS, rate
from bench.table import Row, run, verdict

ROUNDS = 3
ROUND_SECONDS = 5

TIMES_ONE_WORKER_MIN = 1.6

# Two workers, the load, the upstream or the database's server.
CORES_MIN = 4


def beside_portkey(name: str, medians: dict[str, Median]) -> Row:
    times = medians[name].requests_a_second / medians["Portkey"].requests_a_second
    return Row(
        f"small JSON generations, {CLIENTS} clients, {name}",
        "at least Portkey",
        f"{rate('', medians[name]).strip()}: {times:.2f} x Portkey",
        rate("Portkey", medians["Portkey"]),
        verdict(times >= 1),
        {name: asdict(medians[name]), "Portkey": asdict(medians["Portkey"])},
    )


def beside_one_worker(database: str, medians: dict[str, Median]) -> Row:
    one, two = (medians[f"{database}, {workers}"] for workers in ("1 worker", "2 workers"))
    times = two.requests_a_second / one.requests_a_second
    cores = os.cpu_count() or 1
    enough = cores >= CORES_MIN
    return Row(
        f"2 workers beside one, {database}",
        f"{TIMES_ONE_WORKER_MIN:g} x where cores allow",
        f"{times:.2f} x" + ("" if enough else f", on {cores} cores, where {CORES_MIN} are needed to judge"),
        "",
        verdict(times >= TIMES_ONE_WORKER_MIN) if enough else "not judged",
        {"times": round(times, 3), "cores": cores},
    )


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        beans = stack.enter_context(upstream(directory))
        machines = [stack.enter_context(portkey(beans, directory))]
        for workers, name in ((1, "1 worker"), (2, "2 workers")):
            url = stack.enter_context(postgres()).url
            key = open_books(url)
            machines += [
                stack.enter_context(
                    gateway(beans, directory, name=f"PostgreSQL, {name}", workers=workers, database_url=url, key=key)
                ),
                stack.enter_context(gateway(beans, directory, name=f"SQLite, {name}", workers=workers)),
            ]
        medians = take_turns(Wrk(directory, CLIENTS), machines, rounds=ROUNDS, seconds=ROUND_SECONDS)
        for machine in machines[1:]:
            books.check(machine.database_url, medians[machine.name].requests)
    return [
        *(beside_portkey(name, medians) for name in ("PostgreSQL, 1 worker", "PostgreSQL, 2 workers", "SQLite, 2 workers")),
        *(beside_one_worker(database, medians) for database in ("PostgreSQL", "SQLite")),
    ]


if __name__ == "__main__":
    run(measure, seconds_max=240)
