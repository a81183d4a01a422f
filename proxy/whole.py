"""Reads a small JSON object that came whole, in one piece, at a tenth of what :mod:`proxy.skim` takes for it: with the
standard library's scanner, which is written in C.

It says what skim would say, strict or not, or nothing at all: a document with any fault, and whatever the two could see
differently, is left to skim. So it may be the narrower reader of the two, and must never be the wider one.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeAlias

from proxy.skim import DEPTH_MAX, SCALAR_BYTES_MAX

# Requests without images, and answers with links or with the smallest of images. It bounds what is kept and decoded at once,
# and is the most of an image's text that is looked at: no string of a whole document is cut.
WHOLE_BYTES_MAX = 65_536

# ``str`` for a string, ``bytes`` for a number: its spelling, since 1 and 1.0 are not the same here. True, False and None are
# themselves, a list is an array, and an object is a tuple of its members, in order and with all that are given twice.
Members: TypeAlias = tuple[tuple[str, Any], ...]
Value: TypeAlias = str | bytes | bool | list[Any] | Members | None

_SPACE = " \t\n\r"
_SPACE_BYTES = _SPACE.encode("ascii")


def may_be_whole(piece: bytes) -> bool:
    """Whether a document's first piece looks like all of it. No more than a look: what comes next may belong to it."""
    return piece.startswith(b"{") and len(piece) <= WHOLE_BYTES_MAX and piece.rstrip(_SPACE_BYTES).endswith(b"}")


def read_whole(document: bytes) -> Mapping[str, Value] | None:
    """The members of a JSON object in UTF-8; None where skim has to read it.

    So it is where a name is given twice at the top, since a mapping can't show that, and where there are more brackets
    than there may be levels: to count levels takes longer than to count brackets.
    """
    if not document.startswith(b"{") or document.count(b"{") + document.count(b"[") > DEPTH_MAX:
        return None
    try:
        text = document.decode("utf-8")
        members, end = _read(text)
    except ValueError:
        return None
    if end != len(text) and text[end:].strip(_SPACE):
        return None
    by_name = dict(members)
    return by_name if len(by_name) == len(members) else None


def _spelled(number: str) -> bytes:
    if len(number) > SCALAR_BYTES_MAX:
        raise ValueError
    return number.encode("ascii")


def _no_json(_constant: str) -> bytes:
    """NaN and the infinities, which the scanner would take."""
    raise ValueError


# ``strict`` is about control characters in strings. It takes no whitespace before the object, and stops behind it.
_read = json.JSONDecoder(
    object_pairs_hook=tuple, parse_int=_spelled, parse_float=_spelled, parse_constant=_no_json, strict=True
).raw_decode
