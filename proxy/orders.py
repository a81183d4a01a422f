"""Turns a request body into an order, or into the refusal that says what to change.

The only place that decides what a request asks for. Five fields are read; all the others are nobody's business here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import product
from typing import NamedTuple, Protocol, TypeAlias

from proxy.errors import (
    DuplicateParameter,
    InvalidJson,
    InvalidMultipart,
    InvalidValue,
    MissingRequiredParameter,
    ModelNotFound,
    UnsupportedMediaType,
)
from proxy.forms import Field, Form, FormError
from proxy.money import format_usd
from proxy.prices import AUTO, ModelPrices, Operation, Order, PriceCard, nearest_size
from proxy.skim import Found, Skim, SkimError, Watch
from proxy.whole import Value, may_be_whole, read_whole

# Any name of the price card fits, also spelled with an escape for each character; what is longer is not in the table.
VALUE_BYTES_MAX = 1_024

# A character takes twelve bytes at most, as a pair of escapes: so many are within VALUE_BYTES_MAX, however they were spelled.
_SURELY_WHOLE_CHARACTERS = (VALUE_BYTES_MAX - len('""')) // 12

# As much of a wrong value as a caller needs to recognise it.
ECHO_CHARACTERS_MAX = 64

# The fields that set the price, in the order in which they are checked.
READ_FIELDS = ("model", "size", "quality", "n", "stream")

# Some JSON readers, Go's among them, take a name in any case, and the long s for an s. To them {"n": 1, "N": 10} asks for
# ten images. Such a name is an unknown field and passes, but what it may mean is held: the dearest.
_LIKE = {"s": "sS\u017f"}
_SPELLINGS: Mapping[str, str] = {
    "".join(letters): name
    for name in READ_FIELDS
    for letters in product(*(_LIKE.get(letter, letter + letter.upper()) for letter in name))
}
_WATCH = Watch({(spelling,): VALUE_BYTES_MAX for spelling in _SPELLINGS})
_LOOK_ALIKES = _SPELLINGS.keys() - READ_FIELDS

_COUNTS: Mapping[str, int] = {str(n): n for n in range(1, 11)}
_JSON_SWITCH: Mapping[str, bool] = {"true": True, "false": False}
_FORM_SWITCH: Mapping[str, bool] = {"true": True, "1": True, "false": False, "0": False}

# How nearly every request with JSON says so.
_PLAIN_JSON = b"application/json"

_WORD = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
_media_type = re.compile(rf"[ \t]*({_WORD}/{_WORD})[ \t]*(?=;|\Z)")
# A boundary is often sent unquoted with characters that are not a token's; none of those can end a parameter.
_parameter = re.compile(rf";[ \t]*(?:({_WORD})=(?:\"([^\"\\]*)\"|([^\s;\"\\]+)))?[ \t]*(?=;|\Z)")


class Splice(NamedTuple):
    """The one change ever made to a body: ``body[start:end]`` becomes ``replacement``, the preset of an aliased size."""

    start: int
    end: int
    replacement: bytes


class Reading(NamedTuple):
    """What a body asks for, and the change it needs before it goes upstream.

    ``dearest`` is what it can mean at most to another reader, and what is held; nearly always the order itself.
    """

    order: Order
    splice: Splice | None
    dearest: Order


class OrderReader(Protocol):
    """Feed it the body, in pieces of any size, then finish. Both raise a :class:`~proxy.errors.Refusal`: ``feed`` as
    soon as the body can't be read any more, ``finish`` for whatever else is wrong with it. Only a small body that comes
    in one piece is all read by ``finish``."""

    def feed(self, chunk: bytes) -> None: ...

    def finish(self) -> Reading: ...


def open_order(
    operation: Operation,
    content_types: Sequence[bytes],
    content_encodings: Sequence[bytes],
    card: PriceCard,
    aliases: Mapping[str, str],
) -> OrderReader:
    """The reader for a request with these headers: all values of Content-Type and Content-Encoding, as they came.

    ``aliases`` maps sizes outside the table to presets. Raises :class:`UnsupportedMediaType` for what can't be read,
    :class:`InvalidMultipart` for a multipart request without a usable boundary.
    """
    _require_no_encoding(content_encodings)
    clerk = _Clerk(operation, card, aliases)
    if len(content_types) == 1 and content_types[0] == _PLAIN_JSON:
        return _JsonOrder(clerk)
    media_type, parameters = _read_content_type(content_types)
    if media_type == "application/json" and _is_utf8(parameters):
        return _JsonOrder(clerk)
    if media_type == "multipart/form-data" and operation == "edit" and (parameters is None or _is_utf8(parameters)):
        return _FormOrder(clerk, _boundary(parameters))
    raise _unsupported(operation)


class _JsonOrder:
    """A body that seems to lie whole in its first piece waits for the end, to be read at once. Every other, and one that
    turns out to be unusual, is read by a :class:`Skim`, which alone knows how to refuse."""

    def __init__(self, clerk: _Clerk) -> None:
        self._clerk = clerk
        self._waiting = b""
        self._skim: Skim | None = None

    def feed(self, chunk: bytes) -> None:
        if self._skim is None and not self._waiting and may_be_whole(chunk):
            self._waiting = chunk
        else:
            self._skimmed(chunk)

    def finish(self) -> Reading:
        if self._waiting:
            members = read_whole(self._waiting)
            reading = None if members is None else self._clerk.read_usual(members)
            if reading is not None:
                return reading
        skim = self._skimmed(b"")
        try:
            skim.end()
        except SkimError as error:
            raise _invalid_json(error) from None
        exact = [found for found in skim.found if found.path[0] in READ_FIELDS]
        reading = self._clerk.read(((found.path[0], _said_in_json(found)) for found in exact), _JSON_SWITCH)
        doubtful = {_SPELLINGS[found.path[0]] for found in skim.found if found.path[0] not in READ_FIELDS}
        return reading if not doubtful else self._clerk.doubt(reading, doubtful)

    def _skimmed(self, chunk: bytes) -> Skim:
        """The skim, with all read that came so far."""
        if self._skim is None:
            self._skim = Skim(_WATCH, strict=True)
        waiting, self._waiting = self._waiting, b""
        try:
            self._skim.feed(waiting + chunk)
        except SkimError as error:
            raise _invalid_json(error) from None
        return self._skim


class _FormOrder:
    def __init__(self, clerk: _Clerk, boundary: bytes) -> None:
        self._clerk = clerk
        try:
            self._form = Form(boundary, dict.fromkeys(READ_FIELDS, VALUE_BYTES_MAX))
        except FormError as error:
            raise _invalid_multipart(error) from None

    def feed(self, chunk: bytes) -> None:
        try:
            self._form.feed(chunk)
        except FormError as error:
            raise _invalid_multipart(error) from None

    def finish(self) -> Reading:
        try:
            self._form.end()
        except FormError as error:
            raise _invalid_multipart(error) from None
        return self._clerk.read(((field.name, _said_in_form(field)) for field in self._form.found), _FORM_SWITCH)


class _Said(NamedTuple):
    """One read field as the body says it.

    ``string`` is its value where it is text, ``literal`` its spelling where it can be a number or a switch; a form's
    field can be either. Both are None where the value is neither. ``shown`` is what messages show of it, and ``quote``
    stands around text at ``start`` and ``end`` of the body; None where the value is no text.
    """

    string: str | None
    literal: str | None
    shown: str
    quote: bytes | None
    start: int
    end: int

    def echo(self) -> str:
        """The value for a message: cut short, and text in quotes and in ASCII, so that it can stand in any log."""
        cut = self.shown if len(self.shown) <= ECHO_CHARACTERS_MAX else self.shown[:ECHO_CHARACTERS_MAX] + "..."
        return cut if self.quote is None else json.dumps(cut)

    def replaced_by(self, text: str) -> Splice:
        quote = self.quote or b""
        return Splice(self.start, self.end, quote + text.encode("ascii") + quote)


def _said_in_json(found: Found) -> _Said | None:
    """None for null, which says as much as the field's absence."""
    if found.kind == "null":
        return None
    if found.kind in ("object", "array"):
        return _Said(None, None, f"an {found.kind}", None, found.start, found.end)
    text = found.text()
    value = text if found.whole else None
    if found.kind == "string":
        return _Said(value, None, text, b'"', found.start, found.end)
    return _Said(None, value, text, None, found.start, found.end)


