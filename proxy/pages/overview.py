"""The operators' first page: this period's spend against every team's budget, where it is heading, and what is open."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime, timedelta
from typing import Any

from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import Connection
from starlette.responses import Response

from proxy import periods
from proxy.ledger import accounts, overviews, reports
from proxy.metrics import Metrics
from proxy.pages import forecast
from proxy.pages.desk import NOTHING_WRONG, Visit, Wrong
from proxy.pages.export import csv_response
from proxy.pages.fields import FieldError, line
from proxy.prices import PriceCard

# How far the chart looks back, and how many teams have a colour of their own in it.
CHART_DAYS = 30
CHART_TEAMS = 5

MOVERS = 5
REFUSALS = 10

# Micro-USD by team and day.
Spent = Mapping[str, Mapping[date, int]]

_WEEK = timedelta(days=7)
_DAY = timedelta(days=1)


@dataclass(frozen=True, slots=True)
class Heading:
    """A team's spend in a period and where it is heading. ``budget`` is ``None`` for a team that has none."""

    team: str
    period: periods.Period
    budget: reports.BudgetStatus | None
    counted_micro_usd: int
    rate_micro_usd: int
    forecast_micro_usd: int | None
    used_up_at: datetime | None

    @property
    def standing(self) -> str:
        """In a word: fine, ahead (of its budget, at this rate) or over (it already)."""
        if self.budget is None:
            return "none"
        if self.counted_micro_usd >= self.budget.limit_micro_usd:
            return "over"
        ahead = self.forecast_micro_usd is not None and self.forecast_micro_usd > self.budget.limit_micro_usd
        return "ahead" if ahead else "fine"


def heading(
    team: str, budget: reports.BudgetStatus | None, spent: Mapping[date, int], now: datetime, begun_at: datetime
) -> Heading:
    """Where a budget is heading, or the month of a team that has none. ``spent`` is micro-USD by day."""
    rate = forecast.daily_rate(spent, now, begun_at)
    period: periods.Period = "month" if budget is None else budget.period
    if budget is None:
        counted = sum(amount for day, amount in spent.items() if day >= periods.start(period, now))
    else:
        counted = budget.settled_micro_usd + budget.held_micro_usd
    at_end = forecast.at_end(counted, rate, now, periods.resets_at(period, now))
    end = None if budget is None else forecast.used_up_at(budget.remaining_micro_usd, rate, now)
    return Heading(team, period, budget, counted, rate, at_end, end)


def read_spent(connection: Connection, first: date, now: datetime) -> dict[str, dict[date, int]]:
    """What counts, by team and day, from ``first`` to today."""
    found: defaultdict[str, dict[date, int]] = defaultdict(dict)
    for row in overviews.sum_up(connection, ("team", "day"), first, now.date() + _DAY):
        found[row["team"]][row["day"]] = row["settled_micro_usd"] + row["reserved_micro_usd"]
    return found


def first_live_day(now: datetime) -> date:
    """As far back as totals and rates look."""
    return min(periods.start("month", now), forecast.window_start(now))


def first_chart_day(now: datetime) -> date:
    """As far back as the chart looks."""
    return now.date() - (CHART_DAYS - 1) * _DAY


def read_figures(connection: Connection, teams: Sequence[dict[str, Any]], spent: Spent, now: datetime) -> dict[str, Any]:
    """Where every team's budgets are heading, and what is open."""
    budgets: defaultdict[str, list[reports.BudgetStatus]] = defaultdict(list)
    for status in reports.list_budgets(connection, now):
        if status.scope == "team":
            budgets[status.team].append(status)
    opened = overviews.list_open(connection)
    headings = [
        heading(team["name"], budget, spent.get(team["name"], {}), now, team["created_at"])
        for team in teams
        if team["archived_at"] is None
        for budget in (*budgets[team["name"]],) or (None,)
    ]
    by_team = {name: sum(one.reserved_micro_usd for one in opened if one.team == name) for name in {one.team for one in opened}}
    month = {team["name"]: heading(team["name"], None, spent.get(team["name"], {}), now, team["created_at"]) for team in teams}
    return {
        "headings": headings,
        "held": by_team,
        "in_review": {one.team: one for one in opened if one.state == "review"},
        "total": {
            "month": sum(one.counted_micro_usd for one in month.values()),
            "rate": sum(one.rate_micro_usd for one in month.values()),
            "forecast": sum(one.forecast_micro_usd or 0 for one in month.values()),
            "held": sum(one.reserved_micro_usd for one in opened if one.state != "review"),
            "open": sum(one.charges for one in opened if one.state != "review"),
            "review": sum(one.reserved_micro_usd for one in opened if one.state == "review"),
            "reviews": sum(one.charges for one in opened if one.state == "review"),
        },
    }


