"""No room on the disk, no more open files: a clear refusal, and no call that is not booked."""

from __future__ import annotations

import json
import os
import resource
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from proxy.ledger.decisions import Booking
from proxy.ledger.journal import ROOM_BYTES, Journal, abandoned
from tests.chaos.crew import Crashed, Crew, Process, crew
from tests.chaos.sizes import size
from tests.ledger.ledgers import Account, reservation, settled
from tests.live import ORDER, wait_for
from tests.outage import database_away

# More than a spool keeps in memory and the disk has left, less than a request may have.
LARGE_BODY_BYTES = 2 * ROOM_BYTES


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own with room for the journals of two processes and a little more."""
    place = tmp_path / "disk"
    place.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", f"size={2 * ROOM_BYTES + (2 << 20)}", "none", str(place)]
    if os.geteuid() != 0 or shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk can be mounted by root only, and not in every container")
    try:
        yield place
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


def test_no_room_for_a_large_body(small_disk: Path, tmp_path: Path) -> None:
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as team:
        process = team.start(team.plan(state_dir=str(small_disk)))
        assert send_large(team, process) == (503, "storage_unavailable")
        assert team.order(process.base_url) == 200, "a small body needs no disk"
        assert len(team.simulator.requests()) == 1
        assert process.stop() == 0
        assert len(team.audit()) == 1


def test_a_body_larger_than_a_file_may_be(tmp_path: Path) -> None:
    """The same where nothing can be mounted: the process may write no file beyond its journal's size."""
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as team:
        process = team.start(replace(team.plan(), limits={resource.RLIMIT_FSIZE: ROOM_BYTES}))
        assert send_large(team, process) == (503, "storage_unavailable")
        assert team.order(process.base_url) == 200
        assert len(team.simulator.requests()) == 1
        assert process.stop() == 0
        assert len(team.audit()) == 1


def send_large(team: Crew, process: Process) -> tuple[int, str]:
    order = json.dumps({**ORDER, "user": "x" * LARGE_BODY_BYTES})
    with team.client(process.base_url) as client:
        answer = client.post("/images/generations", content=order, headers={"content-type": "application/json"})
    return answer.status_code, answer.json()["error"]["code"]


def test_no_room_for_the_database(small_disk: Path, tmp_path: Path) -> None:
    with crew(f"sqlite:///{small_disk / 'books.db'}", tmp_path) as team:
        process = team.start(team.plan())
        assert team.order(process.base_url) == 200
        with full(small_disk):
            codes = Counter(team.order(process.base_url) for _ in range(10))
            assert set(codes) <= {200, "ledger_unavailable"}
            assert codes["ledger_unavailable"]
            # What was let in while there still was a page to write on is on the bill, and will be in the books.
            assert len(team.simulator.requests()) == 1 + codes[200]
        assert wait_for(lambda: True if team.order(process.base_url) == 200 else None)
        settle(team)
        assert process.stop() == 0
        assert len(team.audit()) == 2 + codes[200]


def test_the_database_fills_up_in_the_middle_of_exchanges(small_disk: Path, tmp_path: Path) -> None:
    with crew(f"sqlite:///{small_disk / 'books.db'}", tmp_path) as team:
        process = team.start(team.plan())
        with team.orders_under_way([process.base_url] * 8) as answers, full(small_disk):
            assert [answer.result() for answer in answers] == [200] * 8
            process.kill()
        heir = team.start(team.plan())
        assert heir.base_url
        settle(team)
        assert heir.stop() == 0
        assert {row["state"] for row in team.audit().values()} == {"settled"}


def test_no_room_for_a_journal(small_disk: Path, tmp_path: Path) -> None:
    """A gateway that could not keep what it can't book does not start, and says why."""
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as team, full(small_disk):
        process = team.start(team.plan(state_dir=str(small_disk)))
        with pytest.raises(Crashed, match=f"No space left on device: '{small_disk / 'journal'}'"):
            process.base_url  # noqa: B018 - asking is what waits for it


def test_a_full_disk_leaves_the_room_that_a_journal_has(small_disk: Path, tmp_path: Path) -> None:
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as team:
        process = team.start(team.plan(state_dir=str(small_disk)))
        urls = [process.base_url] * 8
        with full(small_disk):
            with team.orders_under_way(urls) as answers, database_away(team.database_url):
                assert [answer.result() for answer in answers] == [200] * 8
                process.kill()
            heir = team.start(replace(team.plan(), settings=team.settings(state_dir=str(tmp_path / "other"))))
            assert heir.base_url
        assert heir.stop() == 0
        team.recover(small_disk)
        assert [row["state"] for row in team.audit().values()] == ["settled"] * 8


def test_a_journal_that_can_not_grow_keeps_what_it_has(small_disk: Path) -> None:
    journal = Journal(small_disk / "journal")
    kept: list[Booking] = []
    with full(small_disk):
        while True:
            ends = [settled(reservation(Account("red", 1, "key_1", ""))) for _ in range(500)]
            try:
                journal.write(ends)
            except OSError:
                break
            kept += ends
    journal.close()
    with abandoned(small_disk / "journal") as bookings:
        assert bookings == kept
    assert len(kept) > 10_000


def test_no_more_open_files(tmp_path: Path) -> None:
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as team:
        team.set_budget(10**12)
        process = team.start(replace(team.plan(), limits={resource.RLIMIT_NOFILE: 40}))
        with ThreadPoolExecutor(60) as clients:
            answers = list(
                clients.map(lambda url: team.order(url, "[[sim latency=0.2]]"), [process.base_url] * size(60, 1_000))
            )
        ends = Counter(answers)
        assert ends[200]
        assert set(ends) <= {200, None, "upstream_unreachable", "ledger_unavailable", "storage_unavailable"}, ends
        assert team.order(process.base_url) == 200
        settle(team)
        assert process.stop() == 0
        # Somebody who can't be reached for want of a file heard nothing: nobody has to look into that.
        assert {row["state"] for row in team.charges().values()} <= {"settled", "released"}


def settle(team: Crew) -> None:
    """Wait until no charge is open."""
    wait_for(lambda: None if any(row["state"] == "forwarded" for row in team.charges().values()) else True)


@contextmanager
def full(disk: Path) -> Iterator[None]:
    """The disk has not a byte left for as long as the block lasts."""
    ballast = disk / "ballast"
    with ballast.open("wb", buffering=0) as file:
        for piece in (1 << 16, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(piece))
            except OSError:
                pass
    try:
        yield
    finally:
        ballast.unlink()
