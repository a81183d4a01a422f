"""The HTTP edge: uvicorn, with what its parser lets through and we don't. The only file that knows the server's insides.

A request that two parsers could read in two ways is not answered in one of them: it ends here, before anything of it is
acted on.
"""

from __future__ import annotations

import asyncio
import re
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast
from urllib.parse import unquote

import httptools
import structlog
import uvicorn
from uvicorn.protocols.http.httptools_impl import STATUS_LINE, HttpToolsProtocol, RequestResponseCycle
from uvicorn.server import ServerState

from proxy.errors import SOURCE_HEADER, HeadTooLarge, Refusal, RequestTimeout, Unreadable, UrlTooLong
from proxy.gateway import LINK
from proxy.headers import Headers, value

# A client's library sends a kilobyte or two; eight times that is nobody's mistake.
HEAD_BYTES_MAX = 32_768
HEADERS_MAX = 100
URL_BYTES_MAX = 8_192

# Up to this it is cheaper to copy pieces into one than to hand them to the kernel one by one.
CORKED_BYTES_MAX = 16 * 1024

# What may wait in our memory for one slow reader, beside the piece that is being written.
WAITING_BYTES_MAX = 256 * 1024

# A head is a few kilobytes in one piece: who takes longer is not going to ask anything. A connection that has said nothing
# yet counts too, for it costs a descriptor.
HEAD_SECONDS = 10

# The clients' own libraries let idle connections go after five seconds: they have to be first, or a request meets a
# connection that is being closed.
IDLE_SECONDS = 20

# A body comes at a kilobyte a second at least, the pace of the first mobile phones; over half a minute, since a good
# connection can be dead for some seconds and live again.
BODY_SECONDS = 30
BODY_BYTES_MIN = BODY_SECONDS * 1024

# After hanging up, what was written already has this long to reach the client.
LINGER_SECONDS = 30

# How often is looked whether the last answers have gone out.
LOOK_SECONDS = 0.05

# When everything is over: how long the last bytes of answers that were broken off may take.
CLOSE_SECONDS = 2

# Clients that may wait to be accepted while all workers are busy.
BACKLOG = 2048

# What no line of a head may hold, beside the two characters that end it.
_BROKEN = bytes([*range(0x09), 0x0B, 0x0C, *range(0x0E, 0x20), 0x7F])

_CONTROL = re.compile(rb"[\x00-\x08\x0a-\x1f\x7f]")
_HOST = re.compile(rb"[0-9A-Za-z.\-_:\[\]%]{1,255}")
_LENGTH = re.compile(rb"[0-9]{1,15}")

_ASGI = {"version": "3.0", "spec_version": "2.3"}


log = structlog.get_logger(__name__)


@dataclass(frozen=True, slots=True)
class Patience:
    """How long a connection may keep us waiting: for a head, between requests, and for so many bytes of a body."""

    head_seconds: float = HEAD_SECONDS
    idle_seconds: float = IDLE_SECONDS
    body_seconds: float = BODY_SECONDS
    body_bytes_min: int = BODY_BYTES_MIN

    @property
    def shortest_seconds(self) -> float:
        return min(self.head_seconds, self.idle_seconds, self.body_seconds)


PATIENCE = Patience()


class _Corked:
    """A transport that gathers what is written in one turn of the event loop: a head, a body and its end are three writes, and
    each of them a call into the kernel and a packet."""

    def __init__(self, transport: asyncio.Transport, loop: asyncio.AbstractEventLoop) -> None:
        self._transport = transport
        self._loop = loop
        self._pieces: list[bytes] = []
        self._bytes = 0

    def __getattr__(self, name: str) -> Any:
        return getattr(self._transport, name)

    def write(self, data: bytes) -> None:
        if not self._pieces and data:
            self._loop.call_soon(self.flush)
        self._pieces.append(data)
        self._bytes += len(data)
        if self._bytes > CORKED_BYTES_MAX:
            self.flush()

    def write_now(self, data: bytes) -> None:
        """Write what ends an answer, behind whatever waits: nothing more comes in this turn."""
        if self._pieces:
            self.write(data)
            self.flush()
        elif not self._transport.is_closing():
            self._transport.write(data)

    def flush(self) -> None:
        pieces, self._pieces, self._bytes = self._pieces, [], 0
        if not pieces or self._transport.is_closing():
            # The connection may have ended since, and a closed one takes nothing, not even nothing.
            return
        if len(pieces) == 1 or sum(map(len, pieces)) <= CORKED_BYTES_MAX:
            self._transport.write(b"".join(pieces))
        else:
            self._transport.writelines(pieces)

    def close(self) -> None:
        self.flush()
        self._transport.close()

    def get_write_buffer_size(self) -> int:
        return self._bytes + self._transport.get_write_buffer_size()


