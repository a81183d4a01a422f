"""What the event loop itself spends on a small generation: everything of a request but its sockets and its books, which are
played by objects that answer at once. ``python -m bench.own_time``.

No server and no load, so it tells changes of a few microseconds apart, also beside other work: of many short rounds the
quickest counts.
"""

from __future__ import annotations

import asyncio
import gc
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import uvloop
from prometheus_client import CollectorRegistry

from bench.load import ASK
from bench.machines import ANSWER, GENERATIONS
from proxy import logs
from proxy.app import utc_now
from proxy.exchange import Desk
from proxy.gateway import Gateway
from proxy.headers import Headers
from proxy.keyring import Keyring
from proxy.ledger.accounts import KeyHolder
from proxy.ledger.decisions import Admitted, Booking, Decision, Reservation
from proxy.ledger.teller import Left, Teller
from proxy.metrics import Metrics
from proxy.prices import shipped_card
from proxy.server import Server
from proxy.tracing import Tracer
from proxy.transport import Connection, Transport
from proxy.upstream import Upstream

ROUNDS = 150
REQUESTS_A_ROUND = 40

_ANSWER = (
    b"HTTP/1.1 200 OK\r\nServer: nginx\r\nDate: Sat, 28 Nov 2026 22:00:00 GMT\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\nConnection: keep-alive\r\n\r\n%b" % (len(ANSWER), ANSWER.encode())
)
_ASK = (
    f"POST {GENERATIONS} HTTP/1.1\r\nHost: gateway\r\nContent-Type: application/json\r\nAuthorization: Bearer sk-bm-bench\r\n"
    f"Content-Length: {len(ASK)}\r\n\r\n{ASK}"
).encode()


class Wire:
    """A transport that hands on what is written, and takes everything."""

    def __init__(self, written: Callable[[bytes], object]) -> None:
        self.write = written

    def get_extra_info(self, name: str, default: object = None) -> object:
        return ("127.0.0.1", 1) if name in ("peername", "sockname") else default

    def is_closing(self) -> bool:
        return False

    def get_write_buffer_size(self) -> int:
        return 0

    def __getattr__(self, _: str) -> Callable[..., None]:
        return lambda *_, **__: None


class Books:
    """A teller that admits everything in the next turn of the loop."""

    def reserve(self, _: Reservation) -> asyncio.Future[Decision]:
        loop = asyncio.get_running_loop()
        held: asyncio.Future[Decision] = loop.create_future()
        loop.call_soon(held.set_result, Admitted(10**9))
        return held

    def leave(self, _: Booking) -> Left:
        loop = asyncio.get_running_loop()
        noted: asyncio.Future[bool] = loop.create_future()
        loop.call_soon(noted.set_result, True)
        return Left(noted, loop.create_future())

    def expire(self, _: asyncio.Future[Decision]) -> None:
        raise AssertionError("it was answered")


class Keys:
    """A keyring with one holder. To look a key up in the real one takes some microseconds more."""

    async def holder(self, _: Headers) -> KeyHolder:
        return KeyHolder("key_1", 1, "bench", None, None, None)


async def _connect(self: Transport) -> Connection:
    connection = Connection(self._idle)
    answer = asyncio.get_running_loop().call_soon
    connection.connection_made(cast(Any, Wire(lambda _: answer(connection.data_received, _ANSWER))))
    return connection


async def measure() -> list[float]:
    """CPU seconds a request, of each round."""
    desk = Desk(
        card=shipped_card(),
        teller=cast(Teller, Books()),
        upstream=Upstream("http://127.0.0.1:1/v1"),
        upstream_key="sk-beans-bench",
        metrics=Metrics(CollectorRegistry()),
        tracer=Tracer(),
        timeout_seconds=600,
    )
    gateway = Gateway(
        desk, cast(Keyring, Keys()), utc_now, aliases={}, max_body_bytes=1 << 26, spool_directory=Path("never-used")
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await gateway.handle("generation", scope, receive, send)

    answered = asyncio.Event()
    client = Server(app)._connection()
    client.connection_made(cast(Any, Wire(lambda _: answered.set())))

    async def ask(times: int) -> None:
        for _ in range(times):
            answered.clear()
            client.data_received(_ASK)
            await answered.wait()

    rounds: list[float] = []
    with patch.object(Transport, "_connect", _connect):
        await ask(10 * REQUESTS_A_ROUND)
        gc.collect()
        gc.freeze()
        for _ in range(ROUNDS):
            began = time.thread_time()
            await ask(REQUESTS_A_ROUND)
            rounds.append((time.thread_time() - began) / REQUESTS_A_ROUND)
    return rounds


if __name__ == "__main__":
    with open(os.devnull, "w") as nowhere:
        logs.configure(nowhere)
        seconds = uvloop.run(measure())
    print(f"{1e6 * min(seconds):.0f} µs a request, {1e6 * statistics.median(seconds):.0f} at the median of the rounds")
