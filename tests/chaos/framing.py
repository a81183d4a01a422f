"""One answer in each of the ways in which HTTP tells a body's end."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from tests.live import chunked, until_closed, whole

Framing = Literal["chunked", "length", "close"]

FRAMINGS: tuple[Framing, ...] = ("chunked", "length", "close")


def framed(framing: Framing, status: int, headers: list[tuple[str, str]], pieces: Sequence[bytes]) -> bytes:
    """The bytes of an answer; one that is framed by its close still has to be closed."""
    match framing:
        case "chunked":
            return chunked(status, headers, list(pieces))
        case "length":
            return whole(status, headers, b"".join(pieces))
        case "close":
            return until_closed(status, headers, b"".join(pieces))
