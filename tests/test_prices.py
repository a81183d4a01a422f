"""The price card: every published price, what an order is held at, and what delivered images cost."""

from __future__ import annotations

import re
from decimal import ROUND_HALF_UP, Decimal
from itertools import product

import pytest

from proxy.prices import DeliveredImage, Order, PriceCardError, nearest_size, parse_card, shipped_card

CARD = shipped_card()
MODEL = CARD.models["gpt-image-2"]

# A side's steps of detail, by quality: the published price is that of the image's output tokens.
STEPS = {"low": 16, "medium": 48, "high": 96}


def published_micro_usd(size: str, quality: str) -> int:
    """The price by the token formula: $30 for a million tokens, rounded half up to 4 decimals of a dollar."""
    width, height = (int(edge) for edge in size.split("x"))
    long, short = max(width, height), min(width, height)
    steps = STEPS[quality]
    short_steps = (2 * steps * short + long) // (2 * long)
    tokens = -(-steps * short_steps * (2_000_000 + width * height) // 4_000_000)
    usd = (Decimal(tokens) * 30 / 1_000_000).quantize(Decimal("0.0001"), ROUND_HALF_UP)
    return int(usd * 1_000_000)


def test_the_card_has_27_sizes_and_3_qualities() -> None:
    assert len(MODEL.sizes) == 27
    assert MODEL.qualities == ("low", "medium", "high")
    assert len(MODEL.micro_usd) == 81


@pytest.mark.parametrize(("size", "quality"), MODEL.micro_usd)
def test_every_price_follows_from_the_tokens(size: str, quality: str) -> None:
    assert MODEL.micro_usd[size, quality] == published_micro_usd(size, quality)


def test_an_upright_size_costs_what_the_same_size_lying_costs() -> None:
    for size in MODEL.sizes:
        turned = "x".join(reversed(size.split("x")))
        if turned in MODEL.sizes:
            assert all(MODEL.micro_usd[size, q] == MODEL.micro_usd[turned, q] for q in MODEL.qualities)


def order(size: str = "1024x1024", quality: str = "high", n: int = 1) -> Order:
    return Order("generation", "gpt-image-2", size, quality, n, stream=False)


DEAREST = {quality: max(MODEL.micro_usd[size, quality] for size in MODEL.sizes) for quality in MODEL.qualities}


@pytest.mark.parametrize(
    ("asked", "micro_usd"),
    [
        (order(), 210_700),
        (order(n=10), 2_107_000),
        (order(quality="low", n=3), 17_700),
        (order(quality="auto"), 210_700),
        (order(size="auto", quality="low"), DEAREST["low"]),
        (order(size="auto", quality="auto"), DEAREST["high"]),
        (order(size="auto", quality="auto", n=4), 4 * DEAREST["high"]),
    ],
)
def test_holds(asked: Order, micro_usd: int) -> None:
    assert CARD.hold(asked) == micro_usd


def test_what_is_dearest_is_known_for_all_that_can_be_asked() -> None:
    for size, quality in product((None, *MODEL.sizes), (None, *MODEL.qualities)):
        fitting = [cell for cell in MODEL.micro_usd if size in (None, cell[0]) and quality in (None, cell[1])]
        found = MODEL.dearest(size, quality)
        assert found in fitting
        assert MODEL.micro_usd[found] == max(MODEL.micro_usd[cell] for cell in fitting)
    assert len(MODEL.dearest_cells) == 28 * 4


SQUARE_HIGH, SQUARE_LOW, SMALL_HIGH = 210_700, 5_900, 144_500


@pytest.mark.parametrize(
    ("asked", "delivered", "micro_usd", "size", "quality", "basis"),
    [
        # Explicit on both counts: what was asked for counts, whatever the answer leaves out.
        (order(), [DeliveredImage()], SQUARE_HIGH, "1024x1024", "high", "requested"),
        (order(n=3), [DeliveredImage()] * 2, 2 * SQUARE_HIGH, "1024x1024", "high", "requested"),
        (order(), [DeliveredImage("1024x1024", "high")], SQUARE_HIGH, "1024x1024", "high", "requested"),
        (order(), [DeliveredImage(measured_size="2048x2048")], SQUARE_HIGH, "1024x1024", "high", "requested"),
        # Reported cheaper: it stays at what was asked. Reported dearer: the true price.
        (order(), [DeliveredImage("1024x768", "low")], SQUARE_HIGH, "1024x1024", "high", "requested"),
        (order("1024x768", "high"), [DeliveredImage("1024x1024")], SQUARE_HIGH, "1024x1024", "high", "reported"),
        (order(quality="low"), [DeliveredImage(quality="high")], SQUARE_HIGH, "1024x1024", "high", "reported"),
        # A report outside of the table says nothing that has a price.
        (order(), [DeliveredImage("1x1", "ultra")], SQUARE_HIGH, "1024x1024", "high", "requested"),
        # What was left open is what the answer reports.
        (order("auto", "auto"), [DeliveredImage("1024x768", "high")], SMALL_HIGH, "1024x768", "high", "reported"),
        (order("auto", "low"), [DeliveredImage("1024x1024")], SQUARE_LOW, "1024x1024", "low", "reported"),
        (order(quality="auto"), [DeliveredImage(quality="low")], SQUARE_LOW, "1024x1024", "low", "reported"),
        # Where the answer says no size, the image's own header does.
        (order("auto", "high"), [DeliveredImage(measured_size="1024x768")], SMALL_HIGH, "1024x768", "high", "measured"),
        (
            order("auto", "high"),
            [DeliveredImage("1024x1024", measured_size="1024x768")],
            SQUARE_HIGH,
            "1024x1024",
            "high",
            "reported",
        ),
        (order("auto", "auto"), [DeliveredImage(None, "high", "1024x768")], SMALL_HIGH, "1024x768", "high", "measured"),
        # What nobody says is the dearest that fits.
        (order(quality="auto"), [DeliveredImage()], SQUARE_HIGH, "1024x1024", "high", "assumed"),
        (order("auto", "low"), [DeliveredImage()], DEAREST["low"], None, "low", "assumed"),
        (order("auto", "auto"), [DeliveredImage("1024x1024")], SQUARE_HIGH, "1024x1024", "high", "assumed"),
        (order("auto", "high"), [DeliveredImage(measured_size="1000x1000")], DEAREST["high"], None, "high", "assumed"),
        # Several images are as sure as the least sure, and mixed where they differ.
        (
            order("auto", "high", 2),
            [DeliveredImage("1024x1024"), DeliveredImage(measured_size="1024x768")],
            SQUARE_HIGH + SMALL_HIGH,
            "mixed",
            "high",
            "measured",
        ),
        (
            order(quality="auto", n=2),
            [DeliveredImage(quality="low"), DeliveredImage()],
            SQUARE_LOW + SQUARE_HIGH,
            "1024x1024",
            "mixed",
            "assumed",
        ),
        # Nothing delivered costs nothing.
        (order(n=2), [], 0, "1024x1024", "high", "requested"),
        (order("auto"), [], 0, "auto", "high", "reported"),
    ],
)
def test_charges(
    asked: Order, delivered: list[DeliveredImage], micro_usd: int, size: str | None, quality: str, basis: str
) -> None:
    charge = CARD.charge(asked, tuple(delivered))
    assert (charge.micro_usd, charge.images, charge.quality, charge.basis) == (micro_usd, len(delivered), quality, basis)
    assert size is None or charge.size == size


SIZES, QUALITIES = ("1024x1024", "1024x768", "3840x2160"), ("low", "high")
ASKED = [order(size, quality) for size, quality in product(("auto", *SIZES), ("auto", *QUALITIES))]
TOLD = list(
    map(DeliveredImage, *zip(*product((None, *SIZES, "1x1"), (None, *QUALITIES, "ultra"), (None, SIZES[1])), strict=True))
)


@pytest.mark.parametrize("asked", ASKED, ids=str)
def test_an_image_costs_what_was_asked_for_or_what_is_told_where_that_is_dearer(asked: Order) -> None:
    for image in TOLD:
        charge = CARD.charge(asked, (image,))
        assert charge.micro_usd == MODEL.micro_usd[charge.size, charge.quality]
        assert CARD.charge(asked, (image, image)) == charge._replace(micro_usd=2 * charge.micro_usd, images=2)
        if "auto" not in (asked.size, asked.quality):
            size = image.size if image.size in MODEL.sizes else asked.size
            quality = image.quality if image.quality in MODEL.qualities else asked.quality
            assert charge.micro_usd == max(CARD.hold(asked), MODEL.micro_usd[size, quality])
            assert charge.basis == ("requested" if charge.micro_usd == CARD.hold(asked) else "reported")


@pytest.mark.parametrize(
    ("asked", "nearest"),
    [
        ("1024x1024", "1024x1024"),
        ("512x512", "1024x1024"),
        ("1x1", "1024x1024"),
        ("99999x99999", "2880x2880"),
        ("1536x1024", "2016x1344"),
        ("1024x1536", "1344x2016"),
        ("900x600", "1008x672"),
        ("1920x1080", "2048x1152"),
        ("1080x1920", "1152x2048"),
        ("1280x720", "1088x608"),
        ("4096x2304", "3840x2160"),
        (" 1920X1080 ", "2048x1152"),
        ("900x300", "1440x480"),
        ("3000x1000", "2784x928"),
        ("", None),
        ("large", None),
        ("1024", None),
        ("0x1024", None),
        ("1024x", None),
        ("100000x1", None),
        ("1024x1024x3", None),
    ],
)
def test_the_nearest_size_has_the_same_shape(asked: str, nearest: str | None) -> None:
    assert nearest_size(MODEL, asked) == nearest


def card(
    cell: str = '"0.0059"', *, version: str = 'version = "test-1"', qualities: str = '["low", "high"]', row: str = ""
) -> str:
    row = row or f'64x32 = {{ low = "0.0010", high = {cell} }}'
    return f"{version}\n[models.tiny]\nqualities = {qualities}\n[models.tiny.usd_per_image]\n{row}\n"


def test_a_card_of_ones_own() -> None:
    mine = parse_card(card() + '[models.other]\nqualities = ["flat"]\nusd_per_image = { 1x1 = { flat = "1" } }\n')
    assert mine.version == "test-1"
    assert mine.models["tiny"].micro_usd == {("64x32", "low"): 1_000, ("64x32", "high"): 5_900}
    assert mine.models["other"].micro_usd == {("1x1", "flat"): 1_000_000}


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        (card('"0"'), "64x32 high: the price must be above zero"),
        (card('"-0.0059"'), "64x32 high: '-0.0059' is not an amount in USD"),
        (card('"0.00000001"'), "64x32 high: '0.00000001' is not an amount"),
        (card('""'), "64x32 high: '' is not an amount"),
        (card("0.0059"), "64x32 high: write the price as a string"),
        (card("true"), "64x32 high: write the price as a string"),
        (card(row='64x32 = { low = "0.0010" }'), "64x32 high: the price is missing"),
        (card(row='64x32 = { low = "1", high = "1", ultra = "1" }'), "64x32: 'ultra' is not one of the qualities low, high"),
        (card(row='64x32 = "1"'), "64x32: write one price a quality"),
        (card(row='big = { low = "1", high = "1" }'), "'big' is not a size"),
        (card(row='064x32 = { low = "1", high = "1" }'), "'064x32' is not a size"),
        (card(row="# nothing"), "needs one or more sizes"),
        (card(qualities="[]"), "'qualities' is a list of one or more names"),
        (card(qualities='["low", "high", "auto"]'), "'auto' is not one"),
        (card(qualities='["low", "high", "low"]'), "names each quality once"),
        (card(version=""), "needs a 'version'"),
        (card(version="version = 7"), "needs a 'version'"),
        (card(version='version = "two words"'), "needs a 'version'"),
        (card(version='version = "1"\ncurrency = "EUR"'), "unknown entry 'currency'"),
        ('version = "1"\n', "at least one"),
        ('version = "1"\n[models.tiny]\nqualities = ["low"]\n', "needs exactly 'qualities' and 'usd_per_image'"),
        ("version = ", "is not TOML"),
    ],
)
def test_a_card_that_cannot_be_used_says_where_it_is_wrong(text: str, complaint: str) -> None:
    with pytest.raises(PriceCardError, match=re.escape(complaint)):
        parse_card(text)
