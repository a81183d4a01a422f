"""Programs that come with neither Python nor the lock files. Only here is one looked for, and its absence judged."""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DEPLOY = ROOT / "deploy"

# With this set, a test that can't have its program fails instead of being skipped.
_REQUIRE_PROGRAMS = "TEST_REQUIRE_PROGRAMS"

# Some keep what only an administrator starts out of everybody's path; what wheels bring is beside the interpreter.
_PLACES = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])


def program(name: str, source: str) -> str:
    """Where a program is. ``source`` says what brings it, for whoever does not have it."""
    found = shutil.which(name, path=_PLACES)
    if found is None:
        reason = f"there is no {name}: {source} brings it"
        if os.environ.get(_REQUIRE_PROGRAMS):
            pytest.fail(reason)
        pytest.skip(reason)
    return found
