"""A team's page: its budgets and where they are heading, what was spent on what, its keys, and the forms that change them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import date, datetime, timedelta
from typing import Any, cast

from sqlalchemy import Connection
from starlette.responses import Response

from proxy.ledger import accounts, overviews, reports
from proxy.ledger.pages import team_of_key
from proxy.pages import fields, forecast
from proxy.pages.burndown import BurnDown, burn_down, first_day, images_left, tightest
from proxy.pages.desk import NOTHING_WRONG, Missing, Visit, Wrong
from proxy.pages.export import csv_response
from proxy.pages.fields import FieldError
from proxy.pages.overview import Heading, heading
from proxy.periods import PERIODS, Period

# What spend may be split by, and how far back. The first of each is shown until another is chosen.
SPLITS = ("size", "quality", "operation", "key", "day")
SPANS = (30, 7, 90)

# What a key that is replaced goes on working for, unless the form says otherwise.
OVERLAP = timedelta(hours=24)

_DAY = timedelta(days=1)

_CAPPED = "This key has a budget of its own, which a new key would begin anew: ask an operator to rotate it."


async def show(visit: Visit) -> Response:
    """The whole page."""
    return await _show(visit, 200, NOTHING_WRONG)


async def figures(visit: Visit) -> Response:
    """The live part alone."""
    return await visit.page("_team.html", **await _read(visit))


async def burn_down_csv(visit: Visit) -> Response:
    """The burn-down's numbers."""

    def read(connection: Connection) -> BurnDown:
        team = _team(connection, visit)
        return _burn_down(visit, team, _budgets(connection, visit), _spent(connection, visit))

    burned = await visit.ask(read)
    kind = "spent" if burned.budget is None else "left"
    columns = ["day", f"{kind}_micro_usd", "forecast_micro_usd"]
    rows = [(point.day, point.known_micro_usd, point.forecast_micro_usd) for point in burned.points]
    return csv_response("burn-down", columns, rows)


async def split_csv(visit: Visit) -> Response:
    """The split's numbers."""
    by, span = _split_asked(visit)

    def read(connection: Connection) -> list[dict[str, Any]]:
        _team(connection, visit)
        return _split(connection, visit, by, span)

    columns = [by, *overviews.SUMS]
    return csv_response(f"spend-by-{by}", columns, [[row[name] for name in columns] for row in await visit.ask(read)])


# Changes


async def archive(visit: Visit) -> Response:
    """Close the team, once its name was typed in."""
    name = visit.named("team")
    try:
        if visit.form.get("name", "") != name:
            raise FieldError("name", f"Type {name} to archive it.")
        await visit.change(lambda connection: _archive(connection, visit), "name")
    except FieldError as error:
        return await _show(visit, 422, Wrong("archive", visit.form, {error.field: error.message}))
    return visit.go("teams", name, said="team_archived")


async def add_key(visit: Visit) -> Response:
    """Make a key, and show it this once."""
    try:
        name = fields.line(visit.form, "name", longest=64, required=False)
        lifetime = fields.duration(visit.form, "expires")
        if lifetime is not None and not lifetime:
            raise FieldError("expires", "Write a time longer than nothing, such as 90d.")

        def write(connection: Connection) -> accounts.NewKey:
            _team(connection, visit)
            team = visit.named("team")
            return accounts.add_key(connection, team, name=name, lifetime=lifetime, now=visit.now, actor=visit.actor)

        made = await visit.change(write, "name")
    except FieldError as error:
        return await _show(visit, 422, Wrong("key", visit.form, {error.field: error.message}))
    return await visit.page("key_made.html", 201, made=made, team=visit.named("team"), former=None)


async def rotate_key(visit: Visit) -> Response:
    """Make a key in the place of another, and show it this once."""
    key_id = _own_key(visit)
    try:
        overlap = fields.duration(visit.form, "overlap")

        def write(connection: Connection) -> accounts.NewKey:
            _check_key(connection, visit, key_id)
            if not visit.is_admin and _capped(connection, visit, key_id):
                raise FieldError("overlap", _CAPPED)
            ends = OVERLAP if overlap is None else overlap
            return accounts.rotate_key(connection, key_id, overlap=ends, now=visit.now, actor=visit.actor)

        made = await visit.change(write, "overlap")
    except FieldError as error:
        return await _show(visit, 422, Wrong(key_id, visit.form, {error.field: error.message}))
    return await visit.page("key_made.html", 201, made=made, team=visit.named("team"), former=key_id)


