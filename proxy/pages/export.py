"""The same rows as a table on a page, as CSV. Only here are cells made safe for spreadsheets."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence
from datetime import date, datetime

from starlette.responses import Response

# A spreadsheet would compute what begins so.
_FORMULA = frozenset("=+-@\t\r\n")

# What a cell is not written as it is; all else is numbers and nothing.
_SPELLED = frozenset({str, datetime, date})


def csv_response(name: str, columns: Sequence[str], rows: Iterable[Sequence[object]]) -> Response:
    """A file to download. ``name`` is plain ASCII; amounts are whole micro-USD, instants RFC 3339 in UTC."""
    text = io.StringIO()
    writer = csv.writer(text)
    writer.writerow([_cell(name) for name in columns])
    writer.writerows([_cell(value) if type(value) in _SPELLED else value for value in row] for row in rows)
    disposition = {"content-disposition": f'attachment; filename="{name}.csv"'}
    return Response(text.getvalue().encode("utf-8"), headers=disposition, media_type="text/csv; charset=utf-8")


def _cell(value: object) -> object:
    if isinstance(value, str):
        return f"'{value}" if value[:1] in _FORMULA else value
    if isinstance(value, datetime):
        # The books have UTC alone.
        return value.isoformat().replace("+00:00", "Z")
    return value.isoformat() if isinstance(value, date) else value
