"""How much of each fault is tried: a little in every test run, all of it with ``make chaos``."""

from __future__ import annotations

import os

# ``full`` for the full size; anything else, or nothing, for the small one.
CHAOS = "TEST_CHAOS"

# The seed of a run that failed, to see it fail again.
SEED = "TEST_SEED"

FULL = os.environ.get(CHAOS) == "full"


def size(small: int, full: int) -> int:
    """The number for this run."""
    return full if FULL else small
