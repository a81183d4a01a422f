"""HTTP/1.1 to one upstream, as a transport for the HTTP client: connections, and the answers on them.

The client's own transport asks every idle connection for its health at every request and parses in Python; this one is told
by the event loop when a connection ends, and parses in C. What a paid POST needs
is the same in both: nothing is ever sent twice, and an answer that didn't end as it was framed is an error.
"""

from __future__ import annotations

import asyncio
import ssl
import time
from collections import deque
from collections.abc import AsyncIterator
from typing import Any, cast

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


class _Connection(asyncio.Protocol):
    """One connection, with one exchange on it at a time."""

    def __init__(self, idle: deque[_Connection]) -> None:
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

    async def send(self, head: bytes, body: AsyncIterator[bytes]) -> None:
        """Send a request. Returns early when the answer comes first, or raises when the connection ends before it does."""
        async for piece in body:
            # One packet where that is cheap; a head without a body would only make the other side wait.
            if len(piece) <= JOINED_BYTES_MAX:
                piece, head = head + piece, b""
            elif head:
                self._transport.write(head)
                head = b""
            if piece:
                self._transport.write(piece)
            while not self._writable and not self._decided():
                await self._sleep()
            if self._decided():
                break
        else:
            if head:
                self._transport.write(head)
            self._sent = True
        while not self._decided():
            await self._sleep()
        if not self._head_done and self._error is not None:
            raise self._error

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body, in the pieces in which it comes."""
        while True:
            while self._pieces:
                piece = self._pieces.popleft()
                self._waiting_bytes -= len(piece)
                if not self._reading and self._waiting_bytes < WAITING_BYTES_LOW:
                    self._reading = True
                    self._transport.resume_reading()
                yield piece
            if self._error is not None:
                raise self._error
            if self._ended:
                return
            await self._sleep()

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


class _Body(httpx2.AsyncByteStream):
    """An answer's body, for the client."""

    def __init__(self, connection: _Connection) -> None:
        self._connection: _Connection | None = connection
        self._pieces = connection.pieces()

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces

    async def aclose(self) -> None:
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()


class Transport(httpx2.AsyncBaseTransport):
    """Connections to one origin, as many as there are exchanges. ``connect_seconds`` bounds the making of one."""

    def __init__(self, url: httpx2.URL, *, connect_seconds: float, tls: ssl.SSLContext | None) -> None:
        self._host = url.host
        self._port = url.port or (443 if url.scheme == "https" else 80)
        self._tls = tls if url.scheme == "https" else None
        self._connect_seconds = connect_seconds
        # The latest last: what was used a moment ago is the least likely to be closed by the other side.
        self._idle: deque[_Connection] = deque()

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send a request and return its answer as soon as the head of it is there.

        Raises ``httpx2.ConnectError`` or ``ConnectTimeout`` when nothing was sent, another ``TransportError`` when
        anything may have been.
        """
        head = _head(request)
        connection = self._take() or await self._connect()
        try:
            assert isinstance(request.stream, httpx2.AsyncByteStream)
            await connection.send(head, aiter(request.stream))
        except BaseException:
            connection.release()
            raise
        body = _Body(connection)
        extensions = {"arrived": connection.ended}
        return httpx2.Response(connection.status, headers=connection.headers, stream=body, extensions=extensions)

    async def aclose(self) -> None:
        """Close what is idle."""
        while self._idle:
            self._idle.pop().drop()

    def _take(self) -> _Connection | None:
        while self._idle:
            connection = self._idle.pop()
            if connection.usable():
                return connection
        return None

    async def _connect(self) -> _Connection:
        loop = asyncio.get_running_loop()
        server_hostname = self._host if self._tls is not None else None
        try:
            async with asyncio.timeout(self._connect_seconds):
                _, connection = await loop.create_connection(
                    lambda: _Connection(self._idle), self._host, self._port, ssl=self._tls, server_hostname=server_hostname
                )
        except TimeoutError as error:
            raise httpx2.ConnectTimeout("no connection in time") from error
        except OSError as error:
            raise httpx2.ConnectError(type(error).__name__) from error
        return connection


def _head(request: httpx2.Request) -> bytes:
    """A request's first line and headers. Raises ``httpx2.LocalProtocolError`` for what would end a line of them."""
    target: Any = request.extensions.get("target") or request.url.raw_path
    lines = [b"%b %b HTTP/1.1" % (request.method.encode("ascii"), target)]
    lines += [b"%b: %b" % header for header in request.headers.raw]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise httpx2.LocalProtocolError("a line break in the head of a request")
    return head + b"\r\n\r\n"