def chart_days(spent: Spent, now: datetime) -> dict[str, Any]:
    """Spend by day and team for the chart and its table, and who spends more or less than a week ago."""
    first = first_chart_day(now)
    spent = {team: {day: amount for day, amount in days.items() if day >= first} for team, days in spent.items()}
    largest = sorted(spent, key=lambda team: (-sum(spent[team].values()), team))
    named, others = largest[:CHART_TEAMS], largest[CHART_TEAMS:]
    days = [first + number * _DAY for number in range(CHART_DAYS)]
    rows = [
        (
            day,
            [spent[team].get(day, 0) for team in named] + ([sum(spent[team].get(day, 0) for team in others)] if others else []),
        )
        for day in days
    ]
    return {"columns": [*named, *(["all others"] if others else [])], "rows": rows, "movers": _movers(spent, now.date())}


def _movers(spent: Spent, today: date) -> list[tuple[str, int, int]]:
    """Teams with their spend of the last seven days and of the seven before, the largest difference first."""
    weeks = []
    for team, days in spent.items():
        last = sum(amount for day, amount in days.items() if today - _WEEK < day <= today)
        before = sum(amount for day, amount in days.items() if today - 2 * _WEEK < day <= today - _WEEK)
        weeks.append((team, last, before))
    moved = [week for week in weeks if week[1] != week[2]]
    return sorted(moved, key=lambda week: (-abs(week[1] - week[2]), week[0]))[:MOVERS]


def samples(metrics: Metrics, card: PriceCard, name: str) -> list[tuple[Mapping[str, str], float]]:
    """The labels and values of one metric, of all processes together."""
    page, _ = metrics.page("text/plain", card.version, None)
    text = "".join(f"{row}\n" for row in page.decode("utf-8").splitlines() if row.startswith((f"{name}{{", f"{name} ")))
    return [(sample.labels, sample.value) for family in text_string_to_metric_families(text) for sample in family.samples]


async def home(visit: Visit) -> Response:
    """The overview; for a member the page of the team, or the choice where there are several."""
    if not visit.sees_all:
        return visit.go("teams", visit.teams[0]) if len(visit.teams) == 1 else await visit.page("teams.html")
    return await _show(visit, 200, NOTHING_WRONG)


async def figures(visit: Visit) -> Response:
    """The live part alone."""
    return await visit.page("_overview.html", **await visit.ask(lambda connection: _read(connection, visit.now)))


async def spend_csv(visit: Visit) -> Response:
    """The chart's numbers."""
    spent = await visit.ask(lambda connection: read_spent(connection, first_chart_day(visit.now), visit.now))
    days = chart_days(spent, visit.now)
    columns = ["day", *(f"{name} micro_usd" for name in days["columns"])]
    return csv_response("spend", columns, [(day, *amounts) for day, amounts in days["rows"]])


async def add_team(visit: Visit) -> Response:
    """Make a team."""
    try:
        name = line(visit.form, "name", longest=64)
        await visit.change(lambda connection: accounts.add_team(connection, name, now=visit.now, actor=visit.actor), "name")
    except FieldError as error:
        return await _show(visit, 422, Wrong("team", visit.form, {error.field: error.message}))
    return visit.go("teams", name, said="team_added")


def _read(connection: Connection, now: datetime) -> dict[str, Any]:
    """Everything on the page that changes by itself."""
    teams = accounts.list_teams(connection)
    spent = read_spent(connection, min(first_live_day(now), first_chart_day(now)), now)
    return {
        "figures": read_figures(connection, teams, spent, now),
        "days": chart_days(spent, now),
        "refusals": overviews.list_refusals(connection, now.date() - _WEEK + _DAY)[:REFUSALS],
        "refusals_max": REFUSALS,
        "archived": [team for team in teams if team["archived_at"] is not None],
    }


async def _show(visit: Visit, status: int, wrong: Wrong) -> Response:
    found = await visit.ask(lambda connection: _read(connection, visit.now))
    return await visit.page("overview.html", status, **found, wrong=wrong)
