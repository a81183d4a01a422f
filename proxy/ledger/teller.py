"""The one writer of a process: a thread that takes whatever is waiting into one transaction.

Callers on the event loop hand in a job and await its result. Nothing they do, leaving included, reaches the database work:
it happens in this thread alone. A booking that was handed in is carried out; a reservation can be withdrawn, and then
nothing stays held.
"""

from __future__ import annotations

import asyncio
import queue
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime
from typing import Literal, NamedTuple, Protocol

import structlog
from sqlalchemy import Connection
from sqlalchemy.exc import DataError, DBAPIError, IntegrityError, SQLAlchemyError

from proxy.ledger.books import post
from proxy.ledger.decisions import Booking, Decision, Reservation
from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.outcomes import unsent

Step = Literal["reserve", "book", "read"]

# One transaction stays short enough for the next process to have its turn at the same rows.
BATCH_JOBS_MAX = 256

# A booking that nobody waits for may wait so long for the next reservation, whose transaction takes it along: one sync in
# place of two.
COMPANY_SECONDS = 0.003

# What is not committed after so long is made safe in the journal, if nobody else sees to that; looked for as often as that.
SAFE_SECONDS = 0.5

# Beyond this many waiting reservations an answer would come too late to be of use.
WAITING_MAX = 10_000

# A transaction takes milliseconds. One that takes this long waits for a server that has frozen without closing its
# connections, which no time limit of the server's own can end.
FROZEN_SECONDS = 20.0

# What a disk may take at the end of a process whose database is stuck, to keep what is not booked; looked for as often as that.
LAST_SECONDS = 5.0
LOOK_SECONDS = 0.01

# A journal that is being written to can't be cleared; it is tried again, so often while nothing else is to be done.
CLEAR_SECONDS = 0.1

# Bookings that could not be written are tried again at these intervals, for as long as the process lives.
RETRY_SECONDS_FIRST = 0.1
RETRY_SECONDS_MAX = 2.0

log = structlog.get_logger(__name__)


class LedgerDown(Exception):
    """The books can't be written now. Of a reservation: nothing is held, and nothing may be sent."""


class Observer(Protocol):
    """Who is told how the books' transactions go."""

    def committed(self, step: Step, seconds: float) -> None:
        """A transaction with jobs of this step was committed after so many seconds."""

    def failed(self, step: Step) -> None:
        """A transaction with jobs of this step failed."""


@dataclass(slots=True)
class _Reserve:
    job: Reservation
    answer: asyncio.Future[Decision]


@dataclass(slots=True)
class _Book:
    job: Booking
    answer: asyncio.Future[None] | None = None
    journaled: bool = False
    # Where it is noted, and when it was, as the event loop tells the time: of a booking that nobody waits for.
    note: int | None = None
    left_at: float = 0.0


class Left(NamedTuple):
    """A booking that was left to the teller: whether a note outlives this process, told in the next turn of the event loop;
    and the same as of one that is waited for."""

    noted: asyncio.Future[bool]
    booked: asyncio.Future[None]


@dataclass(slots=True)
class _Batch:
    reserves: list[_Reserve] = field(default_factory=list)
    books: list[_Book] = field(default_factory=list)

    @property
    def steps(self) -> list[Step]:
        steps: list[Step] = ["reserve"] if self.reserves else []
        return [*steps, "book"] if self.books else steps

    def add(self, item: _Reserve | _Book) -> None:
        if isinstance(item, _Reserve):
            self.reserves.append(item)
        else:
            self.books.append(item)


