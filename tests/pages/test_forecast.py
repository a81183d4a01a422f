"""Rates, forecasts and burn-downs, as tables of amounts."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta

import pytest

from proxy import periods
from proxy.ledger.reports import BudgetStatus
from proxy.pages import forecast
from proxy.pages.burndown import burn_down, images_left, tightest
from proxy.pages.overview import heading
from proxy.pages.prices import suggest
from proxy.pages.rendering import cents, usd
from proxy.periods import Period
from proxy.prices import shipped_card

# A Sunday at noon: half of a day, of a week's last one, and the 22nd of 30.
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)
TODAY = NOON.date()
LONG_AGO = datetime(2026, 1, 1, tzinfo=UTC)
DAY = timedelta(days=1)


def budget(limit: int, settled: int = 0, held: int = 0, *, period: Period = "month", soft: bool = False) -> BudgetStatus:
    return BudgetStatus("red", None, "team", period, soft, limit, settled, held, periods.resets_at(period, NOON))


@pytest.mark.parametrize(
    ("spent", "begun_at", "rate"),
    [
        ({}, LONG_AGO, 0),
        ({TODAY: 750}, LONG_AGO, 100),
        ({TODAY - number * DAY: 100 for number in range(1, 8)} | {TODAY: 50}, LONG_AGO, 100),
        ({TODAY - 8 * DAY: 9_000}, LONG_AGO, 0),
        ({TODAY: 300, TODAY - DAY: 300}, NOON - 2 * DAY, 300),
        # A first hour is not taken for 24 of its kind.
        ({TODAY: 300}, NOON - timedelta(hours=1), 300),
        ({TODAY: 300}, NOON + timedelta(seconds=1), 300),
        # A thousand million dollars.
        ({TODAY: 75 * 10**14}, LONG_AGO, 10**15),
    ],
)
def test_the_rate_is_the_average_of_a_week_and_today(spent: dict[date, int], begun_at: datetime, rate: int) -> None:
    assert forecast.daily_rate(spent, NOON, begun_at) == rate


@pytest.mark.parametrize(
    ("period", "at_end"), [("day", 1_000 + 50), ("week", 1_000 + 50), ("month", 1_000 + 850), ("total", None)]
)
def test_a_forecast_goes_on_at_the_rate_until_the_reset(period: Period, at_end: int | None) -> None:
    assert forecast.at_end(1_000, 100, NOON, periods.resets_at(period, NOON)) == at_end


@pytest.mark.parametrize(
    ("remaining", "rate", "at"),
    [(100, 100, NOON + DAY), (0, 100, NOON), (-5, 100, NOON), (100, 0, None), (10**15, 1, None)],
)
def test_when_nothing_is_left(remaining: int, rate: int, at: datetime | None) -> None:
    assert forecast.used_up_at(remaining, rate, NOON) == at


@pytest.mark.parametrize(
    ("limit", "settled", "held", "standing"),
    [
        (10_000, 1_000, 0, "fine"),
        (1_851, 900, 100, "fine"),
        (1_849, 900, 100, "ahead"),
        (1_000, 900, 100, "over"),
        (0, 0, 0, "over"),
    ],
)
def test_where_a_budget_is_heading(limit: int, settled: int, held: int, standing: str) -> None:
    found = heading("red", budget(limit, settled, held), {TODAY: 750}, NOON, LONG_AGO)
    assert (found.standing, found.counted_micro_usd) == (standing, settled + held)


def test_a_team_without_a_budget_is_seen_by_the_month() -> None:
    spent = {date(2026, 10, 31): 5_000, date(2026, 11, 1): 10, TODAY: 750}
    found = heading("red", None, spent, NOON, LONG_AGO)
    assert (found.period, found.counted_micro_usd, found.rate_micro_usd, found.forecast_micro_usd) == ("month", 760, 100, 1_610)
    assert (found.standing, found.used_up_at) == ("none", None)


def test_a_burn_down_ends_today_at_what_the_budget_says() -> None:
    # 500 were spent in the month before the budget counted days: what is left goes by the budget.
    burned = burn_down(budget(10_000, 1_500, 100), {date(2026, 11, 1): 400, date(2026, 11, 21): 600, TODAY: 100}, 100, NOON)
    points = {point.day: (point.known_micro_usd, point.forecast_micro_usd) for point in burned.points}
    assert list(points) == [date(2026, 11, number) for number in range(1, 31)]
    assert points[date(2026, 11, 1)] == (9_100, None)
    assert points[date(2026, 11, 20)] == (9_100, None)
    assert points[date(2026, 11, 21)] == (8_500, None)
    assert points[TODAY] == (8_400, 8_400)
    assert points[date(2026, 11, 23)] == (None, 8_400 - 150)
    assert points[date(2026, 11, 30)] == (None, 8_400 - 850)
    at_end = forecast.at_end(1_600, 100, NOON, periods.resets_at("month", NOON))
    assert at_end == 10_000 - (points[date(2026, 11, 30)][1] or 0)


def test_other_burn_downs() -> None:
    week = burn_down(budget(1_000, period="week"), {}, 0, NOON)
    assert [point.day for point in week.points] == [date(2026, 11, number) for number in range(16, 23)]
    ever = burn_down(budget(1_000, 30, period="total"), {TODAY: 10}, 1, NOON)
    assert (len(ever.points), ever.points[29].day, ever.points[28].known_micro_usd) == (60, TODAY, 980)
    spend = burn_down(None, {date(2026, 10, 31): 9, date(2026, 11, 1): 4, TODAY: 6}, 10, NOON)
    assert (spend.points[0].known_micro_usd, spend.points[21].known_micro_usd, spend.points[22].forecast_micro_usd) == (
        4,
        10,
        25,
    )


def test_images_left_are_those_of_the_tightest_hard_budget() -> None:
    tight = tightest([budget(900_000, 200_000), budget(1_000_000, period="day"), budget(1, soft=True)])
    assert tight is not None
    left = images_left(shipped_card().models["gpt-image-2"], tight.remaining_micro_usd)
    assert left["1024x1024", "high"] == 700_000 // 210_700 == 3
    assert set(images_left(shipped_card().models["gpt-image-2"], -1).values()) == {0}
    assert tightest([budget(1, soft=True)]) is None


@pytest.mark.parametrize(
    ("asked", "nearest", "same_shape"),
    [("1500x1000", "2016x1344", ["2016x1344", "3456x2304"]), ("1000x1000", "1024x1024", ["1024x1024"])],
)
def test_a_size_in_mind_finds_the_presets_of_its_shape(asked: str, nearest: str, same_shape: list[str]) -> None:
    prices = shipped_card().models["gpt-image-2"]
    found = suggest(prices, asked)
    assert found is not None
    assert found.nearest == nearest
    assert [size for size in found.same_shape if size in same_shape] == same_shape
    largest = found.same_shape[-1]
    for size in found.same_shape:
        saved = prices.micro_usd[largest, "high"] - prices.micro_usd[size, "high"]
        assert found.savings[size, "high"] == saved
    assert suggest(prices, "large") is None


@pytest.mark.parametrize(
    ("micro_usd", "exact", "rounded"),
    [(0, "$0.0000", "$0.00"), (210_700, "$0.2107", "$0.21"), (5, "$0.000005", "$0.00"), (-1_005_000, "-$1.0050", "-$1.01")],
)
def test_amounts(micro_usd: int, exact: str, rounded: str) -> None:
    assert (usd(micro_usd), cents(micro_usd)) == (exact, rounded)
