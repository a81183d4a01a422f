"""Watches an answer go by, and says at its end what was delivered. Nothing else reads answers, and nothing here changes,
delays or keeps them: of an image no more than the beginning of one is held at a time.

    answer -> Tap: decoding, and which of the two readers -> _Document: one JSON document, at once or in _Pieces
                                                          -> _Events:   server-sent events, each an _Event
"""

from __future__ import annotations

import re
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, Protocol

from proxy.images import measure_base64
from proxy.prices import AUTO, DeliveredImage
from proxy.skim import Found, Skim, SkimError, Watch
from proxy.whole import Members, Value, may_be_whole, read_whole

# Enough of an image for the size in its header. PNG and WebP need 30 bytes; a JPEG can have its profile and
# provenance data before it.
IMAGE_PREFIX_BYTES = 65_536

# Sizes, qualities and numbers of tokens are far shorter; anything longer is none of them.
SCALAR_BYTES = 64

# A character of ASCII takes six bytes at most, as an escape: so many are within SCALAR_BYTES, however they were spelled.
_SURELY_WHOLE_CHARACTERS = (SCALAR_BYTES - len('""')) // 6

# An event's type or name; the longest known has 30 bytes.
NAME_BYTES = 128

# A request asks for ten images at most. What runs far beyond that is a fault, and must not fill the memory.
IMAGES_MAX = 1_000

# A line costs one to three microseconds however short it is, so this bounds the time that tiny events can burn to some
# seconds. It leaves room for a keep-alive every millisecond for a quarter of an hour.
LINES_MAX = 2_000_000

# The largest true answer, ten images of 3840x2160, has 440 MB. More than that out of compressed bytes is a bomb.
DECODED_BYTES_MAX = 1_000_000_000

# How much is read, or decoded, at a time: what is found in between, and a bomb's output, grow with it.
STEP_BYTES = 65_536

_LF, _CR = b"\n\r"

# Byte order mark and whitespace: what may come before the first byte that means something.
_INSIGNIFICANT = b"\xef\xbb\xbf \t\r\n"

# The longest field name that is read, "event", and its colon: a line whose colon comes later is none of ours.
_FIELD_BYTES = len(b"event:")

_DONE = b"[DONE]"

_IMAGE_NAMES = ("b64_json", "url")

_COUNTS = ("input_tokens", "output_tokens", "total_tokens")

# The sum over as many events as there can be lines stays inside a signed 64-bit column.
_COUNT = re.compile(rb"[0-9]{1,12}")

_SHARED_WATCH: Mapping[tuple[str, ...], int] = {
    ("size",): SCALAR_BYTES,
    ("quality",): SCALAR_BYTES,
    ("error",): SCALAR_BYTES,
    **{("usage", count): SCALAR_BYTES for count in _COUNTS},
}
_DOCUMENT_WATCH = Watch(
    {
        **_SHARED_WATCH,
        ("created",): SCALAR_BYTES,
        ("data",): SCALAR_BYTES,
        ("data", "*"): SCALAR_BYTES,
        **{("data", "*", name): IMAGE_PREFIX_BYTES for name in _IMAGE_NAMES},
    }
)
_EVENT_WATCH = Watch(
    {
        **_SHARED_WATCH,
        ("type",): NAME_BYTES,
        **{(name,): IMAGE_PREFIX_BYTES for name in _IMAGE_NAMES},
    }
)


class Usage(NamedTuple):
    """Tokens, where the answer gives them; summed over a stream's completed images."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None


class Delivery(NamedTuple):
    """What an answer brought.

    ``images``: those that came whole, in order, at most :data:`IMAGES_MAX`; measured where the answer reports no size.
    ``complete``: it was read to its proper end; a JSON document that is whole is, however the transfer ended.
    ``error``: it says itself that something failed: an SSE error event, or a JSON ``error`` that is not null.
    ``understood``: something in it had a known shape. An HTML page, an empty body or an unknown document has not.
    """

    images: tuple[DeliveredImage, ...] = ()
    complete: bool = False
    error: bool = False
    understood: bool = False
    usage: Usage | None = None


def open_tap(content_type: bytes | None, content_encoding: bytes | None) -> Tap:
    """A tap for one answer, from the values of its two headers.

    The encoding may be gzip or deflate, although neither is asked for; an answer in another one is not understood.
    What the answer is, its first byte decides, since a mislabelled one was delivered all the same; only one that
    never begins is judged by its content type.
    """
    media_type = (content_type or b"").partition(b";")[0].strip().lower()
    empty = _Document() if media_type.endswith(b"json") else _Events()
    encoding = (content_encoding or b"identity").strip().lower()
    decoder = _DECODERS.get(encoding, _Sealed)
    return Tap(empty, decoder())


class Tap:
    """Feed it the answer's body as it comes, then ask :meth:`finish` once."""

    def __init__(self, reader: _Reader, decoder: _Decoder) -> None:
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
        return isinstance(self._reader, _Document)

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
                self._reader = _Events() if self.reads_document else _Document()
        self._reader.feed(piece)


