"""Real parts for tests: a gateway that listens on loopback, and an upstream that plays any script, byte by byte."""

from __future__ import annotations

import asyncio
import hashlib
import json
import socket
import struct
import threading
import time
from collections.abc import Awaitable, Callable, Coroutine, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Self, TypeVar

import httpx2

from proxy.app import running
from proxy.ledger import accounts, reports
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.periods import Period
from proxy.settings import load

T = TypeVar("T")

UPSTREAM_KEY = "sk-beans-the-organisations-own-key"

# A test that waits for longer than this waits for something that won't come, on a busy machine too.
PATIENCE_SECONDS = 90.0


def now() -> datetime:
    return datetime.now(UTC)


class Loop:
    """An event loop in a thread of its own, for servers that a test talks to from outside."""

    def __init__(self) -> None:
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T]) -> T:
        """Run a coroutine there to its end."""
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(PATIENCE_SECONDS)

    def close(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(PATIENCE_SECONDS)
        self._loop.close()


# The upstream


@dataclass(frozen=True)
class Received:
    """A request as it arrived, with header names in lower case and in their order."""

    method: str
    target: str
    headers: list[tuple[str, str]]
    body: bytes

    @property
    def sha256(self) -> str:
        return hashlib.sha256(self.body).hexdigest()

    def values(self, name: str) -> list[str]:
        return [value for key, value in self.headers if key == name]


class Conversation:
    """One request and the connection to answer it on."""

    def __init__(self, request: Received, writer: asyncio.StreamWriter) -> None:
        self.request = request
        self._writer = writer
        self.ended = False

    async def write(self, data: bytes) -> None:
        self._writer.write(data)
        await self._writer.drain()

    async def close(self) -> None:
        """End the connection in order."""
        self.ended = True
        self._writer.close()

    async def reset(self) -> None:
        """End the connection with a reset, after what was written has gone out."""
        self.ended = True
        await self._writer.drain()
        sock: socket.socket = self._writer.get_extra_info("socket")
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self._writer.transport.abort()


Script = Callable[[Conversation], Awaitable[None]]


def whole(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """An answer framed by its length."""
    head = "".join(f"{name}: {value}\r\n" for name, value in [*headers, ("Content-Length", str(len(body)))])
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body


def chunked(status: int, headers: list[tuple[str, str]], pieces: list[bytes], *, end: bool = True) -> bytes:
    """An answer in chunks; without ``end`` its last chunk is missing."""
    head = "".join(f"{name}: {value}\r\n" for name, value in [*headers, ("Transfer-Encoding", "chunked")])
    body = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces)
    return f"HTTP/1.1 {status} Status\r\n{head}\r\n".encode() + body + (b"0\r\n\r\n" if end else b"")


def until_closed(status: int, headers: list[tuple[str, str]], body: bytes) -> bytes:
    """An answer whose end is the end of its connection; the script closes it."""
    head = "".join(f"{name}: {value}\r\n" for name, value in headers)
    return f"HTTP/1.1 {status} Status\r\n{head}Connection: close\r\n\r\n".encode() + body


JSON = [("Content-Type", "application/json")]
SSE = [("Content-Type", "text/event-stream")]


def json_answer(images: int = 1, **fields: Any) -> bytes:
    """A document as BeansAI answers: so many small images, and the fields that a test wants in it."""
    return json.dumps({"created": 1, "data": [{"b64_json": "aW1hZ2U="}] * images, **fields}).encode()


def event(kind: str, **fields: Any) -> bytes:
    """One server-sent event with its type in both places."""
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **fields})}\n\n".encode()


def completed(operation: str = "generation", **fields: Any) -> bytes:
    return event(f"image_{operation}.completed", b64_json="aW1hZ2U=", **fields)


def replay(answer: bytes) -> Script:
    """A script that writes one framed answer."""

    async def script(conversation: Conversation) -> None:
        await conversation.write(answer)

    return script


class ScriptedUpstream:
    """An upstream that answers as the test says, and remembers every request. ``script`` may be changed at any time."""

    def __init__(self, loop: Loop) -> None:
        self._loop = loop
        self.script: Script = replay(whole(200, JSON, json_answer()))
        self.requests: list[Received] = []
        self._server = loop.run(asyncio.start_server(self._serve, "127.0.0.1", 0, limit=1 << 20))
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.base_url = f"http://127.0.0.1:{self.port}/v1"
        self.connections = 0
        self._serving: set[asyncio.Task[None]] = set()

    def answer(self, answer: bytes) -> None:
        """From now on, write these bytes for every request."""
        self.script = replay(answer)

    def close(self) -> None:
        """Take no more connections, and end what is still said on those that are open."""

        async def close() -> None:
            self._server.close()
            for task in self._serving:
                task.cancel()
            await asyncio.gather(*self._serving, return_exceptions=True)

        self._loop.run(close())

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        task = asyncio.current_task()
        assert task is not None
        self._serving.add(task)
        try:
            while True:
                conversation = Conversation(await self._receive(reader), writer)
                self.requests.append(conversation.request)
                await self.script(conversation)
                if conversation.ended:
                    return
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self._serving.discard(task)

    async def _receive(self, reader: asyncio.StreamReader) -> Received:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        method, target, _ = head[0].split(" ")
        fields = [line.partition(":") for line in head[1:] if line]
        headers = [(name.lower(), value.strip()) for name, _, value in fields]
        length = next(int(value) for name, value in headers if name == "content-length")
        return Received(method, target, headers, await reader.readexactly(length))


