"""Periods, durations and points in time, all in UTC."""

from __future__ import annotations

from datetime import UTC, date, datetime, timedelta, timezone

import pytest

from proxy.periods import PERIODS, Period, parse_duration, parse_when, resets_at, start

NEW_YORK_IN_WINTER = timezone(timedelta(hours=-5))


@pytest.mark.parametrize(
    ("period", "at", "first", "reset"),
    [
        ("day", datetime(2026, 11, 22, 0, 0, tzinfo=UTC), date(2026, 11, 22), datetime(2026, 11, 23, tzinfo=UTC)),
        ("day", datetime(2026, 11, 22, 23, 59, 59, 999_999, UTC), date(2026, 11, 22), datetime(2026, 11, 23, tzinfo=UTC)),
        # Eight in the evening of the 22nd in New York is the 23rd in UTC.
        (
            "day",
            datetime(2026, 11, 22, 20, 0, tzinfo=NEW_YORK_IN_WINTER),
            date(2026, 11, 23),
            datetime(2026, 11, 24, tzinfo=UTC),
        ),
        ("day", datetime(2028, 2, 28, 12, 0, tzinfo=UTC), date(2028, 2, 28), datetime(2028, 2, 29, tzinfo=UTC)),
        ("week", datetime(2026, 11, 22, 23, 59, tzinfo=UTC), date(2026, 11, 16), datetime(2026, 11, 23, tzinfo=UTC)),
        ("week", datetime(2026, 11, 23, 0, 0, tzinfo=UTC), date(2026, 11, 23), datetime(2026, 11, 30, tzinfo=UTC)),
        # ISO week 53 of 2026 reaches into 2027.
        ("week", datetime(2027, 1, 2, 12, 0, tzinfo=UTC), date(2026, 12, 28), datetime(2027, 1, 4, tzinfo=UTC)),
        ("month", datetime(2026, 11, 30, 23, 59, tzinfo=UTC), date(2026, 11, 1), datetime(2026, 12, 1, tzinfo=UTC)),
        ("month", datetime(2026, 12, 31, 12, 0, tzinfo=UTC), date(2026, 12, 1), datetime(2027, 1, 1, tzinfo=UTC)),
        ("month", datetime(2027, 1, 31, 12, 0, tzinfo=UTC), date(2027, 1, 1), datetime(2027, 2, 1, tzinfo=UTC)),
        ("month", datetime(2027, 2, 28, 12, 0, tzinfo=UTC), date(2027, 2, 1), datetime(2027, 3, 1, tzinfo=UTC)),
        ("month", datetime(2028, 2, 29, 12, 0, tzinfo=UTC), date(2028, 2, 1), datetime(2028, 3, 1, tzinfo=UTC)),
        ("total", datetime(2026, 11, 22, 12, 0, tzinfo=UTC), date(1970, 1, 1), None),
    ],
)
def test_where_a_period_starts_and_when_it_resets(period: Period, at: datetime, first: date, reset: datetime | None) -> None:
    assert start(period, at) == first
    assert resets_at(period, at) == reset


@pytest.mark.parametrize("period", [period for period in PERIODS if period != "total"])
def test_every_moment_of_four_years_is_in_exactly_one_period(period: Period) -> None:
    at = datetime(2026, 1, 1, 12, tzinfo=UTC)
    while at.year < 2030:
        reset = resets_at(period, at)
        assert reset is not None
        assert datetime.combine(start(period, at), datetime.min.time(), UTC) <= at < reset
        assert start(period, reset - timedelta(microseconds=1)) == start(period, at)
        assert start(period, reset) == reset.date()
        at += timedelta(days=1)


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("0s", timedelta(0)),
        ("45s", timedelta(seconds=45)),
        ("90m", timedelta(minutes=90)),
        ("24h", timedelta(days=1)),
        ("90d", timedelta(days=90)),
        ("2w", timedelta(days=14)),
        ("36500d", timedelta(days=36_500)),
    ],
)
def test_durations(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize(
    "text", ["", "90", "d", "-1d", "+1d", "1.5h", "1 d", " 1d", "1d ", "1D", "1y", "1d2h", "1e3s", "٣d", "1d\n"]
)
def test_what_is_not_a_duration_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not a duration: .* such as 90d"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["36501d", "9999999999w", "3153600001s"])
def test_a_duration_has_a_longest(text: str) -> None:
    with pytest.raises(ValueError, match=r"the longest duration is 36500d"):
        parse_duration(text)


NOW = datetime(2026, 11, 22, 15, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "since", "until"),
    [
        ("2026-11-20", datetime(2026, 11, 20, tzinfo=UTC), datetime(2026, 11, 21, tzinfo=UTC)),
        ("2026-12-31", datetime(2026, 12, 31, tzinfo=UTC), datetime(2027, 1, 1, tzinfo=UTC)),
        ("2026-11-20T10:00:00Z", datetime(2026, 11, 20, 10, tzinfo=UTC), datetime(2026, 11, 20, 10, tzinfo=UTC)),
        ("2026-11-20 10:00:00Z", datetime(2026, 11, 20, 10, tzinfo=UTC), datetime(2026, 11, 20, 10, tzinfo=UTC)),
        ("2026-11-20t10:00:00z", datetime(2026, 11, 20, 10, tzinfo=UTC), datetime(2026, 11, 20, 10, tzinfo=UTC)),
        (
            "2026-11-20T10:00:00.25+02:00",
            datetime(2026, 11, 20, 8, 0, 0, 250_000, UTC),
            datetime(2026, 11, 20, 8, 0, 0, 250_000, UTC),
        ),
        ("2026-11-20T20:00:00-05:00", datetime(2026, 11, 21, 1, tzinfo=UTC), datetime(2026, 11, 21, 1, tzinfo=UTC)),
        ("36h", datetime(2026, 11, 21, 3, 30, tzinfo=UTC), datetime(2026, 11, 21, 3, 30, tzinfo=UTC)),
        ("1w", datetime(2026, 11, 15, 15, 30, tzinfo=UTC), datetime(2026, 11, 15, 15, 30, tzinfo=UTC)),
    ],
)
def test_points_in_time(text: str, since: datetime, until: datetime) -> None:
    assert parse_when(text, NOW, end=False) == since
    assert parse_when(text, NOW, end=True) == until
    assert parse_when(text, NOW, end=True).utcoffset() == timedelta(0)


def test_now_counts_in_whatever_zone_it_is_told() -> None:
    assert parse_when("1h", NOW.astimezone(NEW_YORK_IN_WINTER), end=False) == datetime(2026, 11, 22, 14, 30, tzinfo=UTC)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("yesterday", "is not a point in time"),
        ("2026-11-20T10:00:00", "is not a point in time"),
        ("2026-11", "is not a point in time"),
        ("20261120", "is not a point in time"),
        ("2026-W47-1", "is not a point in time"),
        ("", "is not a point in time"),
        ("2026-11-31", "is not in the calendar"),
        ("2026-11-20T25:00:00Z", "is not in the calendar"),
        ("9999-12-31", "is not in the calendar"),
        ("0001-01-01T00:00:00+01:00", "is not in the calendar"),
        ("99999d", "the longest duration"),
    ],
)
def test_what_is_not_a_point_in_time_is_refused(text: str, complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        parse_when(text, NOW, end=True)
