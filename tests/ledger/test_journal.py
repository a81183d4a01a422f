"""The files that a process leaves its outcomes in: whose they are, and what is done with those that can't be read."""

from __future__ import annotations

import json
from pathlib import Path
from zlib import crc32

from structlog.testing import capture_logs

from proxy.ledger.decisions import Booking
from proxy.ledger.journal import SUFFIX, Journal, abandoned
from proxy.outcomes import Outcome

BOOKING = Booking("ch_1", 1, Outcome("settled", 5, 0, 1, "1024x1024", "low", "requested", "complete"), upstream_status=200)


def leave(directory: Path, *bookings: Booking) -> None:
    """What a process leaves that dies with these in its journal."""
    journal = Journal(directory)
    journal.write(bookings)
    journal.close()


def test_a_file_that_this_release_does_not_understand_is_kept_and_keeps_no_other_out(tmp_path: Path) -> None:
    line = json.dumps({"charge_id": "ch_2", "of_a_later_release": True}).encode()
    unknown = tmp_path / f"0-first{SUFFIX}"
    unknown.write_bytes(b"%08x %s\n" % (crc32(line), line))
    leave(tmp_path, BOOKING)
    with capture_logs() as logs, abandoned(tmp_path) as bookings:
        assert bookings == [BOOKING]
    assert list(tmp_path.iterdir()) == [unknown]
    assert [(entry["event"], entry["file"]) for entry in logs] == [("journal_not_understood", unknown.name)]


def test_what_is_taken_over_is_taken_by_one(tmp_path: Path) -> None:
    leave(tmp_path, BOOKING, BOOKING)
    with abandoned(tmp_path) as first:
        assert first == [BOOKING] * 2
        with abandoned(tmp_path) as second:
            assert second == []
    assert not list(tmp_path.iterdir())
