"""Calendar arithmetic in UTC: budget periods, durations and points in time as people write them. The clock is always
an argument, and only this file turns text into a time."""

from __future__ import annotations

import re
from datetime import UTC, date, datetime, time, timedelta
from typing import Literal, get_args

Period = Literal["day", "week", "month", "total"]

PERIODS: tuple[Period, ...] = get_args(Period)

# All time is one period, and it needs a first day.
EPOCH = date(1970, 1, 1)

_UNIT_SECONDS = {"s": 1, "m": 60, "h": 3_600, "d": 86_400, "w": 604_800}

# A hundred years: longer is a typing error, and now plus or minus it stays within the calendar.
_LONGEST = timedelta(days=36_500)

_DURATION = re.compile(r"([0-9]{1,10})([smhdw])", re.ASCII)
_DAY = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}", re.ASCII)
_RFC_3339 = re.compile(
    r"[0-9]{4}-[0-9]{2}-[0-9]{2}[Tt ][0-9]{2}:[0-9]{2}:[0-9]{2}(\.[0-9]{1,9})?([Zz]|[+-][0-9]{2}:[0-9]{2})", re.ASCII
)


def start(period: Period, at: datetime) -> date:
    """The first UTC day of the period that ``at`` (aware) is in: the day itself, the ISO week's Monday, the first of
    the month, or :data:`EPOCH` for all time."""
    today = _utc(at).date()
    match period:
        case "day":
            return today
        case "week":
            return today - timedelta(days=today.weekday())
        case "month":
            return today.replace(day=1)
        case "total":
            return EPOCH


def resets_at(period: Period, at: datetime) -> datetime | None:
    """The UTC midnight at which the next period starts; ``None`` for all time."""
    first = start(period, at)
    match period:
        case "day":
            return _midnight(first + timedelta(days=1))
        case "week":
            return _midnight(first + timedelta(days=7))
        case "month":
            # The 31st day after the first of any month is one of the first four days of the next.
            return _midnight((first + timedelta(days=31)).replace(day=1))
        case "total":
            return None


def parse_duration(text: str) -> timedelta:
    """``90d`` as 90 days: a whole number, zero too, with ``s``, ``m``, ``h``, ``d`` or ``w``.

    Raises ``ValueError`` with a message for the reader.
    """
    match = _DURATION.fullmatch(text)
    if match is None:
        raise ValueError(f"{text!r} is not a duration: write a whole number with s, m, h, d or w, such as 90d or 24h")
    seconds = int(match[1]) * _UNIT_SECONDS[match[2]]
    if seconds > _LONGEST.total_seconds():
        raise ValueError(f"{text!r} is too long: the longest duration is {_LONGEST.days}d")
    return timedelta(seconds=seconds)


def parse_when(text: str, now: datetime, *, end: bool) -> datetime:
    """The moment, in UTC, at which a span of time starts (inclusive), or with ``end`` stops (exclusive).

    A day ``2026-11-22`` is its midnight in UTC, and as an end the midnight after it, so that the day is included.
    A time needs its offset, as in ``2026-11-22T15:00:00Z``. A duration such as ``7d`` counts back from ``now`` (aware).
    Raises ``ValueError`` with a message for the reader.
    """
    if _DURATION.fullmatch(text):
        return _utc(now) - parse_duration(text)
    try:
        if _DAY.fullmatch(text):
            return _midnight(date.fromisoformat(text) + timedelta(days=1 if end else 0))
        if _RFC_3339.fullmatch(text):
            return _utc(datetime.fromisoformat(text.upper()))
    except (ValueError, OverflowError):
        raise ValueError(f"{text!r} is not in the calendar: check the day, the time and the offset") from None
    raise ValueError(
        f"{text!r} is not a point in time: write a day (2026-11-22), a time with its offset "
        "(2026-11-22T15:00:00Z) or how long ago (7d)"
    )


def _utc(at: datetime) -> datetime:
    assert at.tzinfo is not None, "a time without a zone means another moment on every host"
    return at.astimezone(UTC)


def _midnight(day: date) -> datetime:
    return datetime.combine(day, time(), UTC)
