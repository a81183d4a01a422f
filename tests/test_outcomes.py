"""What each end of an exchange means for its charge, as one table: state, what is owed, what stays held."""

from __future__ import annotations

from dataclasses import dataclass

import pytest

from proxy.outcomes import Outcome, answered, unanswered, unsent
from proxy.prices import DeliveredImage, Order, shipped_card
from proxy.taps import Delivery

CARD = shipped_card()
PRICES = CARD.models["gpt-image-2"].micro_usd
HIGH = PRICES["1024x1024", "high"]
LOW = PRICES["1024x1024", "low"]
LARGE = PRICES["3840x2160", "high"]
DEAREST = max(PRICES.values())


def order(n: int = 1, size: str = "1024x1024", quality: str = "high") -> Order:
    return Order("generation", "gpt-image-2", size, quality, n, stream=True)


def auto(n: int = 1) -> Order:
    return order(n, "auto", "auto")


SILENT = DeliveredImage()
REPORTED_LOW = DeliveredImage("1024x1024", "low")
REPORTED_LARGE = DeliveredImage("3840x2160", "high")
MEASURED = DeliveredImage(measured_size="1024x1024")


def whole(*images: DeliveredImage, error: bool = False, understood: bool = True) -> Delivery:
    return Delivery(images, complete=True, error=error, understood=understood)


def cut(*images: DeliveredImage, error: bool = False, understood: bool = True) -> Delivery:
    return Delivery(images, complete=False, error=error, understood=understood)


def html() -> Delivery:
    return whole(understood=False)


@dataclass(frozen=True)
class Row:
    """An order and its answer on the left, its charge on the right: (state, settled, reserved, images, basis)."""

    name: str
    order: Order
    status: int
    delivery: Delivery
    charge: tuple[str, int, int, int, str | None]


RELEASED = ("released", 0, 0, 0, None)

ROWS = [
    # A completed answer.
    Row("one of one", order(), 200, whole(SILENT), ("settled", HIGH, 0, 1, "requested")),
    Row("all of ten", order(10), 200, whole(*[SILENT] * 10), ("settled", 10 * HIGH, 0, 10, "requested")),
    Row("another 2xx", order(), 201, whole(SILENT), ("settled", HIGH, 0, 1, "requested")),
    Row("all, then cut", order(2), 200, cut(SILENT, SILENT), ("settled", 2 * HIGH, 0, 2, "requested")),
    Row("all, then an error", order(2), 200, whole(SILENT, SILENT, error=True), ("settled", 2 * HIGH, 0, 2, "requested")),
    Row("all, under a 500", order(), 500, whole(SILENT), ("settled", HIGH, 0, 1, "requested")),
    Row("more than asked", order(2), 200, whole(*[SILENT] * 3), ("settled", 3 * HIGH, 0, 3, "requested")),
    Row("more than asked, cut", order(2), 200, cut(*[SILENT] * 3), ("settled", 3 * HIGH, 0, 3, "requested")),
    # What auto came to.
    Row("auto, reported", auto(), 200, whole(REPORTED_LOW), ("settled", LOW, 0, 1, "reported")),
    Row(
        "auto quality, measured size",
        order(1, "auto", "low"),
        200,
        whole(MEASURED),
        ("settled", LOW, 0, 1, "measured"),
    ),
    Row("auto, untold", auto(), 200, whole(SILENT), ("settled", DEAREST, 0, 1, "assumed")),
    Row("auto, half told", auto(2), 200, whole(REPORTED_LOW, SILENT), ("settled", LOW + DEAREST, 0, 2, "assumed")),
    Row("auto, fewer", auto(3), 200, whole(REPORTED_LOW), ("settled", LOW, 0, 1, "reported")),
    # Dearer than the hold.
    Row("dearer reported", order(), 200, whole(REPORTED_LARGE), ("settled", LARGE, 0, 1, "reported")),
    Row("cheaper reported", order(), 200, whole(REPORTED_LOW), ("settled", HIGH, 0, 1, "requested")),
    # Fewer images than asked, the answer complete.
    Row("fewer", order(4), 200, whole(SILENT), ("settled", HIGH, 0, 1, "requested")),
    Row("none of one", order(), 200, whole(), RELEASED),
    Row("none of ten", order(10), 200, whole(), RELEASED),
    # An error of the upstream's own.
    Row("error event, no image", order(), 200, whole(error=True), RELEASED),
    Row("error event after one of three", order(3), 200, whole(SILENT, error=True), ("settled", HIGH, 0, 1, "requested")),
    Row(
        "error event after one, auto",
        auto(3),
        200,
        whole(REPORTED_LOW, error=True),
        ("settled", LOW, 0, 1, "reported"),
    ),
    Row("json error under a 200", order(), 200, whole(error=True), RELEASED),
    Row("json error under a 500", order(2), 500, whole(error=True), RELEASED),
    Row("json error under a 503", order(), 503, whole(error=True), RELEASED),
    Row("image and json error under a 500", order(2), 500, whole(SILENT, error=True), ("settled", HIGH, 0, 1, "requested")),
    Row("redirect", order(), 302, html(), RELEASED),
    # A 4xx in any form.
    Row("4xx json", order(), 400, whole(error=True), RELEASED),
    Row("4xx html", order(2), 404, html(), RELEASED),
    Row("4xx cut", order(), 429, cut(error=True), RELEASED),
    Row("4xx empty", order(), 499, cut(understood=False), RELEASED),
    Row("401", order(), 401, whole(error=True), RELEASED),
    # What nobody can know.
    Row("5xx html", order(), 502, html(), ("review", 0, HIGH, 0, None)),
    Row("5xx html, several", order(3), 502, html(), ("review", 0, 3 * HIGH, 0, None)),
    Row("5xx document without an error", order(), 500, whole(), ("review", 0, HIGH, 0, None)),
    Row("5xx json error, cut", order(), 500, cut(error=True), ("review", 0, HIGH, 0, None)),
    Row("5xx cut after an image", order(2), 500, cut(SILENT), ("review", HIGH, HIGH, 1, "requested")),
    Row("2xx json error, cut", order(2), 200, cut(error=True), ("review", 0, 2 * HIGH, 0, None)),
    Row("2xx html", order(2), 200, html(), ("review", 0, 2 * HIGH, 0, None)),
    Row("2xx empty", order(), 200, cut(understood=False), ("review", 0, HIGH, 0, None)),
    Row("cut before any image", order(), 200, cut(), ("review", 0, HIGH, 0, None)),
    Row("cut before any of ten", order(10), 200, cut(), ("review", 0, 10 * HIGH, 0, None)),
    Row("cut after one of three", order(3), 200, cut(SILENT), ("review", HIGH, 2 * HIGH, 1, "requested")),
    Row("redirect cut", order(), 302, cut(understood=False), ("review", 0, HIGH, 0, None)),
    # The held rest is shares of the hold, and what is known is known exactly.
    Row("auto, cut before any", auto(2), 200, cut(), ("review", 0, 2 * DEAREST, 0, None)),
    Row("auto, cut after one of three", auto(3), 200, cut(REPORTED_LOW), ("review", LOW, 2 * DEAREST, 1, "reported")),
    Row("dearer, cut after one of two", order(2), 200, cut(REPORTED_LARGE), ("review", LARGE, HIGH, 1, "reported")),
]


