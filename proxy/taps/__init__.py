"""Watches an answer go by, and says at its end what was delivered. Nothing else reads answers, and nothing here changes,
delays or keeps them: of an image no more than the beginning of one is held at a time.

    answer -> Tap: decoding, and which of the two readers -> documents: one JSON document, at once or in pieces
                                                          -> events:    server-sent events, one by one

Both readers go by :mod:`proxy.taps.delivery`, and fill in its :class:`Delivery`.
"""

from __future__ import annotations

from typing import Protocol

from proxy.taps.decoding import DECODERS, STEP_BYTES, Decoder, Sealed
from proxy.taps.delivery import Delivery, Usage
from proxy.taps.documents import Document
from proxy.taps.events import Events

__all__ = ["Delivery", "Tap", "Usage", "open_tap"]

# Byte order mark and whitespace: what may come before the first byte that means something.
_INSIGNIFICANT = b"\xef\xbb\xbf \t\r\n"


def open_tap(content_type: bytes | None, content_encoding: bytes | None) -> Tap:
    """A tap for one answer, from the values of its two headers.

    The encoding may be gzip or deflate, although neither is asked for; an answer in another one is not understood.
    What the answer is, its first byte decides, since a mislabelled one was delivered all the same; only one that
    never begins is judged by its content type.
    """
    media_type = (content_type or b"").partition(b";")[0].strip().lower()
    empty = Document() if media_type.endswith(b"json") else Events()
    encoding = (content_encoding or b"identity").strip().lower()
    decoder = DECODERS.get(encoding, Sealed)
    return Tap(empty, decoder())


class Tap:
    """Feed it the answer's body as it comes, then ask :meth:`finish` once."""

    def __init__(self, reader: _Reader, decoder: Decoder) -> None:
        self._reader = reader
        self._decoder = decoder
        self._begun = False
        self._faulty = False

    def feed(self, chunk: bytes) -> None:
        """Look at the next bytes. Never raises: a fault in reading must not break the relay, and ends the reading."""
        if self._faulty:
            return
        try:
            for start in range(0, len(chunk), STEP_BYTES):
                for piece in self._decoder.decode(chunk[start : start + STEP_BYTES]):
                    self._read(piece)
        except Exception:
            self._faulty = True

    @property
    def reads_document(self) -> bool:
        """Whether the answer is one JSON document, of which a part is nothing to a client; not events, each whole in itself."""
        return isinstance(self._reader, Document)

    def finish(self, *, ended_properly: bool) -> Delivery:
        """What was delivered.

        ``ended_properly``: the transfer ended as it was framed, by its last chunk or its full length. False for a
        reset, a cut, and a body that only the connection's end delimits, since a cut one looks the same.
        """
        if ended_properly and not self._faulty and self._decoder.at_end():
            self._reader.end()
        return self._reader.delivery()

    def _read(self, piece: bytes) -> None:
        if not self._begun:
            piece = piece.lstrip(_INSIGNIFICANT)
            if not piece:
                return
            self._begun = True
            if piece.startswith(b"{") != self.reads_document:
                self._reader = Events() if self.reads_document else Document()
        self._reader.feed(piece)


class _Reader(Protocol):
    def feed(self, piece: bytes) -> None:
        """Read on; a piece is never empty."""

    def end(self) -> None:
        """Said once the last piece is in, if that was the proper end."""

    def delivery(self) -> Delivery:
        """What was delivered. Nothing is fed after it."""
