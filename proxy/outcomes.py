"""What an exchange's end means for its charge: the one place that turns an answer into settled, released or review.

Pure. The rule behind every row: an image that was seen complete is paid for, what was surely not made is released, and
what nobody can know stays held until a person has looked at it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from proxy.prices import Basis, Charge, Order, PriceCard
from proxy.taps import Delivery

Ending = Literal["settled", "released", "review"]


@dataclass(slots=True)
class Outcome:
    """How a charge is to be booked. Not frozen, although nothing changes one: a frozen one takes six times as long to make.

    ``settled_micro_usd`` is what is known to be owed; ``reserved_micro_usd`` what stays held, above zero in a review only.
    ``size`` and ``quality`` are those of the delivered images, else as asked. ``reason`` is a word for the books.
    """

    state: Ending
    settled_micro_usd: int
    reserved_micro_usd: int
    images_delivered: int
    size: str
    quality: str
    basis: Basis | None
    reason: str


def unsent(order: Order) -> Outcome:
    """The upstream never heard of the request."""
    return _released(order, "unsent")


def unanswered(order: Order, hold_micro_usd: int) -> Outcome:
    """The request was sent, whole or in part, and no answer began."""
    return _review(order, hold_micro_usd, Charge(0, 0, order.size, order.quality, "requested"), "no_answer")


def answered(card: PriceCard, order: Order, hold_micro_usd: int, status: int, delivery: Delivery) -> Outcome:
    """The upstream answered with ``status``; ``delivery`` is what was seen of the body."""
    if 400 <= status < 500:
        return _released(order, "refused_upstream")
    charge = card.charge(order, delivery.images)
    if charge.images >= order.n:
        return _settled(charge, "delivered")
    if delivery.error and delivery.complete:
        return _settled(charge, "failed_in_part") if charge.images else _released(order, "failed_upstream")
    if status >= 500:
        return _review(order, hold_micro_usd, charge, "broke_upstream")
    if delivery.complete and (delivery.understood or 300 <= status < 400):
        return _settled(charge, "delivered_fewer") if charge.images else _released(order, "delivered_none")
    return _review(order, hold_micro_usd, charge, "cut" if delivery.understood else "not_understood")


def _settled(charge: Charge, reason: str) -> Outcome:
    return Outcome("settled", charge.micro_usd, 0, charge.images, charge.size, charge.quality, charge.basis, reason)


def _released(order: Order, reason: str) -> Outcome:
    return Outcome("released", 0, 0, 0, order.size, order.quality, None, reason)


def _review(order: Order, hold_micro_usd: int, known: Charge, reason: str) -> Outcome:
    # The hold is n equal shares: those of the images that were seen are settled, the others stay held.
    still_held = hold_micro_usd * (order.n - known.images) // order.n
    basis = known.basis if known.images else None
    return Outcome("review", known.micro_usd, still_held, known.images, known.size, known.quality, basis, reason)
