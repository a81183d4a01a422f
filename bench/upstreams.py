"""Upstreams that nginx can't play, each a program of its own: ``python -m bench.upstreams events|uploads PORT``.

``events`` answers with a stream that begins with an event, goes on with one every few seconds from SIGUSR1 on, each of which
says when it was sent, and ends as it should after SIGUSR2. ``uploads`` reads a request to its end before it answers; nginx with
a fixed answer would not wait.
"""

from __future__ import annotations

import asyncio
import random
import re
import signal
import sys
import time
from typing import ClassVar, cast

import uvloop

from bench.machines import ANSWER

BACKLOG = 4096

# An image takes half a minute, and shows three previews at the most: twice as often as those come.
EVERY_SECONDS = 5

# A large enough part of an upload is read at once.
READ_BYTES = 1024 * 1024

HEAD_BYTES_MAX = 64 * 1024

_LENGTH = re.compile(rb"^content-length: *(\d+)\r$", re.IGNORECASE | re.MULTILINE)
_HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: %s\r\n%s\r\n\r\n"
_EVENT = (
    b"event: image_generation.partial_image\n"
    b'data: {"type":"image_generation.partial_image","partial_image_index":0,"b64_json":"' + b"Q" * 128 + b'","at":%.6f}\n\n'
)
_LAST = (
    b"event: image_generation.completed\n"
    b'data: {"type":"image_generation.completed","size":"1024x1024","quality":"low","b64_json":"' + b"Q" * 128 + b'"}\n\n'
)


def chunk(data: bytes) -> bytes:
    return b"%x\r\n%s\r\n" % (len(data), data)


class Conversation(asyncio.BufferedProtocol):
    """Requests on one connection, one after the other; bodies are counted, and not kept."""

    # Shared: whatever is in it is dealt with before anything else is read.
    _buffer = bytearray(READ_BYTES)

    def __init__(self) -> None:
        self._head = b""
        self._missing = 0

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)

    def get_buffer(self, sizehint: int) -> bytearray:  # noqa: ARG002
        return self._buffer

    def buffer_updated(self, nbytes: int) -> None:
        if self._missing:
            self._body(nbytes)
            return
        self._head += self._buffer[:nbytes]
        head, end, rest = self._head.partition(b"\r\n\r\n")
        if end:
            length = _LENGTH.search(head + b"\r\n")
            assert length is not None, "a request without a length"
            self._head = b""
            self._missing = int(length[1])
            self._body(len(rest))
        elif len(self._head) > HEAD_BYTES_MAX:
            self.transport.abort()

    def _body(self, size: int) -> None:
        assert size <= self._missing, "a request before the last one was answered"
        self._missing -= size
        if not self._missing:
            self.answer()

    def answer(self) -> None:
        raise NotImplementedError


class Uploads(Conversation):
    def answer(self) -> None:
        body = ANSWER.encode()
        self.transport.write(_HEAD % (b"application/json", b"Content-Length: %d" % len(body)) + body)


class Events(Conversation):
    """A stream that waits for the signals."""

    waiting: ClassVar[set[Events]] = set()
    ending: ClassVar[bool] = False

    def answer(self) -> None:
        Events.waiting.add(self)
        self.transport.write(_HEAD % (b"text/event-stream", b"Transfer-Encoding: chunked"))
        self.transport.write(chunk(_EVENT % time.monotonic()))

    def tick(self) -> None:
        if self.transport.is_closing():
            return
        if Events.ending:
            self.transport.write(chunk(_LAST) + b"0\r\n\r\n")
            return
        self.transport.write(chunk(_EVENT % time.monotonic()))
        asyncio.get_running_loop().call_later(EVERY_SECONDS, self.tick)

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002
        Events.waiting.discard(self)


def go_on() -> None:
    """The streams tick one after the other, as those of many clients do, and not all at once."""
    for stream in Events.waiting:
        asyncio.get_running_loop().call_later(EVERY_SECONDS * random.random(), stream.tick)
    Events.waiting.clear()


def end() -> None:
    """Each stream ends at its own next tick."""
    Events.ending = True


async def serve(kind: type[Conversation], port: int) -> None:
    loop = asyncio.get_running_loop()
    loop.add_signal_handler(signal.SIGUSR1, go_on)
    loop.add_signal_handler(signal.SIGUSR2, end)
    server = await loop.create_server(kind, "127.0.0.1", port, backlog=BACKLOG)
    await server.serve_forever()


if __name__ == "__main__":
    uvloop.run(serve({"events": Events, "uploads": Uploads}[sys.argv[1]], int(sys.argv[2])))
