"""How fast money is spent, and what that comes to. Pure: sums by day and the clock go in, integer micro-USD come out."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, date, datetime, time, timedelta

# A week has every weekday once, so that a Monday does not speak for a Sunday.
WINDOW_DAYS = 7

_DAY = timedelta(days=1)


def daily_rate(spent: Mapping[date, int], now: datetime, begun_at: datetime) -> int:
    """Micro-USD a day, on average of the last seven whole days and today so far, or of the time since ``begun_at``.

    ``spent`` is micro-USD by UTC day. Less than a day counts as one, so that a first hour is not taken for 24 of its kind.
    """
    first = window_start(now)
    since = max(datetime.combine(first, time(), UTC), begun_at)
    total = sum(amount for day, amount in spent.items() if first <= day <= now.date())
    # Not as a share of a timedelta: that holds a thousand million days, and a thousand dollars are as many micro-USD.
    return round(total / (max(now - since, _DAY) / _DAY))


def window_start(now: datetime) -> date:
    """The first of the days that :func:`daily_rate` looks at."""
    return now.astimezone(UTC).date() - WINDOW_DAYS * _DAY


def at_end(counted_micro_usd: int, rate_micro_usd: int, now: datetime, resets_at: datetime | None) -> int | None:
    """What will be counted when the period ends, if it goes on at that rate; ``None`` where it never ends."""
    if resets_at is None:
        return None
    return counted_micro_usd + round(rate_micro_usd * ((resets_at - now) / _DAY))


def used_up_at(remaining_micro_usd: int, rate_micro_usd: int, now: datetime) -> datetime | None:
    """When nothing will be left at that rate; ``None`` where nothing is spent, or not within a century."""
    if rate_micro_usd <= 0:
        return None
    days = max(0, remaining_micro_usd) / rate_micro_usd
    return now + timedelta(days=days) if days < 36_500 else None
