"""Reads multipart/form-data that comes in pieces: the watched fields with their offsets, passing over files unkept.

The only reader of multipart. It is stricter than the usual ones on purpose: where two readers could take a body for
two different forms, and so for two different prices, it refuses. Hence no library: those forgive, and tell no offsets.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TypeAlias
from urllib.parse import unquote

# Sixteen images, a mask and two dozen fields are the most that the image API takes; a part costs some microseconds.
PARTS_MAX = 1_000

# Content-Disposition with a long filename, Content-Type, and little else.
HEAD_BYTES_MAX = 8_192

_CRLF = b"\r\n"
_HEAD_END = b"\r\n\r\n"

# RFC 2046, section 5.1.1: 1 to 70 characters, the last no space.
_boundary = re.compile(rb"[0-9A-Za-z'()+_,./:=? -]{0,69}[0-9A-Za-z'()+_,./:=?-]")

_header = re.compile(r"([!#$%&'*+.^_`|~0-9A-Za-z-]+):[ \t]*([^\x00-\x08\x0a-\x1f\x7f]*)")
_disposition = re.compile(r"form-data(?![^ \t;])", re.IGNORECASE)

# A quote after a backslash ends the value for one reader and not for another. Names of parameters in capitals are
# known to one and not to another. Neither is taken.
_parameter = re.compile(
    r"[ \t]*;[ \t]*(?P<name>[a-z0-9_-]+\*?)=(?:\"(?P<quoted>(?:[^\"\\]|\\(?!\"))*)\"|(?P<token>[!#$%&'*+.^_`|~0-9A-Za-z-]+))"
)


class FormError(ValueError):
    """Not multipart/form-data that every reader would read alike; the message says what is wrong."""


@dataclass(frozen=True, slots=True)
class Field:
    """One occurrence of a watched field. ``value`` is cut at the field's limit; ``start`` and ``end`` (exclusive) are
    the offsets of the uncut value in the body."""

    name: str
    has_filename: bool
    value: bytes
    start: int
    end: int

    @property
    def whole(self) -> bool:
        return len(self.value) == self.end - self.start


class Form:
    """Feed it a body, in pieces of any size; ``found`` has the watched fields in the order of the body.

    ``watch`` maps a field's name to how many bytes of its value to keep. Raises :class:`FormError` for a ``boundary``
    that can't be one. After a :class:`FormError` the reader is of no further use.
    """

    def __init__(self, boundary: bytes, watch: Mapping[str, int]) -> None:
        if not _boundary.fullmatch(boundary):
            raise FormError("the boundary must be 1 to 70 of the characters that RFC 2046 allows")
        self.found: list[Field] = []
        self._watch = watch
        self._opening = b"--" + boundary
        self._delimiter = b"\n--" + boundary  # behind a CR; without one it is no delimiter, but some would take it for one
        self._stray = b"\r--" + boundary
        self._step: _Step = Form._read_opening
        self._parts = 0
        self._offset = 0  # of the first byte that is not yet read
        self._held = b""
        self._head = _Head("", False, None)
        self._value_start = 0
        self._value = bytearray()

    def feed(self, data: bytes) -> None:
        """Read on. Raises :class:`FormError` as soon as the form can't be right any more."""
        data = self._held + data
        at = 0
        while at < len(data):
            after = self._step(self, data, at)
            if after is None:
                break
            at = after
        self._held = data[at:]
        self._offset += at

    def end(self) -> None:
        """Say that nothing follows. Raises :class:`FormError` unless the form was closed."""
        if self._step is not Form._read_epilogue:
            raise FormError("the form ends without its closing boundary")

    # The steps. Each reads from data[at] and returns where it stopped: None means that it needs more than data has.

    def _read_opening(self, data: bytes, at: int) -> int | None:
        if not data.startswith(self._opening, at):
            if self._opening.startswith(data[at:]):
                return None
            raise FormError("the form must begin with the boundary that Content-Type names")
        self._step = Form._read_boundary_end
        return at + len(self._opening)

    def _read_boundary_end(self, data: bytes, at: int) -> int | None:
        """After a boundary: a line's end before another part, or two hyphens after the last."""
        mark = data[at : at + 2]
        if mark == _CRLF:
            self._count_part()
            self._step = Form._read_head
        elif mark == b"--":
            if not self._parts:
                raise FormError("the form has no parts")
            self._step = Form._read_epilogue
        elif mark not in (b"\r", b"-"):
            raise FormError("a boundary must be followed by CRLF, or by two hyphens after the last part")
        return at + 2 if len(mark) == 2 else None

    def _read_head(self, data: bytes, at: int) -> int | None:
        end = data.find(_HEAD_END, at, at + HEAD_BYTES_MAX)
        if end < 0:
            if len(data) - at >= HEAD_BYTES_MAX:
                raise FormError(f"a part's headers take more than {HEAD_BYTES_MAX} bytes")
            return None
        self._head = _read_headers(data[at:end], self._watch)
        self._value_start = self._offset + end + len(_HEAD_END)
        self._value = bytearray()
        self._step = Form._read_value
        # The blank line is looked at once more: a boundary right behind it would end the part for some readers only.
        return end + len(_CRLF)

    def _read_value(self, data: bytes, at: int) -> int | None:
        delimiter = data.find(self._delimiter, at)
        end = len(data) - len(self._delimiter) if delimiter < 0 else delimiter - 1
        if data.find(self._stray, at, len(data) if delimiter < 0 else delimiter) >= 0:
            raise FormError("a boundary inside a part, at the start of a line that does not begin with CRLF")
        if delimiter < 0:
            self._keep(data, at, end)
            return end if end > at else None
        if self._offset + end < self._value_start or data[end : end + 2] != b"\r\n":
            raise FormError("a boundary that does not stand on a line of its own, after CRLF")
        self._keep(data, at, end)
        self._close_part(self._offset + end)
        self._step = Form._read_boundary_end
        return delimiter + len(self._delimiter)

    def _read_epilogue(self, data: bytes, at: int) -> int:
        if data[at:].strip(_CRLF):
            raise FormError("only a line's end may follow the closing boundary")
        return len(data)

    # What the steps do on their way.

    def _count_part(self) -> None:
        self._parts += 1
        if self._parts > PARTS_MAX:
            raise FormError(f"the form has more than {PARTS_MAX} parts")

    def _keep(self, data: bytes, start: int, end: int) -> None:
        """Keep of data[start:end] what belongs to the value and what the field's limit leaves room for."""
        room = self._watch.get(self._head.name, 0) - len(self._value)
        start = max(start, self._value_start - self._offset)
        if room > 0 and start < end:
            self._value += data[start : min(end, start + room)]

    def _close_part(self, end: int) -> None:
        head = self._head
        if head.length is not None and head.length != end - self._value_start:
            raise FormError("a part whose Content-Length is not the length of its value")
        if head.name in self._watch:
            self.found.append(Field(head.name, head.has_filename, bytes(self._value), self._value_start, end))


