"""What people type into forms, read field by field. What can't be taken is said of its field, in words for that
person. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime, timedelta
from urllib.parse import parse_qsl

from proxy.money import parse_usd
from proxy.periods import parse_duration, parse_when

# The largest form is a reason of 500 characters, four bytes each and three characters a byte.
FORM_BYTES_MAX = 16 * 1024
FIELDS_MAX = 20


class FieldError(ValueError):
    """A field that can't be taken as it is. ``field`` is its name."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(message)
        self.field = field
        self.message = message


class FormError(ValueError):
    """Not a form of ours at all."""


def parse_form(text: bytes) -> dict[str, str]:
    """The fields of ``application/x-www-form-urlencoded``, each once. Raises :class:`FormError`."""
    try:
        pairs = parse_qsl(text.decode("ascii"), keep_blank_values=True, errors="strict", max_num_fields=FIELDS_MAX)
    except ValueError:
        raise FormError("This is not a form.") from None
    fields = dict(pairs)
    if len(fields) != len(pairs):
        raise FormError("A field is there twice.")
    return fields


def line(fields: Mapping[str, str], name: str, *, longest: int, required: bool = True) -> str:
    """One line of text without blanks around it. Raises :class:`FieldError`, as all that follow do."""
    value = fields.get(name, "").strip()
    if required and not value:
        raise FieldError(name, "Fill this in.")
    if len(value) > longest or not value.isprintable():
        raise FieldError(name, f"Use at most {longest} printable characters.")
    return value


def choice(fields: Mapping[str, str], name: str, *among: str) -> str:
    """One of some words."""
    value = fields.get(name, "")
    if value not in among:
        raise FieldError(name, f"Choose one of {', '.join(among)}.")
    return value


def usd(fields: Mapping[str, str], name: str) -> int:
    """Dollars, as micro-USD."""
    try:
        return parse_usd(fields.get(name, "").strip().removeprefix("$"))
    except ValueError as error:
        raise FieldError(name, _sentence(error)) from None


def whole(fields: Mapping[str, str], name: str, *, most: int, least: int = 0) -> int | None:
    """A whole number from ``least`` to ``most``; nothing typed is ``None``."""
    value = fields.get(name, "").strip()
    if not value:
        return None
    if not (value.isascii() and value.isdigit() and len(value) <= 15 and least <= int(value) <= most):
        raise FieldError(name, f"Write a whole number from {least} to {most}.")
    return int(value)


def duration(fields: Mapping[str, str], name: str) -> timedelta | None:
    """How long; nothing typed is ``None``."""
    value = fields.get(name, "").strip()
    if not value:
        return None
    try:
        return parse_duration(value)
    except ValueError as error:
        raise FieldError(name, _sentence(error)) from None


def moment(fields: Mapping[str, str], name: str, now: datetime, *, end: bool) -> datetime | None:
    """A point in time, as the beginning or the end of a span; nothing typed is ``None``."""
    value = fields.get(name, "").strip()
    if not value:
        return None
    try:
        return parse_when(value, now, end=end)
    except ValueError as error:
        raise FieldError(name, _sentence(error)) from None


def _sentence(error: ValueError) -> str:
    text = str(error)
    return f"{text[:1].upper()}{text[1:]}."
