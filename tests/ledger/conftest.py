"""The ledger that most of these tests work on, once on SQLite and once on PostgreSQL, and an account for the teller's."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.ledger.ledgers import PRICE, Account, Ledger


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    found = Ledger(database_url)
    yield found
    found.close()


@pytest.fixture
def account(ledger: Ledger) -> Iterator[Account]:
    found = ledger.account()
    ledger.set_budget(1000 * PRICE)
    # Only the teller's own connections are open from here on.
    ledger.close()
    yield found
    # Whatever a test did: nothing is lost, doubled or held in the wrong place.
    ledger.check()
