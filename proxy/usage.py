"""What tools read: the price list, and usage and costs day by day in the shape of OpenAI's organization endpoints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, date, datetime, time, timedelta
from itertools import groupby
from typing import Annotated, Any, Literal

from pydantic import Field
from sqlalchemy import Connection

from proxy.inputs import Cursor, InputError, Name, Query, Whole, cursor_of, read_cursor
from proxy.ledger.usage import sum_days
from proxy.money import MICRO_PER_USD, format_usd
from proxy.prices import PriceCard, dimensions

# Days in one answer, as OpenAI has them.
IMAGES_DAYS_MAX = 31
COSTS_DAYS_MAX = 180

# The year 5138. A number beyond is not in seconds.
_SECONDS_MAX = 100_000_000_000

# Values of one filter. A tool that wants more wants everything.
_VALUES_MAX = 100

_LISTING = "days"

# OpenAI's names for the columns of our books, and the sources that it knows.
_COLUMNS = {
    "project_id": "team",
    "api_key_id": "key",
    "model": "model",
    "size": "size",
    "source": "operation",
    "quality": "quality",
    "line_item": "model",
}
_FILTERS = {"project_ids": "team", "api_key_ids": "key", "models": "model", "sizes": "size", "sources": "operation"}
_OPERATIONS = {"image.generation": "generation", "image.edit": "edit", "image.variation": "variation"}
_SOURCES = {operation: source for source, operation in _OPERATIONS.items()}

Source = Literal["image.generation", "image.edit", "image.variation"]
Names = Annotated[list[Name], Field(max_length=_VALUES_MAX)]


class _DaysQuery(Query):
    start_time: Whole = Field(
        ge=0, le=_SECONDS_MAX, description="Unix seconds; the UTC day that they are in is the first", examples=[1_790_000_000]
    )
    end_time: Annotated[Whole, Field(ge=0, le=_SECONDS_MAX)] | None = Field(
        None, description="Unix seconds, exclusive; the UTC day that they are in counts whole"
    )
    bucket_width: Literal["1d"] = Field("1d", description="'1d': sums are kept by UTC day")
    project_ids: Names = Field([], description="names of teams")
    api_key_ids: Names = Field([], description="ids of keys")
    models: Names = Field([], description="names of models")
    sizes: Names = Field([], description="sizes, as the books have them")
    sources: list[Source] = Field([], max_length=_VALUES_MAX, description="image.generation, image.edit or image.variation")
    page: Cursor | None = Field(None, description="the 'next_page' of the answer before")


class ImagesQuery(_DaysQuery):
    """What ``GET /v1/organization/usage/images`` takes."""

    group_by: list[Literal["project_id", "api_key_id", "model", "size", "source", "quality"]] = Field(
        [], max_length=_VALUES_MAX, description="project_id, api_key_id, model, size, source or quality"
    )
    limit: Whole = Field(7, ge=1, le=IMAGES_DAYS_MAX, description=f"a whole number of days from 1 to {IMAGES_DAYS_MAX}")


class CostsQuery(_DaysQuery):
    """What ``GET /v1/organization/costs`` takes."""

    group_by: list[Literal["project_id", "api_key_id", "line_item", "model", "size", "source", "quality"]] = Field(
        [], max_length=_VALUES_MAX, description="project_id, api_key_id, line_item, model, size, source or quality"
    )
    limit: Whole = Field(7, ge=1, le=COSTS_DAYS_MAX, description=f"a whole number of days from 1 to {COSTS_DAYS_MAX}")


def list_prices(card: PriceCard, aliases: Mapping[str, str]) -> dict[str, Any]:
    """The card in force, one row a model, size and quality, and the sizes that stand for others."""
    rows = [
        {
            "model": model.name,
            "size": size,
            "quality": quality,
            "price_micro_usd": price,
            "price_usd": format_usd(price),
            "megapixels": _megapixels(size),
        }
        for model in card.models.values()
        for (size, quality), price in model.micro_usd.items()
    ]
    return {"object": "list", "version": card.version, "currency": "usd", "data": rows, "size_aliases": dict(aliases)}


def _megapixels(size: str) -> float:
    width, height = dimensions(size)
    return width * height / 1_000_000


def read_images(connection: Connection, query: ImagesQuery, team: str | None, now: datetime) -> dict[str, Any]:
    """Images and requests by day. ``team`` is the only one that may be seen, ``None`` for all. Raises ``InputError``."""
    return _read(connection, query, team, now, _images)


def read_costs(connection: Connection, query: CostsQuery, team: str | None, now: datetime) -> dict[str, Any]:
    """Settled amounts by day, as :func:`read_images` does."""
    return _read(connection, query, team, now, _cost)


def _images(row: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    names = ("project_id", "user_id", "api_key_id", "model", "size", "source", "quality")
    return {
        "object": "organization.usage.images.result",
        "images": row["images"],
        "num_model_requests": row["requests"],
        **{name: by.get(name) for name in names},
    }


def _cost(row: Mapping[str, Any], by: Mapping[str, Any]) -> dict[str, Any]:
    micro_usd = row["settled_micro_usd"]
    itemised = "line_item" in by
    names = ("project_id", "user_id", "api_key_id", "line_item", "model", "size", "source", "quality")
    return {
        "object": "organization.costs.result",
        # OpenAI's shape has a binary fraction; the whole number beside it is exact.
        "amount": {"value": micro_usd / MICRO_PER_USD, "currency": "usd", "micro_usd": micro_usd},
        "quantity": row["images"] if itemised else None,
        "quantity_unit": "images" if itemised else None,
        **{name: by.get(name) for name in names},
    }


def _read(
    connection: Connection, query: ImagesQuery | CostsQuery, team: str | None, now: datetime, show: Any
) -> dict[str, Any]:
    first, end = _days(query, now)
    shown_end = min(end, first + timedelta(days=query.limit))
    groups = tuple(dict.fromkeys(query.group_by))
    by = tuple(dict.fromkeys(_COLUMNS[name] for name in groups))
    rows = sum_days(connection, first, shown_end, by, _only(query, team))
    by_day = {day: list(of_day) for day, of_day in groupby(rows, lambda row: row["day"])}
    days = [first + timedelta(days=number) for number in range((shown_end - first).days)]
    return {
        "object": "page",
        "data": [_bucket(day, [show(row, _named(row, groups)) for row in by_day.get(day, ())]) for day in days],
        "has_more": shown_end < end,
        "next_page": cursor_of(_LISTING, [shown_end.toordinal()]) if shown_end < end else None,
    }


def _days(query: ImagesQuery | CostsQuery, now: datetime) -> tuple[date, date]:
    """The first day to show, and the one after the last. What has not begun yet has no bucket."""
    tomorrow = now.astimezone(UTC).date() + timedelta(days=1)
    first, end = _day(query.start_time), tomorrow
    if query.end_time is not None:
        if query.end_time <= query.start_time:
            raise InputError("'end_time' has to be after 'start_time'", "end_time")
        end = min(tomorrow, _day(query.end_time - 1) + timedelta(days=1))
    if query.page is not None:
        (ordinal,) = read_cursor(_LISTING, (int,), query.page, "page")
        if not first.toordinal() <= int(ordinal) <= tomorrow.toordinal():
            raise InputError("'page' is of another span of time: take it from the answer before, and leave the rest", "page")
        first = date.fromordinal(int(ordinal))
    return first, max(first, end)


def _day(seconds: int) -> date:
    return datetime.fromtimestamp(seconds, UTC).date()


def _only(query: ImagesQuery | CostsQuery, team: str | None) -> dict[str, set[str]]:
    only = {column: set(getattr(query, name)) for name, column in _FILTERS.items() if getattr(query, name)}
    if "operation" in only:
        only["operation"] = {_OPERATIONS[source] for source in only["operation"]}
    if team is not None:
        # A team that asks for others sees what there is of itself, and does not learn whether the others exist.
        only["team"] = only.get("team", {team}) & {team}
    return only


def _named(row: Mapping[str, Any], groups: Sequence[str]) -> dict[str, Any]:
    named = {name: row[_COLUMNS[name]] for name in groups}
    return {name: _SOURCES[value] if name == "source" else value for name, value in named.items()}


def _bucket(day: date, results: list[dict[str, Any]]) -> dict[str, Any]:
    start = int(datetime.combine(day, time(), UTC).timestamp())
    return {"object": "bucket", "start_time": start, "end_time": start + 86_400, "results": results}
