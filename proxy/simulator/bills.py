"""The simulator's own books: what it made and charges for, and which requests reached it. Both are bounded and in memory.

A gateway's ledger is compared with these; they are kept from the wire and the pictures alone.
"""

from __future__ import annotations

import hashlib
from collections import deque
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from itertools import count
from typing import Any


def fingerprint(value: str) -> str:
    """``sha256:`` and the first 16 hexadecimal digits of a secret header's digest: enough to compare, not to use."""
    return f"sha256:{hashlib.sha256(value.encode('utf-8', 'surrogateescape')).hexdigest()[:16]}"


@dataclass(slots=True)
class Entry:
    """One request's charge, which grows as its images are made. ``at`` is the time of its first image."""

    id: str
    request_id: str
    client_request_id: str | None
    operation: str
    model: str
    size: str
    quality: str
    images: int
    micro_usd: int
    at: str

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


class Bill:
    """The entries, the oldest folded into the total beyond ``entries_max``."""

    def __init__(self, entries_max: int) -> None:
        self._entries: deque[Entry] = deque()
        self._entries_max = entries_max
        self._numbers = count(1)
        self._folded_micro_usd = 0

    def open(
        self, *, request_id: str, client_request_id: str | None, operation: str, model: str, size: str, quality: str
    ) -> Entry:
        """A new entry with nothing on it yet."""
        at = datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
        number = f"bill-{next(self._numbers)}"
        entry = Entry(number, request_id, client_request_id, operation, model, size, quality, 0, 0, at)
        self._entries.append(entry)
        if len(self._entries) > self._entries_max:
            self._folded_micro_usd += self._entries.popleft().micro_usd
        return entry

    def as_dict(self) -> dict[str, Any]:
        entries = [entry.as_dict() for entry in list(self._entries)]
        return {"total_micro_usd": self._folded_micro_usd + sum(e["micro_usd"] for e in entries), "entries": entries}

    def clear(self) -> None:
        self._entries.clear()
        self._folded_micro_usd = 0


@dataclass(slots=True)
class Arrival:
    """One request under ``/v1`` as it came over the wire.

    ``headers`` are in their order, duplicates and all. ``complete`` says whether the whole body came; ``status`` is what was
    answered, ``None`` where nothing was.
    """

    method: str
    path: str
    query: str
    headers: list[tuple[str, str]]
    body_bytes: int = 0
    complete: bool = False
    status: int | None = None
    body_digest: Any = field(default_factory=hashlib.sha256)

    def header(self, name: str) -> str | None:
        """The first value of a header, by its name in lower case."""
        return next((value for key, value in self.headers if key.lower() == name), None)

    def as_dict(self) -> dict[str, Any]:
        return {
            "method": self.method,
            "path": self.path,
            "query": self.query,
            "headers": [
                [name, fingerprint(value) if name.lower() == "authorization" else value] for name, value in self.headers
            ],
            "body_bytes": self.body_bytes,
            "body_sha256": self.body_digest.hexdigest(),
            "complete": self.complete,
            "status": self.status,
        }


class Arrivals:
    """The requests that came, the oldest dropped beyond ``arrivals_max``."""

    def __init__(self, arrivals_max: int) -> None:
        self._arrivals: deque[Arrival] = deque(maxlen=arrivals_max)

    def add(self, arrival: Arrival) -> None:
        self._arrivals.append(arrival)

    def as_list(self) -> list[dict[str, Any]]:
        return [arrival.as_dict() for arrival in list(self._arrivals)]

    def clear(self) -> None:
        self._arrivals.clear()
