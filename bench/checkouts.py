"""Several states of the code beside each other: ``python -m bench.checkouts [--postgresql] [--workers N] CHECKOUT ...``.

Each checkout's gateway gets the same load of 32 clients, in turns, and then single requests, in turns. All run on this
environment's Python and packages, and on databases that this checkout has made.
"""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path

from bench import books
from bench.load import Wrk, ask_in_turns, percentile_ms, take_turns
from bench.machines import Machine, gateway, open_books, postgres, scratch, upstream
from bench.small import CLIENTS, rate

ROUNDS = 4
ROUND_SECONDS = 4

WARM_UP = 200
TURNS = 50
REQUESTS_A_TURN = 20


def measure(checkouts: list[Path], *, postgresql: bool, workers: int) -> list[str]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        beans = stack.enter_context(upstream(directory))
        machines: list[Machine] = []
        for number, checkout in enumerate(checkouts, 1):
            url = stack.enter_context(postgres()).url if postgresql else ""
            key = open_books(url) if postgresql else ""
            name = f"{number} ({checkout.name})"
            machines.append(
                stack.enter_context(
                    gateway(beans, directory, name=name, workers=workers, database_url=url, key=key, checkout=checkout)
                )
            )
        medians = take_turns(Wrk(directory, CLIENTS), machines, rounds=ROUNDS, seconds=ROUND_SECONDS)
        for machine in machines:
            books.check(machine.database_url, medians[machine.name].requests)
        by_name = {machine.name: machine for machine in (beans, *machines)}
        seconds = ask_in_turns(by_name, turns=TURNS, requests_a_turn=REQUESTS_A_TURN, warm_up=WARM_UP)
    direct = seconds.pop(beans.name)
    lines = [f"{CLIENTS} clients: {rate(name, found)}" for name, found in medians.items()]
    for name, through in seconds.items():
        p50, p99 = (percentile_ms(through, percent) - percentile_ms(direct, percent) for percent in (50, 99))
        lines.append(f"1 client: {name} adds {p50:.2f} ms at p50, {p99:.2f} ms at p99")
    return lines


if __name__ == "__main__":
    arguments = argparse.ArgumentParser(prog="python -m bench.checkouts")
    arguments.add_argument("checkouts", metavar="CHECKOUT", nargs="+", type=lambda path: Path(path).resolve(strict=True))
    arguments.add_argument("--postgresql", action="store_true")
    arguments.add_argument("--workers", type=int, default=1)
    given = arguments.parse_args()
    print("\n".join(measure(given.checkouts, postgresql=given.postgresql, workers=given.workers)))
