"""What commands print: rows as a table, JSON or CSV on standard output, words for people on standard error.

A row is a mapping. Amounts are integer micro-USD in fields that end in ``_micro_usd``; a table shows them in USD.
"""

from __future__ import annotations

import csv
import json
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from datetime import UTC, date, datetime
from itertools import chain, islice
from typing import Any

from proxy.money import format_usd

Row = Mapping[str, Any]

_MICRO_USD = "_micro_usd"

# A table knows its widths only when it has its rows: a long listing is several tables, each of which fits in memory.
TABLE_ROWS_MAX = 1_000

# Wider than any row: a terminal folds what is too wide for it, but nothing is ever cut off.
_WIDTH = 10_000

# What a spreadsheet takes for the start of a formula.
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


def say(text: str) -> None:
    """A message for the person at the terminal."""
    print(text, file=sys.stderr, flush=True)


def print_json(value: object) -> None:
    print(json.dumps(value, default=_plain))


def print_json_array(rows: Iterable[Row]) -> None:
    """One array, written row by row, however many there are."""
    separator = "["
    for row in rows:
        print(separator, json.dumps(row, default=_plain), sep="\n", end="")
        separator = ","
    print("[]" if separator == "[" else "\n]")


def print_json_lines(rows: Iterable[Row]) -> None:
    for row in rows:
        print(json.dumps(row, default=_plain))


def print_csv(columns: Sequence[str], rows: Iterable[Row]) -> None:
    writer = csv.writer(sys.stdout)
    writer.writerow(columns)
    for row in rows:
        writer.writerow([_field(row[name]) for name in columns])


def print_table(columns: Sequence[str], rows: Iterable[Row], total: Row | None = None) -> None:
    """Rows for people, under headings made of the columns' names. ``total`` is a last row below a line."""
    rest = iter(rows)
    first = list(islice(rest, TABLE_ROWS_MAX))
    for page in chain([first], _pages(rest)):
        _print_one_table(columns, page, total)


def rfc_3339(at: datetime) -> str:
    return at.astimezone(UTC).isoformat().removesuffix("+00:00") + "Z"


def _pages(rows: Iterator[Row]) -> Iterator[list[Row]]:
    while page := list(islice(rows, TABLE_ROWS_MAX)):
        yield page


def _print_one_table(columns: Sequence[str], rows: Sequence[Row], total: Row | None) -> None:
    from rich.box import SIMPLE
    from rich.console import Console
    from rich.table import Table
    from rich.text import Text

    table = Table(box=SIMPLE, show_edge=False, pad_edge=False, show_footer=total is not None)
    for name in columns:
        footer = "" if total is None else _cell(name, total.get(name))
        is_number = name.endswith(_MICRO_USD) or any(type(row[name]) is int for row in rows)
        table.add_column(_heading(name), Text(footer), justify="right" if is_number else "left", no_wrap=True)
    for row in rows:
        # As text and not as markup: a name in brackets is a name.
        table.add_row(*(Text(_cell(name, row[name])) for name in columns))
    Console(file=sys.stdout, width=_WIDTH).print(table)


def _heading(name: str) -> str:
    words = name.removesuffix(_MICRO_USD) + " USD" if name.endswith(_MICRO_USD) else name
    return words.replace("_", " ")


def _cell(name: str, value: object) -> str:
    if value is None:
        return ""
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int) and name.endswith(_MICRO_USD):
        return format_usd(value)
    return rfc_3339(value.replace(microsecond=0)) if isinstance(value, datetime) else str(value)


def _plain(value: object) -> str:
    if isinstance(value, datetime):
        return rfc_3339(value)
    if isinstance(value, date):
        return value.isoformat()
    raise TypeError(f"{type(value).__name__} has no place in a row")


def _field(value: object) -> object:
    if isinstance(value, str):
        return "'" + value if value.startswith(_FORMULA) else value
    if isinstance(value, bool):
        return "true" if value else "false"
    return value if value is None or isinstance(value, int) else _plain(value)
