"""Declared state: what a file says, what is planned from it, and what ``beanmeter apply`` makes of the books."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from proxy.cli import main
from proxy.ledger import accounts
from proxy.ledger.declared import (
    Budget,
    Change,
    DeclarationError,
    ImpossibleError,
    Limit,
    Scope,
    State,
    Terms,
    line_of,
    parse,
    plan,
)
from tests.ledger.ledgers import NOON, Ledger, reservation, settled

DESIGN = """\
[teams.design]
limit = { rpm = 60 }

[teams.design.budgets]
month = "60"
day = { usd = "5.5", soft = true }

[teams."red & co."]
"""


# Reading


def test_a_declaration_is_read() -> None:
    assert parse(DESIGN + '[teams."red & co.".keys.key_1]\nbudgets = { total = "1" }\nlimit.concurrency = 2\n') == {
        ("design", None): Terms({"month": Budget(60_000_000, False), "day": Budget(5_500_000, True)}, Limit(60, None)),
        ("red & co.", None): Terms({}),
        ("red & co.", "key_1"): Terms({"total": Budget(1_000_000, False)}, Limit(None, 2)),
    }


BAD = [
    ("[teams", None, "TOML"),
    ("", None, "no teams"),
    ("# nothing\n", None, "no teams"),
    ("teams = 5\n", 1, "table"),
    ("\n[team.design]\n", 2, "'team'"),
    ("[teams]\ndesign = 5\n", 2, "table"),
    ('[teams.design]\nbudget = "5"\n', 2, "budgets, limit, keys"),
    ('[teams.design.budgets]\nday = "5"\nyear = "5"\n', 3, "day, week, month, total"),
    ("[teams.design.budgets]\nday = 5\n", 2, "string"),
    ("[teams.design.budgets]\nday = 5.5\n", 2, "string"),
    ('[teams.design.budgets]\nday = "5.0000001"\n', 2, "six decimals"),
    ('[teams.design.budgets]\nday = "-5"\n', 2, "amount"),
    ("[teams.design.budgets]\nday = { soft = true }\n", 2, "string"),
    ('[teams.design.budgets]\nday = { usd = "5", soft = 1 }\n', 2, "true or false"),
    ('[teams.design.budgets]\nday = { usd = "5", hard = true }\n', 2, "usd, soft"),
    ('[teams.design.budgets.day]\nusd = "5"\n\nsoft = "no"\n', 4, "true or false"),
    ("[teams.design]\n\n[teams.design.limit]\nrpm = -1\n", 4, "whole number"),
    ("[teams.design]\n\n[teams.design.limit]\nrpm = true\n", 4, "whole number"),
    ("[teams.design]\n\n[teams.design.limit]\nrps = 1\n", 4, "rpm, concurrency"),
    ("[teams.design]\n\n[teams.design.limit]\n", 3, "what to limit"),
    ("[teams.design.keys.key_1]\nname = 'x'\n", 2, "budgets, limit"),
    ("[teams.design.keys]\nkey_1 = 'sk-bm-'\n", 2, "table"),
]


@pytest.mark.parametrize(("text", "line", "words"), BAD, ids=[repr(one[0][:40]) for one in BAD])
def test_what_is_wrong_is_told_with_its_line(text: str, line: int | None, words: str) -> None:
    with pytest.raises(DeclarationError, match=words) as told:
        parse(text)
    assert line_of(text, told.value.place) == line


def test_an_entry_is_found_where_it_starts() -> None:
    # A text of several lines looks like a table in the middle, and is none.
    text = '"""'.join(("[teams.a]\nnote = ", "\n[teams.b]\n", '\n[teams.b]\nlimit = {rpm = 1}\r\n[teams."c.d"]\n'))
    assert line_of(text, ("teams", "b")) == 5
    assert line_of(text, ("teams", "b", "limit", "rpm")) == 6
    assert line_of(text, ("teams", "c.d")) == 7
    assert line_of(text, ("teams", "e")) is None


# Planning

