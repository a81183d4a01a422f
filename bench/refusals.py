"""What each does with requests that have no price: a size, a quality and a number of images that do not exist, in front of the
simulated BeansAI.

What counts is whether the upstream hears of them, and what it makes and bills. Not a measure of `make bench`:
docs/comparison.md has what it printed.
"""

from __future__ import annotations

import json
import sys
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from bench.load import ASK
from bench.machines import GENERATIONS, ROOT, Machine, free_port, gateway, litellm, portkey, running, scratch
from bench.streamed import request
from bench.table import Row, run, verdict

UNPRICED = ({"size": "banana"}, {"quality": "banana"}, {"n": 11})


@dataclass(frozen=True)
class Seen:
    """What became of one request. ``sent`` is how often the upstream was asked, ``images`` how many it billed."""

    status: int
    sent: int
    images: int


def ask(machine: Machine, simulator: Machine, fields: dict[str, object]) -> Seen:
    request(simulator, "POST", "/simulator/reset")
    answer, _ = request(machine, "POST", GENERATIONS, json.dumps({**json.loads(ASK), **fields}))
    sent = json.loads(request(simulator, "GET", "/simulator/requests")[1])
    bill = json.loads(request(simulator, "GET", "/simulator/bill")[1])
    return Seen(answer.status, len(sent), sum(entry["images"] for entry in bill["entries"]))


def described(name: str, seen: Seen) -> str:
    times = "once" if seen.sent == 1 else f"{seen.sent} times"
    return f"{name} {seen.status}, sent {times}, {seen.images} images billed"


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        port = free_port()
        command = [sys.executable, "-m", "proxy.cli", "simulator", "--port", str(port)]
        simulator = stack.enter_context(running("simulator", command, directory, port, environment={"PYTHONPATH": str(ROOT)}))
        machines = [make(simulator, directory) for make in (gateway, portkey, litellm)]
        entered = [stack.enter_context(machine) for machine in machines]
        rows = []
        for fields in UNPRICED:
            ours, *theirs = [(machine.name, ask(machine, simulator, dict(fields))) for machine in entered]
            rows.append(
                Row(
                    json.dumps(fields),
                    "refused with 400, and not sent",
                    described(*ours),
                    "; ".join(described(*one) for one in theirs),
                    verdict(ours[1] == Seen(400, 0, 0)),
                    {name: asdict(seen) for name, seen in (ours, *theirs)},
                )
            )
    return rows


if __name__ == "__main__":
    run(measure, seconds_max=180)
