"""How the admin API says no: problems as in RFC 9457. Their statuses are decided only here and in ``operations``."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

from starlette.responses import Response

from proxy.ledger.accounts import AccountError, Remedy

MEDIA_TYPE = "application/problem+json"

TITLES = {
    400: "Bad Request",
    401: "Unauthorized",
    404: "Not Found",
    405: "Method Not Allowed",
    409: "Conflict",
    413: "Content Too Large",
    415: "Unsupported Media Type",
    422: "Unprocessable Content",
    429: "Too Many Requests",
    503: "Service Unavailable",
}


class Problem(Exception):
    """Something that can't be done. ``field`` names the part of the request at fault, ``None`` where none is."""

    def __init__(self, status: int, detail: str, field: str | None = None, headers: dict[str, str] | None = None) -> None:
        super().__init__(detail)
        self.status = status
        self.detail = detail
        self.field = field
        self.headers = headers or {}

    def response(self) -> Response:
        """The problem as it is answered."""
        told = {"type": "about:blank", "title": TITLES[self.status], "status": self.status, "detail": self.detail}
        if self.field is not None:
            told["field"] = self.field
        response = Response(json.dumps(told), self.status, media_type=MEDIA_TYPE)
        response.headers.update({"cache-control": "no-store", **self.headers})
        return response


# What helps with an error of the accounts, as requests.
_REMEDIES: Mapping[Remedy, str] = {
    "list_teams": "GET /admin/v1/teams lists all, archived ones too",
    "add_team": "POST /admin/v1/teams makes one",
    "list_keys": "GET /admin/v1/keys lists the ids, which start with key_",
    "add_key": "POST /admin/v1/teams/{team}/keys makes a new one",
    "list_budgets": "GET /admin/v1/budgets lists those there are",
    "list_limits": "GET /admin/v1/limits lists those there are",
    "list_reviews": "GET /admin/v1/reviews lists those in review",
}


def tell(error: AccountError) -> str:
    """What is wrong, and what to ask for next."""
    return str(error) if error.remedy is None else f"{error}; {_REMEDIES[error.remedy]}"


@contextmanager
def blaming(status: int, field: str | None = None) -> Iterator[None]:
    """What the accounts refuse in this block is a problem with this status, for which ``field`` is to blame."""
    try:
        yield
    except AccountError as error:
        raise Problem(status, tell(error), field) from None
