"""A team's requests, newest first, with filters and page by page."""

from __future__ import annotations

from datetime import datetime
from typing import Any

from sqlalchemy import Connection
from starlette.responses import Response

from proxy.inputs import InputError, cursor_of, read_cursor
from proxy.ledger import accounts
from proxy.ledger.pages import Page, Turn, list_charges
from proxy.pages import fields
from proxy.pages.desk import Missing, Visit, Wrong
from proxy.pages.export import csv_response
from proxy.pages.fields import FieldError

ROWS = 50

# What one file holds, so that it is made in a moment and in little memory; with since and until one gets the others, and
# with the API and the command line all at once.
CSV_ROWS_MAX = 2_500

STATES = ("reserved", "forwarded", "settled", "released", "review")

CSV_COLUMNS = (
    "id",
    "request_id",
    "created_at",
    "finished_at",
    "key_id",
    "operation",
    "model",
    "size",
    "quality",
    "images_requested",
    "images_delivered",
    "state",
    "reason",
    "basis",
    "upstream_status",
    "reserved_micro_usd",
    "settled_micro_usd",
)

_LISTING = "page-requests"


async def show(visit: Visit) -> Response:
    """A page of them, and the form that filters."""
    asked = {name: visit.asked().get(name, "") for name in ("state", "key_id", "since", "until", "cursor")}
    errors: dict[str, str] = {}
    page = Page([], None)
    try:
        chosen, turn = _chosen(visit, asked), Turn(ROWS, _place(asked["cursor"]))
    except FieldError as error:
        errors = {error.field: error.message}
        chosen, turn = {}, Turn(1)

    def read(connection: Connection) -> tuple[list[dict[str, Any]], Page]:
        keys = _keys(connection, visit)
        return keys, page if errors else list_charges(connection, turn, newest_first=True, **chosen)

    keys, page = await visit.ask(read)
    following = {name: value for name, value in asked.items() if value and name != "cursor"}
    older = None if page.last is None else {**following, "cursor": cursor_of(_LISTING, page.last)}
    return await visit.page(
        "requests.html",
        422 if errors else 200,
        team=visit.named("team"),
        keys=keys,
        rows=page.rows,
        states=STATES,
        following=following,
        older=older,
        csv_rows=CSV_ROWS_MAX,
        wrong=Wrong("filter", asked, errors),
    )


async def export(visit: Visit) -> Response:
    """The same as CSV, without pages."""
    asked = {name: visit.asked().get(name, "") for name in ("state", "key_id", "since", "until")}
    try:
        chosen = _chosen(visit, asked)
    except FieldError:
        return await show(visit)

    def read(connection: Connection) -> Page:
        _keys(connection, visit)
        return list_charges(connection, Turn(CSV_ROWS_MAX), CSV_COLUMNS, newest_first=True, **chosen)

    page = await visit.ask(read)
    return csv_response("requests", CSV_COLUMNS, [[row[name] for name in CSV_COLUMNS] for row in page.rows])


def _keys(connection: Connection, visit: Visit) -> list[dict[str, Any]]:
    try:
        return accounts.list_keys(connection, visit.named("team"))
    except accounts.AccountError:
        raise Missing from None


def _chosen(visit: Visit, asked: dict[str, str]) -> dict[str, Any]:
    """What the ledger lists. Raises :class:`FieldError`."""
    state = fields.choice(asked, "state", "", *STATES)
    key_id = fields.line(asked, "key_id", longest=64, required=False)
    since: datetime | None = fields.moment(asked, "since", visit.now, end=False)
    until: datetime | None = fields.moment(asked, "until", visit.now, end=True)
    return {"team": visit.named("team"), "state": state or None, "key_id": key_id or None, "since": since, "until": until}


def _place(cursor: str) -> tuple[int | str, ...] | None:
    if not cursor:
        return None
    try:
        return read_cursor(_LISTING, (int, str), cursor, "cursor")
    except InputError:
        raise FieldError("cursor", "This page is not there any more: begin with the newest.") from None
