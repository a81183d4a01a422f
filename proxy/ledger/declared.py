"""Declared state: teams, budgets and limits as an operator wrote them down, and what has to change until the books agree.

Reading the declaration and planning are pure. What was spent is in no declaration, and no change touches it.
"""

from __future__ import annotations

import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any, Literal

from sqlalchemy import Connection, select

from proxy.ledger import accounts
from proxy.ledger.accounts import AccountError
from proxy.ledger.books import lock_teams
from proxy.ledger.schema import budgets, keys, limits, teams
from proxy.money import parse_usd
from proxy.periods import PERIODS, Period

Action = Literal["team.add", "team.archive", "budget.set", "budget.remove", "limit.set", "limit.remove"]

# A team, and one of its keys or None for the team itself.
Scope = tuple[str, str | None]

# Where something stands in a declaration: the names of the tables and the entry.
Place = tuple[str, ...]


class DeclarationError(ValueError):
    """A declaration that can't be read, or that can't come true. ``place`` is the entry at fault."""

    def __init__(self, message: str, place: Place = ()) -> None:
        super().__init__(message)
        self.place = place


class ImpossibleError(DeclarationError):
    """What was declared can be read, and these books can't come to it."""


@dataclass(frozen=True, slots=True)
class Budget:
    """What may be spent in a period."""

    limit_micro_usd: int
    soft: bool


@dataclass(frozen=True, slots=True)
class Limit:
    """Requests in any 60 seconds, and at a time; ``None`` is any number."""

    rpm: int | None
    concurrency: int | None


@dataclass(frozen=True, slots=True)
class Terms:
    """The budgets and the limit of a team or a key."""

    budgets: Mapping[Period, Budget]
    limit: Limit | None = None


NO_TERMS = Terms({})


@dataclass(frozen=True, slots=True)
class State:
    """The terms that the books have now. ``archived`` has every team by name, ``team_of`` every key's team, ``successors`` the
    key that was made in a rotated one's place."""

    archived: Mapping[str, bool]
    terms: Mapping[Scope, Terms]
    team_of: Mapping[str, str]
    successors: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class Change:
    """One step. ``before`` and ``after`` are ``None`` where there is nothing, as for teams."""

    action: Action
    team: str
    key_id: str | None = None
    period: Period | None = None
    before: Budget | Limit | None = None
    after: Budget | Limit | None = None

    @property
    def place(self) -> Place:
        """Where a declaration says it."""
        scope = ("teams", self.team) if self.key_id is None else ("teams", self.team, "keys", self.key_id)
        if self.action.startswith("budget."):
            return (*scope, "budgets", str(self.period))
        return (*scope, "limit") if self.action.startswith("limit.") else scope


# Reading a declaration


def parse(text: str) -> dict[Scope, Terms]:
    """The declared terms by scope, with ``(team, None)`` for every team that is named. Raises :class:`DeclarationError`."""
    try:
        data = tomllib.loads(text)
    except RecursionError:
        raise DeclarationError("this is nested too deeply: a declaration has a few levels") from None
    except ValueError as error:  # A number of thousands of digits is no error of TOML's own.
        raise DeclarationError(f"this is not TOML: {error}") from None
    _only(data, ("teams",), ())
    named = _table(data, "teams", ())
    if named is None:
        raise DeclarationError("it declares no teams: begin with a table such as [teams.design]")
    return dict(scoped for team in named for scoped in _team(named, team))


def line_of(text: str, place: Place) -> int | None:
    """The line of TOML on which an entry starts, counted from 1; ``None`` where it is not in there."""
    lines = text.split("\n")
    low, high = 0, len(lines)
    if not place or not _holds(lines, place):
        return None
    # Whether an entry is there stays so from its line on, which makes it a matter of some ten attempts.
    while low + 1 < high:
        middle = (low + high) // 2
        if _holds(lines[:middle], place):
            high = middle
        else:
            low = middle
    return high


def _holds(lines: Sequence[str], place: Place) -> bool:
    """Whether the entry is in the longest beginning of these lines that is whole TOML."""
    for count in range(len(lines), -1, -1):
        try:
            found: Any = tomllib.loads("\n".join([*lines[:count], ""]))
        except tomllib.TOMLDecodeError:
            continue
        for name in place:
            if not isinstance(found, dict) or name not in found:
                return False
            found = found[name]
        return True
    return False