FIVE, SIX, SOFT = Budget(5, False), Budget(6, False), Budget(5, True)
RED: Scope = ("red", None)
KEY: Scope = ("red", "key_1")
NEXT: Scope = ("red", "key_2")


def state(terms: dict[Scope, Terms], *archived: str) -> State:
    names = {"red": False, "blue": False, **dict.fromkeys(archived, True)}
    return State(names, terms, {"key_1": "red", "key_2": "red", "key_3": "blue"}, {"key_1": "key_2"})


PLANS: list[tuple[str, dict[Scope, Terms], dict[Scope, Terms], list[Change], list[Change]]] = [
    # What is declared, what there is, the steps without pruning, and those that pruning adds.
    ("nothing differs", {RED: Terms({"day": FIVE})}, {RED: Terms({"day": FIVE})}, [], [Change("team.archive", "blue")]),
    (
        "a new team",
        {("green", None): Terms({"day": FIVE}, Limit(1, None))},
        {},
        [
            Change("team.add", "green"),
            Change("budget.set", "green", None, "day", None, FIVE),
            Change("limit.set", "green", None, None, None, Limit(1, None)),
        ],
        [Change("team.archive", "blue"), Change("team.archive", "red")],
    ),
    (
        "another limit, and softness",
        {RED: Terms({"day": SIX, "month": SOFT})},
        {RED: Terms({"day": FIVE, "month": FIVE})},
        [Change("budget.set", "red", None, "day", FIVE, SIX), Change("budget.set", "red", None, "month", FIVE, SOFT)],
        [Change("team.archive", "blue")],
    ),
    (
        "what is not declared",
        {RED: Terms({})},
        {RED: Terms({"week": FIVE}, Limit(1, 2)), KEY: Terms({"day": FIVE}), ("blue", None): Terms({"day": FIVE})},
        [],
        [
            Change("budget.remove", "red", None, "week", FIVE),
            Change("limit.remove", "red", None, None, Limit(1, 2)),
            Change("budget.remove", "red", "key_1", "day", FIVE),
            Change("team.archive", "blue"),
        ],
    ),
    (
        "a key that was rotated",
        {RED: Terms({}), KEY: Terms({"day": SIX})},
        {KEY: Terms({"day": FIVE}), NEXT: Terms({"day": FIVE})},
        [
            Change("budget.set", "red", "key_1", "day", FIVE, SIX),
            Change("budget.set", "red", "key_2", "day", FIVE, SIX),
        ],
        [Change("team.archive", "blue")],
    ),
    (
        "its successor has terms of its own",
        {RED: Terms({}), KEY: Terms({"day": FIVE}), NEXT: Terms({"day": SIX})},
        {KEY: Terms({"day": FIVE}), NEXT: Terms({"day": FIVE})},
        [Change("budget.set", "red", "key_2", "day", FIVE, SIX)],
        [Change("team.archive", "blue")],
    ),
]


@pytest.mark.parametrize(("declared", "there", "steps", "pruned"), [one[1:] for one in PLANS], ids=[one[0] for one in PLANS])
def test_plans(declared: dict[Scope, Terms], there: dict[Scope, Terms], steps: list[Change], pruned: list[Change]) -> None:
    assert plan(declared, state(there), prune=False) == steps
    assert plan(declared, state(there), prune=True) == steps + pruned


def test_half_of_a_limit_goes_with_pruning_alone() -> None:
    declared, there = {RED: Terms({}, Limit(9, None))}, {RED: Terms({}, Limit(1, 2)), ("blue", None): Terms({})}
    kept = Change("limit.set", "red", None, None, Limit(1, 2), Limit(9, 2))
    exact = Change("limit.set", "red", None, None, Limit(1, 2), Limit(9, None))
    assert plan(declared, state(there), prune=False) == [kept]
    assert exact in plan(declared, state(there), prune=True)


