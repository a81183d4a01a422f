"""Reads watched scalars out of a JSON object that comes in pieces, with their offsets, and passes over everything else.

The JSON reader on the way of requests and answers; :mod:`proxy.whole` only says of small ones what this says, sooner.
Strings of any length go by without being kept, so memory stays the same whether the document holds an image of 44 MB or none.
"""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal, TypeAlias

Kind = Literal["string", "number", "true", "false", "null", "object", "array"]

# Deeper than any image request or answer; bounds the stack of frames, here and in whoever reads the document next.
DEPTH_MAX = 64

# A value costs one to four microseconds however short it is, so this bounds the time that 64 MB of "[[],[]," can burn
# to about two seconds. Requests have a few dozen values, answers a few hundred.
VALUES_MAX = 500_000

# Every occurrence of a watched value is reported; this bounds the memory that endless repetition can take.
FOUND_MAX = 10_000

# A 64-bit number has at most 25 characters in any usual spelling; nothing else outside strings is longer.
SCALAR_BYTES_MAX = 1_000

# Room for a watched name of 80 characters in its longest spelling, six bytes an escape; a longer name can't be watched.
NAME_BYTES_MAX = 2 + 6 * 80

_QUOTE, _COMMA, _COLON, _OPEN_ARRAY, _CLOSE_ARRAY, _OPEN_OBJECT, _CLOSE_OBJECT = b'",:[]{}'
_BYTE_ORDER_MARK = codecs.BOM_UTF8

_SPACE = rb"[ \t\n\r]*+"
_PLAIN = rb'[^"\\\x00-\x1f]'
_NUMBER = rb"-?(?:0|[1-9][0-9]*+)(?:\.[0-9]++)?(?:[eE][+-]?[0-9]++)?"

_spaces = re.compile(_SPACE)
_scalar_bytes = re.compile(rb"[-+.0-9A-Za-z]*+")
_number = re.compile(_NUMBER)
_control = re.compile(rb"[\x00-\x1f]")

# A run of escapes with little between them goes by in one match; a long plain run is left to bytes.find, which is
# seventy times as fast as any regular expression.
_escapes = re.compile(rb'(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})' + _PLAIN + rb"{0,64}+)++")
_whole_characters = re.compile(rb'"(?:[^\\]|\\[^u]|\\u[0-9a-fA-F]{4})*+', re.DOTALL)
_cut_escape = re.compile(rb"\\(?:u[0-9a-fA-F]{0,3})?")

# "name": scalar, or "name": scalar} -- most of what a request consists of, in one match where it lies in one piece.
# What is longer is left to the states: they pass over long strings faster, and they know the limits.
_member = re.compile(
    rb'"(' + _PLAIN + rb'{0,64}+)"' + _SPACE + rb":" + _SPACE
    + rb'("' + _PLAIN + rb'{0,512}+"|-?(?:0|[1-9][0-9]{0,20}+)|true|false|null)' + _SPACE + rb"([,}])" + _SPACE
)  # fmt: skip

# "name": before whatever the expression above leaves, an object or array as a rule.
_label = re.compile(rb'"(' + _PLAIN + rb'{0,64}+)"' + _SPACE + rb":" + _SPACE)

# Made once: json.loads makes a decoder at each call that asks for anything but its own.
_loads = json.JSONDecoder(strict=False).decode

_CONTROLS = tuple(bytes([byte]) for byte in range(0x20))

# Below this length one search by regular expression is cheaper than 32 by bytes.find.
_SHORT_RUN_BYTES = 512

_KINDS: Mapping[int, Kind] = {_QUOTE: "string", ord("t"): "true", ord("f"): "false", ord("n"): "null"}
_LITERALS: Mapping[bytes, Kind] = {b"true": "true", b"false": "false", b"null": "null"}


class SkimError(ValueError):
    """Not the JSON that was asked for; the message says what is wrong, and at which offset in bytes."""


@dataclass(slots=True)
class Found:
    """One occurrence of a watched value. Not frozen: one is made for each, and a frozen one takes twice as long.

    ``path`` is the pattern that matched, ``index`` the innermost array element on the way there (-1: none). ``raw`` is
    the token's own bytes, quotes included, cut at the pattern's limit; ``b""`` for an object or array. ``start`` and
    ``end`` (exclusive) are offsets in the document; an object or array spans its opening bracket alone.
    """

    path: tuple[str, ...]
    index: int
    kind: Kind
    raw: bytes
    whole: bool
    start: int
    end: int

    def text(self) -> str:
        """The decoded string; of a cut one as much as decodes cleanly; of any other scalar its spelling.

        A lone surrogate, which JSON can spell and UTF-8 can't, is returned as it is.
        """
        if self.kind != "string":
            return self.raw.decode("ascii")
        return _decode(self.raw) if self.whole else _decode_cut(self.raw)