_charset = re.compile(r"charset\s*=\s*\"?([^\s;\"]+)", re.IGNORECASE)

_Step: TypeAlias = Callable[[Form, bytes, int], int | None]


@dataclass(frozen=True, slots=True)
class _Head:
    """What a part's headers say of it. ``length`` is its Content-Length, where it has one."""

    name: str
    has_filename: bool
    length: int | None


def _read_headers(block: bytes, watch: Mapping[str, int]) -> _Head:
    headers: dict[str, str] = {}
    try:
        lines = block.decode("utf-8").split("\r\n")
    except UnicodeDecodeError:
        raise FormError("a part's headers are not UTF-8") from None
    for line in lines:
        header = _header.fullmatch(line)
        if header is None:
            raise FormError("a part's header is not a line of 'Name: value'")
        name = header[1].lower()
        if name in headers:
            raise FormError(f"a part has the header '{name}' twice")
        headers[name] = header[2].rstrip(" \t")
    if "content-disposition" not in headers:
        raise FormError("a part has no Content-Disposition header")
    field, has_filename = _read_disposition(headers["content-disposition"], watch)
    # Some readers decode a field by its own charset, or all of them by the one that this field names.
    charset = _charset.search(headers.get("content-type", ""))
    if field == "_charset_" or (field in watch and charset is not None and charset[1].lower() not in ("utf-8", "us-ascii")):
        raise FormError("a field in another character set than UTF-8")
    return _Head(field, has_filename, _read_length(headers.get("content-length")))


def _read_disposition(value: str, watch: Mapping[str, int]) -> tuple[str, bool]:
    """A field's name, and whether a filename makes it a file."""
    disposition = _disposition.match(value)
    if disposition is None:
        raise FormError("a part's Content-Disposition is not form-data")
    parameters: dict[str, str] = {}
    at = disposition.end()
    while at < len(value):
        parameter = _parameter.match(value, at)
        if parameter is None or parameter["name"] in parameters:
            raise FormError("a part's Content-Disposition has a parameter twice, or one that readers could take differently")
        parameters[parameter["name"]] = parameter["token"] or parameter["quoted"] or ""
        at = parameter.end()
    if "name" not in parameters or "name*" in parameters:
        raise FormError("a part's Content-Disposition must have one parameter 'name', and none 'name*'")
    name = parameters["name"]
    plainer = unquote(name.replace("\\", ""))
    if plainer != name and plainer in watch:
        raise FormError("a field's name with an escape in it, which readers could take differently")
    return name, "filename" in parameters or "filename*" in parameters


def _read_length(value: str | None) -> int | None:
    if value is None:
        return None
    if not re.fullmatch(r"[0-9]{1,12}", value):
        raise FormError("a part's Content-Length is not a number")
    return int(value)
