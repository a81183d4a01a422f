"""Takes the content encoding off an answer, in bounded steps."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Protocol

from proxy.taps.delivery import Unreadable

# The largest true answer, ten images of 3840x2160, has 440 MB. More than that out of compressed bytes is a bomb.
DECODED_BYTES_MAX = 1_000_000_000

# How much is read, or decoded, at a time: what is found in between, and a bomb's output, grow with it.
STEP_BYTES = 65_536


class Decoder(Protocol):
    def decode(self, chunk: bytes, /) -> Iterable[bytes]:
        """What the chunk decodes to, in pieces of at most :data:`STEP_BYTES`, none of them empty."""

    def at_end(self) -> bool:
        """Nothing is missing of what was encoded."""


class _Plain:
    def decode(self, chunk: bytes, /) -> Iterable[bytes]:
        return (chunk,)

    def at_end(self) -> bool:
        return True


class Sealed:
    """An encoding that nobody asked for, and that is not known here."""

    def decode(self, _chunk: bytes, /) -> Iterable[bytes]:
        raise Unreadable

    def at_end(self) -> bool:
        return False


class _Inflater:
    """Gzip of one or more members, and deflate with or without zlib's envelope, decoded in bounded steps."""

    def __init__(self) -> None:
        self._inflate: zlib._Decompress | None = None
        self._decoded_bytes = 0

    def decode(self, chunk: bytes, /) -> Iterator[bytes]:
        more = True
        while chunk or more:
            if self._inflate is None or (self._inflate.eof and chunk):
                self._inflate = zlib.decompressobj(_window_bits(chunk[0]))
            piece = self._inflate.decompress(chunk, STEP_BYTES)
            chunk = self._inflate.unconsumed_tail or self._inflate.unused_data
            # A full step can leave some of its output behind, in zlib itself, with no input left to ask for it.
            more = len(piece) == STEP_BYTES
            self._decoded_bytes += len(piece)
            if self._decoded_bytes > DECODED_BYTES_MAX:
                raise Unreadable
            if piece:
                yield piece

    def at_end(self) -> bool:
        return self._inflate is None or self._inflate.eof


DECODERS: Mapping[bytes, Callable[[], Decoder]] = {
    b"": _Plain,
    b"identity": _Plain,
    b"gzip": _Inflater,
    b"x-gzip": _Inflater,
    b"deflate": _Inflater,
}


def _window_bits(first: int) -> int:
    """What zlib is to expect: gzip begins with 0x1f, zlib's envelope with a low half byte of 8, bare deflate with neither."""
    if first == 0x1F:
        return 16 + zlib.MAX_WBITS
    return zlib.MAX_WBITS if first & 0x0F == 8 else -zlib.MAX_WBITS
