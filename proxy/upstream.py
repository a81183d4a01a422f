"""The way to BeansAI: one POST, its answer as it comes. On the way of a request the only file
that knows the HTTP client, and no POST is sent twice.

The client's own conveniences are left out on purpose: no redirects, no cookies, no retries, no decoding.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator
from typing import Literal
from urllib.parse import urlsplit

import httpx2

from proxy.headers import Headers
from proxy.transport import Connection, Transport

Framing = Literal["length", "chunked", "close"]

CONNECT_SECONDS = 10


class Unreachable(Exception):
    """No connection was made: the upstream never heard of the request."""


class BrokeOff(Exception):
    """The exchange ended in the middle, after bytes of the request may have been sent."""


class Answer:
    """An answer that has begun. ``framing`` is how its end is told; ``length`` counts body bytes where that is by length.
    ``arrived``: all of it is here already, with the head."""

    __slots__ = ("_connection", "arrived", "framing", "headers", "length", "status")

    def __init__(self, connection: Connection) -> None:
        self._connection: Connection | None = connection
        self.status = connection.status
        self.headers: Headers = connection.headers
        self.arrived = connection.ended
        self.framing, self.length = _framing(self.status, self.headers)

    async def piece(self) -> bytes | None:
        """The next piece of the body as it came; ``None`` after the last. Raises :class:`BrokeOff` when the body doesn't end
        as it was framed."""
        assert self._connection is not None, "the answer is closed"
        try:
            return await self._connection.piece()
        except (httpx2.TransportError, OSError, ssl.SSLError) as error:
            raise BrokeOff(type(error).__name__) from error

    def close(self) -> None:
        """Give the connection back, or drop it where the body was not read to its end."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.release()


class Upstream:
    """BeansAI at one base URL, such as ``https://api.beansai.dev/v1``."""

    def __init__(self, base_url: str, verify: ssl.SSLContext | bool = True) -> None:
        parts = urlsplit(base_url)
        self._path = parts.path.encode("ascii")
        self.host = parts.netloc.encode("ascii")
        url = httpx2.URL(base_url)
        tls = httpx2.create_ssl_context(verify=verify) if url.scheme == "https" else None
        self._transport = Transport(url, connect_seconds=CONNECT_SECONDS, tls=tls)

    async def post(self, path: bytes, query: bytes, headers: Headers, body: bytes | AsyncIterator[bytes]) -> Answer:
        """Send one request to ``path`` below the base URL; its answer, as soon as the head of it is there. ``body`` is as long
        as the headers say.

        Raises :class:`Unreachable` when nothing was sent, :class:`BrokeOff` when anything may have been. Waits without a
        limit of its own: the caller keeps the deadline of the whole exchange.
        """
        head = _head(self._path + path + (b"?" + query if query else b""), headers)
        try:
            connection = await self._transport.send(head, body)
        except (httpx2.ConnectError, httpx2.ConnectTimeout) as error:
            raise Unreachable(type(error).__name__) from error
        except (httpx2.TransportError, OSError, ssl.SSLError) as error:
            raise BrokeOff(type(error).__name__) from error
        if not 200 <= connection.status < 600:
            # No answer that HTTP knows, and none that a server could pass on.
            connection.release()
            raise BrokeOff(f"status {connection.status}")
        return Answer(connection)

    def close(self) -> None:
        """Drop all connections that no exchange is on."""
        self._transport.close()


def _head(target: bytes, headers: Headers) -> bytes:
    """A request's first line and headers. Raises :class:`Unreachable` for what would end a line of them: nothing is sent."""
    lines = [b"POST %b HTTP/1.1" % target]
    lines += [b"%b: %b" % header for header in headers]
    head = b"\r\n".join(lines)
    if head.count(b"\n") != len(lines) - 1 or head.count(b"\r") != len(lines) - 1:
        raise Unreachable("a line break in the head of a request")
    return head + b"\r\n\r\n"


def _framing(status: int, headers: Headers) -> tuple[Framing, int | None]:
    names = {name.lower(): value for name, value in headers}
    if status in (204, 304):
        return "length", 0
    if b"transfer-encoding" in names:
        return "chunked", None
    if b"content-length" in names:
        return "length", int(names[b"content-length"].partition(b",")[0])
    return "close", None
