"""One streamed image request through each, in front of the simulated BeansAI: what the client gets, how many images the
upstream makes and charges for, and what is booked for them.

LiteLLM says in a header of its answer what it charges the caller; that it does is seen with a request that is not streamed.
Portkey's gateway books nothing.
"""

from __future__ import annotations

import http.client
import json
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import asdict, dataclass

from bench.books import sum_charges
from bench.load import ASK, ASK_STREAM, Failed
from bench.machines import GENERATIONS, JSON, ROOT, Machine, free_port, gateway, litellm, portkey, running, scratch
from bench.table import Row, run, verdict

# What a peer does after its answer, such as a callback, is over by then.
AFTERWARDS_SECONDS = 3


@dataclass(frozen=True)
class Seen:
    """What became of one request. ``booked_micro_usd`` is ``None`` for who books nothing."""

    status: int
    whole: bool
    generations: int
    billed_micro_usd: int
    booked_micro_usd: int | None


def request(machine: Machine, method: str, path: str, body: str | None = None) -> tuple[http.client.HTTPResponse, bytes]:
    """An answer, and its body."""
    connection = http.client.HTTPConnection("127.0.0.1", machine.port, timeout=60)
    try:
        connection.request(method, path, body, {**JSON, **machine.headers})
        answer = connection.getresponse()
        return answer, answer.read()
    finally:
        connection.close()


def ask(machine: Machine, simulator: Machine, booked: Callable[[http.client.HTTPResponse], int | None]) -> Seen:
    request(simulator, "POST", "/simulator/reset")
    answer, body = request(machine, "POST", GENERATIONS, ASK_STREAM)
    time.sleep(AFTERWARDS_SECONDS)
    bill = json.loads(request(simulator, "GET", "/simulator/bill")[1])
    return Seen(
        status=answer.status,
        whole=b"event: image_generation.completed" in body,
        generations=sum(entry["images"] for entry in bill["entries"]),
        billed_micro_usd=bill["total_micro_usd"],
        booked_micro_usd=booked(answer),
    )


def charged_micro_usd(answer: http.client.HTTPResponse) -> int:
    """What LiteLLM says that a request costs its caller; nothing where it says nothing."""
    return round(1_000_000 * float(answer.getheader("x-litellm-response-cost") or 0))


def check_charges(machine: Machine) -> None:
    """Raises :class:`Failed` where LiteLLM doesn't say what a request costs that it can serve."""
    answer, _ = request(machine, "POST", GENERATIONS, ASK)
    if answer.status != 200 or not charged_micro_usd(answer):
        raise Failed(f"{machine.name} answered {answer.status} without saying what it charges")


def described(seen: Seen) -> str:
    answer = "a stream" if seen.whole else "no image"
    booked = "books nothing" if seen.booked_micro_usd is None else f"books {seen.booked_micro_usd / 1e6:.4f} USD"
    images = "generation" if seen.generations == 1 else "generations"
    return f"{seen.status}, {answer}, {seen.generations} {images} billed {seen.billed_micro_usd / 1e6:.4f} USD, {booked}"


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        port = free_port()
        command = [sys.executable, "-m", "proxy.cli", "simulator", "--port", str(port)]
        simulator = stack.enter_context(running("simulator", command, directory, port, environment={"PYTHONPATH": str(ROOT)}))
        ours = stack.enter_context(gateway(simulator, directory))
        theirs = stack.enter_context(litellm(simulator, directory))
        check_charges(theirs)
        seen = {
            "Beanmeter": ask(ours, simulator, lambda _: sum_charges(ours.database_url)),
            "Portkey": ask(stack.enter_context(portkey(simulator, directory)), simulator, lambda _: None),
            "LiteLLM": ask(theirs, simulator, charged_micro_usd),
        }
    mine = seen["Beanmeter"]
    met = mine.status == 200 and mine.whole and mine.generations == 1 and mine.booked_micro_usd == mine.billed_micro_usd
    return [
        Row(
            "a streamed image",
            "relayed, made once, booked as billed",
            described(mine),
            "; ".join(f"{name} {described(one)}" for name, one in seen.items() if name != "Beanmeter"),
            verdict(met),
            {name: asdict(one) for name, one in seen.items()},
        )
    ]


if __name__ == "__main__":
    run(measure, seconds_max=180)
