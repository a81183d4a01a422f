"""Several workers on one socket: starts them, starts again what died, hands them new settings, and ends them. The only file
that starts processes.

Each worker has a line to its supervisor. Terms go down it, a byte comes up when the worker serves, and the end of the line
is the word to end: so a worker ends in the same way whether its supervisor tells it to or is itself gone.
"""

from __future__ import annotations

import asyncio
import os
import pickle
import signal
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import structlog

from proxy.metrics import forget_gauges
from proxy.settings import Settings
from proxy.signals import Signals, Terms

# A worker that died is replaced at once, for requests wait. One that dies again and again must not keep a processor busy.
PAUSE_SECONDS_FIRST = 0.1
PAUSE_SECONDS_MAX = 10

# Who has lived for this long did not die of its start, which takes a second; whatever killed it, requests wait.
STEADY_SECONDS = 3

# Where none of the workers has ever served after so many starts each, another start won't help.
STARTS_MAX = 2

# Beyond the time to drain: what a worker takes to book what it breaks off, with a database that answers slowly.
MARGIN_SECONDS = 30

SERVING = b"+"

# The size of what follows, in four bytes.
_SIZE_BYTES = 4

log = structlog.get_logger(__name__)


@dataclass(eq=False, slots=True)
class _Worker:
    process: asyncio.subprocess.Process
    line: asyncio.StreamWriter
    answers: asyncio.StreamReader


class Supervisor:
    """Keeps as many workers as the settings say. ``metrics`` is their directory; ``ready`` is called when the first serves."""

    def __init__(self, terms: Terms, listener: socket.socket, metrics: Path, ready: Callable[[], None]) -> None:
        self._terms = terms
        self._listener = listener
        self._metrics = metrics
        self._ready = ready
        self._workers: set[_Worker] = set()
        self._served = False
        self._starts_in_vain = 0
        self._signals = Signals()
        self._ending = asyncio.Event()

    async def run(self, read: Callable[[], Settings]) -> int:
        """Work until told to end; the exit status. ``read`` reads the settings again."""
        self._signals.listen()
        keeping = [asyncio.create_task(self._keep(number)) for number in range(self._terms.settings.workers)]
        following = asyncio.create_task(self._follow(read))
        told = asyncio.create_task(self._signals.end.wait())
        hopeless = asyncio.create_task(self._ending.wait())
        await asyncio.wait((told, hopeless), return_when=asyncio.FIRST_COMPLETED)
        status = 0 if told.done() else 1
        for task in (following, told, hopeless):
            task.cancel()
        await self._end(keeping)
        return status

    async def _keep(self, number: int) -> None:
        """One worker after the other, under one number."""
        pause = PAUSE_SECONDS_FIRST
        while not self._ending.is_set():
            began = time.monotonic()
            try:
                status = await self._employ(number)
            except OSError as error:
                log.error("worker_not_started", number=number, cause=error.strerror)
            else:
                if not self._ending.is_set():
                    log.error("worker_died", number=number, status=status)
            if not self._served:
                self._starts_in_vain += 1
            if self._starts_in_vain >= STARTS_MAX * self._terms.settings.workers:
                log.critical("workers_not_starting", reason="none has ever served; the lines above say why")
                self._ending.set()
                return
            if time.monotonic() - began > STEADY_SECONDS:
                pause = PAUSE_SECONDS_FIRST
            try:
                await asyncio.wait_for(self._ending.wait(), pause)
            except TimeoutError:
                pause = min(2 * pause, PAUSE_SECONDS_MAX)

    async def _employ(self, number: int) -> int:
        """One worker from its start to its death; its exit status, negative for a signal's number."""
        worker = await self._start(number)
        log.info("worker_started", number=number, pid=worker.process.pid)
        # Nothing is awaited between these two: new terms that come meanwhile must not pass the worker by.
        worker.line.write(_letter(self._terms))
        self._workers.add(worker)
        if self._ending.is_set():
            worker.line.close()
        if await _serves(worker) and not self._served:
            self._served = True
            self._ready()
        status = await worker.process.wait()
        self._workers.discard(worker)
        worker.line.close()
        forget_gauges(self._metrics, number)
        return status

    async def _start(self, number: int) -> _Worker:
        ours, theirs = socket.socketpair()
        handed_on = (self._listener.fileno(), theirs.fileno())
        try:
            process = await asyncio.create_subprocess_exec(
                sys.executable,
                "-P",
                "-m",
                "proxy.worker",
                *map(str, (number, *handed_on, self._metrics)),
                stdin=asyncio.subprocess.DEVNULL,
                pass_fds=handed_on,
                # The worker runs this very program, wherever that was found.
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
            )
        except OSError:
            ours.close()
            raise
        finally:
            theirs.close()
        answers, line = await asyncio.open_connection(sock=ours)
        return _Worker(process, line, answers)

    async def _follow(self, read: Callable[[], Settings]) -> None:
        async for terms in self._signals.renewals(self._terms, read):
            self._terms = terms
            for worker in self._workers:
                worker.line.write(_letter(terms))

    async def _end(self, keeping: list[asyncio.Task[None]]) -> None:
        """End all workers: the time to drain first, then the hard way."""
        self._ending.set()
        # As long as anybody has the socket open, connections are accepted that nobody will serve.
        self._listener.close()
        for worker in self._workers:
            worker.line.close()
        hurrying = asyncio.create_task(self._hurry())
        await asyncio.wait(keeping, timeout=self._terms.settings.drain_seconds + MARGIN_SECONDS)
        hurrying.cancel()
        for worker in self._workers:
            log.critical("worker_killed", pid=worker.process.pid, reason="it did not end in time")
            _signal(worker, signal.SIGKILL)
        await asyncio.gather(*keeping)

    async def _hurry(self) -> None:
        await self._signals.end_now.wait()
        for worker in self._workers:
            # It is ending already: to be told once more means at once.
            _signal(worker, signal.SIGTERM)


async def receive(line: asyncio.StreamReader) -> Terms | None:
    """What the supervisor sends next; ``None`` once it sends no more."""
    try:
        size = int.from_bytes(await line.readexactly(_SIZE_BYTES), "big")
        terms: Terms = pickle.loads(await line.readexactly(size))  # noqa: S301 - nobody but the supervisor has the other end
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    return terms


async def _serves(worker: _Worker) -> bool:
    """Whether the worker comes to serve; waits until it does, or has died."""
    try:
        return await worker.answers.read(1) == SERVING
    except ConnectionError:  # It died before it had read its terms.
        return False


def _letter(terms: Terms) -> bytes:
    data = pickle.dumps(terms)
    return len(data).to_bytes(_SIZE_BYTES, "big") + data


def _signal(worker: _Worker, number: signal.Signals) -> None:
    try:
        worker.process.send_signal(number)
    except ProcessLookupError:
        pass
