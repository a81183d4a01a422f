"""All measures, one after the other: ``make bench``, or ``python -m bench [MEASURE ...]`` for some of them.

Writes bench/results.json and bench/results.md, with the computer, the versions and the command. A measure that fails is a row
that says so, and any that is not met makes the exit status 1.
"""

from __future__ import annotations

import argparse
import json
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

from bench import host
from bench.table import Row, failed, markdown

HERE = Path(__file__).parent

MEASURES = (
    "small",
    "small_postgres",
    "latency",
    "streams",
    "streamed",
    "open_streams",
    "memory",
    "uploads",
    "hot_budget",
    "history",
    "start",
)

# Each measure has a limit of its own, which is lower.
MEASURE_SECONDS_MAX = 600
END_SECONDS_MAX = 30


def run(measure: str) -> list[Row]:
    """The rows of one measure, which runs as a program of its own."""
    with tempfile.TemporaryDirectory(prefix="beanmeter-bench-") as directory:
        rows = Path(directory) / "rows.json"
        process = subprocess.Popen([sys.executable, "-m", f"bench.{measure}", "--rows", rows], cwd=HERE.parent)
        try:
            process.wait(MEASURE_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            pass
        finally:
            # It ends what it started.
            process.terminate()
            try:
                process.wait(END_SECONDS_MAX)
            except subprocess.TimeoutExpired:
                process.kill()
        if not rows.exists():
            return [Row(measure, "", f"it ended with status {process.poll()} and without figures", "", "not measured")]
        return [Row(**row) for row in json.loads(rows.read_text())]


def document(about: dict[str, str | int | float], command: str, at: str, seconds: float, rows: list[Row]) -> str:
    memory_gb = int(about["memory_bytes"]) / 1e9
    computer = (
        f"{about['cores']} cores ({about['cpu']}), {memory_gb:.0f} GB, {about['system']}, kernel {about['kernel']}, "
        f"fsync {about['fsync_ms']} ms, load average at the start {about['load_average']}"
    )
    versions = ", ".join(
        f"{name} {about[name]}"
        for name in ("beanmeter", "python", "uvloop", "postgresql", "nginx", "wrk", "node", "portkey", "litellm")
    )
    return f"""# Results of the benchmark

`{command}` at {at}, {seconds / 60:.0f} minutes. Clients, upstream and all that was measured were on one computer: {computer}.

Versions: {versions}.

{markdown(rows)}
"""


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m bench", description=__doc__)
    parser.add_argument("measures", nargs="*", metavar="MEASURE", help=f"of {', '.join(MEASURES)}; all of them by default")
    asked = parser.parse_args().measures
    if unknown := set(asked) - set(MEASURES):
        parser.error(f"there is no measure {', '.join(sorted(unknown))}: name some of {', '.join(MEASURES)}")
    # So that the measure that is running, and what it started, ends too.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("told to end"))
    about = host.describe()
    at = datetime.now(UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
    started = time.monotonic()
    rows: list[Row] = []
    for measure in asked or MEASURES:
        print(f"\n{measure} ...", flush=True)
        rows += run(measure)
    seconds = time.monotonic() - started
    # As `make bench` leaves them: a part of the measures is only printed.
    if not asked:
        results = {
            "at": at,
            "command": "make bench",
            "seconds": round(seconds),
            "host": about,
            "rows": [asdict(row) for row in rows],
        }
        (HERE / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        (HERE / "results.md").write_text(document(about, "make bench", at, seconds, rows))
    print(f"\n{markdown(rows)}")
    return int(failed(rows))


if __name__ == "__main__":
    sys.exit(main())
