"""The simulator's HTTP/1.1 edge, on bare streams: it can also reset, cut and fall silent. Only here are bytes read and sent.

An HTTP server's whole purpose is to never do these things, so this one is written by hand. It is a test instrument for
loopback: lenient in what it reads (the log shows exactly what came), exact in what it sends.
"""

from __future__ import annotations

import asyncio
import fcntl
import socket
import struct
import termios
from collections import deque
from collections.abc import Callable, Iterable
from http import HTTPStatus

import httptools

from proxy.simulator.bills import Arrival
from proxy.simulator.directives import Ending, Framing

# A head that isn't complete after this much gets 431; the SDKs send less than two kilobytes.
HEAD_BYTES_MAX = 65_536

# Large enough to keep a gigabyte a second going, small enough that a slow reader costs no memory.
PIECE_BYTES = 262_144

# Loopback takes a buffer in milliseconds; a reader that doesn't in ten seconds gets its reset without the rest.
_FLUSH_LOOK_SECONDS = 0.001
_FLUSH_LOOKS = 10_000

# How long a client is given to close its side after ours is closed.
_LEAVE_SECONDS = 10.0


class Refused(Exception):
    """A request that HTTP itself forbids, or that is over a limit; answered with ``status``, and the connection closed."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status


class Request:
    """A request as it comes in: what is logged of it, and its body, which is hashed as it arrives."""

    def __init__(self, arrival: Arrival) -> None:
        self.arrival = arrival
        self.body = bytearray()
        self.keep_alive = True

    def take(self, data: bytes) -> None:
        self.body += data
        self.arrival.body_bytes += len(data)
        self.arrival.body_digest.update(data)


class RequestReader:
    """Reads one connection's requests in their order.

    ``arrived`` is called once a head is complete, so that requests whose bodies never end are seen too.
    """

    def __init__(
        self, reader: asyncio.StreamReader, wire: Wire, body_bytes_max: int, arrived: Callable[[Arrival], None]
    ) -> None:
        self._reader = reader
        self._wire = wire
        self._body_bytes_max = body_bytes_max
        self._arrived = arrived
        self._parser = httptools.HttpRequestParser(self)
        self._ready: deque[Request] = deque()
        self._head_bytes = 0
        self._begin()

    async def next(self) -> Request | None:
        """The next whole request, or ``None`` once the client has left. Raises :class:`Refused`."""
        while not self._ready:
            data = await self._reader.read(PIECE_BYTES)
            if not data:
                return None
            try:
                self._parser.feed_data(data)
            except httptools.HttpParserCallbackError as error:
                # The parser wraps what its callbacks raise.
                raise error.__context__ if isinstance(error.__context__, Refused) else error from None
            except (httptools.HttpParserError, httptools.HttpParserUpgrade):
                raise Refused(400) from None
            self._check_head(len(data))
        return self._ready.popleft()

    def _begin(self) -> None:
        self._url = b""
        self._headers: list[tuple[str, str]] = []
        self._request: Request | None = None

    def _check_head(self, data_bytes: int) -> None:
        """Counts what has come since the last complete head; the parser tells of a header only when it is whole."""
        in_head = self._request is None and not self._ready
        self._head_bytes = self._head_bytes + data_bytes if in_head else 0
        if self._head_bytes > HEAD_BYTES_MAX:
            raise Refused(431)

    # What follows is called by the parser.

    def on_message_begin(self) -> None:
        self._begin()

    def on_url(self, url: bytes) -> None:
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        if self._request is None:  # A trailer comes after the head, and is none of ours.
            self._headers.append((name.decode("latin-1"), value.decode("latin-1")))

    def on_headers_complete(self) -> None:
        path, _, query = self._url.decode("latin-1").partition("?")
        arrival = Arrival(self._parser.get_method().decode(), path, query, self._headers)
        self._request = Request(arrival)
        self._request.keep_alive = self._parser.should_keep_alive()
        self._arrived(arrival)
        if (arrival.header("expect") or "").lower() == "100-continue":
            self._wire.send_continue()

    def on_body(self, data: bytes) -> None:
        assert self._request is not None
        if self._request.arrival.body_bytes + len(data) > self._body_bytes_max:
            self._request.arrival.status = 413
            raise Refused(413)
        self._request.take(data)

    def on_message_complete(self) -> None:
        assert self._request is not None
        self._request.arrival.complete = True
        self._ready.append(self._request)


class Wire:
    """One connection's way out. Once the client has left, everything sent is dropped: the simulator goes on making."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._reader = reader
        self._writer = writer
        self._chunked = False
        writer.transport.set_write_buffer_limits(high=PIECE_BYTES)
        writer.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def send_continue(self) -> None:
        self._writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")

    async def send_head(self, status: int, headers: Iterable[tuple[str, str]], framing: Framing, body_bytes: int) -> None:
        """The status line and headers; ``body_bytes`` is declared where ``framing`` is ``length``."""
        self._chunked = framing == "chunked"
        phrase = HTTPStatus(status).phrase if status in set(HTTPStatus) else "Simulated"
        lines = [f"HTTP/1.1 {status} {phrase}", *(f"{name}: {value}" for name, value in headers)]
        if framing == "length":
            lines.append(f"content-length: {body_bytes}")
        if framing == "chunked":
            lines.append("transfer-encoding: chunked")
        if framing == "close":
            lines.append("connection: close")
        await self._send("\r\n".join([*lines, "", ""]).encode("latin-1"))

    async def send_body(self, data: bytes) -> None:
        """A part of the body, in pieces, as fast as the client reads."""
        for start in range(0, len(data), PIECE_BYTES):
            piece = data[start : start + PIECE_BYTES]
            await self._send(b"%x\r\n%b\r\n" % (len(piece), piece) if self._chunked else piece)

    async def finish_body(self) -> None:
        if self._chunked:
            await self._send(b"0\r\n\r\n")

    async def end(self, ending: Ending, silent_seconds: float = 0.0) -> None:
        """Ends the connection without another byte: by a reset, by a clean close, or by a close after a long silence."""
        if ending == "silent":
            await self._wait_for_leave(silent_seconds)
        await self._flush()
        if self._writer.transport.is_closing():
            return
        if ending == "reset":
            # With no time to linger, closing sends RST in place of FIN.
            sock = self._writer.get_extra_info("socket")
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        else:
            # Closing with bytes unread would reset the connection, and the client might lose the answer.
            self._writer.write_eof()
            await self._wait_for_leave(_LEAVE_SECONDS)
        self._writer.transport.abort()

    async def _send(self, data: bytes) -> None:
        if self._writer.transport.is_closing():
            return
        try:
            self._writer.write(data)
            await self._writer.drain()
        except OSError:
            self._writer.transport.abort()

    async def _wait_for_leave(self, seconds: float) -> None:
        try:
            async with asyncio.timeout(seconds):
                while await self._reader.read(PIECE_BYTES):
                    pass
        except (OSError, TimeoutError):
            pass

    async def _flush(self) -> None:
        """Waits until the client's machine has all that was sent: an abort throws away what is still on its way."""
        transport = self._writer.transport
        for _ in range(_FLUSH_LOOKS):
            if transport.is_closing():
                return
            if not transport.get_write_buffer_size() and not _unacknowledged_bytes(transport.get_extra_info("socket").fileno()):
                return
            # The kernel tells nobody when its buffer has gone: one has to look.
            await asyncio.sleep(_FLUSH_LOOK_SECONDS)


def _unacknowledged_bytes(descriptor: int) -> int:
    return int(struct.unpack("i", fcntl.ioctl(descriptor, termios.TIOCOUTQ, b"\0" * 4))[0])
