"""Outcomes that could not be booked, kept on local disk until they are: appended, synced, replayed by whoever comes next.

Each process has a file of its own, locked for as long as it lives, with room taken from the disk beforehand: an outcome
must find its place also when the disk has filled up meanwhile. A file that nobody holds any more belongs to a process
that died; any process on this host may take it over. Beside it lies a file of notes: outcomes on their way to the books.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from zlib import crc32

import msgspec
import structlog

from proxy.ledger import notes
from proxy.ledger.decisions import Booking
from proxy.ledger.notes import Notes
from proxy.outcomes import Outcome

# An outcome takes half a kilobyte: this is room for every exchange that a process can have open, and then some.
ROOM_BYTES = 8 << 20

SUFFIX = ".journal"
NOTES_SUFFIX = ".notes"

log = structlog.get_logger(__name__)


class Journal:
    """This process's own files. Only its teller uses them: the journal by one thread at a time, the notes as they say."""

    def __init__(self, directory: Path) -> None:
        """Raises ``OSError`` where the directory can't be written or has no room."""
        directory.mkdir(parents=True, exist_ok=True)
        self._end = 0
        self._room = ROOM_BYTES
        self._path, self._file = _open_own(directory, SUFFIX, ROOM_BYTES)
        try:
            self._notes_path, notes_file = _open_own(directory, NOTES_SUFFIX, notes.FILE_BYTES)
        except OSError:
            _give_up(self._path, self._file)
            raise
        self._notes = Notes(notes_file)

    def note(self, bookings: Iterable[Booking]) -> list[int | None]:
        """Keep outcomes until they are booked, without a sync; the number of each one's note, ``None`` where it finds no
        place."""
        return self._notes.write([*map(_encode, bookings)])

    def erase(self, notes: Sequence[int]) -> None:
        """Forget notes: their outcomes are booked, or in the journal."""
        self._notes.erase(notes)

    def write(self, bookings: Iterable[Booking]) -> None:
        """Append outcomes; they are on the disk when this returns. Raises ``OSError`` when they are not."""
        data = b"".join(map(_encode, bookings))
        if self._end + len(data) > self._room:
            self._make_room(self._room + max(ROOM_BYTES, len(data)))
        _write_at(self._file, data, self._end)
        os.fdatasync(self._file)
        self._end += len(data)

    def clear(self) -> None:
        """Forget all outcomes: they are booked. The room stays taken."""
        # A zero where a line would begin ends the reading. What is left of old lines behind the next ones is cut off by
        # zeros too, or a replay would find them again; that would change nothing, but it would not be true.
        _write_at(self._file, bytes(self._end), 0)
        os.fdatasync(self._file)
        self._end = 0

    @property
    def empty(self) -> bool:
        """Whether nothing waits in it."""
        return self._end == 0

    def close(self) -> None:
        """Give the files up, and remove those in which nothing is left. What is written later fails."""
        if self._notes.empty:
            self._notes_path.unlink(missing_ok=True)
        self._notes.close()
        if self._end == 0:
            self._path.unlink(missing_ok=True)
        # The number may be another file's soon.
        file, self._file = self._file, notes.CLOSED
        os.close(file)

    def _make_room(self, size: int) -> None:
        _take_room(self._file, size)
        self._room = size


def _open_own(directory: Path, suffix: str, size: int) -> tuple[Path, int]:
    """A new file of this process's, locked, with its room taken from the disk: its path and descriptor. Raises ``OSError``."""
    path = directory / f"{os.getpid()}-{os.urandom(6).hex()}"
    file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o600)
    try:
        # Locked before it has the name by which others look for files that nobody holds.
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _take_room(file, size)
        path = path.rename(path.with_suffix(suffix))
        _sync_directory(directory)
    except OSError as error:
        _give_up(path, file)
        # Not every call says what it was about, and the operator has to know which disk.
        error.filename = str(directory)
        raise
    return path, file


def _give_up(path: Path, file: int) -> None:
    path.unlink(missing_ok=True)
    os.close(file)


def _take_room(file: int, size: int) -> None:
    os.posix_fallocate(file, 0, size)
    os.fsync(file)


@contextmanager
def abandoned(directory: Path) -> Iterator[list[Booking]]:
    """What processes that died have left, locked against others while it is booked; removed when the block ends well."""
    taken: list[tuple[Path, int]] = []
    bookings: list[Booking] = []
    try:
        for path in sorted((*directory.glob(f"*{SUFFIX}"), *directory.glob(f"*{NOTES_SUFFIX}"))):
            file = _take(path)
            if file is None:
                continue
            try:
                bookings.extend(_read_notes(file) if path.suffix == NOTES_SUFFIX else list(_read(file)))
            except (ValueError, TypeError, KeyError):
                # Whole, and not of a shape that this release knows. It is kept for the one that does, and keeps no other out.
                log.critical("journal_not_understood", file=path.name)
                os.close(file)
                continue
            taken.append((path, file))
        yield bookings
        for path, _ in taken:
            path.unlink(missing_ok=True)
    finally:
        for _, file in taken:
            os.close(file)


def _take(path: Path) -> int | None:
    try:
        file = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(file)
        return None
    return file


def _encode(booking: Booking) -> bytes:
    text = _to_json(booking)
    return b"%08x %b\n" % (crc32(text), text)


# One for each request: the standard library's takes six times as long, the fields' way into a mapping counted.
_to_json = msgspec.json.Encoder().encode


def _read(file: int) -> Iterator[Booking]:
    """The outcomes in a file, up to its end or to a line that was never finished."""
    with os.fdopen(os.dup(file), "rb") as lines:
        lines.seek(0)
        for line in lines:
            booking = _decode(line)
            if booking is None:
                return
            yield booking


def _read_notes(file: int) -> list[Booking]:
    """The outcomes that were noted; a note that was never finished is none."""
    return [booking for booking in map(_decode, notes.lines_of(file)) if booking is not None]


def _decode(line: bytes) -> Booking | None:
    checksum, _, text = line.rstrip(b"\n").partition(b" ")
    if not line.endswith(b"\n") or checksum != b"%08x" % crc32(text):
        return None
    fields: dict[str, Any] = json.loads(text)
    return Booking(**{**fields, "outcome": Outcome(**fields["outcome"])})


def _write_at(file: int, data: bytes, at: int) -> None:
    view = memoryview(data)
    while view:
        written = os.pwrite(file, view, at)
        view, at = view[written:], at + written


def _sync_directory(directory: Path) -> None:
    """A new file's name is on the disk only once its directory is."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