def _said_in_form(field: Field) -> _Said:
    if field.has_filename:
        return _Said(None, None, "a file", None, field.start, field.end)
    text = field.value.decode("utf-8", "replace")
    value = text if field.whole else None
    return _Said(value, value, text, b"", field.start, field.end)


class _Clerk(NamedTuple):
    """Checks what was said against the price card, field by field, and writes the order."""

    operation: Operation
    card: PriceCard
    aliases: Mapping[str, str]

    def read(self, fields: Iterable[tuple[str, _Said | None]], switch: Mapping[str, bool]) -> Reading:
        said = _each_once(fields)
        prices = self._model(said.get("model"))
        size, splice = self._size(said.get("size"), said.get("quality"), prices)
        quality = self._quality(said.get("quality"), prices)
        n = _count(said.get("n"))
        stream = _switched(said.get("stream"), switch)
        order = Order(self.operation, prices.name, size, quality, n, stream)
        return Reading(order, splice, dearest=order)

    def read_usual(self, members: Mapping[str, Value]) -> Reading | None:
        """The reading of a body that asks for what the table has, in so many words: nearly every one. None for the others."""
        model, size, quality = members.get("model"), members.get("size"), members.get("quality")
        size = AUTO if size is None else size
        quality = AUTO if quality is None else quality
        if not (isinstance(model, str) and isinstance(size, str) and isinstance(quality, str)):
            return None
        if len(model) + len(size) + len(quality) > _SURELY_WHOLE_CHARACTERS or not _LOOK_ALIKES.isdisjoint(members):
            return None
        prices = self.card.models.get(model)
        if prices is None or (size, quality) not in prices.dearest_cells:
            return None
        n, stream = members.get("n"), members.get("stream")
        count = 1 if n is None else _COUNTS.get(n.decode("ascii")) if isinstance(n, bytes) else None
        if count is None or not (stream is None or isinstance(stream, bool)):
            return None
        order = Order(self.operation, model, size, quality, count, stream is True)
        return Reading(order, None, dearest=order)

    def doubt(self, reading: Reading, doubtful: Collection[str]) -> Reading:
        """The same reading, held at the dearest that it can mean to another reader of the ``doubtful`` fields."""
        if "model" in doubtful and len(self.card.models) > 1:
            # No answer tells which model made the image.
            raise DuplicateParameter("model")
        order = reading.order
        dearest = replace(
            order,
            size=AUTO if "size" in doubtful else order.size,
            quality=AUTO if "quality" in doubtful else order.quality,
            n=max(_COUNTS.values()) if "n" in doubtful else order.n,
        )
        return reading._replace(dearest=dearest)

    def _model(self, said: _Said | None) -> ModelPrices:
        if said is None:
            raise MissingRequiredParameter("model")
        prices = None if said.string is None else self.card.models.get(said.string)
        if prices is None:
            raise ModelNotFound(f"The model {said.echo()} is not priced here. Priced models: {', '.join(self.card.models)}.")
        return prices

    def _size(self, said: _Said | None, quality: _Said | None, prices: ModelPrices) -> tuple[str, Splice | None]:
        if said is None:
            return AUTO, None
        if said.string is not None and said.string in (AUTO, *prices.sizes):
            return said.string, None
        preset = None if said.string is None else self.aliases.get(said.string)
        if preset is not None and preset in prices.sizes:
            return preset, said.replaced_by(preset)
        asked_quality = None if quality is None else quality.string
        raise InvalidValue(
            f"Invalid size: {said.echo()}. {_nearest(prices, said.string, asked_quality)}"
            f"Accepted: {', '.join((AUTO, *prices.sizes, *self.aliases))}.",
            "size",
        )

    def _quality(self, said: _Said | None, prices: ModelPrices) -> str:
        if said is None:
            return AUTO
        accepted = (AUTO, *prices.qualities)
        if said.string is None or said.string not in accepted:
            raise InvalidValue(f"Invalid quality: {said.echo()}. Accepted: {', '.join(accepted)}.", "quality")
        return said.string


