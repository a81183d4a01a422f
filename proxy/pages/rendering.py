"""Templates into HTML, with everything escaped, and the headers that go on every page. How amounts and times look is said
here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from starlette.responses import HTMLResponse, Response

from proxy.money import format_usd
from proxy.pages.assets import asset_path

SECURITY_HEADERS = {
    "content-security-policy": "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' data: blob:; "
    "connect-src 'self'; form-action 'self'; frame-ancestors 'none'",
    # Not "no-referrer": with that a browser says of its own forms that they come from nowhere.
    "referrer-policy": "same-origin",
    "x-content-type-options": "nosniff",
    "cross-origin-opener-policy": "same-origin",
}


def usd(micro_usd: int) -> str:
    """``210700`` as ``$0.2107``: always exact, with four decimals, as prices have them, or six."""
    text = format_usd(micro_usd)
    text = text[:-2] if text.endswith("00") else text
    return f"-${text[1:]}" if micro_usd < 0 else f"${text}"


def cents(micro_usd: int) -> str:
    """An estimate, rounded to cents: ``$12.35``."""
    return ("-" if micro_usd < 0 else "") + f"${format_usd((abs(micro_usd) + 5_000) // 10_000 * 10_000)[:-4]}"


def instant(at: datetime | None) -> str:
    """``2026-11-22 20:31 UTC``; a dash for none."""
    return "-" if at is None else f"{at.astimezone(UTC):%Y-%m-%d %H:%M} UTC"


def day(at: date) -> str:
    """``2026-11-22``."""
    return at.isoformat()


def make_environment(prefix: str) -> Environment:
    """Templates, with ``prefix`` before every path of ours."""
    environment = Environment(
        loader=PackageLoader("proxy", "pages/templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"usd": usd, "cents": cents, "instant": instant, "day": day}
    environment.globals |= {"prefix": prefix, "asset": lambda name: asset_path(prefix, name)}
    return environment


def html(environment: Environment, template: str, context: Mapping[str, Any], status: int) -> Response:
    """A page."""
    return HTMLResponse(environment.get_template(template).render(context), status)


def secure(response: Response) -> Response:
    """The headers of every answer of ours. What is no asset is somebody's own, and kept nowhere."""
    for name, value in SECURITY_HEADERS.items():
        response.headers[name] = value
    if "cache-control" not in response.headers:
        response.headers["cache-control"] = "no-store"
    return response
