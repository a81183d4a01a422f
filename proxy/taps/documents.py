"""Reads an answer that is one JSON document: at once where its first piece is all of it, else in pieces."""

from __future__ import annotations

from dataclasses import dataclass

from proxy.images import measure_base64
from proxy.prices import AUTO, DeliveredImage
from proxy.skim import Found, Skim, Watch
from proxy.taps.delivery import (
    IMAGE_NAMES,
    IMAGE_PREFIX_BYTES,
    IMAGES_MAX,
    SCALAR_BYTES,
    SHARED_WATCH,
    TOKEN_COUNT,
    TOKEN_FIELDS,
    Delivery,
    Facts,
    measured_size,
    usage_of,
)
from proxy.whole import Members, Value, may_be_whole, read_whole

# A character of ASCII takes six bytes at most, as an escape: so many are within SCALAR_BYTES, however they were spelled.
_SURELY_WHOLE_CHARACTERS = (SCALAR_BYTES - len('""')) // 6

_DOCUMENT_WATCH = Watch(
    {
        **SHARED_WATCH,
        ("created",): SCALAR_BYTES,
        ("data",): SCALAR_BYTES,
        ("data", "*"): SCALAR_BYTES,
        **{("data", "*", name): IMAGE_PREFIX_BYTES for name in IMAGE_NAMES},
    }
)


class Document:
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
    return Delivery(tuple(images), True, error, understood, usage_of(_counts(said.get("usage"))))


def _surely_whole(value: Value) -> bool:
    return not isinstance(value, str) or (len(value) <= _SURELY_WHOLE_CHARACTERS and value.isascii())


def _told(value: Value) -> str | None:
    return value if isinstance(value, str) and value not in ("", AUTO) else None


def _is_image(element: Members) -> bool:
    named = False
    for name, value in element:
        if name in IMAGE_NAMES:
            if value or not (value is None or isinstance(value, str)):
                return True
            named = True
    return not named


def _measured_at_once(element: Members) -> str | None:
    """Only asked where the size is not told: to look into a picture takes longer than all the rest."""
    for name, value in element:
        if name in IMAGE_NAMES and isinstance(value, str) and (size := measure_base64(value)) is not None:
            return size
    return None


def _counts(told: Value) -> dict[str, int]:
    if not isinstance(told, tuple):
        return {}
    return {
        name: int(value)
        for name, value in told
        if name in TOKEN_FIELDS and isinstance(value, bytes) and TOKEN_COUNT.fullmatch(value)
    }


class _Pieces:
    """A document that comes in pieces, or in an unusual form."""

    def __init__(self) -> None:
        self._skim = Skim(_DOCUMENT_WATCH, strict=False)
        self._facts = Facts()
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
            usage=usage_of(self._facts.counts),
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
            self.measured_size = self.measured_size or measured_size(found)
