"""Notes of outcomes that clients have been told and the books have not, for the milliseconds in between: in a file, and not
synced, so that they outlive their process at a hundredth of what a line of the journal takes.

A host that loses its power loses them. What is lost so is a review of the held amount, never an image that nobody pays for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator

# An outcome takes half a kilobyte. Whoever has a longer one, or finds no place, waits for the books.
NOTE_BYTES = 1024
NOTES_MAX = 512

FILE_BYTES = NOTE_BYTES * NOTES_MAX

# In place of a file's number that may be another's by now: no file has it.
CLOSED = -1


class Notes:
    """The notes in one open file of :data:`FILE_BYTES`. One thread writes them, any may erase them."""

    def __init__(self, file: int) -> None:
        self._file = file
        self._free = deque(range(NOTES_MAX))

    @property
    def empty(self) -> bool:
        return len(self._free) == NOTES_MAX

    def write(self, line: bytes) -> int | None:
        """Keep a line; the number of its note, ``None`` where there is no room for it or the disk takes nothing."""
        if len(line) > NOTE_BYTES or not self._free:
            return None
        number = self._free.popleft()
        try:
            # What a longer one has left behind it is cut off by the end of the line.
            whole = os.pwrite(self._file, line, number * NOTE_BYTES) == len(line)
        except OSError:
            whole = False
        if not whole:
            self.erase(number)
        return number if whole else None

    def erase(self, number: int) -> None:
        """Forget a note. Where the disk takes not even that its place is not used again: a replay of what is booked changes
        nothing."""
        try:
            os.pwrite(self._file, b"\0", number * NOTE_BYTES)
        except OSError:
            return
        self._free.append(number)

    def close(self) -> None:
        """Give the file up. What is written later finds no place."""
        file, self._file = self._file, CLOSED
        os.close(file)


def lines_of(file: int) -> Iterator[bytes]:
    """The lines that were noted in a file, in no order. One that was written only in part is among them."""
    for start in range(0, os.fstat(file).st_size, NOTE_BYTES):
        note = os.pread(file, NOTE_BYTES, start)
        if note[:1] != b"\0":
            line, end, _ = note.partition(b"\n")
            yield line + end