async def revoke_key(visit: Visit) -> Response:
    """Stop a key from working."""
    key_id = _own_key(visit)

    def write(connection: Connection) -> None:
        _check_key(connection, visit, key_id)
        accounts.revoke_key(connection, key_id, now=visit.now, actor=visit.actor)

    await visit.change(write, "key_id")
    return visit.go("teams", visit.named("team"), said="key_revoked")


async def set_budget(visit: Visit) -> Response:
    """Make or replace a budget of the team or of one of its keys."""
    form, team = visit.form, visit.named("team")
    try:
        key_id = _scope(form)
        period = cast("Period", fields.choice(form, "period", *PERIODS))
        limit = fields.usd(form, "usd")
        soft = "soft" in form

        def write(connection: Connection) -> None:
            _team(connection, visit)
            accounts.set_budget(connection, team, key_id, period, limit, soft=soft, now=visit.now, actor=visit.actor)

        await visit.change(write, "key_id")
    except FieldError as error:
        return await _show(visit, 422, Wrong("budget", form, {error.field: error.message}))
    return visit.go("teams", team, said="budget_set")


async def remove_budget(visit: Visit) -> Response:
    """Take a budget away."""
    form, team = visit.form, visit.named("team")
    try:
        key_id = _scope(form)
        period = cast("Period", fields.choice(form, "period", *PERIODS))

        def write(connection: Connection) -> None:
            _team(connection, visit)
            accounts.remove_budget(connection, team, key_id, period, now=visit.now, actor=visit.actor)

        await visit.change(write, "key_id")
    except FieldError as error:
        return await _show(visit, 422, Wrong("budget", {}, {error.field: error.message}))
    return visit.go("teams", team, said="budget_removed")


async def set_limit(visit: Visit) -> Response:
    """Limit how fast, and how much at once, the team or one of its keys may ask."""
    form, team = visit.form, visit.named("team")
    try:
        key_id = _scope(form)
        rpm = fields.whole(form, "rpm", most=accounts.LIMIT_MAX)
        concurrency = fields.whole(form, "concurrency", most=accounts.LIMIT_MAX)
        if rpm is None and concurrency is None:
            raise FieldError("rpm", "Fill in at least one of the two limits.")

        def write(connection: Connection) -> None:
            _team(connection, visit)
            accounts.set_limit(
                connection,
                team,
                key_id,
                rpm=rpm,
                concurrency=concurrency,
                now=visit.now,
                actor=visit.actor,
            )

        await visit.change(write, "key_id")
    except FieldError as error:
        return await _show(visit, 422, Wrong("limit", form, {error.field: error.message}))
    return visit.go("teams", team, said="limit_set")


async def remove_limit(visit: Visit) -> Response:
    """Take the limits of the team or of one of its keys away."""
    form, team = visit.form, visit.named("team")
    try:
        key_id = _scope(form)

        def write(connection: Connection) -> None:
            _team(connection, visit)
            accounts.remove_limit(connection, team, key_id, now=visit.now, actor=visit.actor)

        await visit.change(write, "key_id")
    except FieldError as error:
        return await _show(visit, 422, Wrong("limit", {}, {error.field: error.message}))
    return visit.go("teams", team, said="limit_removed")


def _scope(form: Mapping[str, str]) -> str | None:
    """The key that a budget or limit is for; ``None`` for the whole team."""
    return fields.line(form, "key_id", longest=64, required=False) or None


# Reading


def _team(connection: Connection, visit: Visit) -> dict[str, Any]:
    """The team of the path with its keys. Raises :class:`Missing`."""
    try:
        return accounts.show_team(connection, visit.named("team"))
    except accounts.AccountError:
        raise Missing from None


def _archive(connection: Connection, visit: Visit) -> None:
    _team(connection, visit)
    accounts.archive_team(connection, visit.named("team"), now=visit.now, actor=visit.actor)


def _own_key(visit: Visit) -> str:
    """The key of the path. Who is signed in with a key may change that one alone: others can have budgets that it has not."""
    key_id = visit.named("key_id")
    if not visit.is_admin and (visit.session is None or visit.session.key_id != key_id):
        raise Missing
    return key_id


def _check_key(connection: Connection, visit: Visit, key_id: str) -> None:
    if team_of_key(connection, key_id) != visit.named("team"):
        raise Missing


def _capped(connection: Connection, visit: Visit, key_id: str) -> bool:
    """Whether the key has a budget of its own that refuses."""
    return any(one.key_id == key_id and not one.soft for one in _budgets(connection, visit))


