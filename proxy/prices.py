"""What an image costs: the price card, the hold for an order, and the charge for what was delivered.

Pure: an :class:`Order` and a :class:`Delivery` go in, integer micro-USD come out. Nothing else in the
program multiplies a price.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib import resources
from itertools import product
from typing import Literal, NamedTuple

from proxy.money import parse_usd

Operation = Literal["generation", "edit"]
Basis = Literal["requested", "reported", "measured", "assumed", "operator", "expired"]

AUTO = "auto"

_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})", re.ASCII)


@dataclass(frozen=True, slots=True)
class Order:
    """What a request asks for, as far as the price depends on it. ``size`` and ``quality`` are in the table or ``auto``."""

    operation: Operation
    model: str
    size: str
    quality: str
    n: int
    stream: bool


class DeliveredImage(NamedTuple):
    """One image of an answer. ``size`` and ``quality`` are what the answer says of it, ``None`` where it says nothing or
    ``auto``; ``measured_size`` is ``WxH`` from the image's own header, where that was looked at."""

    size: str | None = None
    quality: str | None = None
    measured_size: str | None = None


class Charge(NamedTuple):
    """The price of delivered images. ``size`` and ``quality`` are those of every image, or ``mixed``."""

    micro_usd: int
    images: int
    size: str
    quality: str
    basis: Basis


class PriceCardError(ValueError):
    """A price card that can't be used; the message says where it is wrong."""


@dataclass(frozen=True)
class ModelPrices:
    """One model's table: micro-USD by (size, quality), complete over ``sizes`` x ``qualities``."""

    name: str
    sizes: tuple[str, ...]
    qualities: tuple[str, ...]
    micro_usd: Mapping[tuple[str, str], int]

    @cached_property
    def dearest_cells(self) -> Mapping[tuple[str, str], tuple[str, str]]:
        """The cell with the highest price among those that fit, for all that an order can ask for; ``auto`` fits everything."""
        return {
            (size, quality): max(
                product(self.sizes if size == AUTO else (size,), self.qualities if quality == AUTO else (quality,)),
                key=self.micro_usd.__getitem__,
            )
            for size in (AUTO, *self.sizes)
            for quality in (AUTO, *self.qualities)
        }

    def dearest(self, size: str | None, quality: str | None) -> tuple[str, str]:
        """The cell with the highest price among those that fit; ``None`` fits everything."""
        return self.dearest_cells[AUTO if size is None else size, AUTO if quality is None else quality]


@dataclass(frozen=True)
class PriceCard:
    """All prices in force, and the version that goes on every charge made under them."""

    version: str
    models: Mapping[str, ModelPrices]

    @cached_property
    def fingerprint(self) -> str:
        """Sixteen characters that differ where a price does, whatever the version says."""
        cells = {name: sorted((*cell, price) for cell, price in model.micro_usd.items()) for name, model in self.models.items()}
        return hashlib.sha256(json.dumps(cells, sort_keys=True).encode("utf-8")).hexdigest()[:16]

    def hold(self, order: Order) -> int:
        """Micro-USD to hold for an order: n x the price, or n x the dearest that fits where something is ``auto``."""
        prices = self.models[order.model]
        return order.n * prices.micro_usd[prices.dearest_cells[order.size, order.quality]]

    def charge(self, order: Order, images: tuple[DeliveredImage, ...]) -> Charge:
        """What the delivered images cost.

        What was asked for explicitly counts, unless the answer reports something dearer: then the dearer price is the
        true one. What was left open comes from the answer, else from the image's header, else it is the dearest that fits.
        """
        if not images:
            return Charge(
                0, 0, order.size, order.quality, "requested" if AUTO not in (order.size, order.quality) else "reported"
            )
        prices = self.models[order.model]
        if len(images) == 1:
            size, quality, basis = _price(prices, order, images[0])
            return Charge(prices.micro_usd[size, quality], 1, size, quality, basis)
        priced = [_price(prices, order, image) for image in images]
        sizes = {size for size, _, _ in priced}
        qualities = {quality for _, quality, _ in priced}
        return Charge(
            micro_usd=sum(prices.micro_usd[size, quality] for size, quality, _ in priced),
            images=len(images),
            size=sizes.pop() if len(sizes) == 1 else "mixed",
            quality=qualities.pop() if len(qualities) == 1 else "mixed",
            basis=max((basis for _, _, basis in priced), key=_WEAKER.index),
        )


# From the surest to the weakest: a charge of several images is as sure as its weakest.
_WEAKER: tuple[Basis, ...] = ("requested", "reported", "measured", "assumed")


def _known(value: str) -> str | None:
    return None if value == AUTO else value


