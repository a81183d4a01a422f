"""Notes of outcomes that clients have been told and the books have not, for the milliseconds in between: in a file, and not
synced, so that they outlive their process at a hundredth of what a line of the journal takes.

A host that loses its power loses them. What is lost so is a review of the held amount, never an image that nobody pays for.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterator, Sequence

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

    def write(self, lines: Sequence[bytes]) -> list[int | None]:
        """Keep lines; the number of each one's note, ``None`` where there is no room for it or the disk takes nothing."""
        numbers: list[int | None] = []
        placed: dict[int, bytes] = {}
        for line in lines:
            number = self._free.popleft() if len(line) <= NOTE_BYTES and self._free else None
            if number is not None:
                placed[number] = line
            numbers.append(number)
        for run in _runs(list(placed)):
            if not self._put(run[0], [placed[number] for number in run]):
                self.erase(run)
                numbers = [None if number in run else number for number in numbers]
        return numbers

    def erase(self, numbers: Sequence[int]) -> None:
        """Forget notes. Where the disk takes not even that their places are not used again: a replay of what is booked changes
        nothing."""
        for run in _runs(sorted(numbers)):
            if self._put(run[0], [b"\0"] * len(run)):
                self._free.extend(run)
            elif len(run) > 1:
                # What one place has is not to cost the others.
                for number in run:
                    self.erase([number])

    def _put(self, number: int, lines: Sequence[bytes]) -> bool:
        """Write lines into neighbouring places from that number on; whether the disk took all."""
        try:
            # What a longer one has left behind the last is cut off by the end of the line.
            data = b"".join([line.ljust(NOTE_BYTES, b"\0") for line in lines[:-1]]) + lines[-1]
            return os.pwrite(self._file, data, number * NOTE_BYTES) == len(data)
        except (OSError, MemoryError):
            return False

    def close(self) -> None:
        """Give the file up. What is written later finds no place."""
        file, self._file = self._file, CLOSED
        os.close(file)


def _runs(numbers: Sequence[int]) -> list[list[int]]:
    """The numbers, cut where the next one is not the neighbour. Each run is one call into the kernel, at each of which the
    other thread may come and ask for the interpreter: for a note alone that costs ten times as much as the note."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    return runs


def lines_of(file: int) -> Iterator[bytes]:
    """The lines that were noted in a file, in no order. One that was written only in part is among them."""
    for start in range(0, os.fstat(file).st_size, NOTE_BYTES):
        note = os.pread(file, NOTE_BYTES, start)
        if note[:1] != b"\0":
            line, end, _ = note.partition(b"\n")
            yield line + end
