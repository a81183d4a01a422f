"""From a client's request to an exchange: who calls, what is asked for, what it may cost. Nothing here is committed or
sent; a refusal leaves no trace in the books."""

from __future__ import annotations

import asyncio
import hashlib
import re
import time
from collections.abc import Awaitable, Callable, Mapping, MutableMapping
from datetime import datetime
from pathlib import Path
from typing import Any

import structlog

from proxy import headers, tokens
from proxy.errors import (
    IncompleteBody,
    InvalidValue,
    LedgerUnavailable,
    Refusal,
    RequestTooLarge,
    StorageUnavailable,
)
from proxy.exchange import Client, Desk, Exchange, Link, Request, Send, refuse
from proxy.keyring import Keyring
from proxy.ledger.decisions import Repeatable
from proxy.metrics import NO_TEAM
from proxy.orders import Reading, open_order
from proxy.prices import Operation
from proxy.spool import Spool, SpoolFull

Receive = Callable[[], Awaitable[MutableMapping[str, Any]]]

# Where the server puts the client's :class:`~proxy.exchange.Link` in an ASGI scope's extensions.
LINK = "beanmeter.link"

log = structlog.get_logger(__name__)


class Gateway:
    """Takes priced requests, in the event loop in which it is made. ``clock`` gives UTC; ``spool_directory`` keeps larger
    bodies while they are read and sent."""

    def __init__(
        self,
        desk: Desk,
        keyring: Keyring,
        clock: Callable[[], datetime],
        *,
        aliases: Mapping[str, str],
        max_body_bytes: int,
        spool_directory: Path,
    ) -> None:
        self._desk = desk
        self._keyring = keyring
        self._clock = clock
        self._aliases = aliases
        self._max_body_bytes = max_body_bytes
        self._spool_directory = spool_directory
        # To ask which loop runs, and which task in that, is a call into the kernel each time: once here, and once an exchange.
        self._loop = asyncio.get_running_loop()
        self._exchanges: set[asyncio.Task[Any]] = set()
        self._closed = False

    async def handle(self, operation: Operation, scope: Mapping[str, Any], receive: Receive, send: Send) -> None:
        """Serve one ``POST`` of a priced path, as an ASGI application does."""
        started = time.perf_counter()
        link: Link | None = scope.get("extensions", {}).get(LINK)
        client = Client(send, link)
        request_id = tokens.new_request_id(self._clock())
        body = Spool(self._spool_directory)
        team = NO_TEAM
        span = self._desk.tracer.start(operation, scope["headers"], request_id)
        try:
            holder = await self._keyring.holder(scope["headers"])
            team = holder.team
            self._observe("authenticate", started)
            repeat = _Repeat(operation, scope["headers"])
            reading = await self._read(operation, scope["headers"], receive, body, repeat)
            if self._closed:
                # Those that had begun have been ended. What one that begins now had sent, nobody would be there to book.
                raise LedgerUnavailable("This gateway is ending, so this request could not be booked any more")
            request = Request(
                request_id=request_id,
                holder=holder,
                reading=reading,
                hold_micro_usd=self._desk.card.hold(reading.dearest),
                query=scope["query_string"],
                headers=span.headers(scope["headers"]),
                body=body,
                repeat=repeat.digests(),
                span=span,
                started=started,
            )
        except Refusal as refusal:
            body.close()
            self._desk.metrics.refused(team, refusal.code)
            log.info("refused", request_id=request_id, team=team, code=refusal.code, status=refusal.status, **span.ids)
            span.refused(refusal.code, status=refusal.status, team=team, order=None)
            await refuse(client, refusal, request_id)
            return
        except BaseException:
            body.close()
            span.close()
            raise
        await self._carry_out(request, client)

    async def close(self) -> None:
        """Bring every exchange that still goes on to its end now: what is known of it is booked. None begins after that."""
        self._closed = True
        for task in self._exchanges:
            task.cancel()
        await asyncio.gather(*self._exchanges, return_exceptions=True)

    async def _carry_out(self, request: Request, client: Client) -> None:
        # In the task of the request, which the server leaves alone whether or not its client stays: only the end of the
        # process cancels it, above.
        task = asyncio.current_task(self._loop)
        assert task is not None
        self._exchanges.add(task)
        try:
            await Exchange(self._desk, request, client, self._loop, task).run()
        finally:
            self._exchanges.discard(task)

    async def _read(
        self, operation: Operation, request_headers: headers.Headers, receive: Receive, body: Spool, repeat: _Repeat
    ) -> Reading:
        """The whole body, checked as it arrives, and what it asks for."""
        reader = open_order(
            operation,
            headers.values(request_headers, b"content-type"),
            headers.values(request_headers, b"content-encoding"),
            self._desk.card,
            self._aliases,
        )
        declared = headers.value(request_headers, b"content-length")
        if declared is not None and int(declared) > self._max_body_bytes:
            raise RequestTooLarge(self._max_body_bytes)
        spent = 0.0
        more = True
        try:
            while more:
                message = await receive()
                if message["type"] == "http.disconnect":
                    raise IncompleteBody
                piece, more = message.get("body", b""), message.get("more_body", False)
                if body.size + len(piece) > self._max_body_bytes:
                    raise RequestTooLarge(self._max_body_bytes)
                if piece:
                    began = time.perf_counter()
                    reader.feed(piece)
                    repeat.feed(piece)
                    await body.append(piece)
                    spent += time.perf_counter() - began
            began = time.perf_counter()
            # A disk that is full is told now, while nothing is held yet.
            await body.seal()
        except SpoolFull as error:
            log.error("spool_full", cause=type(error.__cause__).__name__)
            raise StorageUnavailable from error
        reading = reader.finish()
        self._desk.metrics.overhead.labels("read").observe(spent + time.perf_counter() - began)
        return reading

    def _observe(self, stage: str, started: float) -> None:
        self._desk.metrics.overhead.labels(stage).observe(time.perf_counter() - started)


class _Repeat:
    """What a request with an ``Idempotency-Key`` is recognised by, gathered while its body is read."""

    __slots__ = ("_body", "_key")

    def __init__(self, operation: Operation, request_headers: headers.Headers) -> None:
        keys = headers.values(request_headers, b"idempotency-key")
        self._key: bytes | None = None
        if keys:
            if len(keys) > 1 or not re.fullmatch(rb"[ -~]{1,255}", keys[0]):
                raise InvalidValue("Send one Idempotency-Key of 1 to 255 printable ASCII characters.", "Idempotency-Key")
            self._key = hashlib.sha256(keys[0]).digest()
            self._body = hashlib.sha256(operation.encode("ascii") + b"\0")

    def feed(self, piece: bytes) -> None:
        if self._key is not None:
            self._body.update(piece)

    def digests(self) -> Repeatable | None:
        """The digests of a request whose whole body was fed; ``None`` for one that sent no key."""
        return None if self._key is None else Repeatable(self._key, self._body.digest())
