"""What an answer brought, and what both of its readers go by: what they look for alike, and how much of it they take."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from proxy.images import measure_base64
from proxy.prices import AUTO, DeliveredImage
from proxy.skim import Found

# Enough of an image for the size in its header. PNG and WebP need 30 bytes; a JPEG can have its profile and
# provenance data before it.
IMAGE_PREFIX_BYTES = 65_536

# Sizes, qualities and numbers of tokens are far shorter; anything longer is none of them.
SCALAR_BYTES = 64

# A request asks for ten images at most. What runs far beyond that is a fault, and must not fill the memory.
IMAGES_MAX = 1_000

IMAGE_NAMES = ("b64_json", "url")

TOKEN_FIELDS = ("input_tokens", "output_tokens", "total_tokens")

# The sum over as many events as there can be lines stays inside a signed 64-bit column.
TOKEN_COUNT = re.compile(rb"[0-9]{1,12}")

SHARED_WATCH: Mapping[tuple[str, ...], int] = {
    ("size",): SCALAR_BYTES,
    ("quality",): SCALAR_BYTES,
    ("error",): SCALAR_BYTES,
    **{("usage", count): SCALAR_BYTES for count in TOKEN_FIELDS},
}


class Usage(NamedTuple):
    """Tokens, where the answer gives them; summed over a stream's completed images."""

    input_tokens: int | None = None
    output_tokens: int | None = None
    total_tokens: int | None = None


class Delivery(NamedTuple):
    """What an answer brought.

    ``images``: those that came whole, in order, at most :data:`IMAGES_MAX`; measured where the answer reports no size.
    ``complete``: it was read to its proper end; a JSON document that is whole is, however the transfer ended.
    ``error``: it says itself that something failed: an SSE error event, or a JSON ``error`` that is not null.
    ``understood``: something in it had a known shape. An HTML page, an empty body or an unknown document has not.
    """

    images: tuple[DeliveredImage, ...] = ()
    complete: bool = False
    error: bool = False
    understood: bool = False
    usage: Usage | None = None


class Unreadable(Exception):
    """The rest of the answer can't be read, or is beyond a limit."""


@dataclass(slots=True)
class Facts:
    """What an object says of its images in common."""

    size: str | None = None
    quality: str | None = None
    error: bool = False
    counts: dict[str, int] = field(default_factory=dict)

    def note(self, found: Found) -> None:
        """Take up one value of :data:`SHARED_WATCH`. Of a name given twice the last counts, as for every JSON reader."""
        name = found.path[0]
        if name == "usage":
            if found.kind == "number" and TOKEN_COUNT.fullmatch(found.raw):
                self.counts[found.path[1]] = int(found.raw)
        elif name == "size":
            self.size = _reported(found)
        elif name == "quality":
            self.quality = _reported(found)
        elif name == "error":
            self.error = found.kind != "null"

    def image(self, measured_size: str | None) -> DeliveredImage:
        return DeliveredImage(self.size, self.quality, measured_size if self.size is None else None)


def text_of(found: Found) -> str | None:
    return found.text() if found.kind == "string" and found.whole else None


def _reported(found: Found) -> str | None:
    text = text_of(found)
    return None if text in ("", AUTO) else text


def measured_size(found: Found) -> str | None:
    """The size in the header of an image given as base64 or as a data URL; any other URL decodes to no image."""
    return measure_base64(found.text()) if found.kind == "string" else None


def usage_of(counts: dict[str, int]) -> Usage | None:
    return Usage(**counts) if counts else None