def _team(named: Mapping[str, Any], team: str) -> Iterator[tuple[Scope, Terms]]:
    place = ("teams", team)
    table = _table(named, team, ("teams",))
    assert table is not None
    _only(table, ("budgets", "limit", "keys"), place)
    yield (team, None), _terms(table, place)
    its_keys = _table(table, "keys", place) or {}
    for key_id in its_keys:
        inner = _table(its_keys, key_id, (*place, "keys"))
        assert inner is not None
        _only(inner, ("budgets", "limit"), (*place, "keys", key_id))
        yield (team, key_id), _terms(inner, (*place, "keys", key_id))


def _terms(table: Mapping[str, Any], place: Place) -> Terms:
    declared = _table(table, "budgets", place) or {}
    _only(declared, PERIODS, (*place, "budgets"))
    limit = _table(table, "limit", place)
    return Terms(
        {period: _budget(declared[period], (*place, "budgets", period)) for period in PERIODS if period in declared},
        None if limit is None else _limit(limit, (*place, "limit")),
    )


def _budget(value: Any, place: Place) -> Budget:
    soft: Any = False
    if isinstance(value, dict):
        _only(value, ("usd", "soft"), place)
        value, soft = value.get("usd"), value.get("soft", False)
    if not isinstance(value, str):
        raise DeclarationError('write the amount as a string of USD, such as "60" or { usd = "60", soft = true }', place)
    if not isinstance(soft, bool):
        raise DeclarationError("'soft' is true or false", (*place, "soft"))
    try:
        return Budget(parse_usd(value), soft)
    except ValueError as error:
        raise DeclarationError(str(error), place) from None


def _limit(table: Mapping[str, Any], place: Place) -> Limit:
    _only(table, ("rpm", "concurrency"), place)
    if not table:
        raise DeclarationError("say what to limit: 'rpm', 'concurrency' or both", place)
    for name, value in table.items():
        if type(value) is not int or not 0 <= value <= accounts.LIMIT_MAX:
            raise DeclarationError(f"'{name}' is a whole number from 0 to {accounts.LIMIT_MAX}", (*place, name))
    return Limit(table.get("rpm"), table.get("concurrency"))


def _table(table: Mapping[str, Any], name: str, place: Place) -> Mapping[str, Any] | None:
    found = table.get(name)
    if found is not None and not isinstance(found, dict):
        raise DeclarationError(f"'{name}' is a table, as in [{'.'.join((*place, name))}]", (*place, name))
    return found


def _only(table: Mapping[str, Any], known: Sequence[str], place: Place) -> None:
    for name in table:
        if name not in known:
            raise DeclarationError(f"there is no {name!r} here: it takes {', '.join(known)}", (*place, name))


# Planning


def plan(declared: Mapping[Scope, Terms], state: State, *, prune: bool) -> list[Change]:
    """The steps from the books to the declaration, in order; none where they agree.

    Without ``prune`` nothing is taken away. With it budgets and limits that are not declared are removed, and teams that are
    not declared are archived. What is declared of a key holds for those that were made in its place too: a rotation is no way
    out of it. Raises :class:`ImpossibleError`.
    """
    for team, key_id in declared:
        _check(team, key_id, state)
    wanted = _passed_on(declared, state)
    names = list(dict.fromkeys(team for team, _ in declared))
    if prune:
        wanted = {**{scope: NO_TERMS for scope in state.terms if scope[0] in names}, **wanted}
    changes = [Change("team.add", team) for team in names if team not in state.archived]
    for scope in sorted(wanted, key=lambda scope: (names.index(scope[0]), scope[1] or "")):
        changes += _steps(scope, wanted[scope], state.terms.get(scope, NO_TERMS), prune=prune)
    if prune:
        left = (team for team, archived in state.archived.items() if team not in names and not archived)
        changes += [Change("team.archive", team) for team in sorted(left)]
    return changes


def _check(team: str, key_id: str | None, state: State) -> None:
    if state.archived.get(team):
        raise ImpossibleError(f"team {team!r} is archived, and does not come back: take it out", ("teams", team))
    if key_id is not None and state.team_of.get(key_id) != team:
        raise ImpossibleError(
            f"team {team!r} has no key {key_id}; 'beanmeter key list' shows the ids", ("teams", team, "keys", key_id)
        )


