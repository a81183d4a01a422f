"""Team keys and record ids: how they are made, checked and digested. The only file that knows their spelling."""

from __future__ import annotations

import hashlib
import os
import re
from base64 import b32encode
from datetime import datetime
from zlib import crc32

KEY_PREFIX = "sk-bm-"

# 160 bits are 32 characters of base32; a CRC-32 is seven, and finds every slip within six neighbouring characters.
_RANDOM_BYTES = 20
_RANDOM_CHARACTERS = 32
_KEY = re.compile(KEY_PREFIX + r"[a-z2-7]{39}", re.ASCII)

# Crockford's alphabet sorts as ASCII does, so ids sort by the time in them.
_CROCKFORD = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"
_PAIRS = tuple(high + low for high in _CROCKFORD for low in _CROCKFORD)
# Takes the lowest five bits of each byte: uniform, since 256 is a multiple of 32.
_LOW_FIVE_BITS = (_CROCKFORD * 8).encode("ascii")
_ID_LIMIT_MS = 1 << 48
_IDS_A_DRAW = 256


def new_key() -> str:
    """A new team key: ``sk-bm-``, 160 bits of randomness and a checksum, 45 characters in all."""
    body = b32encode(os.urandom(_RANDOM_BYTES)).decode("ascii").lower()
    return KEY_PREFIX + body + _checksum(body)


def is_well_formed(key: str) -> bool:
    """Whether ``key`` is spelled as a team key is, checksum included: a mistyped key is refused without a database."""
    if _KEY.fullmatch(key) is None:
        return False
    body_end = len(KEY_PREFIX) + _RANDOM_CHARACTERS
    return key[body_end:] == _checksum(key[len(KEY_PREFIX) : body_end])


def digest(key: str) -> bytes:
    """The SHA-256 of a key, 32 bytes: all that is kept of it. A key is random, so a plain digest can't be searched."""
    return hashlib.sha256(key.encode("utf-8")).digest()


def last_four(key: str) -> str:
    """The four characters by which people recognise a key in a listing."""
    return key[-4:]


def new_id(prefix: str, now_ms: int) -> str:
    """An id such as ``chg_01JD...``: 48 bits of ``now_ms`` (Unix milliseconds), then 80 bits of randomness.

    26 characters after the prefix, in the order and alphabet of a ULID.
    """
    if not 0 <= now_ms < _ID_LIMIT_MS:
        raise ValueError(f"{now_ms} ms is not a time that an id can hold")
    time = _PAIRS[now_ms >> 40] + _PAIRS[now_ms >> 30 & 1023] + _PAIRS[now_ms >> 20 & 1023]
    time += _PAIRS[now_ms >> 10 & 1023] + _PAIRS[now_ms & 1023]
    return f"{prefix}_{time}{_random_part()}"


# Drawn from the system for many ids at once: at each call the interpreter is let go, and whoever waits for it comes. Not for
# keys, which are not to lie about in memory.
_drawn: list[str] = []
# A process made of this one would give the same ids.
os.register_at_fork(after_in_child=_drawn.clear)


def _random_part() -> str:
    """80 bits as 16 characters."""
    try:
        # One step of the interpreter's: no two threads get the same.
        return _drawn.pop()
    except IndexError:
        letters = os.urandom(16 * _IDS_A_DRAW).translate(_LOW_FIVE_BITS).decode("ascii")
        parts = [letters[at : at + 16] for at in range(0, len(letters), 16)]
        _drawn.extend(parts[1:])
        return parts[0]


def _checksum(body: str) -> str:
    # Five bytes make eight characters, of which the first is always "a": a CRC-32 fills seven.
    return b32encode(crc32(body.encode("ascii")).to_bytes(5, "big"))[1:].decode("ascii").lower()


def new_request_id(now: datetime) -> str:
    """The id of a request that arrives at ``now``; a charge has the same one after ``chg``."""
    return new_id("req", int(now.timestamp() * 1000))
