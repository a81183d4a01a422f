"""Charges whose cost nobody knows yet, and the forms that settle or release them."""

from __future__ import annotations

from sqlalchemy import Connection
from starlette.responses import Response

from proxy.ledger import reviews
from proxy.ledger.pages import Page, Turn, has_charge, list_charges
from proxy.pages import fields
from proxy.pages.desk import NOTHING_WRONG, Missing, Visit, Wrong
from proxy.pages.fields import FieldError

# More than a person decides over in a sitting.
ROWS = 50

# What 'reviews' takes for a reason.
REASON_CHARACTERS_MAX = 500


async def show(visit: Visit) -> Response:
    """The oldest of them."""
    return await _show(visit, 200, NOTHING_WRONG)


async def settle(visit: Visit) -> Response:
    """Settle one at what the bill says."""
    charge_id = visit.named("charge_id")
    try:
        amount = fields.usd(visit.form, "usd")

        def write(connection: Connection) -> None:
            _check(connection, charge_id)
            reviews.settle(connection, charge_id, amount, now=visit.now, actor=visit.actor)

        await visit.change(write, "usd")
    except FieldError as error:
        return await _show(visit, 422, Wrong(charge_id, visit.form, {error.field: error.message}))
    return visit.go("reviews", said="review_settled")


async def release(visit: Visit) -> Response:
    """Release one: it cost nothing."""
    charge_id = visit.named("charge_id")
    try:
        reason = fields.line(visit.form, "reason", longest=REASON_CHARACTERS_MAX)

        def write(connection: Connection) -> None:
            _check(connection, charge_id)
            reviews.release(connection, charge_id, reason, now=visit.now, actor=visit.actor)

        await visit.change(write, "reason")
    except FieldError as error:
        return await _show(visit, 422, Wrong(charge_id, visit.form, {error.field: error.message}))
    return visit.go("reviews", said="review_released")


def _check(connection: Connection, charge_id: str) -> None:
    if not has_charge(connection, charge_id):
        raise Missing


async def _show(visit: Visit, status: int, wrong: Wrong) -> Response:
    def read(connection: Connection) -> Page:
        return list_charges(connection, Turn(ROWS), state="review")

    page = await visit.ask(read)
    # What has ended meanwhile has no form of its own any more.
    gone = wrong.form if wrong.form and wrong.form not in {row["id"] for row in page.rows} else None
    return await visit.page("reviews.html", status, rows=page.rows, more=page.last is not None, wrong=wrong, gone=gone)