class ClientLink:
    """One request's connection, for the exchange that answers it."""

    __slots__ = ("_connection", "_cycle")

    def __init__(self, connection: Connection, cycle: RequestResponseCycle) -> None:
        self._connection = connection
        self._cycle = cycle

    @property
    def gone(self) -> bool:
        return self._cycle.disconnected

    def answer(self, status: int, head: Headers, body: bytes) -> bool:
        """Send a whole answer in one write, as the cycle would in three steps; False where it needs those."""
        cycle = self._cycle
        if cycle.disconnected or cycle.response_started or cycle.flow.write_paused or len(body) > CORKED_BYTES_MAX:
            return False
        if value(head, b"content-length") != b"%d" % len(body) or value(head, b"connection") is not None:
            return False
        lines = b"".join([b"%b: %b\r\n" % field for field in head])
        ends = lines.count(b"\r\n"), lines.count(b"\r"), lines.count(b"\n")
        if ends != (len(head),) * 3 or len(lines.translate(None, _BROKEN)) != len(lines):
            return False
        cycle.response_started = cycle.response_complete = True
        cycle.waiting_for_100_continue = False
        cycle.message_event.set()
        ending = b"\r\n" if cycle.keep_alive else b"connection: close\r\n\r\n"
        self._connection.corked.write_now(STATUS_LINE[status] + lines + ending + body)
        if not cycle.keep_alive:
            self._connection.transport.close()
        cycle.on_response()
        return True

    def hang_up(self) -> None:
        # To the server, the client has left: what is still sent to it goes nowhere.
        self._cycle.disconnected = True
        self._cycle.message_event.set()
        self._connection.flow.resume_writing()
        self._connection.end()


