"""Dollars to integer micro-USD and back, exactly."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.money import format_usd, parse_usd


@pytest.mark.parametrize(
    ("text", "micro_usd"),
    [
        ("0", 0),
        ("12", 12_000_000),
        ("0.2107", 210_700),
        ("5.000000", 5_000_000),
        ("0.000001", 1),
        ("0.1", 100_000),
        ("007.5", 7_500_000),
        ("999999999999.999999", 999_999_999_999_999_999),
    ],
)
def test_dollars(text: str, micro_usd: int) -> None:
    assert parse_usd(text) == micro_usd


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "-1",
        "+1",
        "$1",
        "1$",
        "1,5",
        "1,000",
        "1_000",
        "1.",
        ".5",
        "1e3",
        "0.0000001",
        "1 ",
        "\t1",
        "1\n",
        "nan",
        "inf",
        "٣",
        "1000000000000",
    ],
)
def test_what_is_not_an_amount_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not an amount in USD: .* such as 25 or 0.2107"):
        parse_usd(text)


@pytest.mark.parametrize(
    ("micro_usd", "text"),
    [
        (0, "0.000000"),
        (1, "0.000001"),
        (210_700, "0.210700"),
        (12_000_000, "12.000000"),
        (-210_700, "-0.210700"),
        (-1, "-0.000001"),
    ],
)
def test_amounts_are_printed_with_six_decimals(micro_usd: int, text: str) -> None:
    assert format_usd(micro_usd) == text


@given(st.integers(0, 10**18 - 1))
def test_what_is_printed_reads_back_the_same(micro_usd: int) -> None:
    assert parse_usd(format_usd(micro_usd)) == micro_usd
