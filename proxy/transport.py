"""HTTP/1.1 to one upstream, beside the HTTP client's own transport: connections, and the answers on them.

The client's own asks every idle connection for its health at every request, parses in Python, and makes a request and a
response of some thirty objects; this one is told by the event loop when a connection ends, parses in C, and takes bytes. What
a paid POST needs is the same in both: nothing is ever sent twice, and an answer that didn't end as it was framed is an error.
Addresses, TLS settings and errors are the client's.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import cast

import httptools
import httpx2

# An idle connection that the other side is about to close turns a paid POST into a reset that nobody can explain. Servers
# keep idle connections for five seconds and more; one that was idle for longer than this is not used again.
IDLE_SECONDS = 2.0

# Up to this a body's first piece is copied behind the head, so that both are one write and one packet.
JOINED_BYTES_MAX = 64 * 1024

# Of an answer, what may wait in memory for its reader before the upstream is held back, and when it may go on. One read
# brings up to 256 KB, which may come on top: an answer gets no faster from more than that.
WAITING_BYTES_HIGH = 64 * 1024
WAITING_BYTES_LOW = 16 * 1024

# No server has more to say before its answer than this.
HEAD_BYTES_MAX = 256 * 1024


class _Surplus(Exception):
    """Something follows an answer's end, and belongs to nobody."""