class Watch:
    """Patterns made ready, for a reader that is made often: it takes longer than to read a small document."""

    def __init__(self, patterns: Mapping[tuple[str, ...], int]) -> None:
        self.root = _plant(patterns)


class Skim:
    """Feed it a document, in pieces of any size, and read ``found`` and ``whole`` at any time.

    ``watch`` maps a pattern, such as ``("size",)`` or ``("data", "*", "size")`` with ``*`` for any array index, to how
    many bytes of the value's token to keep. ``strict`` takes RFC 8259 in UTF-8 and nothing else; otherwise a leading
    byte order mark is passed over, and strings are not searched for control characters and broken UTF-8.
    After a :class:`SkimError` the reader is of no further use.
    """

    def __init__(self, watch: Mapping[tuple[str, ...], int] | Watch, *, strict: bool) -> None:
        planted = watch if isinstance(watch, Watch) else Watch(watch)
        self.found: list[Found] = []
        self.whole = False
        self._strict = strict
        self._node: _Node | None = planted.root  # what is watched of the value that comes next
        self._frames: list[_Frame] = [_Frame(is_object=False, node=None, index=-1)]
        self._step: _Step = Skim._start
        self._values = 0
        self._offset = 0  # of the first byte that is not yet read
        self._held = b""  # a token's beginning that can't be read without its end
        self._cut_character = b""
        self._string_is_name = False
        self._string_start = 0
        self._string_room = 0
        self._string_raw = bytearray()

    def feed(self, data: bytes) -> None:
        """Read on. Raises :class:`SkimError` as soon as the document can't be right any more."""
        if self._strict:
            self._check_utf8(data)
        data = self._held + data
        at: int | None = 0
        seen = 0
        while at is not None and at < len(data):
            seen = at
            if data[at] in b" \t\n\r" and self._step is not Skim._string:
                at = _end(_spaces.match(data, at))
            else:
                at = self._step(self, data, at)
        self._held = data[seen:] if at is None else b""
        self._offset += len(data) - len(self._held)

    def end(self) -> None:
        """Say that nothing follows. Raises :class:`SkimError` unless a whole document was read."""
        if not self.whole:
            raise SkimError(f"the document ends before it is complete, at offset {self._offset + len(self._held)}")

    # The states. Each reads from data[at], which is no whitespace outside strings, sets what comes next, and returns
    # where it stopped: None means that it needs more than data has, and wants to see data[at:] again.

    def _start(self, data: bytes, at: int) -> int | None:
        if self._offset + at == 0 and not self._strict and data[0] == _BYTE_ORDER_MARK[0]:
            if data.startswith(_BYTE_ORDER_MARK):
                return len(_BYTE_ORDER_MARK)
            if _BYTE_ORDER_MARK.startswith(data):
                return None
        if data[at] != _OPEN_OBJECT:
            raise self._fault("the document must be a JSON object in UTF-8 and begin with '{'", at)
        return self._open(data, at)

    def _first_name(self, data: bytes, at: int) -> int:
        return self._close(at) if data[at] == _CLOSE_OBJECT else self._name(data, at)

    def _name(self, data: bytes, at: int) -> int:
        member = _member.match(data, at)
        if member is not None:
            return self._take_members(data, member)
        label = _label.match(data, at)
        if label is not None:
            self._node = self._child(label[1])
            self._step = Skim._value
            return label.end()
        if data[at] != _QUOTE:
            raise self._fault("expected a name in double quotes", at)
        return self._open_string(at, is_name=True, room=NAME_BYTES_MAX)

    def _colon(self, data: bytes, at: int) -> int:
        if data[at] != _COLON:
            raise self._fault("expected ':' after the name", at)
        self._step = Skim._value
        return at + 1

    def _first_item(self, data: bytes, at: int) -> int | None:
        if data[at] == _CLOSE_ARRAY:
            return self._close(at)
        self._frames[-1].index = 0
        return self._value(data, at)

    def _value(self, data: bytes, at: int) -> int | None:
        byte = data[at]
        if byte == _QUOTE:
            self._count_value(at)
            room = self._node.keep if self._node is not None and self._node.keep is not None else 0
            return self._open_string(at, is_name=False, room=room)
        if byte in (_OPEN_OBJECT, _OPEN_ARRAY):
            return self._open(data, at)
        return self._scalar(data, at)

    def _scalar(self, data: bytes, at: int) -> int | None:
        end = _end(_scalar_bytes.match(data, at))
        if end - at > SCALAR_BYTES_MAX:
            raise self._fault(f"a number or literal of more than {SCALAR_BYTES_MAX} bytes", at)
        if end == len(data):
            return None
        raw = data[at:end]
        kind = _LITERALS.get(raw) or ("number" if _number.fullmatch(raw) else None)
        if kind is None:
            raise self._fault("expected a JSON value", at)
        self._count_value(at)
        self._report(kind, raw, self._offset + at, self._offset + end)
        self._step = Skim._next
        return end

    def _string(self, data: bytes, at: int) -> int | None:
        start, quote = at, -1
        while True:
            if quote < at:
                quote = data.find(b'"', at)
                quote = len(data) if quote < 0 else quote
            slash = data.find(b"\\", at, quote)
            self._check_plain(data, at, quote if slash < 0 else slash)
            if slash < 0:
                self._keep(data, start, quote + 1)
                return quote if quote == len(data) else self._close_string(quote + 1)
            escapes = _escapes.match(data, slash)
            if escapes is None:
                if not _cut_escape.fullmatch(data, slash):
                    raise self._fault("an invalid escape in a string", slash)
                self._keep(data, start, slash)
                return slash if slash > start else None
            at = escapes.end()

    def _next(self, data: bytes, at: int) -> int:
        frame = self._frames[-1]
        if data[at] == _COMMA:
            if frame.is_object:
                self._step = Skim._name
            else:
                frame.index += 1
                self._node = frame.node and frame.node.items
                self._step = Skim._value
            return at + 1
        if data[at] != (_CLOSE_OBJECT if frame.is_object else _CLOSE_ARRAY):
            raise self._fault("expected ',' or '}'" if frame.is_object else "expected ',' or ']'", at)
        return self._close(at)

    def _nothing(self, _: bytes, at: int) -> int:
        raise self._fault("only whitespace may follow the document", at)

    # What the states do on their way.

    def _open(self, data: bytes, at: int) -> int:
        self._count_value(at)
        if len(self._frames) > DEPTH_MAX:
            raise self._fault(f"more than {DEPTH_MAX} levels deep", at)
        is_object = data[at] == _OPEN_OBJECT
        self._report("object" if is_object else "array", b"", self._offset + at, self._offset + at + 1)
        index = self._frames[-1].index if is_object else -1
        self._frames.append(_Frame(is_object, self._node, index))
        if is_object:
            self._step = Skim._first_name
        else:
            self._node = self._node and self._node.items
            self._step = Skim._first_item
        return at + 1

    def _close(self, at: int) -> int:
        self._frames.pop()
        self.whole = len(self._frames) == 1
        self._step = Skim._nothing if self.whole else Skim._next
        return at + 1

    def _open_string(self, at: int, *, is_name: bool, room: int) -> int:
        self._string_is_name = is_name
        self._string_start = self._offset + at
        self._string_room = room
        self._string_raw = bytearray(b'"'[:room])
        self._step = Skim._string
        return at + 1

    def _close_string(self, end: int) -> int:
        raw = bytes(self._string_raw)
        if self._string_is_name:
            whole = len(raw) == self._offset + end - self._string_start
            self._node = self._child(raw[1:-1] if b"\\" not in raw else _encode(_decode(raw))) if whole else None
            self._step = Skim._colon
        else:
            self._report("string", raw, self._string_start, self._offset + end)
            self._step = Skim._next
        return end

    def _keep(self, data: bytes, start: int, end: int) -> None:
        """Keep of data[start:end] what the string's limit leaves room for."""
        room = self._string_room - len(self._string_raw)
        if room > 0:
            self._string_raw += data[start : min(end, start + room)]

    def _take_members(self, data: bytes, member: re.Match[bytes] | None) -> int:
        """Pass over a run of short members: most of what is read, so it stays out of the states between them."""
        frame = self._frames[-1]
        watched = frame.node.names if frame.node is not None else {}
        self._step = Skim._name
        at = 0
        while member is not None:
            self._count_value(member.start())
            at = member.end()
            name, raw, behind = member.groups()
            node = watched.get(name)
            if node is not None and node.keep is not None:
                self._node = node
                start = self._offset + member.start(2)
                self._report(_KINDS.get(raw[0], "number"), raw, start, start + len(raw))
            if behind == b"}":
                self._close(at)
                break
            member = _member.match(data, at)
        return at

    def _child(self, name: bytes) -> _Node | None:
        node = self._frames[-1].node
        return None if node is None else node.names.get(name)

    def _report(self, kind: Kind, raw: bytes, start: int, end: int) -> None:
        node = self._node
        if node is None or node.keep is None:
            return
        if len(self.found) == FOUND_MAX:
            raise SkimError(f"more than {FOUND_MAX} values of the kind that is read, at offset {start}")
        raw = raw[: node.keep]
        self.found.append(Found(node.path, self._frames[-1].index, kind, raw, len(raw) == end - start, start, end))

    def _count_value(self, at: int) -> None:
        self._values += 1
        if self._values > VALUES_MAX:
            raise self._fault(f"more than {VALUES_MAX} values", at)

    def _check_plain(self, data: bytes, start: int, end: int) -> None:
        """In strict reading, no raw control character in data[start:end] of a string."""
        if not self._strict:
            return
        if end - start > _SHORT_RUN_BYTES and all(data.find(control, start, end) < 0 for control in _CONTROLS):
            return
        control = _control.search(data, start, end)
        if control is not None:
            raise self._fault("a control character in a string, which must be escaped", control.start())

    def _check_utf8(self, data: bytes) -> None:
        """All of the document is UTF-8, whatever part of it a byte belongs to; a character may be cut by a piece's end."""
        if data.isascii() and not self._cut_character:
            return
        at = self._offset + len(self._held) - len(self._cut_character)
        data = self._cut_character + data
        try:
            _, used = codecs.utf_8_decode(data, "strict", False)
        except UnicodeDecodeError as error:
            raise SkimError(f"not UTF-8, at offset {at + error.start}") from None
        self._cut_character = data[used:]

    def _fault(self, what: str, at: int) -> SkimError:
        return SkimError(f"{what}, at offset {self._offset + at}")