def charge_of(outcome: Outcome) -> tuple[str, int, int, int, str | None]:
    return (
        outcome.state,
        outcome.settled_micro_usd,
        outcome.reserved_micro_usd,
        outcome.images_delivered,
        outcome.basis,
    )


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_an_answer_means(row: Row) -> None:
    outcome = answered(CARD, row.order, CARD.hold(row.order), row.status, row.delivery)
    assert charge_of(outcome) == row.charge
    assert outcome.reason


@pytest.mark.parametrize("asked", [order(), order(7), auto(), auto(10)], ids=str)
def test_what_was_not_sent_is_released(asked: Order) -> None:
    outcome = unsent(asked)
    assert charge_of(outcome) == RELEASED
    assert (outcome.size, outcome.quality) == (asked.size, asked.quality)


@pytest.mark.parametrize("asked", [order(), order(7), auto(), auto(10)], ids=str)
def test_what_was_sent_and_not_answered_stays_held_whole(asked: Order) -> None:
    outcome = unanswered(asked, CARD.hold(asked))
    assert charge_of(outcome) == ("review", 0, CARD.hold(asked), 0, None)
    assert (outcome.size, outcome.quality) == (asked.size, asked.quality)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.name)
def test_nothing_stays_held_but_in_a_review_and_no_more_than_was(row: Row) -> None:
    hold = CARD.hold(row.order)
    outcome = answered(CARD, row.order, hold, row.status, row.delivery)
    assert (outcome.reserved_micro_usd > 0) == (outcome.state == "review")
    assert outcome.reserved_micro_usd <= hold
    assert outcome.settled_micro_usd == 0 or outcome.state != "released"


@pytest.mark.parametrize("seen", range(10))
def test_a_cut_splits_the_hold_of_every_price_without_a_rest(seen: int) -> None:
    for (size, quality), price in PRICES.items():
        asked = order(10, size, quality)
        outcome = answered(CARD, asked, CARD.hold(asked), 200, cut(*[SILENT] * seen))
        assert charge_of(outcome)[:4] == ("review", seen * price, (10 - seen) * price, seen)


@pytest.mark.parametrize(
    ("images", "size", "quality"),
    [
        ((), "auto", "auto"),
        ((REPORTED_LOW,), "1024x1024", "low"),
        ((REPORTED_LOW, REPORTED_LARGE), "mixed", "mixed"),
        ((REPORTED_LOW, DeliveredImage("1024x1024", "high")), "1024x1024", "mixed"),
    ],
)
def test_a_charge_is_named_after_its_images(images: tuple[DeliveredImage, ...], size: str, quality: str) -> None:
    outcome = answered(CARD, auto(max(1, len(images))), 0, 200, whole(*images))
    assert (outcome.size, outcome.quality) == (size, quality)
