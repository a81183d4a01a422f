"""Everything that the admin API can do, once: its path, what it takes, what it answers, and the ledger's function behind it.
Requests are served and the API is described from this table alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal, cast

from pydantic import BaseModel
from sqlalchemy import Connection

from proxy.admin import asks
from proxy.admin.problems import Problem, blaming
from proxy.inputs import InputError, cursor_of, read_cursor
from proxy.ledger import accounts, declared, pages, reports, reviews
from proxy.ledger.pages import Page, Turn
from proxy.periods import PERIODS, Period, parse_duration, parse_when
from proxy.prices import PriceCard
from proxy.usage import list_prices

ACTOR = "admin api"

Method = Literal["GET", "POST", "PUT", "DELETE"]
Row = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Asked:
    """A request as it was read: the parts of its path, and its query and body checked by the operation's models. With it go
    the time and the prices in force."""

    path: Mapping[str, str]
    query: Any
    body: Any
    now: datetime
    card: PriceCard
    aliases: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Operation:
    """One thing to do, in one transaction. ``run`` answers what is sent as JSON, and raises :class:`Problem` or
    ``InputError``. ``answer`` names a shape of ``answers``."""

    name: str
    method: Method
    path: str
    summary: str
    run: Callable[[Connection, Asked], Row]
    answer: str
    query: type[BaseModel] = asks.Nothing
    body: type[BaseModel] | None = None
    status: int = 200

    @property
    def writes(self) -> bool:
        """Whether it changes something."""
        return self.method != "GET"


# Teams


def _list_teams(connection: Connection, asked: Asked) -> Row:
    return _listed("teams", pages.list_teams(connection, _turn("teams", asked)))


def _add_team(connection: Connection, asked: Asked) -> Row:
    name = asked.body.name
    if any(team["name"] == name for team in accounts.list_teams(connection)):
        raise Problem(409, f"A team named {name!r} exists already.", "name")
    with blaming(422, "name"):
        return accounts.add_team(connection, name, now=asked.now, actor=ACTOR)


def _show_team(connection: Connection, asked: Asked) -> Row:
    team = _team(connection, asked.path["team"])
    budgets = reports.list_budgets(connection, asked.now, team=team["name"])
    return team | {"budgets": [pages.budget_row(status) for status in budgets]}


def _archive_team(connection: Connection, asked: Asked) -> Row:
    team = _team(connection, asked.path["team"])
    return accounts.archive_team(connection, team["name"], now=asked.now, actor=ACTOR)


# Keys


def _list_keys(connection: Connection, asked: Asked) -> Row:
    team = _some_team(connection, asked)
    return _listed("keys", pages.list_keys(connection, _turn("keys", asked, (str,)), team=team))


def _add_key(connection: Connection, asked: Asked) -> Row:
    team, body = _team(connection, asked.path["team"]), asked.body
    if team["archived_at"] is not None:
        raise Problem(409, f"Team {team['name']!r} is archived: a key of it would not work.", "team")
    lifetime = None if body.expires is None else parse_duration(body.expires)
    with blaming(422, "name"):
        return asdict(accounts.add_key(connection, team["name"], name=body.name, lifetime=lifetime, now=asked.now, actor=ACTOR))


def _revoke_key(connection: Connection, asked: Asked) -> Row:
    _, key_id = _scope_of_key(connection, asked)
    return accounts.revoke_key(connection, key_id, now=asked.now, actor=ACTOR)


def _rotate_key(connection: Connection, asked: Asked) -> Row:
    _, key_id = _scope_of_key(connection, asked)
    overlap = parse_duration(asked.body.overlap)
    with blaming(409, "key_id"):
        return asdict(accounts.rotate_key(connection, key_id, overlap=overlap, now=asked.now, actor=ACTOR))


# Budgets and limits, of teams and of keys

Scope = tuple[str, str | None]
FindScope = Callable[[Connection, Asked], Scope]


def _scope_of_team(connection: Connection, asked: Asked) -> Scope:
    return _team(connection, asked.path["team"])["name"], None


def _scope_of_key(connection: Connection, asked: Asked) -> tuple[str, str]:
    key_id = asked.path["key_id"]
    team = pages.team_of_key(connection, key_id) if key_id.isprintable() else None
    if team is None:
        raise Problem(404, "There is no key with this id.", "key_id")
    return team, key_id


def _list_budgets(connection: Connection, asked: Asked) -> Row:
    team = _some_team(connection, asked)
    return _listed("budgets", pages.list_budgets(connection, _turn("budgets", asked), asked.now, team=team))


def _set_budget(scope: FindScope) -> Callable[[Connection, Asked], Row]:
    def run(connection: Connection, asked: Asked) -> Row:
        (team, key_id), period, body = scope(connection, asked), _period(asked), asked.body
        accounts.set_budget(connection, team, key_id, period, body.limit_micro_usd, soft=body.soft, now=asked.now, actor=ACTOR)
        row = _budget(connection, team, key_id, period, asked.now)
        assert row is not None
        return row

    return run


def _remove_budget(scope: FindScope) -> Callable[[Connection, Asked], Row]:
    def run(connection: Connection, asked: Asked) -> Row:
        (team, key_id), period = scope(connection, asked), _period(asked)
        row = _budget(connection, team, key_id, period, asked.now)
        if row is None:
            raise Problem(404, f"There is no budget per {period} here.", "period")
        with blaming(404, "period"):
            accounts.remove_budget(connection, team, key_id, period, now=asked.now, actor=ACTOR)
        return row

    return run


def _list_limits(connection: Connection, asked: Asked) -> Row:
    team = _some_team(connection, asked)
    return _listed("limits", pages.list_limits(connection, _turn("limits", asked), team=team))


def _set_limit(scope: FindScope) -> Callable[[Connection, Asked], Row]:
    def run(connection: Connection, asked: Asked) -> Row:
        (team, key_id), body = scope(connection, asked), asked.body
        if body.rpm is None and body.concurrency is None:
            raise Problem(422, "Say what to limit: 'rpm', 'concurrency' or both. DELETE removes a limit.", "rpm")
        limit = declared.Limit(body.rpm, body.concurrency)
        declared.replace_limit(connection, team, key_id, limit, now=asked.now, actor=ACTOR)
        return {"team": team, "key_id": key_id, **asdict(limit)}

    return run


def _remove_limit(scope: FindScope) -> Callable[[Connection, Asked], Row]:
    def run(connection: Connection, asked: Asked) -> Row:
        team, key_id = scope(connection, asked)
        with blaming(404, "team" if key_id is None else "key_id"):
            accounts.remove_limit(connection, team, key_id, now=asked.now, actor=ACTOR)
        return {"team": team, "key_id": key_id, "rpm": None, "concurrency": None}

    return run


# Charges, reviews, sums, audit


def _list_charges(connection: Connection, asked: Asked) -> Row:
    query = asked.query
    page = pages.list_charges(
        connection,
        _turn("charges", asked, (int, str)),
        team=_some_team(connection, asked),
        key_id=query.key_id,
        state=query.state,
        newest_first=query.order == "newest",
        **_span(asked),
    )
    return _listed("charges", page)


def _list_reviews(connection: Connection, asked: Asked) -> Row:
    team = _some_team(connection, asked)
    return _listed("reviews", pages.list_charges(connection, _turn("reviews", asked, (int, str)), team=team, state="review"))


def _settle(connection: Connection, asked: Asked) -> Row:
    charge_id = _charge(connection, asked)
    with blaming(409, "charge_id"):
        return reviews.settle(connection, charge_id, asked.body.settled_micro_usd, now=asked.now, actor=ACTOR)


def _release(connection: Connection, asked: Asked) -> Row:
    charge_id = _charge(connection, asked)
    with blaming(409, "charge_id"):
        return reviews.release(connection, charge_id, asked.body.reason, now=asked.now, actor=ACTOR)


def _sum_up(connection: Connection, asked: Asked) -> Row:
    by = tuple(dict.fromkeys(asked.query.by.split(",")))
    turn = _turn(f"spend by {','.join(by)}", asked, (str,) * len(by))

    def place(row: Row) -> pages.Place:
        return tuple(str(row[name]) for name in by)

    rows = reports.spend(connection, by, **_span(asked))
    left = rows if turn.after is None else [row for row in rows if place(row) > cast("tuple[str, ...]", turn.after)]
    shown = left[: turn.rows]
    page = Page(shown, place(shown[-1]) if len(left) > len(shown) else None)
    return _listed(f"spend by {','.join(by)}", page)


def _list_prices(_connection: Connection, asked: Asked) -> Row:
    return list_prices(asked.card, asked.aliases)


def _list_audit(connection: Connection, asked: Asked) -> Row:
    newest_first = asked.query.order == "newest"
    return _listed("audit", pages.list_audit(connection, _turn("audit", asked), newest_first=newest_first, **_span(asked)))


# What a request says, looked up


def _team(connection: Connection, name: str) -> Row:
    """A team with its keys; a problem where there is none."""
    if not name.isprintable():
        raise Problem(404, "There is no team with this name.", "team")
    with blaming(404, "team"):
        return accounts.show_team(connection, name)


def _some_team(connection: Connection, asked: Asked) -> str | None:
    """The team that a listing is of; a mistyped name is a problem, not an empty list."""
    name: str | None = asked.query.team
    return None if name is None else cast("str", _team(connection, name)["name"])


def _charge(connection: Connection, asked: Asked) -> str:
    charge_id = asked.path["charge_id"]
    if not charge_id.isprintable() or not pages.has_charge(connection, charge_id):
        raise Problem(404, "There is no charge with this id.", "charge_id")
    return charge_id


def _period(asked: Asked) -> Period:
    period = asked.path["period"]
    if period not in PERIODS:
        raise Problem(404, f"A budget is per {', '.join(PERIODS)}.", "period")
    return period


def _budget(connection: Connection, team: str, key_id: str | None, period: Period, now: datetime) -> Row | None:
    found = reports.list_budgets(connection, now, team=team)
    return next((pages.budget_row(one) for one in found if (one.key_id, one.period) == (key_id, period)), None)


def _turn(listing: str, asked: Asked, kinds: Sequence[type] = (int,)) -> Turn:
    query: asks.PageQuery = asked.query
    return Turn(query.limit, None if query.cursor is None else read_cursor(listing, kinds, query.cursor, "cursor"))


def _span(asked: Asked) -> dict[str, datetime | None]:
    return {"since": _when(asked, "since", end=False), "until": _when(asked, "until", end=True)}


def _when(asked: Asked, field: str, *, end: bool) -> datetime | None:
    text = getattr(asked.query, field)
    try:
        return None if text is None else parse_when(text, asked.now, end=end)
    except ValueError as error:
        raise InputError(f"'{field}': {error}", field) from None


# Declared state


def _apply(connection: Connection, asked: Asked) -> Row:
    body = asked.body
    try:
        wanted = declared.parse(body.toml)
        changes = declared.apply(connection, wanted, prune=body.prune, now=asked.now, actor=ACTOR)
    except declared.DeclarationError as error:
        told = f"{'.'.join(error.place)}: {error}" if error.place else str(error)
        raise Problem(409 if isinstance(error, declared.ImpossibleError) else 422, told, "toml") from None
    if body.dry_run:
        # Made and taken back: a dry run fails where the real one would.
        connection.rollback()
    return {"dry_run": body.dry_run, "changes": [asdict(change) for change in changes]}


def _listed(listing: str, page: Page) -> Row:
    return {
        "data": page.rows,
        "has_more": page.last is not None,
        "next_cursor": None if page.last is None else cursor_of(listing, page.last),
    }


OPERATIONS = (
    Operation("list_teams", "GET", "/teams", "Teams, archived ones too", _list_teams, "Teams", asks.PageQuery),
    Operation("add_team", "POST", "/teams", "Make a team", _add_team, "Team", body=asks.NewTeam, status=201),
    Operation("show_team", "GET", "/teams/{team}", "A team with its keys and budgets", _show_team, "TeamWithAll"),
    Operation("archive_team", "POST", "/teams/{team}/archive", "Close a team: its keys stop working", _archive_team, "Team"),
    Operation("list_keys", "GET", "/keys", "Keys, without their secrets", _list_keys, "Keys", asks.TeamPageQuery),
    Operation(
        "add_key",
        "POST",
        "/teams/{team}/keys",
        "Make a key, which is shown this once",
        _add_key,
        "NewKey",
        body=asks.KeyToMake,
        status=201,
    ),
    Operation("revoke_key", "DELETE", "/keys/{key_id}", "Stop a key from working", _revoke_key, "Key"),
    Operation(
        "rotate_key",
        "POST",
        "/keys/{key_id}/rotate",
        "Make a key like this one, which goes on working for a while",
        _rotate_key,
        "NewKey",
        body=asks.Rotation,
        status=201,
    ),
    Operation(
        "list_budgets", "GET", "/budgets", "Budgets, and what counts against them", _list_budgets, "Budgets", asks.TeamPageQuery
    ),
    *(
        operation
        for of, scope, path in (("team", _scope_of_team, "/teams/{team}"), ("key", _scope_of_key, "/keys/{key_id}"))
        for operation in (
            Operation(
                f"set_{of}_budget",
                "PUT",
                f"{path}/budgets/{{period}}",
                f"Make or replace a budget of a {of}",
                _set_budget(scope),
                "Budget",
                body=asks.BudgetTerms,
            ),
            Operation(
                f"remove_{of}_budget",
                "DELETE",
                f"{path}/budgets/{{period}}",
                f"Remove a budget of a {of}; what was spent stays in the books",
                _remove_budget(scope),
                "Budget",
            ),
            Operation(
                f"set_{of}_limit",
                "PUT",
                f"{path}/limit",
                f"Make or replace the limit of a {of}",
                _set_limit(scope),
                "Limit",
                body=asks.LimitTerms,
            ),
            Operation(
                f"remove_{of}_limit", "DELETE", f"{path}/limit", f"Remove the limit of a {of}", _remove_limit(scope), "Limit"
            ),
        )
    ),
    Operation("list_limits", "GET", "/limits", "Limits", _list_limits, "Limits", asks.TeamPageQuery),
    Operation("list_charges", "GET", "/charges", "Charges in the order of time", _list_charges, "Charges", asks.ChargesQuery),
    Operation("list_reviews", "GET", "/reviews", "Charges in review", _list_reviews, "Charges", asks.TeamPageQuery),
    Operation(
        "settle_review",
        "POST",
        "/reviews/{charge_id}/settle",
        "Settle a charge in review at what the bill says",
        _settle,
        "Decided",
        body=asks.Settlement,
    ),
    Operation(
        "release_review",
        "POST",
        "/reviews/{charge_id}/release",
        "Release a charge in review: it cost nothing",
        _release,
        "Decided",
        body=asks.Release,
    ),
    Operation(
        "apply",
        "POST",
        "/apply",
        "Bring teams, budgets and limits to what a declaration says: all of it, or nothing",
        _apply,
        "Applied",
        body=asks.Declaration,
    ),
    Operation("sum_up", "GET", "/spend", "What was spent, summed up", _sum_up, "Spend", asks.SpendQuery),
    Operation("list_prices", "GET", "/prices", "The price card in force", _list_prices, "Prices"),
    Operation("list_audit", "GET", "/audit", "Who changed what", _list_audit, "Audit", asks.SpanPageQuery),
)
