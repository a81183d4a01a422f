"""The files that a process leaves its outcomes in: whose they are, and what is done with those that can't be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from random import Random
from zlib import crc32

import pytest
from structlog.testing import capture_logs

from proxy.ledger.decisions import Booking
from proxy.ledger.journal import SUFFIX, Journal, abandoned
from proxy.ledger.notes import NOTE_BYTES, NOTES_MAX
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


def noted(number: int, upstream_request_id: str | None = None) -> Booking:
    return replace(BOOKING, charge_id=f"ch_{number}", upstream_request_id=upstream_request_id)


def test_a_note_outlives_its_process_until_it_is_erased(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    (first,) = journal.note([noted(0)])
    second, third = journal.note([noted(1), noted(2)])
    assert first is not None
    assert second is not None
    assert third is not None
    journal.erase([second])
    journal.write([noted(3)])
    # Whoever looks while the process lives finds nothing that is his.
    with abandoned(tmp_path) as bookings:
        assert bookings == []
    journal.close()
    with abandoned(tmp_path) as bookings:
        assert sorted(booking.charge_id for booking in bookings) == ["ch_0", "ch_2", "ch_3"]
        assert all(replace(booking, charge_id="ch_1") == BOOKING for booking in bookings)
    assert not list(tmp_path.iterdir())


def test_a_place_is_used_again_and_a_shorter_note_ends_where_it_ends(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    for number in range(2 * NOTES_MAX):
        (place,) = journal.note([noted(number, "x" * (number % 2 * 100))])
        assert place is not None
        journal.erase([place])
    kept = journal.note(noted(number) for number in range(NOTES_MAX))
    assert None not in kept
    assert journal.note([noted(NOTES_MAX)]) == [None], "no room"
    journal.close()
    with abandoned(tmp_path) as bookings:
        assert sorted(bookings, key=lambda booking: int(booking.charge_id[3:])) == [noted(n) for n in range(NOTES_MAX)]


def test_notes_that_come_and_go_in_any_order_are_those_that_are_kept(tmp_path: Path) -> None:
    journal, random = Journal(tmp_path), Random(1)
    kept: dict[str, int] = {}
    for number in range(500):
        some = [noted(100 * number + each, "x" * random.choice((0, 100, NOTE_BYTES))) for each in range(random.randrange(20))]
        for booking, place in zip(some, journal.note(some), strict=True):
            assert (place is None) == (booking.upstream_request_id == "x" * NOTE_BYTES)
            if place is not None:
                kept[booking.charge_id] = place
        gone = random.sample(sorted(kept), max(0, len(kept) - random.randrange(100)))
        journal.erase([kept.pop(charge_id) for charge_id in gone])
        assert len(set(kept.values())) == len(kept)
    journal.close()
    with abandoned(tmp_path) as bookings:
        assert sorted(booking.charge_id for booking in bookings) == sorted(kept)


def test_what_is_too_long_for_a_note_is_none(tmp_path: Path) -> None:
    journal = Journal(tmp_path)
    assert journal.note([noted(0, "x" * NOTE_BYTES)]) == [None]
    journal.close()
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("written", [0, 1, 9, 100, 200])
def test_a_note_that_was_never_finished_is_none(tmp_path: Path, written: int) -> None:
    journal = Journal(tmp_path)
    journal.note([noted(0)])
    (path,) = tmp_path.glob("*.notes")
    line = path.read_bytes()[:NOTE_BYTES]
    with path.open("r+b") as file:
        file.seek(NOTE_BYTES)
        file.write(line[:written])
    journal.close()
    with abandoned(tmp_path) as bookings:
        assert bookings == [noted(0)]


def test_what_comes_after_the_end_fails_and_touches_no_other_file(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "journal")
    journal.close()
    others = [(tmp_path / str(number)).open("w+b") for number in range(4)]
    with pytest.raises(OSError, match="Bad file descriptor"):
        journal.write([BOOKING])
    assert journal.note([BOOKING] * 3) == [None] * 3
    for other in others:
        assert other.read() == b""
        other.close()
