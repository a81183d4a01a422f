"""How long healthy requests take while 500 connections hold an unfinished head, against the same without them.

``python bench/half_open.py`` starts a gateway as a process of its own, on loopback, with the upstream in this process. Quiet
and crowded rounds take turns, so that a machine whose speed drifts favours neither. It prints the figures as JSON and as a
row for a Markdown table. With the crowd, the 99th percentile may be twice what it is without; beyond that the exit status
is 1.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import tempfile
import time
from pathlib import Path

from memory import gateway

CROWD = 500
CLIENTS = 8
REQUESTS_A_ROUND = 400
ROUNDS = 3
RATIO_MAX = 2.0
RUN_SECONDS_MAX = 120

ANSWER = json.dumps({"created": 1, "data": [{"b64_json": "aW1hZ2U="}], "size": "1024x1024", "quality": "low"}).encode()
BODY = json.dumps({"model": "gpt-image-2", "prompt": "x", "size": "1024x1024", "quality": "low"}).encode()


async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    """The upstream: the same small document for every request."""
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            length = re.search(rb"content-length: (\d+)", head)
            assert length is not None
            await reader.readexactly(int(length[1]))
            answer = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n%s"
            writer.write(answer % (len(ANSWER), ANSWER))
    except (asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
        writer.close()


async def client(port: int, key: str, requests: int, seconds: list[float]) -> None:
    """One healthy client on one connection; adds how long each of its requests took."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
    request = head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(BODY), BODY)
    for _ in range(requests):
        started = time.perf_counter()
        writer.write(request)
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 200 "), answer
        await reader.readexactly(len(ANSWER))
        seconds.append(time.perf_counter() - started)
    writer.close()


async def a_round(port: int, key: str, crowd: int) -> list[float]:
    """The durations of a round's requests beside ``crowd`` half-open connections, all of which are alive at its end."""
    half_open = [await asyncio.open_connection("127.0.0.1", port) for _ in range(crowd)]
    for _, writer in half_open:
        writer.write(b"POST /v1/images/generations HTTP/1.1\r\nHost: bench\r\nX-Slow: ")
    seconds: list[float] = []
    await asyncio.gather(*(client(port, key, REQUESTS_A_ROUND // CLIENTS, seconds) for _ in range(CLIENTS)))
    assert not any(reader.at_eof() for reader, _ in half_open), "the round outlasted the patience with half-open connections"
    for _, writer in half_open:
        writer.transport.abort()
    return seconds


async def measure(directory: Path) -> tuple[list[float], list[float]]:
    upstream = await asyncio.start_server(serve, "127.0.0.1", 0)
    upstream_port = upstream.sockets[0].getsockname()[1]
    quiet: list[float] = []
    crowded: list[float] = []
    with gateway(upstream_port, directory) as (_, port, key):
        async with asyncio.timeout(RUN_SECONDS_MAX):
            await a_round(port, key, 0)  # the first requests compile statements, and count for neither
            for _ in range(ROUNDS):
                quiet += await a_round(port, key, 0)
                crowded += await a_round(port, key, CROWD)
    upstream.close()
    return quiet, crowded


def main() -> int:
    with tempfile.TemporaryDirectory(prefix="beanmeter-half-open-") as directory:
        quiet, crowded = asyncio.run(measure(Path(directory)))
    figures = {
        name: {"p50_ms": 1000 * statistics.median(seconds), "p99_ms": 1000 * statistics.quantiles(seconds, n=100)[98]}
        for name, seconds in (("quiet", quiet), ("crowded", crowded))
    }
    ratio = figures["crowded"]["p99_ms"] / figures["quiet"]["p99_ms"]
    print(json.dumps({**figures, "p99_ratio": ratio, "p99_ratio_max": RATIO_MAX}))
    print(
        f"| {CROWD} half-open connections, {CLIENTS} healthy clients "
        f"| p50 {figures['quiet']['p50_ms']:.1f} ms, p99 {figures['quiet']['p99_ms']:.1f} ms without "
        f"| p50 {figures['crowded']['p50_ms']:.1f} ms, p99 {figures['crowded']['p99_ms']:.1f} ms with | x {ratio:.2f} |"
    )
    return 0 if ratio <= RATIO_MAX else 1


if __name__ == "__main__":
    sys.exit(main())