# The gateway


@dataclass
class LiveGateway:
    """A gateway on loopback with one team, ``red``, and a key of it."""

    loop: Loop
    database_url: str
    upstream_url: str
    state_dir: Path
    settings: dict[str, str] = field(default_factory=dict)
    base_url: str = ""
    key: str = ""
    key_id: str = ""

    def __enter__(self) -> Self:
        self.database = Database(self.database_url)
        migrate(self.database)
        self.key_id, self.key = self.add_team("red")
        environment = {
            "BEANMETER_UPSTREAM_URL": self.upstream_url,
            "BEANMETER_UPSTREAM_KEY": UPSTREAM_KEY,
            "BEANMETER_DATABASE_URL": self.database_url,
            "BEANMETER_STATE_DIR": str(self.state_dir),
            "BEANMETER_DRAIN_SECONDS": "5",
            **self.settings,
        }
        self._running = running(load(environment, self.state_dir), "127.0.0.1", 0)
        self.base_url = self.loop.run(self._running.__aenter__())
        self.port = int(self.base_url.rpartition(":")[2].removesuffix("/v1"))
        self.client = httpx2.Client(
            base_url=self.base_url, headers={"authorization": f"Bearer {self.key}"}, timeout=PATIENCE_SECONDS, trust_env=False
        )
        return self

    def __exit__(self, *_: object) -> None:
        self.client.close()
        self.loop.run(self._running.__aexit__(None, None, None))
        self.database.close()

    def add_team(self, name: str) -> tuple[str, str]:
        """A team with one key; the key's id and the key."""
        with self.database.writing() as connection:
            accounts.add_team(connection, name, now=now(), actor="test")
            key = accounts.add_key(connection, name, now=now(), actor="test")
        return key.id, key.key

    def set_budget(
        self,
        limit_micro_usd: int,
        period: Period = "month",
        *,
        team: str = "red",
        key_id: str | None = None,
        soft: bool = False,
    ) -> None:
        with self.database.writing() as connection:
            accounts.set_budget(connection, team, key_id, period, limit_micro_usd, soft=soft, now=now(), actor="test")

    def settle(self, port: int | None = None) -> None:
        """Let what its clients have been answered come into the books: a gateway waits for that when it is asked for figures.
        ``port`` is another gateway's."""
        self.client.get(f"http://127.0.0.1:{port or self.port}/metrics")

    def charges(self) -> list[dict[str, Any]]:
        """All charges, oldest first."""
        self.settle()
        with self.database.reading() as connection:
            return list(reports.list_charges(connection))

    def charge_when_ended(self, request_id: str | None = None) -> dict[str, Any]:
        """The only charge, or that of a request, once it is no longer forwarded."""

        def ended() -> dict[str, Any] | None:
            found = [row for row in self.charges() if request_id in (None, row["request_id"])]
            assert len(found) <= 1, found
            return found[0] if found and found[0]["state"] not in ("reserved", "forwarded") else None

        return wait_for(ended)

    def metric(self, line: str) -> float:
        """The value of a sample by its name and labels as they are written; 0 where there is none yet."""
        page = self.client.get(self.base_url.removesuffix("/v1") + "/metrics").text
        return next(
            (float(value) for name, _, value in (row.rpartition(" ") for row in page.splitlines()) if name == line), 0.0
        )

    def connect(self) -> socket.socket:
        """A bare connection to it."""
        return socket.create_connection(("127.0.0.1", self.port), PATIENCE_SECONDS)


# A booking that nobody waits for is in the books some milliseconds after its answer. What is open for longer is open.
BOOKED_SECONDS = 0.2


def booked_charges(look: Callable[[], list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """The charges, with what is on its way into the books given the time to come there."""
    deadline = time.monotonic() + BOOKED_SECONDS
    while True:
        found = look()
        if all(charge["state"] != "forwarded" for charge in found) or time.monotonic() > deadline:
            return found
        time.sleep(0.01)


def wait_for(look: Callable[[], T | None]) -> T:
    """What ``look`` finds, looked for until it does."""
    deadline = time.monotonic() + PATIENCE_SECONDS
    while time.monotonic() < deadline:
        found = look()
        if found is not None:
            return found
        time.sleep(0.01)
    raise AssertionError("it did not come to that in time")


@contextmanager
def live_gateway(
    database_url: str, state_dir: Path, settings: dict[str, str] | None = None
) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    """A gateway in front of a scripted upstream."""
    loop = Loop()
    upstream = ScriptedUpstream(loop)
    try:
        with LiveGateway(loop, database_url, upstream.base_url, state_dir, settings or {}) as gateway:
            yield gateway, upstream
    finally:
        upstream.close()
        loop.close()


ORDER = {"model": "gpt-image-2", "prompt": "a bean", "size": "1024x1024", "quality": "high"}
PRICE_MICRO_USD = 210_700