def _price(prices: ModelPrices, order: Order, image: DeliveredImage) -> tuple[str, str, Basis]:
    """The cell of one delivered image, and how it is known."""
    if image.size in (None, order.size) and image.quality in (None, order.quality) and AUTO not in (order.size, order.quality):
        return order.size, order.quality, "requested"
    reported_size = image.size if image.size in prices.sizes else None
    reported_quality = image.quality if image.quality in prices.qualities else None
    size, quality = _known(order.size), _known(order.quality)
    basis: Basis = "requested"
    if size is None or quality is None:
        basis = "reported"
        if size is None and (size := reported_size) is None:
            measured = image.measured_size if image.measured_size in prices.sizes else None
            size, basis = measured, "measured"
        if quality is None:
            quality = reported_quality
        if size is None or quality is None:
            size, quality = prices.dearest(size, quality)
            basis = "assumed"
    told = (reported_size or size, reported_quality or quality)
    if prices.micro_usd[told] > prices.micro_usd[size, quality]:
        return *told, "reported"
    return size, quality, basis


def nearest_size(prices: ModelPrices, asked: str) -> str | None:
    """The preset closest in shape to ``WxH``, and among those of one shape closest in area; ``None`` if it isn't ``WxH``."""
    match = _SIZE.fullmatch(asked.strip().lower())
    if match is None:
        return None
    width, height = int(match[1]), int(match[2])

    def distance(size: str) -> tuple[float, float]:
        w, h = dimensions(size)
        shape = (w * height) / (h * width)
        area = (w * h) / (width * height)
        # Presets of one shape differ by a few pixels (2016x1344 and 3456x2304 are both 3:2), so shapes within
        # three percent are the same shape, and the area decides.
        return (round(abs(_log2(shape)) / 0.045), abs(_log2(area)))

    return min(prices.sizes, key=distance)


def dimensions(size: str) -> tuple[int, int]:
    """``(width, height)`` in pixels of a size of the table."""
    width, _, height = size.partition("x")
    return int(width), int(height)


def _log2(ratio: float) -> float:
    return math.log2(ratio)


def shipped_card() -> PriceCard:
    """The card in the package: gpt-image-2's 27 sizes x 3 qualities, as BeansAI publishes them."""
    return parse_card(resources.files("proxy").joinpath("cards/gpt-image-2.toml").read_text("utf-8"))


def parse_card(text: str) -> PriceCard:
    """A card from TOML: ``version``, then ``[models.NAME]`` with ``qualities`` and a table ``usd_per_image`` of
    size to one price a quality, as strings of USD.

    Raises :class:`PriceCardError` that names the cell at fault.
    """
    try:
        data = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise PriceCardError(f"the price card is not TOML: {error}") from None
    unknown = data.keys() - {"version", "models"}
    if unknown:
        raise PriceCardError(f"the price card has an unknown entry {min(unknown)!r}; it takes 'version' and 'models'")
    version = data.get("version")
    if not isinstance(version, str) or not re.fullmatch(r"[!-~]{1,64}", version):
        raise PriceCardError(
            "the price card needs a 'version' of 1 to 64 printable characters without spaces, such as \"2026-11\""
        )
    models = data.get("models")
    if not isinstance(models, dict) or not models:
        raise PriceCardError("the price card needs at least one [models.NAME] table")
    return PriceCard(version, {name: _parse_model(name, table) for name, table in models.items()})


def _parse_model(name: str, table: object) -> ModelPrices:
    where = f"models.{name}"
    if not isinstance(table, dict) or table.keys() != {"qualities", "usd_per_image"}:
        raise PriceCardError(f"[{where}] needs exactly 'qualities' and 'usd_per_image'")
    qualities, rows = table["qualities"], table["usd_per_image"]
    if not isinstance(qualities, list) or not qualities or not all(isinstance(q, str) and q for q in qualities):
        raise PriceCardError(f'[{where}] \'qualities\' is a list of one or more names, such as ["low", "medium", "high"]')
    if AUTO in qualities or len(set(qualities)) != len(qualities):
        raise PriceCardError(f"[{where}] 'qualities' names each quality once, and 'auto' is not one")
    if not isinstance(rows, dict) or not rows:
        raise PriceCardError(f"[{where}.usd_per_image] needs one or more sizes")
    cells: dict[tuple[str, str], int] = {}
    for size, row in rows.items():
        if not _SIZE.fullmatch(size):
            raise PriceCardError(f"[{where}.usd_per_image] {size!r} is not a size: write WxH, such as 1024x1024")
        if not isinstance(row, dict):
            raise PriceCardError(f'[{where}.usd_per_image] {size}: write one price a quality, such as {{ low = "0.0059" }}')
        stray = row.keys() - set(qualities)
        if stray:
            raise PriceCardError(
                f"[{where}.usd_per_image] {size}: {min(stray)!r} is not one of the qualities {', '.join(qualities)}"
            )
        for quality in qualities:
            cells[size, quality] = _parse_cell(f"[{where}.usd_per_image] {size} {quality}", row.get(quality))
    return ModelPrices(name, tuple(rows), tuple(qualities), cells)


def _parse_cell(where: str, value: object) -> int:
    if value is None:
        raise PriceCardError(f"{where}: the price is missing")
    if not isinstance(value, str):
        raise PriceCardError(
            f'{where}: write the price as a string, such as "0.0059": a binary fraction can\'t hold it exactly'
        )
    try:
        micro_usd = parse_usd(value)
    except ValueError as error:
        raise PriceCardError(f"{where}: {error}") from None
    if micro_usd <= 0:
        raise PriceCardError(f"{where}: the price must be above zero")
    return micro_usd