@pytest.mark.parametrize(
    ("declared", "place"),
    [
        ({("old", None): Terms({})}, ("teams", "old")),
        ({RED: Terms({}), ("red", "key_none"): Terms({})}, ("teams", "red", "keys", "key_none")),
        ({RED: Terms({}), ("red", "key_3"): Terms({})}, ("teams", "red", "keys", "key_3")),
        ({("new", None): Terms({}), ("new", "key_1"): Terms({})}, ("teams", "new", "keys", "key_1")),
    ],
)
def test_what_can_not_come_true(declared: dict[Scope, Terms], place: tuple[str, ...]) -> None:
    with pytest.raises(ImpossibleError) as told:
        plan(declared, state({}, "old"), prune=False)
    assert told.value.place == place


def test_an_archived_team_that_is_not_declared_stays_as_it_is() -> None:
    there = state({("old", None): Terms({"day": FIVE})}, "old")
    assert Change("team.archive", "old") not in plan({RED: Terms({})}, there, prune=True)
    assert all(change.team != "old" for change in plan({RED: Terms({})}, there, prune=True))


# The command


@dataclass(frozen=True)
class Ran:
    """What a command left behind."""

    status: int
    out: str
    err: str


Apply = Callable[..., Ran]


@pytest.fixture
def books(database_url: str, monkeypatch: pytest.MonkeyPatch) -> Iterator[Ledger]:
    monkeypatch.setenv("BEANMETER_DATABASE_URL", database_url)
    opened = Ledger(database_url)
    yield opened
    opened.close()


