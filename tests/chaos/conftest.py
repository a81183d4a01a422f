"""What the tests of faults stand on: chance that can be repeated, and a PostgreSQL server that may be broken."""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest

from tests.chaos.sizes import FULL, SEED
from tests.ledger.ledgers import Ledger
from tests.postgres import Server, running_postgres


@pytest.fixture
def chance() -> random.Random:
    """Where a test's choices come from. The seed is shown where the test fails; ``TEST_SEED`` sets it.

    A small run makes the same choices each time, so that it fails for what was changed; a full one makes new ones.
    """
    seed = os.environ.get(SEED) or (str(random.SystemRandom().randrange(10**9)) if FULL else "20261122")
    print(f"{SEED}={seed}")
    return random.Random(seed)


@pytest.fixture
def breakable_postgres() -> Iterator[Server]:
    """A server of the test's own."""
    with running_postgres() as server:
        yield server


@pytest.fixture
def ledger(database_url: str) -> Iterator[Ledger]:
    found = Ledger(database_url)
    yield found
    found.close()
