"""Integer micro-USD: parsing, printing, multiplying. The only file that turns text into money or money into text."""

from __future__ import annotations

import re

MICRO_PER_USD = 1_000_000

# A budget or price of a trillion dollars or more is a typing error, and below that the sum of any number of charges that a
# database can hold stays inside a signed 64-bit column.
_USD = re.compile(r"([0-9]{1,12})(?:\.([0-9]{1,6}))?", re.ASCII)


def parse_usd(text: str) -> int:
    """The micro-USD in a decimal amount of dollars such as ``12``, ``0.2107`` or ``5.000000``.

    Raises ``ValueError`` with a message for the reader on anything else: a sign, an exponent,
    a separator, or more than six decimals, which micro-USD can't hold.
    """
    match = _USD.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not an amount in USD: write digits with at most six decimals, such as 25 or 0.2107")
    whole, fraction = match.groups()
    return int(whole) * MICRO_PER_USD + int((fraction or "").ljust(6, "0"))


def format_usd(micro_usd: int) -> str:
    """``210700`` as ``0.210700``: six decimals, always exact."""
    sign = "-" if micro_usd < 0 else ""
    whole, fraction = divmod(abs(micro_usd), MICRO_PER_USD)
    return f"{sign}{whole}.{fraction:06d}"
