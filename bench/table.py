"""What a measure found: rows with a verdict each, as a table for people and as JSON for programs; and how a measure is run."""

from __future__ import annotations

import argparse
import json
import signal
import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from bench.load import Failed
from bench.machines import Missing

# "shown" is for what has no bound, "not judged" for what this computer can't show; both say so in ``reached``.
Verdict = Literal["met", "not met", "shown", "not judged", "not measured"]

HEAD = ("measure", "must reach", "reached", "peers", "verdict")


@dataclass(frozen=True)
class Row:
    """One line of the table. ``figures`` are the numbers behind the words, with their units last in their names."""

    measure: str
    must: str
    reached: str
    peers: str
    verdict: Verdict
    figures: Mapping[str, Any] = field(default_factory=dict)


def verdict(met: bool) -> Verdict:
    return "met" if met else "not met"


def failed(rows: Iterable[Row]) -> bool:
    """Whether anything that has to be reached was not, or could not be measured."""
    return any(row.verdict in ("not met", "not measured") for row in rows)


def markdown(rows: Iterable[Row]) -> str:
    lines = [HEAD, ("---",) * len(HEAD), *((row.measure, row.must, row.reached, row.peers, row.verdict) for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def run(measure: Callable[[], list[Row]], *, seconds_max: int) -> None:
    """Run one measure as a program: prints its rows, writes them to ``--rows FILE`` as JSON, and ends with status 1 where a
    row is not met. Whatever it started is ended, also when it takes longer than ``seconds_max`` or is told to end."""
    parser = argparse.ArgumentParser(description=sys.modules["__main__"].__doc__)
    parser.add_argument("--rows", type=Path, metavar="FILE", help="where the rows go as JSON")
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, _end)
    signal.signal(signal.SIGALRM, _end)
    signal.alarm(seconds_max)
    try:
        rows = measure()
    except (Missing, Failed) as reason:
        name = Path(sys.argv[0]).stem
        rows = [Row(name, "", str(reason), "", "not measured")]
    if arguments.rows is not None:
        arguments.rows.write_text(json.dumps([asdict(row) for row in rows]))
    else:
        for row in rows:
            print(json.dumps(asdict(row)))
    print(markdown(rows))
    sys.exit(failed(rows))


def _end(number: int, _frame: object) -> None:
    raise SystemExit("the measure took too long" if number == signal.SIGALRM else "told to end")
