"""The HTTP edge: uvicorn, with what its parser lets through and we don't. The only file that knows the server's insides.

A request that two parsers could read in two ways is not answered in one of them: it ends here, before anything of it is
acted on.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import uvicorn
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol, RequestResponseCycle

from proxy.gateway import LINK
from proxy.headers import values

# A client's library sends a kilobyte or two; eight times that is nobody's mistake.
HEAD_BYTES_MAX = 32_768
HEADERS_MAX = 100
URL_BYTES_MAX = 8_192

# What may wait in our memory for one slow reader, beside the piece that is being written.
WAITING_BYTES_MAX = 512 * 1024

# The clients' own libraries let idle connections go after five seconds: they have to be first, or a request meets a
# connection that is being closed.
IDLE_SECONDS = 20

# After hanging up, what was written already has this long to reach the client.
LINGER_SECONDS = 30

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HOST = re.compile(rb"[0-9A-Za-z.\-_:\[\]%]{1,255}")


class Rejected(Exception):
    """The head of a request can't be trusted; the connection ends with a 400."""


class ClientLink:
    """One request's connection, for the exchange that answers it."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    @property
    def gone(self) -> bool:
        return self._cycle.disconnected

    def hang_up(self) -> None:
        # To the server, the client has left: what is still sent to it goes nowhere.
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        self._connection.flow.resume_writing()
        self._connection.end()


class Connection(HttpToolsProtocol):
    """One client's connection."""

    # Bytes of a head that is not complete yet; the parser keeps an unfinished line to itself and tells nothing of it.
    _head_bytes = 0
    _head_done = False

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        transport.set_write_buffer_limits(high=WAITING_BYTES_MAX)

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        if not self._head_done and not self.transport.is_closing():
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                self.send_400_response("The head of the request is too large.")

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._head_bytes = 0
        self._head_done = False

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the head come trailers, and nothing in them may pass for a header.
        if not self._head_done:
            super().on_header(name, value)

    def on_headers_complete(self) -> None:
        self._head_done = True
        check_head(self.url, self.headers)
        super().on_headers_complete()
        extensions: dict[str, Any] = {LINK: ClientLink(self, self.cycle)}
        self.scope["extensions"] = extensions

    def end(self) -> None:
        """Close once what is written has gone out, or after a while in any case."""
        self.transport.close()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def check_head(url: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise :class:`Rejected` for a head that is too large, or whose meaning depends on who reads it."""
    if len(url) > URL_BYTES_MAX or not url.startswith(b"/"):
        raise Rejected("a path, and not a long one, follows the method")
    if len(headers) > HEADERS_MAX or sum(len(name) + len(value) for name, value in headers) > HEAD_BYTES_MAX:
        raise Rejected("fewer headers")
    if any(_CONTROL.search(value) for _, value in headers):
        raise Rejected("no control characters")
    hosts, lengths, codings = (values(headers, name) for name in (b"host", b"content-length", b"transfer-encoding"))
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise Rejected("exactly one Host")
    if len(lengths) > 1 or (lengths and codings) or not all(re.fullmatch(rb"[0-9]{1,15}", length) for length in lengths):
        raise Rejected("one length, in digits")
    if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
        raise Rejected("no transfer coding but chunked")


def make_config(app: Any, drain_seconds: float, **more: Any) -> uvicorn.Config:
    """The server's configuration, with everything off that would add to an answer or to a log."""
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        loop="uvloop",
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=IDLE_SECONDS,
        timeout_graceful_shutdown=max(1, int(drain_seconds)),
        backlog=2048,
        **more,
    )
