"""What a sweep ends at once, however much the dead have left, and that it comes to an end itself."""

from __future__ import annotations

import asyncio
from collections import Counter
from datetime import datetime, timedelta
from pathlib import Path

import pytest
from sqlalchemy import delete, text, update

from proxy.ledger import sweep
from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.ledger.schema import charges, rollups, team_days
from proxy.ledger.sweep import Sweeper
from proxy.ledger.teller import Teller
from tests.ledger.ledgers import NOON, PRICE, Ledger, reservation
from tests.ledger.traffic import Log

# So many charges are more than one reading finds.
FOUND_MAX = 20
LEFT = 2 * FOUND_MAX + 5


def clock() -> datetime:
    return NOON + timedelta(hours=1)


def one_sweep(url: str, journals: Path) -> int:
    """What one sweep of a new process says, an hour later."""

    async def scenario() -> int:
        database = Database(url)
        teller = Teller(database, clock, Log())
        teller.start()
        try:
            return await Sweeper(database, teller, clock, journals=journals, review_hours=72).sweep()
        finally:
            await teller.close(30)
            database.close()

    return asyncio.run(scenario())


@pytest.fixture(autouse=True)
def small_readings(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sweep, "FOUND_MAX", FOUND_MAX)
    monkeypatch.setattr(sweep, "SETTLED_IN_SECONDS", 0)


def left_behind(ledger: Ledger) -> None:
    """Charges of a process that died in the middle of their exchanges."""
    account = ledger.account()
    ledger.set_budget(1000 * PRICE)
    ledger.post([reservation(account) for _ in range(LEFT)])


def states(ledger: Ledger) -> Counter[str]:
    return Counter(row["state"] for row in ledger.charges().values())


def test_one_sweep_ends_all_that_was_left(ledger: Ledger, tmp_path: Path) -> None:
    left_behind(ledger)
    ledger.close()
    assert one_sweep(ledger.url, tmp_path) == LEFT
    assert states(ledger) == {"review": LEFT}
    ledger.check()


def test_what_cannot_be_booked_is_left_for_the_next_round(ledger: Ledger, tmp_path: Path) -> None:
    left_behind(ledger)
    with ledger.database.writing() as connection:
        # Books that don't add up any more: to release a charge takes its amount from a sum that is not there.
        connection.execute(update(charges).values(state="reserved"))
        connection.execute(delete(rollups))
        connection.execute(delete(team_days))
    ledger.close()
    assert one_sweep(ledger.url, tmp_path) == FOUND_MAX
    assert states(ledger) == {"reserved": LEFT}


@pytest.mark.postgres
@pytest.mark.parametrize("database_url", ["postgresql"], indirect=True)
def test_a_database_that_can_only_be_read_is_not_told_the_same_again_and_again(ledger: Ledger, tmp_path: Path) -> None:
    left_behind(ledger)
    with ledger.database.writing() as connection:
        name = connection.scalar(text("SELECT current_database()"))
        connection.execute(text(f'ALTER DATABASE "{name}" SET default_transaction_read_only = on'))
    ledger.close()

    async def scenario() -> list[int]:
        database = Database(ledger.url)
        teller = Teller(database, clock, Log(), Journal(tmp_path))
        teller.start()
        try:
            sweeper = Sweeper(database, teller, clock, journals=tmp_path, review_hours=72)
            return [await sweeper.sweep() for _ in range(3)]
        finally:
            await teller.close(0)
            database.close()

    assert asyncio.run(scenario()) == [FOUND_MAX, 0, 0]
