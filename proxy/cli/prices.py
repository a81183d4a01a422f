"""``beanmeter prices``: the price card in force, or what a request would be held at."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from proxy.cli.arguments import Json
from proxy.cli.failures import Failed
from proxy.cli.opening import read_settings
from proxy.cli.printing import print_json, print_table
from proxy.money import format_usd

if TYPE_CHECKING:
    from proxy.prices import ModelPrices, PriceCard


def prices(
    size: Annotated[str | None, typer.Option(metavar="WxH", help="Of the table, an alias, or auto.")] = None,
    quality: Annotated[str | None, typer.Option(metavar="QUALITY", help="Of the table, or auto.")] = None,
    n: Annotated[int | None, typer.Option("-n", min=1, max=10, help="How many images in one request.")] = None,
    as_json: Json = False,
) -> None:
    """Show the prices per image, or quote a request."""
    from proxy.settings import load_card

    settings = read_settings()
    card = load_card(settings)
    if size is not None:
        size = settings.size_aliases.get(size, size)
    rows = [row for model in card.models for row in _quotes(card, card.models[model], size, quality, n)]
    if not rows:
        raise Failed(_not_priced(card, size, quality))
    if as_json:
        print_json(rows)
    elif size is not None and quality is not None:
        for row in rows:
            _print_quote(row)
    else:
        print(f"Price card {card.version}. USD for {'each image' if n is None else f'{n} images'}.")
        for model in dict.fromkeys(row["model"] for row in rows):
            _print_model([row for row in rows if row["model"] == model])


def _quotes(card: PriceCard, prices: ModelPrices, size: str | None, quality: str | None, n: int | None) -> list[dict[str, Any]]:
    """A model's prices as rows: all cells, or those that were asked for; ``auto`` is held at the dearest that fits."""
    from proxy.prices import AUTO, Order

    sizes = prices.sizes if size is None else (size,) if size in (*prices.sizes, AUTO) else ()
    qualities = prices.qualities if quality is None else (quality,) if quality in (*prices.qualities, AUTO) else ()
    rows = []
    for each_size in sizes:
        for each_quality in qualities:
            price = card.hold(Order("generation", prices.name, each_size, each_quality, 1, False))
            row: dict[str, Any] = {"model": prices.name, "size": each_size, "quality": each_quality, "price_micro_usd": price}
            rows.append(row if n is None else row | {"n": n, "total_micro_usd": n * price})
    return rows


def _not_priced(card: PriceCard, size: str | None, quality: str | None) -> str:
    """What is wrong with a size or quality that no model has, and what to ask for instead."""
    from proxy.prices import AUTO, nearest_size

    models = list(card.models.values())
    prices = next((model for model in models if quality in (None, AUTO, *model.qualities)), None)
    if prices is None:
        return f"{quality!r} is not a quality of {models[0].name}: take {', '.join(models[0].qualities)} or {AUTO}"
    near = None if size is None else nearest_size(prices, size)
    if near is None:
        return f"{size!r} is not a size of {prices.name}: write WxH, such as {prices.sizes[0]}; 'beanmeter prices' shows all"
    dearest = prices.dearest(near, quality if quality in prices.qualities else None)
    price = format_usd(prices.micro_usd[dearest])
    return f"{size} is not a size of {prices.name}; the nearest preset is {near}, {price} USD an image at {dearest[1]} quality"


def _print_quote(row: dict[str, Any]) -> None:
    n = row.get("n", 1)
    price, total = format_usd(row["price_micro_usd"]), format_usd(n * row["price_micro_usd"])
    print(f"{row['model']} {row['size']} {row['quality']}: {n} x {price} = {total} USD")


def _print_model(rows: list[dict[str, Any]]) -> None:
    """One line a size, one column a quality."""
    model = rows[0]["model"]
    lines: dict[str, dict[str, Any]] = {}
    for row in rows:
        line = lines.setdefault(row["size"], {model: row["size"]})
        line[f"{row['quality']}_micro_usd"] = row.get("total_micro_usd", row["price_micro_usd"])
    print_table(tuple(dict.fromkeys(name for line in lines.values() for name in line)), lines.values())
