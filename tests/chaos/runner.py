"""A gateway in a process that kills itself at a named step. Only here is the product touched from inside: its steps are
watched, and some of its waits are made shorter; what it does is its own."""

from __future__ import annotations

import os
import resource
import signal
import sys
import threading
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from multiprocessing.connection import Connection as Pipe
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Row

from proxy import app, logs
from proxy.headers import Headers
from proxy.ledger import sweep, teller
from proxy.ledger.decisions import Booking, Decision, Reservation
from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.settings import load
from proxy.upstream import Answer, Upstream

# The steps, in the order in which an exchange comes by.
BEFORE_RESERVE_COMMIT = "before_reserve_commit"
AFTER_RESERVE_COMMIT = "after_reserve_commit"
BEFORE_SEND = "before_send"
IN_SEND = "in_send"
AFTER_SEND = "after_send"
AFTER_HEAD = "after_head"
AFTER_FIRST_BYTE = "after_first_byte"
AFTER_LAST_BYTE = "after_last_byte"
BEFORE_BOOK_COMMIT = "before_book_commit"
AFTER_BOOK_COMMIT = "after_book_commit"
BEFORE_JOURNAL = "before_journal"
AFTER_JOURNAL = "after_journal"
IN_SWEEP = "in_sweep"


@dataclass(frozen=True)
class Plan:
    """How a gateway is to run. ``die_at`` is a step and ``visit`` says at which coming by; ``limits`` are the process's own,
    by their ``RLIMIT_`` numbers."""

    settings: Mapping[str, str]
    log: Path
    die_at: str = ""
    visit: int = 1
    clock_ahead: timedelta = timedelta()
    # How many jobs go into one transaction, so that there is a middle to be killed in.
    batch_jobs_max: int = teller.BATCH_JOBS_MAX
    # Whoever is looked for died already: nobody has to be given time to book what it kept.
    settled_in_seconds: float = sweep.SETTLED_IN_SECONDS
    grace: timedelta = sweep.GRACE
    sweep_seconds: float = sweep.INTERVAL_SECONDS
    # After how long a transaction's server counts as frozen.
    frozen_seconds: float = teller.FROZEN_SECONDS
    limits: Mapping[int, int] = field(default_factory=dict)


def run(plan: Plan, ready: Pipe) -> None:
    """Serve by the plan, and send the base URL once requests are served; the whole of a process."""
    with plan.log.open("ab") as log:
        os.dup2(log.fileno(), sys.stderr.fileno())
    logs.configure(sys.stderr)
    for limit, value in plan.limits.items():
        resource.setrlimit(limit, (value, value))
    _shorten(plan)
    _watch(_Killer(plan).at)
    sys.exit(app.serve(load(plan.settings, plan.log.parent), ready.send))


class _Killer:
    def __init__(self, plan: Plan) -> None:
        self._step = plan.die_at
        self._left = plan.visit

    def at(self, step: str) -> None:
        """A step is come by."""
        if step == self._step:
            self._left -= 1
            if not self._left:
                os.kill(os.getpid(), signal.SIGKILL)


Come = Callable[[str], None]


def _shorten(plan: Plan) -> None:
    app.utc_now = lambda: datetime.now(UTC) + plan.clock_ahead
    teller.BATCH_JOBS_MAX = plan.batch_jobs_max
    teller.FROZEN_SECONDS = plan.frozen_seconds
    sweep.SETTLED_IN_SECONDS = plan.settled_in_seconds  # type: ignore[assignment]
    sweep.GRACE = plan.grace
    sweep.INTERVAL_SECONDS = plan.sweep_seconds  # type: ignore[assignment]


def _watch(come_by: Come) -> None:
    _watch_commits(come_by)
    _watch_journal(come_by)
    _watch_upstream(come_by)
    _watch_sweep(come_by)


def _watch_commits(come_by: Come) -> None:
    post = teller.post  # type: ignore[attr-defined]
    posting = Database.posting
    transaction = threading.local()

    def watched_post(
        connection: Connection, reservations: Sequence[Reservation], bookings: Sequence[Booking], now: datetime
    ) -> list[Decision]:
        decisions: list[Decision] = post(connection, reservations, bookings, now)
        transaction.steps = [BEFORE_RESERVE_COMMIT, AFTER_RESERVE_COMMIT] if reservations else []
        transaction.steps += [BEFORE_BOOK_COMMIT, AFTER_BOOK_COMMIT] if bookings else []
        for step in transaction.steps[::2]:
            come_by(step)
        return decisions

    @contextmanager
    def watched_posting(self: Database) -> Iterator[Connection]:
        transaction.steps = []
        with posting(self) as connection:
            yield connection
        for step in transaction.steps[1::2]:
            come_by(step)

    teller.post = watched_post  # type: ignore[attr-defined]
    Database.posting = watched_posting  # type: ignore[method-assign]


def _watch_journal(come_by: Come) -> None:
    write = Journal.write

    def watched_write(self: Journal, bookings: Sequence[Booking]) -> None:
        come_by(BEFORE_JOURNAL)
        write(self, bookings)
        come_by(AFTER_JOURNAL)

    Journal.write = watched_write  # type: ignore[method-assign,assignment]


def _watch_upstream(come_by: Come) -> None:
    post, piece = Upstream.post, Answer.piece

    async def watched_post(
        self: Upstream, path: bytes, query: bytes, headers: Headers, body: bytes | AsyncIterator[bytes]
    ) -> Answer:
        async def watched_body() -> AsyncIterator[bytes]:
            async for piece in _pieces_of(body):
                half = len(piece) // 2
                yield piece[:half]
                come_by(IN_SEND)
                yield piece[half:]
            come_by(AFTER_SEND)

        come_by(BEFORE_SEND)
        answer = await post(self, path, query, headers, watched_body())
        come_by(AFTER_HEAD)
        return answer

    async def watched_piece(self: Answer) -> bytes | None:
        found = await piece(self)
        come_by(AFTER_LAST_BYTE if found is None else AFTER_FIRST_BYTE)
        return found

    Upstream.post = watched_post  # type: ignore[method-assign]
    Answer.piece = watched_piece  # type: ignore[method-assign]


async def _pieces_of(body: bytes | AsyncIterator[bytes]) -> AsyncIterator[bytes]:
    if isinstance(body, bytes):
        yield body
    else:
        async for piece in body:
            yield piece


def _watch_sweep(come_by: Come) -> None:
    overdue_booking = sweep.overdue_booking

    def watched(row: Row[Any]) -> Booking:
        come_by(IN_SWEEP)
        return overdue_booking(row)

    sweep.overdue_booking = watched