def _passed_on(declared: Mapping[Scope, Terms], state: State) -> dict[Scope, Terms]:
    wanted = dict(declared)
    for (team, key_id), terms in declared.items():
        while key_id is not None and (key_id := state.successors.get(key_id)) and (team, key_id) not in declared:
            wanted[team, key_id] = terms
    return wanted


def _steps(scope: Scope, wanted: Terms, there: Terms, *, prune: bool) -> Iterator[Change]:
    team, key_id = scope
    for period in PERIODS:
        before, after = there.budgets.get(period), wanted.budgets.get(period)
        if after is not None and after != before:
            yield Change("budget.set", team, key_id, period, before, after)
        elif after is None and before is not None and prune:
            yield Change("budget.remove", team, key_id, period, before)
    limit = wanted.limit
    if limit is not None and there.limit is not None and not prune:
        # One of the two that is not declared was set by somebody, and stays.
        rpm = there.limit.rpm if limit.rpm is None else limit.rpm
        limit = Limit(rpm, there.limit.concurrency if limit.concurrency is None else limit.concurrency)
    if limit is not None and limit != there.limit:
        yield Change("limit.set", team, key_id, None, there.limit, limit)
    elif limit is None and there.limit is not None and prune:
        yield Change("limit.remove", team, key_id, None, there.limit)


# The books


def apply(connection: Connection, declared: Mapping[Scope, Terms], *, prune: bool, now: datetime, actor: str) -> list[Change]:
    """Bring the books to what is declared, inside the caller's transaction; the changes. Raises :class:`ImpossibleError`."""
    # Nobody else changes a team between the look and the change.
    lock_teams(connection, connection.scalars(select(teams.c.id)))
    changes = plan(declared, read_state(connection), prune=prune)
    for change in changes:
        try:
            _carry_out(connection, change, now, actor)
        except AccountError as error:
            raise ImpossibleError(str(error), change.place) from None
    return changes


def read_state(connection: Connection) -> State:
    """The terms that the books have now."""
    budgets_of: dict[Scope, dict[Period, Budget]] = {}
    limits_of: dict[Scope, Limit] = {}
    names = {row.id: row.name for row in connection.execute(select(teams.c.id, teams.c.name))}
    for row in connection.execute(select(budgets)):
        budgets_of.setdefault((names[row.team_id], row.key_id), {})[row.period] = Budget(row.limit_micro_usd, row.soft)
    for row in connection.execute(select(limits)):
        limits_of[names[row.team_id], row.key_id] = Limit(row.rpm, row.concurrency)
    found = connection.execute(select(keys.c.id, keys.c.team_id, keys.c.successor_id)).all()
    return State(
        archived={team["name"]: team["archived_at"] is not None for team in accounts.list_teams(connection)},
        terms={scope: Terms(budgets_of.get(scope, {}), limits_of.get(scope)) for scope in budgets_of.keys() | limits_of.keys()},
        team_of={row.id: names[row.team_id] for row in found},
        successors={row.id: row.successor_id for row in found if row.successor_id is not None},
    )


def replace_limit(connection: Connection, team: str, key_id: str | None, limit: Limit, *, now: datetime, actor: str) -> None:
    """Limit a team or a key to exactly this: what is ``None`` is not limited, whatever it was before."""
    scope_limits = [row for row in accounts.list_limits(connection, team) if row["key_id"] == key_id]
    lost = any(row[name] is not None and value is None for row in scope_limits for name, value in asdict(limit).items())
    if lost:
        accounts.remove_limit(connection, team, key_id, now=now, actor=actor)
    accounts.set_limit(connection, team, key_id, rpm=limit.rpm, concurrency=limit.concurrency, now=now, actor=actor)


def _carry_out(connection: Connection, change: Change, now: datetime, actor: str) -> None:
    team, key_id, period, after = change.team, change.key_id, change.period, change.after
    if change.action == "team.add":
        accounts.add_team(connection, team, now=now, actor=actor)
    elif change.action == "team.archive":
        accounts.archive_team(connection, team, now=now, actor=actor)
    elif change.action == "limit.remove":
        accounts.remove_limit(connection, team, key_id, now=now, actor=actor)
    elif isinstance(after, Limit):
        replace_limit(connection, team, key_id, after, now=now, actor=actor)
    elif isinstance(after, Budget):
        assert period is not None
        accounts.set_budget(connection, team, key_id, period, after.limit_micro_usd, soft=after.soft, now=now, actor=actor)
    else:
        assert period is not None
        accounts.remove_budget(connection, team, key_id, period, now=now, actor=actor)