class Teller:
    """Reserves and books for one event loop.

    ``clock`` gives the time of each transaction: what is reserved in it is reserved at that time. ``journal`` takes what
    can't be booked while the database is away, and ``unbooked`` is told how many outcomes wait for it.
    """

    def __init__(
        self,
        database: Database,
        clock: Callable[[], datetime],
        observer: Observer,
        journal: Journal | None = None,
        unbooked: Callable[[int], None] = lambda _: None,
    ) -> None:
        self._database = database
        self._journal = journal
        self._unbooked = unbooked
        self._clock = clock
        self._observer = observer
        self._waiting: queue.SimpleQueue[_Reserve | _Book | None] = queue.SimpleQueue()
        # Bookings that nobody waits for: to be noted at the end of this turn, and noted.
        self._unnoted: list[tuple[_Book, asyncio.Future[bool]]] = []
        self._unhurried: deque[_Book] = deque()
        self._hurrying: asyncio.TimerHandle | None = None
        self._securing: asyncio.Task[None] | None = None
        # The thread is on its way to what nobody waits for.
        self._woken = False
        self._unwritten: deque[_Book] = deque()
        # What was handed in to be booked and is not committed yet, by the identity of the job: one charge can have several,
        # such as its exchange's and the sweep's, and they may say different things.
        self._unbooked_yet: dict[int, _Book] = {}
        # The journal is written here, and in a thread of its own for whoever can't wait for this one. The event loop's own
        # threads have others to serve while a disk is stuck.
        self._journal_lock = threading.Lock()
        self._securing_thread = ThreadPoolExecutor(1, "teller-journal")
        self._uncleared = False
        self._connection: Connection | None = None
        self._writing_since = float("inf")
        self._retry_at = 0.0
        self._retry_seconds = RETRY_SECONDS_FIRST
        self._closing = False
        self._give_up_at = float("inf")
        self._thread = threading.Thread(target=self._run, name="teller", daemon=True)

    def start(self) -> None:
        """Start the thread; call from the event loop whose futures it will answer."""
        self._loop = asyncio.get_running_loop()
        self._thread.start()
        self._watch()

    def reserve(self, job: Reservation) -> asyncio.Future[Decision]:
        """Hold the amount against every budget that applies, and mark the charge as forwarded, in one commit.

        The future raises :class:`LedgerDown`. Whoever waits no longer calls :meth:`expire`, or :meth:`withdraw`.
        """
        item = _Reserve(job, self._loop.create_future())
        if self._closing or self._waiting.qsize() > WAITING_MAX:
            item.answer.set_exception(LedgerDown())
        else:
            self._waiting.put(item)
        return item.answer

    def expire(self, answer: asyncio.Future[Decision]) -> None:
        """Give a reservation up whose answer has taken too long: nothing stays held."""
        if not answer.done():
            answer.set_exception(LedgerDown())

    def withdraw(self, job: Reservation, answer: asyncio.Future[Decision]) -> None:
        """Take a reservation back that nothing was sent for: nothing stays held, whether it is committed by now or not."""
        if not answer.cancel() and not answer.cancelled() and answer.exception() is None:
            # It was committed, and answered at the very moment at which the waiting ended.
            self._let_go(job)

    @property
    def behind(self) -> bool:
        """Whether outcomes wait for the database: what is handed in now waits with them."""
        return bool(self._unwritten)

    def book(self, job: Booking) -> asyncio.Future[None]:
        """Write the end of an exchange; the future is done once it is committed, or safe in the journal until it can be."""
        answer: asyncio.Future[None] = self._loop.create_future()
        self._waiting.put(self._remember(_Book(job, answer)))
        return answer

    def leave(self, job: Booking) -> Left | None:
        """See to it that the end of an exchange is booked, whoever waits for that; ``None`` where somebody has to, since there
        is no place for notes, or the ledger is away.

        A note outlives this process. What could be noted goes along with the next reservation, or by itself after a moment;
        what could not is written at once.
        """
        if self._journal is None or self.behind or self._closing:
            return None
        left = Left(self._loop.create_future(), self._loop.create_future())
        if not self._unnoted:
            # One call for all that are left in this turn.
            self._loop.call_soon(self._note)
        self._unnoted.append((self._remember(_Book(job, left.booked)), left.noted))
        return left

    def _note(self) -> None:
        """On the loop: note what is left, and hand it on."""
        unnoted, self._unnoted = self._unnoted, []
        if not unnoted:
            return
        assert self._journal is not None
        failure: Exception | None = None
        notes: Sequence[int | None]
        try:
            notes = self._journal.note(item.job for item, _ in unnoted)
        except Exception as error:
            # Whatever it is, such as a moment without memory, each of them still has to be booked; then it is told.
            failure, notes = error, [None] * len(unnoted)
        now = self._loop.time()
        for (item, noted), note in zip(unnoted, notes, strict=True):
            if note is None:
                self._waiting.put(item)
            else:
                item.note, item.left_at = note, now
                self._unhurried.append(item)
            if not noted.done():
                noted.set_result(note is not None)
        if self._unhurried and self._hurrying is None:
            self._hurrying = self._loop.call_later(COMPANY_SECONDS, self._hurry)
        if failure is not None:
            log.error("not_noted", exc_info=failure)

    def _remember(self, item: _Book) -> _Book:
        self._unbooked_yet[id(item.job)] = item
        return item

    def _let_go(self, job: Reservation) -> None:
        """Have nothing held for a request that is not sent."""
        self._waiting.put(self._remember(_void(job)))

    def _hurry(self) -> None:
        """On the loop: have what nobody waits for written now."""
        if self._hurrying is not None:
            self._hurrying.cancel()
            self._hurrying = None
        if self._unhurried:
            self._wake()

    def _wake(self) -> None:
        if not self._woken:
            self._woken = True
            self._waiting.put(None)

    async def settled(self, seconds: float) -> None:
        """Wait until all that was handed in to be booked by now is committed or in the journal, but no longer than so long:
        who asks what the books say finds what this process has told its clients."""
        self._note()
        self._hurry()
        answers = [item.answer for item in list(self._unbooked_yet.values())]
        waiting = [answer for answer in answers if answer is not None and not answer.done()]
        if waiting:
            await asyncio.wait(waiting, timeout=seconds)

    async def secure(self, *jobs: Booking) -> None:
        """Write bookings that take their time to the journal now, beside the thread that may be stuck with them."""
        await self._loop.run_in_executor(self._securing_thread, self._secure, jobs)

    @property
    def _outstanding(self) -> int:
        """How many outcomes wait for the database: those that a transaction failed with, and those made safe beside one."""
        # The lists are copies: jobs are handed in meanwhile.
        waiting = [*list(self._unwritten), *(item for item in list(self._unbooked_yet.values()) if item.journaled)]
        return len({id(item.job) for item in waiting})

    async def close(self, timeout_seconds: float) -> None:
        """Write what is waiting, then stop: ``timeout_seconds`` at most, then :data:`LAST_SECONDS` for the disk."""
        self._note()
        self._give_up_at = time.monotonic() + timeout_seconds
        self._closing = True
        self._waiting.put(None)
        self._watching.cancel()
        if self._hurrying is not None:
            self._hurrying.cancel()
        await _ended(self._thread, timeout_seconds + 1)
        if self._journal is not None:
            await self._close_journal()
        self._securing_thread.shutdown(wait=False)

    async def _close_journal(self) -> None:
        assert self._journal is not None
        give_up_at = time.monotonic() + LAST_SECONDS
        if self._unbooked_yet:
            # The thread is stuck in the database, or has given up, or something came after its end. What it has not come to is
            # made safe without it, where the disk is not stuck as well.
            last = threading.Thread(target=self._secure_all, name="teller-last", daemon=True)
            last.start()
            await _ended(last, LAST_SECONDS)
        if self._thread.is_alive():
            # It may still write to the files: they are left to the end of the process.
            return
        while not self._journal_lock.acquire(blocking=False):
            if time.monotonic() > give_up_at:
                return
            await asyncio.sleep(LOOK_SECONDS)
        try:
            self._journal.close()
        finally:
            self._journal_lock.release()

    # In the thread

    def _run(self) -> None:
        while True:
            batch = self._gather()
            if batch.steps:
                self._write(batch)
            # Not before all of the batch has its place: what of it was written singly must not wipe out the rest.
            if batch.steps or self._uncleared:
                self._clear_journal()
            if self._closing and self._waiting.empty() and not self._unhurried:
                if not self._unwritten and not self._uncleared:
                    return
                if time.monotonic() > self._give_up_at:
                    self._confess()
                    return

    def _gather(self) -> _Batch:
        """What is waiting now, up to a batch; waits only while there is nothing to do, and adds no delay when idle."""
        batch = _Batch()
        try:
            item = self._waiting.get(timeout=self._patience())
            while True:
                # None only wakes. What nobody waits for any more is answered before its turn has come.
                if item is not None and not (isinstance(item, _Reserve) and item.answer.done()):
                    batch.add(item)
                if len(batch.reserves) + len(batch.books) >= BATCH_JOBS_MAX:
                    break
                item = self._waiting.get_nowait()
        except queue.Empty:
            pass
        # Before the rest is taken: whoever leaves a booking after that wakes this thread again.
        self._woken = False
        while self._unhurried and len(batch.books) < BATCH_JOBS_MAX:
            batch.books.append(self._unhurried.popleft())
        if self._unhurried:
            # More than there was room for: the next batch is theirs, whether or not anybody else comes.
            self._wake()
        if self._unwritten and time.monotonic() >= self._retry_at:
            while self._unwritten and len(batch.books) < BATCH_JOBS_MAX:
                batch.books.append(self._unwritten.popleft())
        return batch

    def _patience(self) -> float | None:
        if self._unwritten:
            return max(0.0, self._retry_at - time.monotonic())
        if self._closing:
            return 0.05
        return CLEAR_SECONDS if self._uncleared else None

    def _write(self, batch: _Batch, *, again: bool = True) -> None:
        started = time.perf_counter()
        self._writing_since = time.monotonic()
        committing = False
        try:
            with self._database.posting() as connection:
                self._connection = connection
                reservations = [item.job for item in batch.reserves]
                decisions = post(connection, reservations, [item.job for item in batch.books], self._clock())
                committing = True
        except (IntegrityError, DataError) as error:
            self._write_singly(batch, error)
        except (SQLAlchemyError, OSError) as error:
            if again and not committing and isinstance(error, DBAPIError) and error.connection_invalidated:
                # The database was restarted since the last transaction. Nothing of this one is written, and a new
                # connection may serve it.
                self._write(batch, again=False)
            else:
                self._fail(batch, error, committing=committing)
        except MemoryError as error:
            # It will pass, and says nothing against what was to be written.
            self._fail(batch, error, committing=committing)
        except Exception as error:
            # Such as a number that SQLite's driver can't pass on. Whatever it is, the thread must outlive it.
            self._write_singly(batch, error)
        else:
            self._retry_seconds = RETRY_SECONDS_FIRST
            self._forget(batch.books)
            for item in batch.reserves:
                if item.answer.done():
                    self._let_go(item.job)
            self._answer(batch, decisions)
            seconds = time.perf_counter() - started
            for step in batch.steps:
                self._tell(self._observer.committed, step, seconds)
        finally:
            self._connection = None
            self._writing_since = float("inf")

    def _forget(self, items: Sequence[_Book]) -> None:
        """They have come to their end: booked, or refused for good."""
        for item in items:
            self._unbooked_yet.pop(id(item.job), None)
        self._erase(items)

    def _erase(self, items: Iterable[_Book]) -> None:
        notes: list[int] = []
        for item in items:
            # Taken in one step: the journal's thread may come to it at the same time, and a place may be given back only once.
            note, item.note = item.note, None
            if note is not None:
                notes.append(note)
        if notes and self._journal is not None:
            self._journal.erase(notes)

    def _tell(self, observe: Callable[..., None], *what: object) -> None:
        try:
            observe(*what)
        except Exception:
            # Whoever counts can fail, such as on a full disk; the books go on.
            log.exception("not_observed")

    def _answer(self, batch: _Batch, decisions: Sequence[Decision]) -> None:
        answers = list(zip(batch.reserves, decisions, strict=True))
        done = [item.answer for item in batch.books if item.answer is not None]

        def deliver() -> None:
            for item, decision in answers:
                if item.answer.done():
                    # Given up since the commit; to let it go twice does no harm.
                    self._let_go(item.job)
                else:
                    item.answer.set_result(decision)
            for booked in done:
                if not booked.done():
                    booked.set_result(None)

        self._call(deliver)

    def _write_singly(self, batch: _Batch, error: Exception) -> None:
        """One job that can't be written must not keep the others of its batch out of the books."""
        if len(batch.reserves) + len(batch.books) > 1:
            # Bookings first, as in a batch: what they release has room again.
            for book in batch.books:
                self._write(_Batch(books=[book]))
            for reserve in batch.reserves:
                self._write(_Batch(reserves=[reserve]))
            return
        # The charge stays as it is, held, and comes up for review, where a person finds here what was to be booked.
        outcomes = [_told(item.job) for item in batch.books]
        log.critical("ledger_rejected", charges=_ids(batch), outcomes=outcomes, error=_cause(error))
        for step in batch.steps:
            self._tell(self._observer.failed, step)
        self._refuse(batch.reserves)
        self._forget(batch.books)
        self._answer(_Batch(books=batch.books), [])

    def _fail(self, batch: _Batch, error: Exception, *, committing: bool) -> None:
        log.error("ledger_unavailable", reservations=len(batch.reserves), bookings=len(batch.books), error=_cause(error))
        for step in batch.steps:
            self._tell(self._observer.failed, step)
        self._unwritten.extend(batch.books)
        if committing:
            # The commit may have happened though its answer was lost. Nothing is sent for these reservations, so
            # whatever of them is in the books is released once the database is back.
            for item in batch.reserves:
                self._unwritten.append(self._remember(_void(item.job)))
        self._retry_at = time.monotonic() + self._retry_seconds
        self._retry_seconds = min(RETRY_SECONDS_MAX, 2 * self._retry_seconds)
        self._refuse(batch.reserves)
        self._write_journal()

    def _write_journal(self) -> None:
        """Make safe what is unwritten; its exchanges are done then, whenever the database comes back."""
        self._tell(self._unbooked, self._outstanding)
        new = [item for item in self._unwritten if not item.journaled]
        if self._journal is None or not new:
            return
        with self._journal_lock:
            self._journalise(new)

    def _secure_all(self) -> None:
        with self._journal_lock:
            items = [item for item in list(self._unbooked_yet.values()) if not item.journaled]
            if items:
                self._journalise(items)

    def _secure(self, jobs: Sequence[Booking]) -> None:
        with self._journal_lock:
            found = [self._unbooked_yet.get(id(job)) for job in jobs]
            items = [item for item in found if item is not None and not item.journaled]
            if self._journal is not None and items:
                self._journalise(items)

    def _journalise(self, items: Sequence[_Book]) -> None:
        assert self._journal is not None
        try:
            self._journal.write([item.job for item in items])
        except OSError as error:
            # They are still in memory, and their exchanges wait on.
            log.critical("journal_not_written", outcomes=len(items), cause=error.strerror)
            return
        for item in items:
            item.journaled = True
        self._erase(items)
        self._tell(self._unbooked, self._outstanding)
        self._answer(_Batch(books=list(items)), [])

    def _clear_journal(self) -> None:
        """Empty the journal once all that was ever put into it is booked; later, where somebody is writing to it now. Its disk
        may be stuck, and those who wait for the database are not to wait for that."""
        if self._journal is None:
            return
        self._uncleared = not self._journal_lock.acquire(blocking=False)
        if self._uncleared:
            return
        try:
            # The list is a copy: jobs are handed in meanwhile.
            waiting = self._unwritten or any(item.journaled for item in list(self._unbooked_yet.values()))
            if self._journal.empty or waiting:
                return
            self._journal.clear()
        except OSError as error:
            # A replay of what is booked changes nothing.
            log.error("journal_not_cleared", cause=error.strerror)
        finally:
            self._journal_lock.release()
        self._tell(self._unbooked, 0)

    def _refuse(self, reserves: Sequence[_Reserve]) -> None:
        futures = [item.answer for item in reserves]

        def deliver() -> None:
            for future in futures:
                if not future.done():
                    future.set_exception(LedgerDown())

        if futures:
            self._call(deliver)

    def _watch(self) -> None:
        """On the loop: let go of a server that has frozen in the middle of a transaction, and make safe what waits for it."""
        self._watching = self._loop.call_later(SAFE_SECONDS, self._watch)
        connection = self._connection
        if time.monotonic() - self._writing_since > FROZEN_SECONDS and connection is not None:
            self._database.interrupt(connection)
            log.error("ledger_frozen", seconds=FROZEN_SECONDS)
        late = self._loop.time() - SAFE_SECONDS
        # The list is a copy: the thread takes out of it meanwhile.
        left = [item for item in list(self._unbooked_yet.values()) if item.note is not None and item.left_at < late]
        if left and (self._securing is None or self._securing.done()):
            self._securing = self._loop.create_task(self.secure(*(item.job for item in left)))

    def _call(self, deliver: Callable[[], None]) -> None:
        try:
            self._loop.call_soon_threadsafe(deliver)
        except RuntimeError:  # The loop is closed: nobody waits for an answer any more, and the books are written.
            pass

    def _confess(self) -> None:
        for item in (item for item in self._unwritten if not item.journaled and item.note is None):
            log.critical("booking_lost", **_told(item.job))