class _Reader(Protocol):
    def feed(self, piece: bytes) -> None:
        """Read on; a piece is never empty."""

    def end(self) -> None:
        """Said once the last piece is in, if that was the proper end."""

    def delivery(self) -> Delivery:
        """What was delivered. Nothing is fed after it."""


class _Decoder(Protocol):
    def decode(self, chunk: bytes, /) -> Iterable[bytes]:
        """What the chunk decodes to, in pieces of at most :data:`STEP_BYTES`, none of them empty."""

    def at_end(self) -> bool:
        """Nothing is missing of what was encoded."""


class _Plain:
    def decode(self, chunk: bytes, /) -> Iterable[bytes]:
        return (chunk,)

    def at_end(self) -> bool:
        return True


class _Unreadable(Exception):
    """The rest of the answer can't be read, or is beyond a limit of this file."""


class _Sealed:
    """An encoding that nobody asked for, and that is not known here."""

    def decode(self, _chunk: bytes, /) -> Iterable[bytes]:
        raise _Unreadable

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
                raise _Unreadable
            if piece:
                yield piece

    def at_end(self) -> bool:
        return self._inflate is None or self._inflate.eof


_DECODERS: Mapping[bytes, Callable[[], _Decoder]] = {
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


@dataclass(slots=True)
class _Facts:
    """What an object says of its images in common."""

    size: str | None = None
    quality: str | None = None
    error: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, found: Found) -> None:
        """Take up one value of :data:`_SHARED_WATCH`. Of a name given twice the last counts, as for every JSON reader."""
        name = found.path[0]
        if name == "usage":
            if found.kind == "number" and _COUNT.fullmatch(found.raw):
                self.counts[found.path[1]] = int(found.raw)
        elif name == "size":
            self.size = _reported(found)
        elif name == "quality":
            self.quality = _reported(found)
        elif name == "error":
            self.error = found.kind != "null"

    def image(self, measured_size: str | None) -> DeliveredImage:
        return DeliveredImage(self.size, self.quality, measured_size if self.size is None else None)


def _string(found: Found) -> str | None:
    return found.text() if found.kind == "string" and found.whole else None


def _reported(found: Found) -> str | None:
    text = _string(found)
    return None if text in ("", AUTO) else text


def _measured(found: Found) -> str | None:
    """The size in the header of an image given as base64 or as a data URL; any other URL decodes to no image."""
    return measure_base64(found.text()) if found.kind == "string" else None


def _usage(counts: dict[str, int]) -> Usage | None:
    return Usage(**counts) if counts else None


class _Document:
    """One JSON document. An element of ``data`` is one image, unless it is no object, or has its ``b64_json`` and ``url``
    all null or empty. It counts as soon as one of these is whole; one without either, once it is closed."""

    def __init__(self) -> None:
        self._read: Delivery | None = None  # at once, all of it
        self._pieces: _Pieces | None = None

    def feed(self, piece: bytes) -> None:
        if self._pieces is None:
            # Whatever follows a whole document takes nothing from what came.
            self._read = self._read or _read_at_once(piece)
            if self._read is not None:
                return
            self._pieces = _Pieces()
        self._pieces.feed(piece)

    def end(self) -> None:
        """Changes nothing: a document says itself whether it is whole."""

    def delivery(self) -> Delivery:
        return self._read or (self._pieces or _Pieces()).delivery()


