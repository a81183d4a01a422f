"""What operators and tools send, read into checked models: query strings, JSON bodies and cursors. Pure; what can't be read is
said of the field at fault."""

from __future__ import annotations

import json
import re
from base64 import urlsafe_b64decode, urlsafe_b64encode
from collections.abc import Sequence
from typing import Annotated, Any, TypeVar, get_origin

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from proxy.periods import parse_duration

# A name or id that can be in the books: what the database can't hold is in none of them.
NAME_CHARACTERS_MAX = 64

# A cursor holds the place of one row; the longest is that of a sum by all columns.
CURSOR_CHARACTERS_MAX = 2_000

Model = TypeVar("Model", bound=BaseModel)


class InputError(ValueError):
    """What was sent can't be taken. ``field`` is the one at fault, ``None`` where nothing could be read at all."""

    def __init__(self, message: str, field: str | None) -> None:
        super().__init__(message)
        self.message = message
        self.field = field


class Query(BaseModel):
    """The parameters of a query string."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Body(BaseModel):
    """The fields of a JSON object. Strict: a number in quotes is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


def _whole(value: object) -> object:
    # To pydantic " 5", 5.0 and 5_0 are whole numbers too.
    return int(value) if isinstance(value, str) and re.fullmatch(r"[0-9]{1,15}", value, re.ASCII) else None


def _printable(text: str) -> str:
    if not text.isprintable():
        raise ValueError("only printable characters")
    return text


def _lasting(text: str) -> str:
    if not parse_duration(text):
        raise ValueError("longer than nothing")
    return text


def _duration(text: str) -> str:
    parse_duration(text)
    return text


Whole = Annotated[int, BeforeValidator(_whole)]
Name = Annotated[str, Field(min_length=1, max_length=NAME_CHARACTERS_MAX), AfterValidator(_printable)]
Cursor = Annotated[str, Field(max_length=CURSOR_CHARACTERS_MAX)]
Duration = Annotated[str, Field(pattern=r"^[0-9]{1,10}[smhdw]$", examples=["24h"]), AfterValidator(_duration)]
Lifetime = Annotated[str, Field(pattern=r"^[0-9]{1,10}[smhdw]$", examples=["90d"]), AfterValidator(_lasting)]


def read_query(model: type[Model], pairs: Sequence[tuple[str, str]]) -> Model:
    """A query string's names and values as a model. A list's name may come several times, and with ``[]`` behind it, as
    OpenAI's clients write lists; any other name comes once. Raises :class:`InputError`."""
    values: dict[str, Any] = {}
    for name, value in pairs:
        field = name.removesuffix("[]")
        if field in model.model_fields and get_origin(model.model_fields[field].annotation) is list:
            values.setdefault(field, []).append(value)
        elif name in values:
            raise InputError(f"'{name}' is given more than once: give it once", name)
        else:
            values[name] = value
    return _checked(model.model_validate, model, values)


def read_body(model: type[Model], body: bytes) -> Model:
    """A JSON document as a model. Raises :class:`InputError`."""
    return _checked(model.model_validate_json, model, body)


def _checked(validate: Any, model: type[Model], value: object) -> Model:
    try:
        checked: Model = validate(value)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        field = str(first["loc"][0]) if first["loc"] else None
        raise InputError(_wording(model, field, first), field) from None
    return checked


def _wording(model: type[BaseModel], field: str | None, error: Any) -> str:
    if error["type"] == "json_invalid":
        return "this is not JSON in UTF-8"
    if field is None:
        return "send a JSON object"
    if error["type"] == "extra_forbidden":
        return f"there is no '{field}' here: it takes {', '.join(model.model_fields) or 'nothing'}"
    if error["type"] == "missing":
        return f"'{field}' is missing"
    expected = model.model_fields[field].description
    told = error["msg"].removeprefix("Value error, ").removeprefix("Input should be ")
    return f"'{field}' has to be {expected}" if expected else f"'{field}' has to be {told}"


# Cursors

# Ids of rows and microseconds since 1970 stay below this for two centuries.
_NUMBER_MAX = 1 << 53


def cursor_of(listing: str, place: Sequence[int | str]) -> str:
    """A place in a listing as text that a client hands back."""
    return urlsafe_b64encode(json.dumps([listing, *place]).encode("ascii")).decode("ascii").rstrip("=")


def read_cursor(listing: str, kinds: Sequence[type], cursor: str, field: str) -> tuple[int | str, ...]:
    """The place in a cursor of this listing, of values of these kinds. Raises :class:`InputError`."""
    try:
        told, *place = json.loads(urlsafe_b64decode(cursor.encode("ascii") + b"=" * (-len(cursor) % 4)))
        known = told == listing and len(place) == len(kinds) and all(map(_is_of, place, kinds))
    except (ValueError, TypeError, RecursionError):
        known = False
    if not known:
        raise InputError(f"'{field}' is not a cursor of this listing: take it from the answer before, unchanged", field)
    return tuple(place)


def _is_of(value: object, kind: type) -> bool:
    if type(value) is not kind:
        return False
    return 0 <= value < _NUMBER_MAX if isinstance(value, int) else isinstance(value, str) and value.isprintable()