def _void(job: Reservation) -> _Book:
    """Lets go what may be held for a request that is not sent."""
    return _Book(Booking(job.charge_id, job.team_id, unsent(job.order)))


def _told(job: Booking) -> dict[str, object]:
    """A booking's outcome for the log."""
    outcome = job.outcome
    return {
        "charge": job.charge_id,
        "state": outcome.state,
        "settled_micro_usd": outcome.settled_micro_usd,
        "reserved_micro_usd": outcome.reserved_micro_usd,
        "images": outcome.images_delivered,
    }


async def _ended(thread: threading.Thread, seconds: float) -> None:
    """Wait until a thread has ended, but no longer than so long. To wait in one of the event loop's own threads would need one
    of these, and they may all be stuck."""
    give_up_at = time.monotonic() + seconds
    while thread.is_alive() and time.monotonic() < give_up_at:  # noqa: ASYNC110 -- a thread tells nobody of its end
        await asyncio.sleep(LOOK_SECONDS)


def _ids(batch: _Batch) -> list[str]:
    return [item.job.charge_id for item in batch.reserves] + [item.job.charge_id for item in batch.books]


def _cause(error: Exception) -> str:
    """The driver's own words, without the statement and its values."""
    return str(error.orig) if isinstance(error, DBAPIError) else type(error).__name__
