"""Prometheus' own programs, from wherever the machine has them."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
CONFIGURATION = ROOT / "deploy" / "prometheus"
DASHBOARDS = ROOT / "deploy" / "grafana" / "dashboards"
RUNBOOK = ROOT / "docs" / "observability.md"

# With this set, a test that can't have Prometheus fails instead of being skipped.
_REQUIRE_PROMETHEUS = "TEST_REQUIRE_PROMETHEUS"

# The packages of Debian and Ubuntu that have them.
_PACKAGES = {"prometheus": "prometheus", "promtool": "prometheus", "amtool": "prometheus-alertmanager"}

# What has not come by then won't come, on the slowest machine.
PATIENCE_SECONDS = 120


def program(name: str) -> str:
    """The path of a program; without it the test is skipped."""
    path = shutil.which(name)
    if path is None:
        reason = f"there is no {name}: on Debian and Ubuntu, apt install {_PACKAGES[name]}"
        if os.environ.get(_REQUIRE_PROMETHEUS):
            pytest.fail(reason)
        pytest.skip(reason)
    return path


def run(name: str, *arguments: str | Path) -> str:
    """Run a program to its good end; what it printed."""
    command = [program(name), *map(str, arguments)]
    ran = subprocess.run(command, cwd=CONFIGURATION, capture_output=True, text=True, timeout=PATIENCE_SECONDS, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout
