"""A request body while it is read and sent: in memory while small, on disk beyond that, gone when the exchange is."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path
from typing import IO

from proxy.orders import Splice

# Most requests are smaller and never touch the disk; a few hundred larger ones at once must not fill the memory.
MEMORY_BYTES_MAX = 1 << 20

# What of a body on disk is in memory while it goes up.
PIECE_BYTES = 256 << 10


class SpoolFull(Exception):
    """The disk took no more of the body."""


class Spool:
    """One body. Append, then seal, then read from the beginning as often as needed, then close."""

    __slots__ = ("_directory", "_file", "_in_memory", "_pieces", "size")

    def __init__(self, directory: Path) -> None:
        self._directory = directory
        self._pieces: list[bytes] = []
        self._in_memory = 0
        self._file: IO[bytes] | None = None
        self.size = 0

    async def append(self, piece: bytes) -> None:
        """Keep a piece. Raises :class:`SpoolFull` when the disk has no room."""
        self._pieces.append(piece)
        self._in_memory += len(piece)
        self.size += len(piece)
        if self._in_memory > MEMORY_BYTES_MAX:
            # A disk can be slow, and the loop has other requests to serve.
            await _in_thread(self._flush)

    async def seal(self) -> None:
        """Put the last pieces where the others are, so that reading needs no more room. Raises :class:`SpoolFull`."""
        if self._file is not None and self._pieces:
            await _in_thread(self._flush)

    def content(self, splice: Splice | None = None) -> bytes | AsyncIterator[bytes]:
        """The body from its beginning, with the splice's replacement in its place: whole where it is in memory, else in
        pieces from the disk."""
        if self._file is None:
            return _spliced(b"".join(self._pieces), splice)
        assert not self._pieces, "a body is sealed before it is read"
        return self._read(splice)

    async def _read(self, splice: Splice | None) -> AsyncIterator[bytes]:
        spans = [(0, self.size)] if splice is None else [(0, splice.start), (splice.end, self.size)]
        for index, (start, end) in enumerate(spans):
            if index and splice is not None:
                yield splice.replacement
            while start < end:
                piece = await asyncio.to_thread(self._read_at, start, min(PIECE_BYTES, end - start))
                start += len(piece)
                yield piece

    def close(self) -> None:
        """Forget the body. The file has no name, so closing it frees its room; so does the end of the process."""
        self._pieces.clear()
        if self._file is not None:
            self._file.close()

    def _flush(self) -> None:
        if self._file is None:
            self._directory.mkdir(parents=True, exist_ok=True)
            self._file = tempfile.TemporaryFile(dir=self._directory, buffering=0)  # noqa: SIM115 - closed by close()
        pieces, self._pieces, self._in_memory = self._pieces, [], 0
        view = memoryview(b"".join(pieces))
        while view:
            view = view[self._file.write(view) :]

    def _read_at(self, start: int, length: int) -> bytes:
        assert self._file is not None
        self._file.seek(start)
        piece = self._file.read(length)
        if not piece:
            raise OSError("the spooled body is shorter than what was written")
        return piece


def spliced_size(size: int, splice: Splice | None) -> int:
    """How long a body of ``size`` bytes is with the splice in it."""
    return size if splice is None else size - (splice.end - splice.start) + len(splice.replacement)


def _spliced(body: bytes, splice: Splice | None) -> bytes:
    return body if splice is None else body[: splice.start] + splice.replacement + body[splice.end :]


async def _in_thread(flush: object) -> None:
    assert callable(flush)
    try:
        await asyncio.to_thread(flush)
    except OSError as error:
        raise SpoolFull from error
