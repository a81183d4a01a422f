"""Clients that each read one slow stream, in a process of their own: ``python -m bench.readers STREAMS SECONDS PORT KEY``.

Prints ``open`` once every stream has begun, ``watching`` a little later, then what it saw in so many seconds as JSON, and
in the end how many streams reached their end.
"""

from __future__ import annotations

import asyncio
import json
import re
import statistics
import sys
import time
from typing import cast

import uvloop

from bench.load import ASK
from bench.machines import GENERATIONS

# A gateway that admits a request gets the next one: a queue in front of it would be measured instead.
OPENING_AT_ONCE = 64
OPENING_SECONDS_MAX = 150

# For the streams to get going.
SETTLING_SECONDS = 6
ENDING_SECONDS_MAX = 60

_SENT_AT = re.compile(rb'"at":(\d+\.\d+)\}')

# What of a piece may belong to an event that the next piece completes.
_TAIL_BYTES = 32


class Watch:
    """What all readers see. Delays, in seconds, count while ``watching``."""

    def __init__(self) -> None:
        self.watching = False
        self.delays: list[float] = []
        self.completed = 0


class Reader(asyncio.Protocol):
    def __init__(self, watch: Watch, request: bytes) -> None:
        loop = asyncio.get_running_loop()
        self._watch = watch
        self._request = request
        self._tail = b""
        self._first = b""
        self.opened: asyncio.Future[None] = loop.create_future()
        self.ended: asyncio.Future[None] = loop.create_future()

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast(asyncio.Transport, transport)
        self._transport.write(self._request)

    def data_received(self, data: bytes) -> None:
        now = time.monotonic()
        seen = self._tail + data
        if not self.opened.done():
            self._first += data
        sent = _SENT_AT.findall(seen)
        self._tail = b"" if seen.endswith(b"}\n\n\r\n") else seen[-_TAIL_BYTES:]
        if sent and self._watch.watching:
            self._watch.delays += [now - float(at) for at in sent]
        if sent and not self.opened.done():
            self.opened.set_result(None)
        elif not self._first.startswith(b"HTTP/1.1 200"[: len(self._first)]):
            # A refusal leaves the connection open for another request, which there is none of.
            self._transport.close()
        if b"image_generation.completed" in seen:
            self._watch.completed += 1
            self._transport.close()

    def connection_lost(self, exc: Exception | None) -> None:
        if not self.opened.done():
            self.opened.set_exception(ConnectionError(f"a stream did not begin: {exc or self._first[:1000]!r}"))
        if not self.ended.done():
            self.ended.set_result(None)


async def open_all(streams: int, port: int, request: bytes, watch: Watch) -> list[Reader]:
    gate = asyncio.Semaphore(OPENING_AT_ONCE)
    loop = asyncio.get_running_loop()

    async def open_one() -> Reader:
        async with gate:
            _, reader = await loop.create_connection(lambda: Reader(watch, request), "127.0.0.1", port)
            await reader.opened
        return reader

    try:
        async with asyncio.timeout(OPENING_SECONDS_MAX):
            return await asyncio.gather(*(open_one() for _ in range(streams)))
    except TimeoutError:
        raise ConnectionError(f"the streams had not all begun after {OPENING_SECONDS_MAX} s") from None


async def read(streams: int, seconds: float, port: int, key: str) -> None:
    body = json.dumps({**json.loads(ASK), "stream": True}).encode()
    request = (
        f"POST {GENERATIONS} HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
        f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"
    ).encode() + body
    watch = Watch()
    started = time.monotonic()
    readers = await open_all(streams, port, request, watch)
    print("open", flush=True)
    opening_seconds = time.monotonic() - started
    await asyncio.sleep(SETTLING_SECONDS)
    print("watching", flush=True)
    watch.watching = True
    await asyncio.sleep(seconds)
    watch.watching = False
    percentiles = statistics.quantiles(watch.delays, n=100)
    seen = {
        "streams": sum(not reader.ended.done() for reader in readers),
        "opening_seconds": round(opening_seconds, 1),
        "events": len(watch.delays),
        "p50_ms": round(1000 * percentiles[49], 2),
        "p99_ms": round(1000 * percentiles[98], 2),
        "max_ms": round(1000 * max(watch.delays), 2),
    }
    print(json.dumps(seen), flush=True)
    await asyncio.wait([reader.ended for reader in readers], timeout=ENDING_SECONDS_MAX)
    print(json.dumps({"completed": watch.completed}), flush=True)


if __name__ == "__main__":
    try:
        uvloop.run(read(int(sys.argv[1]), float(sys.argv[2]), int(sys.argv[3]), sys.argv[4]))
    except OSError as reason:
        # One line, where the figures would stand: the measure passes it on.
        print(f"FAILED {reason}", flush=True)
