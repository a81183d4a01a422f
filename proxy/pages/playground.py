"""Where a picture is made by hand. The page calls the gateway's own ``/v1`` from the browser, with a key that is pasted in and
known only there; here are its form, the price of what it asks for, and what became of it."""

from __future__ import annotations

from starlette.responses import JSONResponse, Response

from proxy.ledger.overviews import find_charge
from proxy.pages import fields
from proxy.pages.desk import Missing, Visit
from proxy.pages.fields import FieldError
from proxy.prices import AUTO, Order

# What a request may ask for.
IMAGES_MAX = 10


async def show(visit: Visit) -> Response:
    """The form."""
    return await visit.page("playground.html", models=visit.desk.card.models, auto=AUTO, images_max=IMAGES_MAX)


async def price(visit: Visit) -> Response:
    """What a request is held at: as JSON, ``hold_micro_usd``; or what is wrong with it, ``message``, and at which ``field``.
    That is no error: it is asked while somebody types."""
    asked, card = visit.asked(), visit.desk.card
    try:
        model = fields.choice(asked, "model", *card.models)
        size = fields.choice(asked, "size", AUTO, *card.models[model].sizes)
        quality = fields.choice(asked, "quality", AUTO, *card.models[model].qualities)
        n = fields.whole(asked, "n", least=1, most=IMAGES_MAX)
        if n is None:
            raise FieldError("n", f"Write a whole number from 1 to {IMAGES_MAX}.")
    except FieldError as error:
        return JSONResponse({"field": error.field, "message": error.message})
    hold = card.hold(Order("generation", model, size, quality, n, True))
    return JSONResponse({"hold_micro_usd": hold, "at_most": AUTO in (size, quality)})


async def cost(visit: Visit) -> Response:
    """What became of a request: the state of its charge and its amounts, as JSON. Of another team's it says nothing."""
    request_id = visit.asked().get("request_id", "")
    if not request_id.isprintable():
        raise Missing
    names = None if visit.sees_all else visit.teams
    found = await visit.ask(lambda connection: find_charge(connection, request_id, names=names))
    if found is None:
        raise Missing
    return JSONResponse(found)