class Connection(HttpToolsProtocol):
    """One client's connection."""

    def __init__(self, config: uvicorn.Config, server_state: ServerState, patience: Patience) -> None:
        super().__init__(config, server_state, app_state={})
        self._patience = patience
        # Bytes since the parser last told of anything; it keeps an unfinished line, a header's or a trailer's, to itself.
        self._untold_bytes = 0
        self._in_head = False
        self._last = False
        self._running: RequestResponseCycle | None = None
        self._deadline = 0.0
        self._body_bytes = 0
        self._paused = False
        self._timer: asyncio.TimerHandle | None = None

    @property
    def busy(self) -> bool:
        """Whether a request is half here, or an answer has not gone out yet."""
        return self._in_head or self._unanswered is not None or self.transport.get_write_buffer_size() > 0

    @property
    def _unanswered(self) -> RequestResponseCycle | None:
        """The latest request, unless its answer is complete."""
        cycle = cast("RequestResponseCycle | None", self.cycle)
        return None if cycle is None or cycle.response_complete else cycle

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self.corked = _Corked(transport, self.loop)
        super().connection_made(cast("asyncio.Transport", self.corked))
        transport.set_write_buffer_limits(high=WAITING_BYTES_MAX)
        self._allow(self._patience.head_seconds)
        self._watch()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        # Of several requests in a row only the latest has been told; the one that is being answered is an earlier one.
        if self._running is not None and not self._running.response_complete:
            self._running.disconnected = True
            self._running.message_event.set()
        if self._timer is not None:
            self._timer.cancel()

    def data_received(self, data: bytes) -> None:
        self._untold_bytes += len(data)
        try:
            self._feed(data)
        except httptools.HttpParserError as error:
            cause = error.__context__
            self.reject(cause if isinstance(cause, Refusal) else Unreadable("The request can't be read as HTTP/1.1."))
        else:
            if self._untold_bytes > HEAD_BYTES_MAX:
                long_url = self._in_head and len(self.url) > URL_BYTES_MAX
                self.reject(UrlTooLong(URL_BYTES_MAX) if long_url else HeadTooLarge(HEAD_BYTES_MAX, HEADERS_MAX))

    def reject(self, refusal: Refusal) -> None:
        """Refuse what can't be read, and close; a request that came whole before it is owed its answer first."""
        log.info("rejected", code=refusal.code, status=refusal.status, reason=refusal.message)
        request = self._unanswered
        if request is not None and not request.more_body:
            request.keep_alive = False
            self.flow.pause_reading()
            return
        # In the middle of another answer the words of this one would pass for a part of it.
        if not self.pipeline and (request is None or not request.response_started):
            self.transport.write(_answer(refusal))
        if request is not None:
            # What can't be read may stand in this request's own body: nothing more is done for it.
            request.disconnected = True
            request.message_event.set()
        self.end()

    def on_message_begin(self) -> None:
        self.url = b""
        self.headers = []
        self._in_head = True
        if self.cycle is not None:
            # The first head's time began with the connection.
            self._allow(self._patience.head_seconds)

    def on_header(self, name: bytes, value: bytes) -> None:
        # After the head come trailers, and nothing in them may pass for a header.
        if self._in_head:
            # The blanks behind a value are no part of it, and the way upstream takes none.
            self.headers.append((name.lower(), value.rstrip(b" \t")))

    def on_headers_complete(self) -> None:
        self._untold_bytes = 0
        self._in_head = False
        version = self.parser.get_http_version()
        method = self.parser.get_method()
        if version not in ("1.1", "1.0") or method == b"CONNECT":
            raise Unreadable("HTTP/1.1 is spoken here, and there is no tunnel.")
        check_head(self.url, self.headers)
        if self.parser.should_upgrade():
            return
        self._expect_body()
        before = self._unanswered
        self.cycle = cycle = self._cycle(method.decode("ascii"), version)
        if before is None:
            self._start_asgi_task(cycle, self.app)
        else:
            self.flow.pause_reading()
            self.pipeline.appendleft((cycle, self.app))

    def _cycle(self, method: str, version: str) -> RequestResponseCycle:
        """The request whose head is complete, as an application is told of it."""
        path, _, query = self.url.partition(b"?")
        extensions: dict[str, Any] = {}
        scope: Any = {
            "type": "http",
            "asgi": _ASGI,
            "http_version": version,
            "method": method,
            "scheme": self.scheme,
            "server": self.server,
            "client": self.client,
            "root_path": "",
            "path": unquote(path.decode("ascii")),
            "raw_path": path,
            "query_string": query,
            "headers": self.headers,
            "state": {},
            "extensions": extensions,
        }
        cycle = RequestResponseCycle(
            scope=scope,
            transport=self.transport,
            flow=self.flow,
            logger=self.logger,
            access_logger=self.access_logger,
            access_log=False,
            default_headers=self.server_state.default_headers,
            message_event=asyncio.Event(),
            expect_100_continue=(value(self.headers, b"expect") or b"").lower() == b"100-continue",
            keep_alive=not self._last and version == "1.1" and self.parser.should_keep_alive(),
            on_response=self.on_response_complete,
        )
        extensions[LINK] = ClientLink(self, cycle)
        return cycle

    def on_body(self, body: bytes) -> None:
        self._untold_bytes = 0
        super().on_body(body)
        self._body_bytes += len(body)
        self._paused |= self.flow.read_paused

    def on_message_complete(self) -> None:
        self._untold_bytes = 0
        if not self.parser.should_upgrade():
            super().on_message_complete()

    def on_response_complete(self) -> None:
        if self.transport.is_closing():
            return
        self.flow.resume_reading()
        if self.pipeline:
            self._expect_body()
            self._start_asgi_task(*self.pipeline.pop())
        else:
            self._allow(self._patience.head_seconds if self._in_head else self._patience.idle_seconds)

    def shutdown(self) -> None:
        """Answer what is being asked, or what comes next, and nothing after that."""
        self._last = True
        if self._unanswered is not None:
            self._unanswered.keep_alive = False

    def _start_asgi_task(self, cycle: RequestResponseCycle, app: Any) -> None:
        self._running = cycle
        super()._start_asgi_task(cycle, app)

    def _allow(self, seconds: float) -> None:
        self._deadline = self.loop.time() + seconds

    def _expect_body(self) -> None:
        self._body_bytes = 0
        self._paused = self.flow.read_paused
        self._allow(self._patience.body_seconds)

    def _watch(self) -> None:
        # Whatever happens meanwhile sets a deadline at least this far away, so a look this often is never late.
        now = self.loop.time()
        if now >= self._deadline and not self.transport.is_closing():
            if self._kept_waiting():
                self._give_up()
                return
            self._expect_body()
        wait = min(self._deadline - now, self._patience.shortest_seconds)
        self._timer = self.loop.call_later(max(0.0, wait), self._watch)

    def _kept_waiting(self) -> bool:
        """Whether it is the client that did not do its part until the deadline, and not we who did not read or answer."""
        request = self._unanswered
        if request is None:
            return True
        if self.pipeline or self._paused or self.flow.read_paused:
            return False
        return request.more_body and self._body_bytes < self._patience.body_bytes_min

    def _give_up(self) -> None:
        if self._in_head or self._unanswered is not None:
            self.reject(RequestTimeout())
        else:
            self.end()

    def _feed(self, data: bytes) -> None:
        while True:
            try:
                self.parser.feed_data(data)
                return
            except httptools.HttpParserUpgrade as offer:
                self._decline_upgrade()
                data = data[offer.args[0] :]

    def _decline_upgrade(self) -> None:
        # Some clients offer HTTP/2 with their first request. The parser takes whatever follows the head for the other
        # protocol, the request's own body too, so the head is read once more without the offer.
        version = self.parser.get_http_version().encode("ascii")
        lines = [b"%s %s HTTP/%s" % (self.parser.get_method(), self.url, version)]
        lines += [b"%s: %s" % header for header in self.headers if header[0] != b"upgrade"]
        self.parser = httptools.HttpRequestParser(self)
        self.parser.feed_data(b"\r\n".join([*lines, b"", b""]))

    def end(self) -> None:
        """Close once what is written has gone out, or after a while in any case."""
        self.transport.close()
        self.loop.call_later(LINGER_SECONDS, self.transport.abort)


