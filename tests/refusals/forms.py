"""An edit as a form, right or with something wrong in it."""

from __future__ import annotations

from tests.live import ORDER

FORM_TYPE = ("Content-Type", "multipart/form-data; boundary=b")
PNG = b"\x89PNG\r\n\x1a\n and so on"


def part(name: str, value: bytes, more: str = "") -> bytes:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n'.encode() + value + b"\r\n"


IMAGE = part("image", PNG, '; filename="a.png"\r\nContent-Type: image/png')


def form(*extra: bytes, **changes: str | None) -> bytes:
    """The usual order as a form with an image; fields that are None are left out."""
    fields = {**ORDER, **changes}
    named = [part(name, value.encode()) for name, value in fields.items() if value is not None]
    return b"".join([*named, IMAGE, *extra, b"--b--\r\n"])