def _read_at_once(piece: bytes) -> Delivery | None:
    """What a document brought whose first piece is all of it; None where it isn't, or where only :class:`_Pieces` can tell."""
    said = read_whole(piece) if may_be_whole(piece) else None
    if said is None:
        return None
    size, quality, data = said.get("size"), said.get("quality"), said.get("data")
    elements = data if isinstance(data, list) else []
    if not (_surely_whole(size) and _surely_whole(quality)) or len(elements) > IMAGES_MAX:
        return None
    told_size, told_quality = _told(size), _told(quality)
    images = [
        DeliveredImage(told_size, told_quality, None if told_size is not None else _measured_at_once(element))
        for element in elements
        if isinstance(element, tuple) and _is_image(element)
    ]
    error = said.get("error") is not None
    understood = error or "data" in said or "created" in said
    return Delivery(tuple(images), True, error, understood, _usage(_counts(said.get("usage"))))


def _surely_whole(value: Value) -> bool:
    return not isinstance(value, str) or (len(value) <= _SURELY_WHOLE_CHARACTERS and value.isascii())


def _told(value: Value) -> str | None:
    return value if isinstance(value, str) and value not in ("", AUTO) else None


def _is_image(element: Members) -> bool:
    named = False
    for name, value in element:
        if name in _IMAGE_NAMES:
            if value or not (value is None or isinstance(value, str)):
                return True
            named = True
    return not named


def _measured_at_once(element: Members) -> str | None:
    """Only asked where the size is not told: to look into a picture takes longer than all the rest."""
    for name, value in element:
        if name in _IMAGE_NAMES and isinstance(value, str) and (size := measure_base64(value)) is not None:
            return size
    return None


def _counts(usage: Value) -> dict[str, int]:
    if not isinstance(usage, tuple):
        return {}
    return {
        name: int(value) for name, value in usage if name in _COUNTS and isinstance(value, bytes) and _COUNT.fullmatch(value)
    }


class _Pieces:
    """A document that comes in pieces, or in an unusual form."""

    def __init__(self) -> None:
        self._skim = Skim(_DOCUMENT_WATCH, strict=False)
        self._facts = _Facts()
        self._sizes: list[str | None] = []  # measured, of each image
        self._element: _Element | None = None
        self._known = False

    def feed(self, piece: bytes) -> None:
        if self._skim.whole:
            # Whatever follows takes nothing from what came.
            return
        try:
            self._skim.feed(piece)
        finally:
            self._take_up()

    def delivery(self) -> Delivery:
        if self._element is not None and self._element.filled:
            self._close_element()
        return Delivery(
            images=tuple(self._facts.image(size) for size in self._sizes),
            complete=self._skim.whole,
            error=self._facts.error,
            understood=self._known or self._facts.error,
            usage=_usage(self._facts.counts),
        )

    def _take_up(self) -> None:
        for found in self._skim.found:
            name = found.path[0]
            if name == "data":
                self._note_data(found)
            else:
                self._close_element()
                self._facts.note(found)
            if name in ("data", "created"):
                self._known = True
        self._skim.found.clear()
        if self._skim.whole:
            self._close_element()

    def _note_data(self, found: Found) -> None:
        if len(found.path) < 3:
            self._close_element()
            if found.path == ("data", "*") and found.kind == "object":
                self._element = _Element()
        elif self._element is not None:
            self._element.note(found)

    def _close_element(self) -> None:
        if self._element is not None and (self._element.filled or not self._element.named):
            self._add(self._element)
        self._element = None

    def _add(self, element: _Element) -> None:
        if len(self._sizes) < IMAGES_MAX:
            self._sizes.append(element.measured_size)


@dataclass(slots=True)
class _Element:
    """An element of ``data``: whether it names an image at all, and whether there is one behind the name."""

    named: bool = False
    filled: bool = False
    measured_size: str | None = None

    def note(self, found: Found) -> None:
        self.named = True
        if found.kind != "null" and found.raw != b'""':
            self.filled = True
            self.measured_size = self.measured_size or _measured(found)


