"""How large an image is, from the first bytes of its file. Nothing else in the program looks inside an image.

The layouts: PNG (third edition, 11.2.1 IHDR), JPEG (ITU T.81, annex B), WebP (RFC 9649; RFC 6386, 9.1 for VP8).
"""

from __future__ import annotations

import binascii
import re
import string

# What a base64 reader may meet before the text proper ends: the url-safe letters stand for the plain ones,
# and line breaks stand for nothing.
_TO_PLAIN_BASE64 = str.maketrans("-_", "+/", string.whitespace)

_BASE64_LETTERS = re.compile(r"[A-Za-z0-9+/]*", re.ASCII)

# What measure needs of a PNG or WebP, and letters that hold more than that, but for line breaks.
_HEADER_BYTES = 30
_HEADER_LETTERS = 64

_JPEG = b"\xff\xd8"

# Markers without a segment behind them (TEM, RST0-7, SOI).
_JPEG_BARE = frozenset({0x01, *range(0xD0, 0xD9)})

# Frame headers, SOF0 to SOF15; the three in between are other tables (DHT, JPG, DAC).
_JPEG_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}

# From the first of these on (EOI, SOS) a frame header is no longer to come.
_JPEG_LATE = frozenset({0xD9, 0xDA})


def measure(prefix: bytes) -> str | None:
    """``WxH`` in pixels of a PNG, JPEG or WebP file that begins with ``prefix``; ``None`` if these bytes don't tell.

    It is the size of the stored picture: an orientation in EXIF turns only how it is shown.
    """
    if prefix.startswith(b"\x89PNG\r\n\x1a\n"):
        return _measure_png(prefix)
    if prefix.startswith(_JPEG):
        return _measure_jpeg(prefix)
    if prefix.startswith(b"RIFF") and prefix[8:12] == b"WEBP":
        return _measure_webp(prefix)
    return None


def decode_base64(text: str) -> bytes:
    """The bytes of base64 ``text`` that may be cut anywhere, be url-safe, hold line breaks, or be a ``data:`` URL.

    Reading stops at the first character that is not base64, and what comes before it counts; nothing raises.
    """
    return _decode(_without_scheme(text))


def measure_base64(text: str) -> str | None:
    """What :func:`measure` tells of the bytes of :func:`decode_base64`. All but a JPEG tell by their first ones, and then the
    others are not decoded: that takes as long as all else that is done with an image."""
    header = _decode(_without_scheme(text)[:_HEADER_LETTERS])
    return measure(decode_base64(text) if len(header) < _HEADER_BYTES or header.startswith(_JPEG) else header)


def _without_scheme(text: str) -> str:
    return text.partition(",")[2] if text[:5].lower() == "data:" else text


def _decode(text: str) -> bytes:
    matched = _BASE64_LETTERS.match(text.translate(_TO_PLAIN_BASE64))
    letters = matched[0] if matched else ""
    # A last group of one letter holds less than a byte.
    if len(letters) % 4 == 1:
        letters = letters[:-1]
    return binascii.a2b_base64(letters + "=" * (-len(letters) % 4))


def _size(width: int, height: int) -> str | None:
    return f"{width}x{height}" if width and height else None


def _measure_png(prefix: bytes) -> str | None:
    if len(prefix) < 24 or prefix[12:16] != b"IHDR":
        return None
    return _size(int.from_bytes(prefix[16:20], "big"), int.from_bytes(prefix[20:24], "big"))


def _measure_jpeg(prefix: bytes) -> str | None:
    at = 2
    while at + 1 < len(prefix) and prefix[at] == 0xFF:
        marker = prefix[at + 1]
        if marker == 0xFF:
            # A fill byte: any number of them may stand before a marker.
            at += 1
        elif marker in _JPEG_BARE:
            at += 2
        elif marker in _JPEG_LATE:
            return None
        elif marker in _JPEG_FRAME:
            frame = prefix[at + 5 : at + 9]
            # A height of zero is given only after the first scan (DNL); nobody writes that.
            return _size(int.from_bytes(frame[2:], "big"), int.from_bytes(frame[:2], "big")) if len(frame) == 4 else None
        else:
            # A length covers its own two bytes; one that is too short to do so still moves on, so the walk ends.
            at += 2 + max(2, int.from_bytes(prefix[at + 2 : at + 4], "big"))
    return None


def _measure_webp(prefix: bytes) -> str | None:
    kind, body = prefix[12:16], prefix[20:30]
    if kind == b"VP8L" and len(body) >= 5 and body[0] == 0x2F:
        bits = int.from_bytes(body[1:5], "little")
        return _size((bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1)
    if len(body) < 10:
        return None
    if kind == b"VP8X":
        return _size(int.from_bytes(body[4:7], "little") + 1, int.from_bytes(body[7:10], "little") + 1)
    if kind == b"VP8 " and body[3:6] == b"\x9d\x01\x2a":
        # The two top bits of each are a scaling hint for display.
        return _size(int.from_bytes(body[6:8], "little") & 0x3FFF, int.from_bytes(body[8:10], "little") & 0x3FFF)
    return None
