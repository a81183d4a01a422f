"""Scripts, styles and their like, each under a path with its own digest, so that a browser may keep it for good."""

from __future__ import annotations

import hashlib
from functools import cache
from importlib import resources

from starlette.responses import Response

# Name in a path -> file, and what it is. Nothing else is ever read from disk.
_FILES = {
    "pico.css": ("vendor/pico.min.css", "text/css; charset=utf-8"),
    "dashboard.css": ("dashboard.css", "text/css; charset=utf-8"),
    "htmx.js": ("vendor/htmx.min.js", "text/javascript; charset=utf-8"),
    "chart.js": ("vendor/chart.umd.min.js", "text/javascript; charset=utf-8"),
    "charts.js": ("charts.js", "text/javascript; charset=utf-8"),
    "playground.js": ("playground.js", "text/javascript; charset=utf-8"),
    "icon.svg": ("icon.svg", "image/svg+xml"),
}


def asset_path(prefix: str, name: str) -> str:
    """Where a browser finds an asset."""
    return f"{prefix}/static/{_digest(name)}/{name}"


def serve(digest: str, name: str) -> Response | None:
    """An asset; ``None`` for what is none, or was another one in an earlier release."""
    if name not in _FILES or digest != _digest(name):
        return None
    return Response(
        _content(name), headers={"cache-control": "public, max-age=31536000, immutable"}, media_type=_FILES[name][1]
    )


@cache
def _content(name: str) -> bytes:
    return resources.files("proxy").joinpath(f"pages/static/{_FILES[name][0]}").read_bytes()


@cache
def _digest(name: str) -> str:
    return hashlib.sha256(_content(name)).hexdigest()[:16]