def check_head(url: bytes, headers: list[tuple[bytes, bytes]]) -> None:
    """Raise a :class:`Refusal` for a head that is too large, or whose meaning depends on who reads it."""
    if len(url) > URL_BYTES_MAX:
        raise UrlTooLong(URL_BYTES_MAX)
    if not url.startswith(b"/") or b"#" in url:
        raise Unreadable("A path follows the method, and no fragment follows the path.")
    hosts, lengths, codings = [], [], []
    size = 0
    for name, content in headers:
        size += len(name) + len(content)
        if name == b"host":
            hosts.append(content)
        elif name == b"content-length":
            lengths.append(content)
        elif name == b"transfer-encoding":
            codings.append(content)
        if _CONTROL.search(content):
            raise Unreadable("Headers hold no control characters.")
    if len(headers) > HEADERS_MAX or size > HEAD_BYTES_MAX:
        raise HeadTooLarge(HEAD_BYTES_MAX, HEADERS_MAX)
    if len(hosts) != 1 or not _HOST.fullmatch(hosts[0]):
        raise Unreadable("A request has exactly one Host.")
    if len(lengths) > 1 or (lengths and codings) or not all(map(_LENGTH.fullmatch, lengths)):
        raise Unreadable("A body has one length, in digits, or is chunked.")
    if codings and [coding.strip().lower() for coding in codings] != [b"chunked"]:
        raise Unreadable("There is no transfer coding but chunked.")


def _answer(refusal: Refusal) -> bytes:
    """A refusal as it stands on the wire, with the end of the connection announced."""
    body = refusal.body()
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"connection", b"close"),
        SOURCE_HEADER,
        *refusal.headers,
    ]
    return STATUS_LINE[refusal.status] + b"".join(b"%s: %s\r\n" % field for field in head) + b"\r\n" + body


class Server:
    """Serves an ASGI application on one listening socket, from :meth:`start` over :meth:`drain` to :meth:`close`."""

    def __init__(self, app: Any, patience: Patience = PATIENCE) -> None:
        self._config = _config(app)
        self._state = ServerState()
        self._patience = patience

    async def start(self, listener: socket.socket) -> None:
        """Accept connections; the socket is the server's from now on."""
        loop = asyncio.get_running_loop()
        self._accepting = await loop.create_server(self._connection, sock=listener, backlog=BACKLOG)

    async def drain(self, seconds: float, at_once: asyncio.Event) -> bool:
        """Refuse new connections, and wait until everything that was begun is answered, whoever is left to read it.

        Waits for at most ``seconds``, and until ``at_once`` is set; whether nothing is open any more.
        """
        self._accepting.close()
        for connection in self._connections():
            connection.shutdown()
        await self._wait(lambda: not self._busy() or at_once.is_set(), seconds)
        return not self._busy()

    async def close(self) -> None:
        """End all connections; what was written still has a moment to go out."""
        for connection in self._connections():
            connection.end()
        await self._wait(lambda: not self._state.connections and not self._state.tasks, CLOSE_SECONDS)
        for connection in self._connections():
            connection.transport.abort()
        for task in self._state.tasks:
            task.cancel()

    async def _wait(self, done: Callable[[], bool], seconds: float) -> None:
        give_up_at = time.monotonic() + seconds
        # Nobody is told when the last task or connection is gone.
        while not done() and time.monotonic() < give_up_at:  # noqa: ASYNC110
            await asyncio.sleep(LOOK_SECONDS)

    def _connection(self) -> Connection:
        return Connection(self._config, self._state, self._patience)

    def _connections(self) -> list[Connection]:
        return [connection for connection in self._state.connections if isinstance(connection, Connection)]

    def _busy(self) -> bool:
        # A request whose client has left has no connection, and still a task.
        return bool(self._state.tasks) or any(connection.busy for connection in self._connections())


def _config(app: Any) -> uvicorn.Config:
    """The server's configuration, with everything off that would add to an answer or to a log."""
    config = uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        date_header=False,
        proxy_headers=False,
    )
    config.load()
    return config
