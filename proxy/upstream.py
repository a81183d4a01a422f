"""The way to BeansAI: one POST, its answer as it comes. On the way of a request the only file
that knows the HTTP client, and no POST is sent twice.

The client's own conveniences are left out on purpose: no redirects, no cookies, no retries, no decoding.
"""

from __future__ import annotations

import ssl
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

import httpx2

from proxy.headers import Headers
from proxy.transport import Transport

Framing = Literal["length", "chunked", "close"]

CONNECT_SECONDS = 10


class Unreachable(Exception):
    """No connection was made: the upstream never heard of the request."""


class BrokeOff(Exception):
    """The exchange ended in the middle, after bytes of the request may have been sent."""


@dataclass(frozen=True, slots=True)
class Answer:
    """An answer that has begun. ``framing`` is how its end is told; ``length`` counts body bytes where that is by length.
    ``arrived``: all of it is here already, with the head."""

    status: int
    headers: Headers
    framing: Framing
    length: int | None
    arrived: bool
    _response: httpx2.Response

    async def pieces(self) -> AsyncIterator[bytes]:
        """The body in the pieces in which it comes. Raises :class:`BrokeOff` when it doesn't end as it was framed."""
        try:
            async for piece in self._response.stream:  # type: ignore[union-attr]
                if piece:
                    yield piece
        except (httpx2.TransportError, OSError, ssl.SSLError) as error:
            raise BrokeOff(type(error).__name__) from error

    async def close(self) -> None:
        """Give the connection back, or drop it where the body was not read to its end."""
        await self._response.stream.aclose()  # type: ignore[union-attr]


class _Body(httpx2.AsyncByteStream):
    """A request body for the client to read once."""

    def __init__(self, pieces: AsyncIterator[bytes]) -> None:
        self._pieces = pieces

    def __aiter__(self) -> AsyncIterator[bytes]:
        return self._pieces


class Upstream:
    """BeansAI at one base URL, such as ``https://api.beansai.dev/v1``."""

    def __init__(self, base_url: str, verify: ssl.SSLContext | bool = True) -> None:
        parts = urlsplit(base_url)
        self._path = parts.path.encode("ascii")
        self.host = parts.netloc.encode("ascii")
        # Parsed once: where it goes never changes, and what is asked for is the target below.
        self._url = url = httpx2.URL(base_url)
        tls = httpx2.create_ssl_context(verify=verify) if url.scheme == "https" else None
        self._transport = Transport(url, connect_seconds=CONNECT_SECONDS, tls=tls)

    async def post(self, path: str, query: bytes, headers: Headers, body: Callable[[], AsyncIterator[bytes]]) -> Answer:
        """Send one request to ``path`` below the base URL; its answer, as soon as the head of it is there.

        Raises :class:`Unreachable` when nothing was sent, :class:`BrokeOff` when anything may have been. Waits without a
        limit of its own: the caller keeps the deadline of the whole exchange.
        """
        target = self._path + path.encode("ascii") + (b"?" + query if query else b"")
        request = httpx2.Request(
            "POST",
            self._url,
            headers=list(headers),
            stream=_Body(body()),
            extensions={"target": target},
        )
        try:
            response = await self._transport.handle_async_request(request)
        except (httpx2.ConnectError, httpx2.ConnectTimeout, httpx2.PoolTimeout) as error:
            raise Unreachable(type(error).__name__) from error
        except (httpx2.TransportError, OSError, ssl.SSLError) as error:
            raise BrokeOff(type(error).__name__) from error
        if not 200 <= response.status_code < 600:
            # No answer that HTTP knows, and none that a server could pass on.
            await response.stream.aclose()  # type: ignore[union-attr]
            raise BrokeOff(f"status {response.status_code}")
        raw = response.headers.raw
        framing, length = _framing(response.status_code, raw)
        return Answer(response.status_code, raw, framing, length, response.extensions["arrived"], response)

    async def close(self) -> None:
        """Drop all connections."""
        await self._transport.aclose()


def _framing(status: int, headers: Headers) -> tuple[Framing, int | None]:
    names = {name.lower(): value for name, value in headers}
    if status in (204, 304):
        return "length", 0
    if b"transfer-encoding" in names:
        return "chunked", None
    if b"content-length" in names:
        return "length", int(names[b"content-length"].partition(b",")[0])
    return "close", None
