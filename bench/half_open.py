"""How long healthy requests take while 500 connections hold an unfinished head, against the same without them.

Quiet and crowded rounds take turns, so that a machine whose speed drifts favours neither. With the crowd, the 99th percentile
may be twice what it is without.
"""

from __future__ import annotations

import asyncio
import statistics
import time
from contextlib import ExitStack

from bench.load import ASK
from bench.machines import ANSWER, GENERATIONS, Machine, gateway, scratch, upstream
from bench.table import Row, run, verdict

CROWD = 500
CLIENTS = 8
REQUESTS_A_ROUND = 400
ROUNDS = 3
RATIO_MAX = 2.0
LOAD_SECONDS_MAX = 120


async def client(machine: Machine, requests: int, seconds: list[float]) -> None:
    """One healthy client on one connection; adds how long each of its requests took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", machine.port)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: bench\r\nAuthorization: {machine.headers['Authorization']}\r\n"
    request = f"{head}Content-Type: application/json\r\nContent-Length: {len(ASK)}\r\n\r\n{ASK}".encode()
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        await reader.readexactly(len(ANSWER))
        seconds.append(time.perf_counter() - started)
    writer.close()


async def a_round(machine: Machine, crowd: int) -> list[float]:
    """The durations of a round's requests beside ``crowd`` half-open connections, all of which are alive at its end."""
    half_open = [await asyncio.open_connection("127.0.0.1", machine.port) for _ in range(crowd)]
    for _, writer in half_open:
        writer.write(f"POST {GENERATIONS} HTTP/1.1\r\nHost: bench\r\nX-Slow: ".encode())
    seconds: list[float] = []
    await asyncio.gather(*(client(machine, REQUESTS_A_ROUND // CLIENTS, seconds) for _ in range(CLIENTS)))
    assert not any(reader.at_eof() for reader, _ in half_open), "the round outlasted the patience with half-open connections"
    for _, writer in half_open:
        writer.transport.abort()
    return seconds


async def load(machine: Machine) -> tuple[list[float], list[float]]:
    quiet: list[float] = []
    crowded: list[float] = []
    async with asyncio.timeout(LOAD_SECONDS_MAX):
        await a_round(machine, 0)  # the first requests compile statements, and count for neither
        for _ in range(ROUNDS):
            quiet += await a_round(machine, 0)
            crowded += await a_round(machine, CROWD)
    return quiet, crowded


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        machine = stack.enter_context(gateway(stack.enter_context(upstream(directory)), directory))
        quiet, crowded = asyncio.run(load(machine))
    figures = {
        name: {"p50_ms": 1000 * statistics.median(seconds), "p99_ms": 1000 * statistics.quantiles(seconds, n=100)[98]}
        for name, seconds in (("quiet", quiet), ("crowded", crowded))
    }
    ratio = figures["crowded"]["p99_ms"] / figures["quiet"]["p99_ms"]
    without, beside = (f"p50 {one['p50_ms']:.1f} ms, p99 {one['p99_ms']:.1f} ms" for one in figures.values())
    return [
        Row(
            f"{CLIENTS} healthy clients beside {CROWD} half-open connections",
            f"p99 at most {RATIO_MAX:g} x that without",
            f"{beside}; without {without}: {ratio:.2f} x",
            "",
            verdict(ratio <= RATIO_MAX),
            figures,
        )
    ]


if __name__ == "__main__":
    run(measure, seconds_max=180)