def _budgets(connection: Connection, visit: Visit) -> list[reports.BudgetStatus]:
    return reports.list_budgets(connection, visit.now, team=visit.named("team"))


def _spent(connection: Connection, visit: Visit) -> dict[date, int]:
    """What counts by day, as far back as any burn-down and the rate look."""
    now = visit.now
    first = min(first_day("month", now), first_day("total", now), first_day("week", now), forecast.window_start(now))
    rows = overviews.sum_up(connection, ("day",), first, now.date() + _DAY, team=visit.named("team"))
    return {row["day"]: row["settled_micro_usd"] + row["reserved_micro_usd"] for row in rows}


def _headings(
    team: dict[str, Any], budgets: Sequence[reports.BudgetStatus], spent: dict[date, int], now: datetime
) -> list[Heading]:
    own: list[reports.BudgetStatus | None] = [one for one in budgets if one.scope == "team"]
    return [heading(team["name"], one, spent, now, team["created_at"]) for one in own or [None]]


def _burn_down(visit: Visit, team: dict[str, Any], budgets: Sequence[reports.BudgetStatus], spent: dict[date, int]) -> BurnDown:
    """That of the budget asked for, else of the longest; sums are by day, so a day's budget has none."""
    own = _burning(budgets)
    chosen = next((one for one in own if one.period == visit.asked().get("budget")), own[0] if own else None)
    return burn_down(chosen, spent, forecast.daily_rate(spent, visit.now, team["created_at"]), visit.now)


def _burning(budgets: Sequence[reports.BudgetStatus]) -> list[reports.BudgetStatus]:
    order: tuple[Period, ...] = ("month", "week", "total")
    own = [one for one in budgets if one.scope == "team" and one.period in order]
    return sorted(own, key=lambda one: order.index(one.period))


def _split_asked(visit: Visit) -> tuple[str, int]:
    asked = visit.asked()
    by, days = asked.get("by"), asked.get("days")
    return by if by in SPLITS else SPLITS[0], next((span for span in SPANS if str(span) == days), SPANS[0])


def _split(connection: Connection, visit: Visit, by: str, span: int) -> list[dict[str, Any]]:
    first = visit.now.date() - (span - 1) * _DAY
    rows = overviews.sum_up(connection, (by,), first, visit.now.date() + _DAY, team=visit.named("team"))
    return rows if by == "day" else sorted(rows, key=lambda row: -row["settled_micro_usd"])


async def _read(visit: Visit) -> dict[str, Any]:
    """Everything on the page that changes by itself, and what that is made of."""
    by, span = _split_asked(visit)

    def read(connection: Connection) -> dict[str, Any]:
        team = _team(connection, visit)
        budgets, spent = _budgets(connection, visit), _spent(connection, visit)
        return {
            "team": team,
            "budgets": budgets,
            "headings": _headings(team, budgets, spent, visit.now),
            "burned": _burn_down(visit, team, budgets, spent),
            "burning": _burning(budgets),
            "split": _split(connection, visit, by, span),
            "opened": overviews.list_open(connection, team=visit.named("team")),
        }

    found = await visit.ask(read)
    # For somebody with a key, that key's own budgets count too.
    key_id = None if visit.session is None else visit.session.key_id
    tight = tightest([one for one in found["budgets"] if one.scope == "team" or one.key_id == key_id])
    models = visit.desk.card.models
    left = {name: images_left(prices, 0 if tight is None else tight.remaining_micro_usd) for name, prices in models.items()}
    chosen = found["burned"].budget
    return {
        **found,
        "names": {key["id"]: key["name"] or f"…{key['last_four']}" for key in found["team"]["keys"]},
        "tight": tight,
        "left": left,
        "models": models,
        "by": by,
        "span": span,
        "splits": SPLITS,
        "spans": sorted(SPANS),
        # What the live part has to be asked for to be the same again.
        "asked": {"by": by, "days": span} | ({} if chosen is None else {"budget": chosen.period}),
    }


async def _show(visit: Visit, status: int, wrong: Wrong) -> Response:
    found = await _read(visit)
    limits = await visit.ask(lambda connection: accounts.list_limits(connection, visit.named("team")))
    valid = {
        key["id"]
        for key in found["team"]["keys"]
        if key["revoked_at"] is None and (key["expires_at"] is None or key["expires_at"] > visit.now)
    }
    return await visit.page("team.html", status, **found, limits=limits, valid=valid, periods=PERIODS, wrong=wrong)
