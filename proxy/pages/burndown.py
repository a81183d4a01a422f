"""What is left of a budget day by day, up to now and as it will go on; and how many images it still buys. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta

from proxy import periods
from proxy.ledger.reports import BudgetStatus
from proxy.prices import ModelPrices

# All time has no end: so far back and ahead it is shown.
_TOTAL_DAYS = 30

_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Point:
    """The end of a UTC day: what is left then, of a team without a budget what was spent since the first day. Either is known
    or, from today on, as it will be at the present rate; today has both."""

    day: date
    known_micro_usd: int | None
    forecast_micro_usd: int | None


@dataclass(frozen=True, slots=True)
class BurnDown:
    """A period, day by day. ``budget`` is ``None`` where spend is added up instead."""

    budget: BudgetStatus | None
    points: Sequence[Point]


def first_day(period: periods.Period, now: datetime) -> date:
    """The first day shown of a period."""
    return now.date() - (_TOTAL_DAYS - 1) * _DAY if period == "total" else periods.start(period, now)


def burn_down(budget: BudgetStatus | None, spent: Mapping[date, int], rate_micro_usd: int, now: datetime) -> BurnDown:
    """The current period of a budget, or the month of a team that has none. ``spent`` is micro-USD by day."""
    period: periods.Period = "month" if budget is None else budget.period
    today, first = now.date(), first_day(period, now)
    end = periods.resets_at(period, now)
    last = today + _TOTAL_DAYS * _DAY if end is None else end.date() - _DAY
    days = [first + number * _DAY for number in range((last - first).days + 1)]
    so_far = [day for day in days if day <= today]
    left_of_today = periods.resets_at("day", now)
    assert left_of_today is not None
    points = []
    for day in days:
        known = forecast = None
        if day <= today:
            known = _known(budget, spent, so_far, day)
        if day >= today:
            # By the end of today only the rest of today is still to come.
            ahead = round(rate_micro_usd * ((left_of_today - now) / _DAY + (day - today).days)) if day > today else 0
            at_now = _known(budget, spent, so_far, today)
            forecast = at_now + ahead if budget is None else at_now - ahead
        points.append(Point(day, known, forecast))
    return BurnDown(budget, points)


def _known(budget: BudgetStatus | None, spent: Mapping[date, int], so_far: Sequence[date], day: date) -> int:
    if budget is None:
        return sum(spent.get(one, 0) for one in so_far if one <= day)
    # Counted back from what the budget itself says: what was spent before it was made counts in it all the same.
    return budget.remaining_micro_usd + sum(spent.get(one, 0) for one in so_far if one > day)


def tightest(budgets: Sequence[BudgetStatus]) -> BudgetStatus | None:
    """The hard budget with the least left."""
    return min((one for one in budgets if not one.soft), key=lambda one: one.remaining_micro_usd, default=None)


def images_left(prices: ModelPrices, remaining_micro_usd: int) -> dict[tuple[str, str], int]:
    """How many images of each size and quality it still buys."""
    return {cell: max(0, remaining_micro_usd) // price for cell, price in prices.micro_usd.items()}