def _each_once(fields: Iterable[tuple[str, _Said | None]]) -> dict[str, _Said | None]:
    said: dict[str, _Said | None] = {}
    twice: set[str] = set()
    for name, value in fields:
        if name in said:
            twice.add(name)
        said[name] = value
    for name in READ_FIELDS:
        if name in twice:
            raise DuplicateParameter(name)
    return said


def _count(said: _Said | None) -> int:
    if said is None:
        return 1
    n = None if said.literal is None else _COUNTS.get(said.literal)
    if n is None:
        raise InvalidValue(f"Invalid n: {said.echo()}. Accepted: a whole number from 1 to 10, written as digits alone.", "n")
    return n


def _switched(said: _Said | None, switch: Mapping[str, bool]) -> bool:
    if said is None:
        return False
    stream = None if said.literal is None else switch.get(said.literal)
    if stream is None:
        raise InvalidValue(f"Invalid stream: {said.echo()}. Accepted: {', '.join(switch)}.", "stream")
    return stream


def _nearest(prices: ModelPrices, asked: str | None, quality: str | None) -> str:
    """The sentence that offers the preset nearest in shape, with its price; empty where the size is not WxH."""
    size = None if asked is None else nearest_size(prices, asked)
    if size is None:
        return ""
    qualities = [name for name in prices.qualities if name == quality] or prices.qualities
    each = ", ".join(f"${format_usd(prices.micro_usd[size, name])} in {name}" for name in qualities)
    return f"The nearest preset of that shape is {size}, at {each} quality for each image. "


