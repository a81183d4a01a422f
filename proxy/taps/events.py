"""Reads an answer that is a stream of server-sent events."""

from __future__ import annotations

from proxy.prices import DeliveredImage
from proxy.skim import Found, Skim, SkimError, Watch
from proxy.taps.delivery import (
    IMAGE_NAMES,
    IMAGE_PREFIX_BYTES,
    IMAGES_MAX,
    SCALAR_BYTES,
    SHARED_WATCH,
    Delivery,
    Facts,
    Unreadable,
    measured_size,
    text_of,
    usage_of,
)

# An event's type or name; the longest known has 30 bytes.
NAME_BYTES = 128

# A line costs one to three microseconds however short it is, so this bounds the time that tiny events can burn to some
# seconds. It leaves room for a keep-alive every millisecond for a quarter of an hour.
LINES_MAX = 2_000_000

_LF, _CR = b"\n\r"

# The longest field name that is read, "event", and its colon: a line whose colon comes later is none of ours.
_FIELD_BYTES = len(b"event:")

_DONE = b"[DONE]"

_EVENT_WATCH = Watch(
    {
        **SHARED_WATCH,
        ("type",): NAME_BYTES,
        **{(name,): IMAGE_PREFIX_BYTES for name in IMAGE_NAMES},
    }
)


class Events:
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
                raise Unreadable
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
            usage=usage_of(self._counts),
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
        self.facts = Facts()
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
                self._type = text_of(found)
            case ("b64_json" | "url",):
                self.measured_size = self.measured_size or measured_size(found)
            case _:
                self.facts.note(found)