_Step: TypeAlias = Callable[[Skim, bytes, int], int | None]


@dataclass(slots=True)
class _Node:
    """What is watched at one place of the document, and below it. ``keep`` is None where the place itself is not."""

    path: tuple[str, ...] = ()
    keep: int | None = None
    names: dict[bytes, _Node] = field(default_factory=dict)
    items: _Node | None = None


@dataclass(slots=True)
class _Frame:
    """An object or array that is open. ``index`` is that of the innermost array element; an object has it from outside."""

    is_object: bool
    node: _Node | None
    index: int


def _plant(patterns: Mapping[tuple[str, ...], int]) -> _Node:
    """The patterns as a tree. An array's elements have a branch of their own, so that a member named "*" is not one."""
    root = _Node()
    for path, keep in patterns.items():
        node = root
        for name in path:
            if name == "*":
                node.items = node.items or _Node()
                node = node.items
            else:
                assert len(name) <= 80, "see NAME_BYTES_MAX"
                node = node.names.setdefault(_encode(name), _Node())
        node.path, node.keep = path, keep
    return root


def _encode(name: str) -> bytes:
    return name.encode("utf-8", "surrogatepass")


def _decode(token: bytes) -> str:
    if b"\\" not in token:
        return token[1:-1].decode("utf-8", "replace")
    text: str = _loads(token.decode("utf-8", "replace"))
    return text


def _decode_cut(token: bytes) -> str:
    """The characters of a string token that are there as a whole. The last may be half of one that UTF-16 needs two for."""
    if b"\\" not in token:
        return codecs.utf_8_decode(token[1:], "replace", False)[0]
    clean = _whole_characters.match(token)
    if clean is None:
        return ""
    spelled, _ = codecs.utf_8_decode(clean[0], "replace", False)
    text: str = _loads(spelled + '"')
    return text[:-1] if "\ud800" <= text[-1:] <= "\udbff" else text


def _end(match: re.Match[bytes] | None) -> int:
    assert match is not None, "these expressions match the empty run too"
    return match.end()
