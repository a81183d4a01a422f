"""Coffee beans as PNG files, by size and seed, and PNGs of any number of bytes. Pixels may be made only here.

A picture is drawn a row at a time in 256 indexed colours, so that the largest takes a few hundredths of a second.
"""

from __future__ import annotations

import base64
import math
import random
import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

# Prompts fall into so many classes; each has one picture a size, so that a cache can serve a load test.
SEEDS = 16

# No preset is longer; a larger edge would only burn time and memory.
EDGE_PIXELS_MAX = 4096

# The smallest and largest payload that can be asked for: a PNG's bones, and a little more than the largest real one.
PAYLOAD_BYTES_MIN = 1_000
PAYLOAD_BYTES_MAX = 32_000_000

BEANS = 6

_SIGNATURE = b"\x89PNG\r\n\x1a\n"

# The background takes the indexes below 252, the beans those above.
_RAMP = 252
_SHADOW, _BODY, _SHINE, _CREASE = 252, 253, 254, 255


@dataclass(frozen=True, slots=True)
class Ellipse:
    """A filled ellipse: centre, half axes and turn (radians), in one indexed colour."""

    x: float
    y: float
    long: float
    short: float
    turn: float
    colour: int

    def span(self, row: int, width: int) -> tuple[int, int]:
        """The columns ``[left, right)`` that it covers in a row; an empty range where it covers none."""
        cos, sin = math.cos(self.turn), math.sin(self.turn)
        # The ellipse is a*dx^2 + 2*b*dx*dy + c*dy^2 = 1 around its centre; a row fixes dy and leaves a quadratic in dx.
        a = (cos / self.long) ** 2 + (sin / self.short) ** 2
        b = cos * sin * (1 / self.long**2 - 1 / self.short**2)
        c = (sin / self.long) ** 2 + (cos / self.short) ** 2
        dy = row - self.y
        root = (b * dy) ** 2 - a * (c * dy * dy - 1)
        if root <= 0:
            return 0, 0
        middle, half = self.x - b * dy / a, math.sqrt(root) / a
        return min(max(int(middle - half), 0), width), min(max(int(middle + half), 0), width)


def seed_of(prompt: str) -> int:
    """The picture class of a prompt, ``0`` to ``SEEDS - 1``; the same in every process."""
    return zlib.crc32(prompt.encode("utf-8", "replace")) % SEEDS


@lru_cache(maxsize=64)  # A picture is a tenth of a megabyte: a few megabytes in all.
def picture(width: int, height: int, seed: int, beans: int = BEANS) -> bytes:
    """A PNG of ``width`` x ``height`` pixels with ``beans`` coffee beans; fewer beans make a preview of the same picture."""
    chance = random.Random(seed)  # noqa: S311 - a picture, not a secret
    palette = _palette(chance)
    shapes = [shape for _ in range(BEANS) for shape in _bean(chance, width, height)]
    shapes = shapes[: 4 * beans]
    ramp = bytes(_RAMP * i // (width + height) for i in range(width + height))
    rows = zlib.compressobj(1)
    pieces = [rows.compress(b"\0" + _row(ramp[y : y + width], shapes, y)) for y in range(height)]
    pieces.append(rows.flush())
    return _png(width, height, 8, 3, [(b"PLTE", palette), (b"IDAT", b"".join(pieces))])


@lru_cache(maxsize=4)  # Up to 43 MB each in Base64.
def padded_base64(width: int, height: int, payload_bytes: int) -> bytes:
    """Base64 of a plain PNG of the given size that is ``payload_bytes`` long.

    The padding is an ancillary chunk of bytes that don't repeat, so that one lost or swapped on the way would show. The
    three largest sizes can't go below some 1,100 bytes, and are that long when less is asked for.
    """
    row = b"\0" * (1 + (width + 7) // 8)
    chunks = [(b"IDAT", zlib.compress(row * height, 9))]
    missing = payload_bytes - len(_png(width, height, 1, 0, chunks)) - 12
    if missing >= 0:
        padding = random.Random(payload_bytes).randbytes(missing)  # noqa: S311 - padding, not a secret
        chunks.append((b"beAn", padding))
    return base64.b64encode(_png(width, height, 1, 0, chunks))


@lru_cache(maxsize=64)
def picture_base64(width: int, height: int, seed: int, beans: int = BEANS) -> bytes:
    """Base64 of :func:`picture`."""
    return base64.b64encode(picture(width, height, seed, beans))


def _png(width: int, height: int, bit_depth: int, colour_type: int, chunks: list[tuple[bytes, bytes]]) -> bytes:
    head = struct.pack(">IIBBBBB", width, height, bit_depth, colour_type, 0, 0, 0)
    return _SIGNATURE + b"".join(_chunk(*chunk) for chunk in [(b"IHDR", head), *chunks, (b"IEND", b"")])


def _chunk(name: bytes, data: bytes) -> bytes:
    return b"".join((struct.pack(">I", len(data)), name, data, struct.pack(">I", zlib.crc32(data, zlib.crc32(name)))))


def _palette(chance: random.Random) -> bytes:
    """256 RGB colours: a warm gradient between two tones of the seed's, and the four browns of a bean."""
    low = (chance.randint(150, 215), chance.randint(110, 190), chance.randint(80, 200))
    high = (chance.randint(215, 255), chance.randint(200, 245), chance.randint(170, 240))
    gradient = [tuple(a + (b - a) * i // _RAMP for a, b in zip(low, high, strict=True)) for i in range(_RAMP)]
    return bytes(channel for colour in gradient for channel in colour) + bytes.fromhex("8a6a506f43288f5d3b3b2013")


def _bean(chance: random.Random, width: int, height: int) -> Iterator[Ellipse]:
    """A bean's four layers, from the bottom up: shadow, body, shine, crease."""
    edge = min(width, height)
    x, y = chance.uniform(0.1, 0.9) * width, chance.uniform(0.1, 0.9) * height
    long, turn = chance.uniform(0.12, 0.22) * edge, chance.uniform(0, math.pi)
    short = long * 0.66
    yield Ellipse(x + long * 0.08, y + long * 0.1, long, short, turn, _SHADOW)
    yield Ellipse(x, y, long, short, turn, _BODY)
    yield Ellipse(x - long * 0.12, y - long * 0.14, long * 0.7, short * 0.6, turn, _SHINE)
    yield Ellipse(x, y, long * 0.92, short * 0.1, turn, _CREASE)


def _row(background: bytes, shapes: list[Ellipse], y: int) -> bytes:
    row = bytearray(background)
    for shape in shapes:
        if abs(y - shape.y) < shape.long:
            left, right = shape.span(y, len(background))
            row[left:right] = bytes((shape.colour,)) * (right - left)
    return bytes(row)