# The headers.

_Parameters: TypeAlias = list[tuple[str, str]]  # in their order, names in lower case


def _require_no_encoding(content_encodings: Sequence[bytes]) -> None:
    for value in content_encodings:
        for encoding in value.split(b","):
            if encoding.strip(b" \t").lower() not in (b"", b"identity"):
                raise UnsupportedMediaType("Send the request body without a Content-Encoding; it is read here as it comes.")


def _read_content_type(values: Sequence[bytes]) -> tuple[str, _Parameters | None]:
    """The media type in lower case, empty where there is not exactly one; and its parameters, None where those are broken."""
    value = values[0].decode("latin-1") if len(values) == 1 else ""
    media_type = _media_type.match(value)
    if media_type is None:
        return "", None
    parameters: _Parameters = []
    at = media_type.end()
    while at < len(value):
        parameter = _parameter.match(value, at)
        if parameter is None:
            return media_type[1].lower(), None
        if parameter[1] is not None:
            parameters.append((parameter[1].lower(), parameter[3] if parameter[2] is None else parameter[2]))
        at = parameter.end()
    return media_type[1].lower(), parameters


def _is_utf8(parameters: _Parameters | None) -> bool:
    if parameters is None:
        return False
    charsets = [value.lower() for name, value in parameters if name == "charset"]
    return not charsets or (len(charsets) == 1 and charsets[0] in ("utf-8", "utf8", "us-ascii"))


def _boundary(parameters: _Parameters | None) -> bytes:
    boundaries = [value for name, value in parameters or () if name == "boundary"]
    if len(boundaries) != 1:
        raise InvalidMultipart("Content-Type must name one boundary: multipart/form-data; boundary=...")
    return boundaries[0].encode("latin-1")


def _unsupported(operation: Operation) -> UnsupportedMediaType:
    accepted: Mapping[Operation, str] = {
        "generation": "application/json in UTF-8",
        "edit": "application/json in UTF-8 or multipart/form-data",
    }
    return UnsupportedMediaType(f"Send one Content-Type: {accepted[operation]}.")


def _invalid_json(error: SkimError) -> InvalidJson:
    return InvalidJson(f"The request body is not a JSON object that can be read: {error}.")


def _invalid_multipart(error: FormError) -> InvalidMultipart:
    return InvalidMultipart(f"The request body is not multipart/form-data that can be read: {error}.")
