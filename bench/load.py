"""Load on a machine, and what it made of it. Machines take turns, round by round, and the median over the rounds counts: a
computer whose speed drifts favours nobody.
"""

from __future__ import annotations

import http.client
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from bench.machines import GENERATIONS, JSON, Machine, program

# What a small generation is asked for with.
ASK = json.dumps({"model": "gpt-image-2", "prompt": "a coffee bean on a desk", "size": "1024x1024", "quality": "low", "n": 1})
ASK_STREAM = json.dumps(
    {"model": "gpt-image-2", "prompt": "a coffee bean on a desk", "size": "3840x2160", "quality": "high", "stream": True}
)

# Beyond this wrk counts an answer as missing.
ANSWER_SECONDS_MAX = 30


class Failed(Exception):
    """A load that did not go as it had to, so that its figures mean nothing."""


@dataclass(frozen=True)
class Round:
    """One machine under load for a while. ``cpu_seconds`` is what it spent itself, the upstream and the load not counted."""

    requests: int
    bytes: int
    seconds: float
    p50_ms: float
    p99_ms: float
    cpu_seconds: float


@dataclass(frozen=True)
class Median:
    """Medians over the rounds of one machine; ``requests`` are those of all rounds together."""

    requests: int
    requests_a_second: float
    bytes_a_second: float
    p50_ms: float
    p99_ms: float
    cpu_ms_a_request: float
    rounds_requests_a_second: tuple[float, ...]


def median(rounds: Sequence[Round]) -> Median:
    return Median(
        requests=sum(one.requests for one in rounds),
        requests_a_second=round(statistics.median(one.requests / one.seconds for one in rounds), 1),
        bytes_a_second=round(statistics.median(one.bytes / one.seconds for one in rounds)),
        p50_ms=round(statistics.median(one.p50_ms for one in rounds), 3),
        p99_ms=round(statistics.median(one.p99_ms for one in rounds), 3),
        cpu_ms_a_request=round(statistics.median(1000 * one.cpu_seconds / max(1, one.requests) for one in rounds), 4),
        rounds_requests_a_second=tuple(round(one.requests / one.seconds, 1) for one in rounds),
    )


# The load of many clients

_SCRIPT = """
wrk.method = "POST"
wrk.path = {path}
local file = assert(io.open({body}, "rb"))
wrk.body = file:read("*a")
file:close()
{headers}
done = function(summary, latency)
    local errors = summary.errors
    io.write(string.format(
        '\\nFIGURES {{"requests": %d, "bytes": %d, "microseconds": %d, "p50": %d, "p99": %d, "failed": %d, "refused": %d}}\\n',
        summary.requests, summary.bytes, summary.duration, latency:percentile(50), latency:percentile(99),
        errors.connect + errors.read + errors.write + errors.timeout, errors.status))
end
"""


class Wrk:
    """A load of ``clients`` connections, each of which sends its next request when it has its answer."""

    def __init__(
        self,
        directory: Path,
        clients: int,
        *,
        path: str = GENERATIONS,
        body: Path | None = None,
        text: str = ASK,
        headers: Mapping[str, str] = JSON,
    ) -> None:
        self._directory = directory
        self._clients = clients
        self._path = path
        self._headers = headers
        self._body = body or directory / "ask.json"
        if body is None:
            self._body.write_text(text)

    def __call__(self, machine: Machine, seconds: float) -> Round:
        """One round. Raises :class:`Failed` where a single answer was not 2xx, or failed to come."""
        script = self._directory / f"load-{machine.port}.lua"
        headers = "\n".join(
            f"wrk.headers[{json.dumps(name)}] = {json.dumps(value)}"
            for name, value in {**self._headers, **machine.headers}.items()
        )
        script.write_text(_SCRIPT.format(path=json.dumps(self._path), body=json.dumps(str(self._body)), headers=headers))
        command = [program("wrk"), "--threads", "1", "--connections", str(self._clients), "--duration", f"{seconds:g}s"]
        command += ["--timeout", f"{ANSWER_SECONDS_MAX}s", "--script", str(script), f"http://127.0.0.1:{machine.port}"]
        cpu_before = machine.cpu_seconds()
        done = subprocess.run(
            command, check=True, capture_output=True, text=True, timeout=seconds + 2 * ANSWER_SECONDS_MAX, cwd=self._directory
        )
        cpu_seconds = machine.cpu_seconds() - cpu_before
        figures = json.loads(done.stdout.partition("FIGURES ")[2])
        if figures["failed"] or figures["refused"]:
            answers, refused, errors = (figures[name] for name in ("requests", "refused", "failed"))
            raise Failed(f"{machine.name}: {answers} answers, {refused} of them refusals, and {errors} errors")
        return Round(
            requests=figures["requests"],
            bytes=figures["bytes"],
            seconds=figures["microseconds"] / 1e6,
            p50_ms=figures["p50"] / 1000,
            p99_ms=figures["p99"] / 1000,
            cpu_seconds=cpu_seconds,
        )


def take_turns(
    load: Callable[[Machine, float], Round],
    machines: Sequence[Machine],
    *,
    rounds: int,
    seconds: float,
    warm_up_seconds: float = 2,
) -> dict[str, Median]:
    """The medians of each machine, by its name: A, B, A, B, after a warm-up that does not count."""
    for machine in machines:
        load(machine, warm_up_seconds)
    taken: dict[str, list[Round]] = {machine.name: [] for machine in machines}
    for _ in range(rounds):
        for machine in machines:
            one = load(machine, seconds)
            if not one.requests:
                raise Failed(f"{machine.name}: no answer in {seconds:g} s")
            taken[machine.name].append(one)
    return {name: median(of_one) for name, of_one in taken.items()}


# One client


class Client:
    """One client on one connection, that waits for each answer before it asks again."""

    def __init__(self, machine: Machine) -> None:
        self._machine = machine
        self._connection = http.client.HTTPConnection("127.0.0.1", machine.port, timeout=ANSWER_SECONDS_MAX)

    def ask(self, requests: int) -> list[float]:
        """How long each of so many requests took, in seconds. Raises :class:`Failed` for any but 200."""
        headers = {**JSON, **self._machine.headers}
        body = ASK.encode()
        seconds: list[float] = []
        for _ in range(requests):
            started = time.perf_counter()
            self._connection.request("POST", GENERATIONS, body, headers)
            answer = self._connection.getresponse()
            content = answer.read()
            seconds.append(time.perf_counter() - started)
            if answer.status != 200:
                raise Failed(f"{self._machine.name} answered {answer.status}: {content[:500]!r}")
        return seconds

    def close(self) -> None:
        self._connection.close()


_Name = TypeVar("_Name")


def ask_in_turns(
    machines: Mapping[_Name, Machine], *, turns: int, requests_a_turn: int, warm_up: int
) -> dict[_Name, list[float]]:
    """How long each request of one client to each machine took, in seconds: A, B, A, B, a few requests at a time, on
    connections that stay open, after a warm-up of so many requests that do not count."""
    with ExitStack() as stack:
        clients = {name: stack.enter_context(closing(Client(machine))) for name, machine in machines.items()}
        for client in clients.values():
            client.ask(warm_up)
        seconds: dict[_Name, list[float]] = {name: [] for name in clients}
        for _ in range(turns):
            for name, client in clients.items():
                seconds[name] += client.ask(requests_a_turn)
    return seconds


def percentile_ms(seconds: Sequence[float], percent: int) -> float:
    return 1000 * statistics.quantiles(seconds, n=100)[percent - 1]
