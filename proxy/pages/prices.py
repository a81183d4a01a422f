"""The price card in force, as people compare it: by megapixel, by shape, and for a size that they have in mind."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.responses import Response

from proxy.pages.desk import Visit, Wrong
from proxy.prices import ModelPrices, dimensions, nearest_size

_SIZE = re.compile(r"[1-9][0-9]{0,4}x[1-9][0-9]{0,4}", re.ASCII)

# Presets of one shape differ by a few pixels.
_SAME_SHAPE = 0.03


@dataclass(frozen=True, slots=True)
class Suggestion:
    """The preset nearest to a size that was typed in, and all of its shape, from the smallest; ``savings`` has micro-USD by
    size and quality against the largest of them."""

    asked: str
    nearest: str
    same_shape: Sequence[str]
    savings: dict[tuple[str, str], int]


def suggest(prices: ModelPrices, asked: str) -> Suggestion | None:
    """What to take for ``WxH``; ``None`` if it isn't that."""
    nearest = nearest_size(prices, asked)
    if nearest is None:
        return None
    shape = _shape(nearest)
    alike = [size for size in prices.sizes if abs(_shape(size) / shape - 1) <= _SAME_SHAPE]
    alike.sort(key=megapixels)
    cells = prices.micro_usd
    savings = {
        (size, quality): cells[alike[-1], quality] - cells[size, quality] for size in alike for quality in prices.qualities
    }
    return Suggestion(asked, nearest, alike, savings)


def megapixels(size: str) -> float:
    """Millions of pixels."""
    width, height = dimensions(size)
    return width * height / 1_000_000


def _shape(size: str) -> float:
    width, height = dimensions(size)
    return width / height


async def show(visit: Visit) -> Response:
    """The card, and a form for a size."""
    asked = visit.asked().get("size", "").strip()
    errors, suggestions = {}, {}
    if asked:
        # As people write it: with blanks, a star or the sign for "times".
        size = re.sub(r"\s*[x*\u00d7]\s*", "x", asked.lower())
        if _SIZE.fullmatch(size):
            suggestions = {name: suggest(prices, size) for name, prices in visit.desk.card.models.items()}
        else:
            errors = {"size": "Write width x height in pixels, such as 1500x1000, each from 1 to 99999."}
    return await visit.page(
        "prices.html",
        422 if errors else 200,
        card=visit.desk.card,
        aliases=visit.desk.aliases,
        megapixels=megapixels,
        suggestions=suggestions,
        wrong=Wrong("size", {"size": asked}, errors),
    )
