"""The rules without the books: who has room, and which step may follow which."""

from __future__ import annotations

from dataclasses import astuple, replace
from datetime import UTC, datetime
from typing import get_args

import pytest

from proxy.ledger.decisions import NEXT, Admitted, Balance, OverBudget, State, admit
from tests.ledger.ledgers import NOON


def balance(limit: int, settled: int = 0, held: int = 0, *, soft: bool = False, **changes: object) -> Balance:
    whole = Balance(1, "team", None, "total", soft, limit, settled, held)
    return replace(whole, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("balances", "hold", "remaining"),
    [
        pytest.param([], 5, None, id="no budget"),
        pytest.param([balance(5)], 5, 0, id="exact fit"),
        pytest.param([balance(10, 3, 2)], 5, 0, id="exact fit beside what is settled and held"),
        pytest.param([balance(100, 3, 2)], 5, 90, id="room"),
        pytest.param([balance(0, soft=True)], 5, None, id="soft never refuses"),
        pytest.param([balance(0, 7, 7, soft=True), balance(9, 2)], 5, 2, id="soft is not the tightest"),
        pytest.param([balance(90), balance(10, 1), balance(50)], 5, 4, id="tightest of several"),
        pytest.param([balance(5), balance(5)], 5, 0, id="several that just fit"),
        pytest.param([balance(10**18, 10**18 - 1)], 1, 0, id="as large as money gets"),
    ],
)
def test_admitted(balances: list[Balance], hold: int, remaining: int | None) -> None:
    held_before = [one.held_micro_usd for one in balances]
    assert admit(hold, balances, NOON) == Admitted(remaining)
    assert [one.held_micro_usd for one in balances] == [held + hold for held in held_before]


@pytest.mark.parametrize(
    ("balances", "hold", "limit", "remaining"),
    [
        pytest.param([balance(0)], 1, 0, 0, id="zero budget"),
        pytest.param([balance(4)], 5, 4, 4, id="one too little"),
        pytest.param([balance(10, 3, 3)], 5, 10, 4, id="one too little beside what is settled and held"),
        pytest.param([balance(10, 3, 12)], 1, 10, -5, id="limit lowered under what is held"),
        pytest.param([balance(2), balance(90)], 5, 2, 2, id="the first has no room"),
        pytest.param([balance(90), balance(2)], 5, 2, 2, id="the last has no room"),
        pytest.param([balance(4), balance(3), balance(2), balance(9)], 5, 2, 2, id="the one with the least left is named"),
        pytest.param([balance(0, 9, soft=True), balance(4)], 5, 4, 4, id="the soft one is never named"),
    ],
)
def test_over_budget(balances: list[Balance], hold: int, limit: int, remaining: int) -> None:
    before = [astuple(one) for one in balances]
    decision = admit(hold, balances, NOON)
    assert decision == OverBudget("team", "total", limit, remaining, hold, None)
    assert [astuple(one) for one in balances] == before, "what is refused is held nowhere"


def test_a_refusal_says_whose_budget_it_is_and_when_it_resets() -> None:
    decision = admit(5, [balance(9, period="month"), balance(1, period="week", scope="key", key_id="k")], NOON)
    assert decision == OverBudget("key", "week", 1, 1, 5, datetime(2026, 11, 23, tzinfo=UTC))


def test_what_one_reservation_takes_the_next_does_not_find() -> None:
    budget = balance(10)
    assert [type(admit(4, [budget], NOON)) for _ in range(3)] == [Admitted, Admitted, OverBudget]
    assert budget.held_micro_usd == 8


def test_the_life_of_a_charge() -> None:
    lives = {(state, after) for state, afters in NEXT.items() for after in afters}
    assert NEXT.keys() == set(get_args(State))
    assert lives == {
        ("reserved", "forwarded"),
        ("reserved", "released"),
        ("forwarded", "settled"),
        ("forwarded", "released"),
        ("forwarded", "review"),
        ("review", "settled"),
        ("review", "released"),
    }