class _Events:
    """Server-sent events, read as browsers read them, but for two things that upstreams do: a last event needs no blank
    line, and two events whose data are whole objects need none between them."""

    def __init__(self) -> None:
        self._after_cr = False  # a line feed that comes next belongs to the line end before it
        self._lines = 0
        self._head = b""  # of a line whose field is not known yet
        self._field: bytes | None = None
        self._value = b""  # of an event line
        self._name = ""
        self._event: _Event | None = None
        self._images: list[DeliveredImage] = []
        self._counts: dict[str, int] = {}
        self._ended = False
        self._done = False
        self._error = False
        self._known = False

    def feed(self, piece: bytes) -> None:
        size = len(piece)
        at = 1 if self._after_cr and piece[0] == _LF else 0
        self._after_cr = piece[-1] == _CR
        # Where the next line end of each kind is stays known until it is passed: to look for both from every line on
        # takes quadratic time where only one kind occurs.
        lf = cr = -1
        while at < size:
            if lf < at:
                lf = _find(piece, b"\n", at)
            if cr < at:
                cr = _find(piece, b"\r", at)
            end = min(lf, cr)
            if at < end:
                self._read(piece[at:end])
            if end == size:
                return
            self._lines += 1
            if self._lines > LINES_MAX:
                raise _Unreadable
            self._end_line()
            at = end + 2 if end == cr and lf == cr + 1 else end + 1

    def end(self) -> None:
        self._end_line()
        self._judge(dispatched=True)
        self._ended = True

    def delivery(self) -> Delivery:
        self._judge(dispatched=False)
        return Delivery(
            images=tuple(self._images),
            complete=self._ended or self._done or self._error,
            error=self._error,
            understood=self._known,
            usage=_usage(self._counts),
        )

    def _read(self, part: bytes) -> None:
        """Take up a part of a line, which is not empty."""
        if self._field is None:
            head = self._head + part[:_FIELD_BYTES]
            name, colon, _ = head.partition(b":")
            if not colon and len(head) < _FIELD_BYTES:
                self._head = head
                return
            part = part[len(name) + 1 - len(self._head) :]
            self._field = name if colon else b""
            if self._field == b"data":
                self._begin_data()
        if self._field == b"data" and self._event is not None:
            self._event.read(part)
        elif self._field == b"event":
            self._value += part[: NAME_BYTES - len(self._value)]

    def _begin_data(self) -> None:
        if self._event is not None and self._event.whole:
            self._judge(dispatched=True)
        if self._event is None:
            self._event = _Event()
        else:
            self._event.read(b"\n")

    def _end_line(self) -> None:
        if self._field is None and not self._head:
            self._judge(dispatched=True)
        elif self._field == b"event":
            if self._name and self._event is not None and self._event.whole:
                self._judge(dispatched=True)
            self._name = self._value.strip().decode("latin-1")
        self._head, self._field, self._value = b"", None, b""

    def _judge(self, *, dispatched: bool) -> None:
        """Book the event that was read, if there is one. One that was cut off, not dispatched, counts if its data is whole."""
        event, name = self._event, self._name
        self._event, self._name = None, ""
        if event is None:
            return
        kind = event.kind(name)
        if event.whole and kind.endswith(".completed"):
            self._known = True
            self._add(event)
        elif event.whole and kind.endswith(".partial_image"):
            self._known = True
        elif "error" in (kind, name) and (event.whole or dispatched):
            self._known = self._error = True
        elif event.head.strip() == _DONE:
            self._known = self._done = True

    def _add(self, event: _Event) -> None:
        if len(self._images) < IMAGES_MAX:
            self._images.append(event.facts.image(event.measured_size))
        for count, tokens in event.facts.counts.items():
            self._counts[count] = self._counts.get(count, 0) + tokens


def _find(piece: bytes, byte: bytes, at: int) -> int:
    found = piece.find(byte, at)
    return len(piece) if found < 0 else found


class _Event:
    """The data of one event. Once its object is whole, what follows takes nothing from it."""

    def __init__(self) -> None:
        self.head = b""  # of data that is no object, to know the one word that is looked for
        self.facts = _Facts()
        self.measured_size: str | None = None
        self._type: str | None = None
        self._skim = Skim(_EVENT_WATCH, strict=False)
        self._broken = False

    @property
    def whole(self) -> bool:
        return self._skim.whole

    def kind(self, name: str) -> str:
        """The type that the data gives, else the event's name. An ``error`` without a type speaks for itself."""
        if not self._type and self.facts.error:
            return "error"
        return self._type or name

    def read(self, part: bytes) -> None:
        if self.whole:
            return
        self.head += part[: SCALAR_BYTES - len(self.head)]
        if not self._broken:
            try:
                self._skim.feed(part)
            except SkimError:
                self._broken = True
            for found in self._skim.found:
                self._note(found)
            self._skim.found.clear()

    def _note(self, found: Found) -> None:
        match found.path:
            case ("type",):
                self._type = _string(found)
            case ("b64_json" | "url",):
                self.measured_size = self.measured_size or _measured(found)
            case _:
                self.facts.note(found)