class Connection(asyncio.Protocol):
    """One connection, with one exchange on it at a time. ``status`` and ``headers`` are those of the answer that has begun."""

    def __init__(self, idle: deque[Connection]) -> None:
        self._loop = asyncio.get_running_loop()
        self._idle = idle
        self._transport: asyncio.Transport
        self._waiter: asyncio.Future[None] | None = None
        self._writable = True
        self._closed = False
        self.idle_since = 0.0
        self._begin()

    def _begin(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.status = 0
        self.headers: list[tuple[bytes, bytes]] = []
        self._head_bytes = 0
        self._head_done = False
        self._interim = False
        self._pieces: deque[bytes] = deque()
        self._waiting_bytes = 0
        self._reading = True
        self._sent = False
        self._ended = False
        self._reusable = False
        self._error: Exception | None = None

    # What the transport tells

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Event loops bring classes of their own for it.
        self._transport = cast(asyncio.Transport, transport)

    def data_received(self, data: bytes) -> None:
        if self._ended:
            # Nothing was asked for: whatever this is, the connection is of no further use.
            self.drop()
            return
        try:
            self._parser.feed_data(data)
        except httptools.HttpParserError as error:
            self._fail(httpx2.RemoteProtocolError(type(error).__name__))
            return
        if not self._head_done:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self._fail(httpx2.RemoteProtocolError("the head of the answer has no end"))

    def pause_writing(self) -> None:
        self._writable = False

    def resume_writing(self) -> None:
        self._writable = True
        self._wake()

    def eof_received(self) -> None:
        """The other side has no more to say; what it still owes is missing."""

    def connection_lost(self, exc: Exception | None) -> None:
        self._closed = True
        if not self._ended:
            if exc is None and self._head_done and self._until_closed():
                self._ended = True
            elif self._error is None:
                self._error = httpx2.ReadError("the connection ended before the answer did")
        self._wake()

    # What the parser tells

    def on_message_begin(self) -> None:
        if self._ended:
            raise _Surplus

    def on_header(self, name: bytes, value: bytes) -> None:
        # Trailers come after the head, and are not passed on.
        if not self._head_done:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        self.status = self._parser.get_status_code()
        self._interim = 100 <= self.status < 200
        if self._interim:
            self.headers = []
            return
        self._head_done = True
        self._wake()

    def on_body(self, body: bytes) -> None:
        self._pieces.append(body)
        self._waiting_bytes += len(body)
        if self._waiting_bytes > WAITING_BYTES_HIGH and self._reading:
            self._reading = False
            self._transport.pause_reading()
        self._wake()

    def on_message_complete(self) -> None:
        if not self._interim:
            # Asked now: once the message is behind it, the parser forgets how it was framed, and says no.
            self._reusable = self._parser.should_keep_alive()
            self._ended = True
            self._wake()

    # What an exchange does

    async def send(self, head: bytes, body: bytes | AsyncIterator[bytes]) -> None:
        """Send a request. Returns early when the answer comes first, or raises when the connection ends before it does."""
        if isinstance(body, bytes):
            await self._send_whole(head, body)
        else:
            await self._send_pieces(head, body)
        while not self._decided():
            await self._sleep()
        if not self._head_done and self._error is not None:
            raise self._error

    async def _send_whole(self, head: bytes, body: bytes) -> None:
        if len(body) <= JOINED_BYTES_MAX:
            # One packet, and nothing to wait for: the system takes as little as this at once.
            self._transport.write(head + body)
            self._sent = True
            return
        self._transport.write(head)
        self._transport.write(body)
        await self._written()
        self._sent = not self._decided()

    async def _send_pieces(self, head: bytes, body: AsyncIterator[bytes]) -> None:
        self._transport.write(head)
        async for piece in body:
            self._transport.write(piece)
            await self._written()
            if self._decided():
                return
        self._sent = True

    async def _written(self) -> None:
        """Wait until the connection takes more, or there is no use in more."""
        while not self._writable and not self._decided():
            await self._sleep()

    async def piece(self) -> bytes | None:
        """The next piece of the body as it came; ``None`` after the last. Raises ``httpx2.TransportError`` for a body that
        doesn't end as it was framed."""
        while not self._pieces:
            if self._error is not None:
                raise self._error
            if self._ended:
                return None
            await self._sleep()
        piece = self._pieces.popleft()
        self._waiting_bytes -= len(piece)
        if not self._reading and self._waiting_bytes < WAITING_BYTES_LOW:
            self._reading = True
            self._transport.resume_reading()
        return piece

    def release(self) -> None:
        """Keep the connection for another exchange, or drop it where this one can't be known to have ended cleanly."""
        if self._ended and self._sent and not self._pieces and self._reusable and not self._closed:
            self._begin()
            self._ended = True  # until the next one begins
            self.idle_since = time.monotonic()
            self._idle.append(self)
        else:
            self.drop()

    def usable(self) -> bool:
        """Make ready for the next exchange; whether that is possible."""
        if self._closed or self._transport.is_closing() or time.monotonic() - self.idle_since > IDLE_SECONDS:
            self.drop()
            return False
        self._ended = False
        return True

    @property
    def ended(self) -> bool:
        """Whether the whole answer is here."""
        return self._ended

    def _decided(self) -> bool:
        """Whether the answer has begun, or can't begin any more."""
        return self._head_done or self._error is not None

    def _until_closed(self) -> bool:
        names = {name.lower() for name, _ in self.headers}
        return b"content-length" not in names and b"transfer-encoding" not in names

    def _fail(self, error: Exception) -> None:
        """The connection is of no further use, and neither is its answer, unless that was whole already."""
        if not self._ended:
            self._error = self._error or error
        self.drop()
        self._wake()

    def drop(self) -> None:
        """End the connection now."""
        self._transport.abort()

    async def _sleep(self) -> None:
        self._waiter = self._loop.create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


class Transport:
    """Connections to one origin, as many as there are exchanges. ``connect_seconds`` bounds the making of one."""

    def __init__(self, url: httpx2.URL, *, connect_seconds: float, tls: ssl.SSLContext | None) -> None:
        self._host = url.host
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = tls if url.scheme == "https" else None
        self._connect_seconds = connect_seconds
        # The latest last: what was used a moment ago is the least likely to be closed by the other side.
        self._idle: deque[Connection] = deque()

    async def send(self, head: bytes, body: bytes | AsyncIterator[bytes]) -> Connection:
        """Send a request, its head as it stands on the wire; the connection as soon as the head of the answer is there. Whoever
        has it releases it.

        Raises ``httpx2.ConnectError`` or ``ConnectTimeout`` when nothing was sent, another ``TransportError`` when
        anything may have been.
        """
        connection = self._take() or await self._connect()
        try:
            await connection.send(head, body)
        except BaseException:
            connection.release()
            raise
        return connection

    def close(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().drop()

    def _take(self) -> Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
        return None

    async def _connect(self) -> Connection:
        loop = asyncio.get_running_loop()
        server_hostname = self._host if self._tls is not None else None
        try:
            async with asyncio.timeout(self._connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: Connection(self._idle), self._host, self._port, ssl=self._tls, server_hostname=server_hostname
                )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout("no connection in time") from error
        except OSError as error:
            raise httpx2.ConnectError(type(error).__name__) from error
        return connection
