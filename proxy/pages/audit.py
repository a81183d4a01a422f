"""Who changed what, newest first."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from starlette.responses import Response

from proxy.inputs import InputError, cursor_of, read_cursor
from proxy.ledger.pages import Turn, list_audit
from proxy.pages.desk import Missing, Visit

ROWS = 50

_LISTING = "page-audit"


async def show(visit: Visit) -> Response:
    """A page of changes."""
    cursor = visit.asked().get("cursor")
    try:
        place = None if cursor is None else read_cursor(_LISTING, (int,), cursor, "cursor")
    except InputError:
        raise Missing from None
    page = await visit.ask(lambda connection: list_audit(connection, Turn(ROWS, place), newest_first=True))
    rows = [{**row, "changes": _changes(row["before"], row["after"])} for row in page.rows]
    return await visit.page("audit.html", rows=rows, older=None if page.last is None else cursor_of(_LISTING, page.last))


def _changes(before: str | None, after: str | None) -> list[tuple[str, Any, Any]]:
    """The fields that differ: name, before and after, ``None`` where there was or is nothing."""
    old: Mapping[str, Any] = json.loads(before) if before else {}
    new: Mapping[str, Any] = json.loads(after) if after else {}
    return [(name, old.get(name), new.get(name)) for name in {**old, **new} if old.get(name) != new.get(name)]