@pytest.fixture
def apply(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Apply:
    """Applies a text, with these options."""
    monkeypatch.chdir(tmp_path)

    def apply(text: str | bytes, *options: str) -> Ran:
        (tmp_path / "teams.toml").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(SystemExit) as ended:
            main(["apply", "teams.toml", *options])
        out, err = capsys.readouterr()
        assert isinstance(ended.value.code, int)
        return Ran(ended.value.code, out, err)

    return apply


def test_applied_once_it_is_so_and_twice_it_changes_nothing(books: Ledger, apply: Apply) -> None:
    before = books.content()
    planned = apply(DESIGN, "--dry-run")
    assert (planned.status, planned.err) == (0, "5 changes, not made: this is a dry run.\n")
    assert books.content() == before
    done = apply(DESIGN)
    assert (done.status, done.err) == (0, "5 changes made.\n")
    assert (
        done.out
        == planned.out
        == (
            "+ team design\n"
            "+ team red & co.\n"
            "+ budget design per day: 5.500000 USD, soft\n"
            "+ budget design per month: 60.000000 USD\n"
            "+ limit design: rpm 60\n"
        )
    )
    after = books.content()
    for options in ((), ("--dry-run",), ("--prune",)):
        again = apply(DESIGN, *options)
        assert (again.status, again.out, again.err) == (0, "", "Nothing to change.\n")
    assert books.content() == after
    actors = {(row[2].partition(":")[0], row[3]) for row in after["audit"]}
    assert actors == {("cli", "team.add"), ("cli", "budget.set"), ("cli", "limit.set")}


def test_what_was_spent_stays(books: Ledger, apply: Apply) -> None:
    account = books.account("design")
    books.set_budget(10**9, "total", team="design")
    job = reservation(account)
    books.post([job])
    books.post([], [settled(job)])
    spent = books.content()
    steps = apply('[teams.design.budgets]\ntotal = "1"\nday = "1"\n')
    assert steps.out.splitlines() == [
        "+ budget design per day: 1.000000 USD",
        "~ budget design per total: 1000.000000 USD -> 1.000000 USD",
    ]
    for name in ("charges", "rollups", "keys", "teams"):
        assert books.content()[name] == spent[name]
    assert set(spent["balances"]) <= set(books.content()["balances"])
    books.check()


def test_pruning(books: Ledger, apply: Apply) -> None:
    books.account("old")
    red = books.account("red")
    books.set_budget(5, "week")
    books.set_budget(5, "day", key_id=red.key_id)
    kept = apply("[teams.red]\n")
    assert (kept.out, kept.err) == ("", "Nothing to change.\n")
    pruned = apply("[teams.red]\n", "--prune")
    assert pruned.out.splitlines() == [
        "- budget red per week: 0.000005 USD",
        f"- budget red/{red.key_id} per day: 0.000005 USD",
        "- team old: archived",
    ]
    with books.database.reading() as connection:
        assert [(team["name"], team["archived_at"] is None) for team in accounts.list_teams(connection)] == [
            ("old", False),
            ("red", True),
        ]
    assert books.content()["budgets"] == []
    assert apply("[teams.red]\n", "--prune").err == "Nothing to change.\n"


def test_keys_by_their_ids_and_json(books: Ledger, apply: Apply) -> None:
    red = books.account("red")
    text = f'[teams.red.keys.{red.key_id}]\nbudgets.day = "5"\nlimit.concurrency = 2\n'
    ran = apply(text, "--json")
    assert json.loads(ran.out) == {
        "dry_run": False,
        "changes": [
            {
                "action": "budget.set",
                "team": "red",
                "key_id": red.key_id,
                "period": "day",
                "before": None,
                "after": {"limit_micro_usd": 5_000_000, "soft": False},
            },
            {
                "action": "limit.set",
                "team": "red",
                "key_id": red.key_id,
                "period": None,
                "before": None,
                "after": {"rpm": None, "concurrency": 2},
            },
        ],
    }
    # A rotation passes the terms on, and the declaration goes with them.
    with books.database.writing() as connection:
        renewed = accounts.rotate_key(connection, red.key_id, overlap=NOON - NOON, now=NOON, actor="test")
    assert apply(text, "--prune").err == "Nothing to change.\n"
    assert apply(text.replace('"5"', '"6"')).out.count(" -> 6.000000 USD") == 2
    budgets: list[Any] = books.content()["budgets"]
    assert {row[2] for row in budgets} == {red.key_id, renewed.id}


def test_limits_change_as_declared(books: Ledger, apply: Apply) -> None:
    apply("[teams.red.limit]\nrpm = 1\nconcurrency = 2\n")
    assert apply("[teams.red.limit]\nrpm = 3\n").out == "~ limit red: rpm 1, concurrency 2 -> rpm 3, concurrency 2\n"
    assert apply("[teams.red.limit]\nrpm = 3\n", "--prune").out == "~ limit red: rpm 3, concurrency 2 -> rpm 3\n"
    with books.database.reading() as connection:
        assert accounts.list_limits(connection) == [{"team": "red", "key_id": None, "rpm": 3, "concurrency": None}]


@pytest.mark.parametrize(
    ("text", "status", "words"),
    [
        # It can't be read: wrong usage.
        ("[teams", 2, "teams.toml: this is not TOML"),
        (b"[teams.\xff]", 2, "UTF-8"),
        (b"#" * ((1 << 20) + 1), 2, "larger than"),
        ('[teams.red.budgets]\nday = "x"\n', 2, "teams.toml, line 2: 'x' is not an amount"),
        # It can be read, and can't come true.
        ("\n[teams.old]\n", 1, "teams.toml, line 2: team 'old' is archived"),
        ("[teams.red]\n[teams.red.keys.key_none]\nlimit.rpm = 1\n", 1, "teams.toml, line 2: team 'red' has no key key_none"),
        ('[teams.good]\n[teams."<b>"]\n', 1, "teams.toml, line 2: '<b>' can't be a team's name"),
    ],
)
def test_all_of_it_or_nothing(books: Ledger, apply: Apply, text: str | bytes, status: int, words: str) -> None:
    books.account("red")
    books.account("old")
    with books.database.writing() as connection:
        accounts.archive_team(connection, "old", now=NOON, actor="test")
    before = books.content()
    for options in ((), ("--dry-run",), ("--prune",)):
        ran = apply(text, *options)
        assert (ran.status, ran.out) == (status, "")
        assert words in ran.err
    assert books.content() == before


def test_wrong_settings_and_no_file(apply: Apply, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("BEANMETER_PORT", "eighty")
    assert apply("[teams.red]\n").status == 3
    with pytest.raises(SystemExit) as ended:
        main(["apply", str(tmp_path / "none.toml")])
    assert ended.value.code == 2
