"""Wiring: settings become a running gateway. Nothing is decided here."""

from __future__ import annotations

import asyncio
import gc
import os
import resource
import shutil
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import structlog
import uvloop
from prometheus_client import CollectorRegistry, ProcessCollector
from sqlalchemy.exc import SQLAlchemyError
from starlette.responses import PlainTextResponse
from starlette.types import Receive, Scope, Send

from proxy.door import Door
from proxy.endpoints import make_endpoints
from proxy.errors import MethodNotAllowed
from proxy.exchange import Client, Desk, refuse
from proxy.gateway import Gateway
from proxy.keyring import Keyring
from proxy.ledger.accounts import note_prices
from proxy.ledger.engine import Database
from proxy.ledger.journal import Journal
from proxy.ledger.migrate import migrate
from proxy.ledger.sweep import Sweeper
from proxy.ledger.teller import Teller
from proxy.metrics import Metrics
from proxy.prices import Operation, PriceCard
from proxy.server import BACKLOG, PATIENCE, Patience, Server
from proxy.settings import Settings, load, load_card
from proxy.signals import Signals, Terms
from proxy.supervisor import Supervisor
from proxy.tokens import new_request_id
from proxy.tracing import Tracing, check_tracing, open_tracing
from proxy.upstream import Upstream

# The paths on the way of money, spelled so and not otherwise: another spelling of a path is another path.
PRICED: dict[bytes, Operation] = {b"/v1/images/generations": "generation", b"/v1/images/edits": "edit"}

# Who asks whether to send requests here is told before the connections end.
READY = b"/readyz"

# Whoever else asks may have an answer whose booking is under way: it is waited for, so that what is shown has it, and no
# longer than a transaction takes.
UNWAITED = frozenset({READY, b"/livez"})
BOOKED_SECONDS = 0.5

# How long the last bookings may take when the process ends.
CLOSE_SECONDS = 10

# An open exchange has two connections, and many systems stop at a thousand until they are asked for more.
OPEN_FILES = 10_240

# Objects that may pile up before the collector looks at the new ones: what a few hundred requests leave.
GARBAGE_OBJECTS = 20_000

log = structlog.get_logger(__name__)


def utc_now() -> datetime:
    """The clock of a running gateway."""
    return datetime.now(UTC)


class _Shift:
    """Requests that begin by the same settings and prices. They also end by them, whatever is decided meanwhile."""

    def __init__(self, terms: Terms, database: Database, teller: Teller, metrics: Metrics, tracing: Tracing) -> None:
        settings, card = terms
        assert settings.upstream_key is not None
        keyring = Keyring(database, utc_now, settings.revocation_seconds)
        self._upstream = Upstream(settings.upstream_url)
        desk = Desk(
            card=card,
            teller=teller,
            upstream=self._upstream,
            upstream_key=settings.upstream_key.get_secret_value(),
            metrics=metrics,
            tracer=tracing.toward(settings.upstream_url),
            timeout_seconds=settings.upstream_timeout_seconds,
        )
        self._gateway = Gateway(
            desk,
            keyring,
            utc_now,
            aliases=settings.size_aliases,
            max_body_bytes=settings.max_body_bytes,
            spool_directory=Path(settings.state_dir) / "spool",
        )
        door = Door(None if settings.admin_token is None else settings.admin_token.get_secret_value())
        self.rest = make_endpoints(database, keyring, card, metrics, utc_now, door, settings.size_aliases, settings.openid)
        self._requests = 0
        self._quiet = asyncio.Event()

    async def handle(self, operation: Operation, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one ``POST`` of a priced path."""
        self._requests += 1
        self._quiet.clear()
        try:
            await self._gateway.handle(operation, scope, receive, send)
        finally:
            self._requests -= 1
            if not self._requests:
                self._quiet.set()

    async def finish(self) -> None:
        """Close once the last request is over. None may begin any more."""
        if self._requests:
            await self._quiet.wait()
        self._upstream.close()

    async def close(self) -> None:
        """End what is still open: what is known of it is booked."""
        try:
            await asyncio.wait_for(self._gateway.close(), CLOSE_SECONDS)
        except TimeoutError:
            log.critical("exchanges_not_booked", reason="the ledger did not take them in time; they come up for review")
        self._upstream.close()


class Application:
    """The ASGI application. The priced paths go straight to the gateway, everything else to Starlette."""

    def __init__(self, settings: Settings, card: PriceCard) -> None:
        self._terms = Terms(settings, card)
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._metrics = Metrics(registry)
        self._database = Database(settings.database_url.get_secret_value())
        self._leaving = False
        self._finishing: dict[_Shift, asyncio.Task[None]] = {}

    @property
    def settings(self) -> Settings:
        """The settings by which requests are served now."""
        return self._terms.settings

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = PRICED.get(scope["raw_path"])
        if operation is None:
            if scope["raw_path"] not in UNWAITED:
                await self._teller.settled(BOOKED_SECONDS)
            leaving = self._leaving and scope["raw_path"] == READY
            await (PlainTextResponse("the gateway is ending\n", 503) if leaving else self._shift.rest)(scope, receive, send)
        elif scope["method"] != "POST":
            await refuse(Client(send, None), MethodNotAllowed("POST"), new_request_id(utc_now()))
        else:
            try:
                await self._shift.handle(operation, scope, receive, send)
            except asyncio.CancelledError:
                # The exchange was ended with the process: it is booked, and its client knows.
                if not self._leaving:
                    raise
            except Exception:
                self._metrics.internal_errors.labels("request").inc()
                raise

    @asynccontextmanager
    async def open(self) -> AsyncIterator[None]:
        """What requests need: to be entered before the first, and left after the last."""
        journals = self._journals
        self._tracing = open_tracing(self.settings)
        self._teller = Teller(self._database, utc_now, self._metrics, Journal(journals), self._metrics.journal_entries.set)
        self._teller.start()
        self._begin()
        refused = self._metrics.refused_lately
        counting = asyncio.create_task(refused.run(self._database, utc_now))
        try:
            yield
        finally:
            self._sweeping.cancel()
            counting.cancel()
            await asyncio.wait((self._sweeping, self._noting), timeout=CLOSE_SECONDS)
            # Exchanges first, for they book; the teller next, for it writes; then what both used.
            for finishing in self._finishing.values():
                finishing.cancel()
            await asyncio.gather(*(shift.close() for shift in (self._shift, *self._finishing)))
            noting = asyncio.create_task(refused.note(self._database, utc_now))
            await asyncio.gather(
                self._teller.close(CLOSE_SECONDS), self._tracing.close(), asyncio.wait((noting,), timeout=CLOSE_SECONDS)
            )
            self._database.close()

    def adopt(self, terms: Terms) -> None:
        """Serve by other settings and prices from now on; what is open goes on by those that it began with."""
        former = self._shift
        finishing = self._finishing[former] = asyncio.create_task(former.finish())
        finishing.add_done_callback(lambda _: self._finishing.pop(former, None))
        self._sweeping.cancel()
        self._terms = terms
        self._begin()

    def leave(self) -> None:
        """Say that no more requests should come."""
        self._leaving = True

    def _begin(self) -> None:
        self._shift = _Shift(self._terms, self._database, self._teller, self._metrics, self._tracing)
        self._noting = asyncio.create_task(self._note_prices())
        sweeper = Sweeper(
            self._database, self._teller, utc_now, journals=self._journals, review_hours=self.settings.review_hours
        )
        self._sweeping = asyncio.create_task(sweeper.run())

    async def _note_prices(self) -> None:
        """Leave a trace of which prices are in force since when."""
        card = self._terms.card
        try:
            await self._database.change(
                lambda connection: note_prices(connection, card.version, card.fingerprint, now=utc_now(), actor="serve")
            )
        except (SQLAlchemyError, OSError) as error:
            # A gateway starts, and takes other prices, also while the ledger is away; the next start leaves the trace.
            log.warning("prices_not_noted", version=card.version, cause=type(error).__name__)

    @property
    def _journals(self) -> Path:
        return self.settings.state_dir / "journal"


@asynccontextmanager
async def serving(
    application: Application, listener: socket.socket, end_now: asyncio.Event, patience: Patience = PATIENCE
) -> AsyncIterator[None]:
    """The application on a listening socket. At the end of the block open exchanges may finish, for as long as the settings
    say and until ``end_now`` is set; what is open then is broken off, and booked as far as it is known."""
    server = Server(application, patience)
    try:
        async with application.open():
            await server.start(listener)
            try:
                yield
            finally:
                application.leave()
                if not await server.drain(application.settings.drain_seconds, end_now):
                    log.warning("exchanges_broken_off", reason="told to" if end_now.is_set() else "the time to drain is over")
    finally:
        await server.close()
        # Of an application that could not open: nobody has it then.
        listener.close()


@asynccontextmanager
async def running(settings: Settings, host: str, port: int, patience: Patience = PATIENCE) -> AsyncIterator[str]:
    """A gateway in this event loop; its base URL. Port 0 takes a free one. Signals are the caller's."""
    card = load_card(settings)
    await asyncio.to_thread(_migrate, settings)
    listener = _listen(host, port)
    base_url = _base_url(listener)
    async with serving(Application(settings, card), listener, asyncio.Event(), patience):
        yield base_url


def _read_environment() -> Settings:
    return load(os.environ, Path.cwd())


def serve(
    settings: Settings,
    ready: Callable[[str], None] = lambda _: None,
    read: Callable[[], Settings] = _read_environment,
) -> int:
    """Run the gateway until it is told to stop; the exit status of the process.

    Migrates the database first. ``ready`` is called with the base URL once requests are served. ``read`` reads the settings
    again on SIGHUP. Raises ``SettingsError``, ``SchemaError``, SQLAlchemy's errors, and ``OSError`` where the address can't
    be listened on.
    """
    _limit_process()
    terms = Terms(settings, load_card(settings))
    check_tracing(settings)
    _migrate(settings)
    listener = _listen(settings.host, settings.port)
    if settings.workers == 1:
        with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
            runner.run(_serve_alone(terms, listener, ready, read))
        return 0
    base_url = _base_url(listener)
    metrics = _empty(settings.state_dir / "metrics" / base_url.split("/")[2])
    try:
        return asyncio.run(Supervisor(terms, listener, metrics, lambda: ready(base_url)).run(read))
    finally:
        shutil.rmtree(metrics, ignore_errors=True)


async def _serve_alone(
    terms: Terms, listener: socket.socket, ready: Callable[[str], None], read: Callable[[], Settings]
) -> None:
    signals = Signals()
    signals.listen()
    application = Application(*terms)
    base_url = _base_url(listener)

    async def follow() -> None:
        async for renewed in signals.renewals(terms, read):
            application.adopt(renewed)

    async with serving(application, listener, signals.end_now):
        spare_collector()
        ready(base_url)
        following = asyncio.create_task(follow())
        await signals.end.wait()
        following.cancel()


def spare_collector() -> None:
    """Say that what is loaded by now stays: the garbage collector would look at all of it again and again, and whoever is
    being served would wait for that. For a process that serves and does nothing else."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(GARBAGE_OBJECTS, 20, 50)


def _limit_process() -> None:
    """What holds for this process and for those that it starts."""
    # A core file would hold keys and prompts.
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft != resource.RLIM_INFINITY:
        most = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
        resource.setrlimit(resource.RLIMIT_NOFILE, (max(soft, most), hard))


def _migrate(settings: Settings) -> None:
    database = Database(settings.database_url.get_secret_value())
    try:
        migrate(database)
    finally:
        database.close()


def _empty(directory: Path) -> Path:
    """An empty directory. Its name has the address in it, which nobody else listens on: what is in there is left over."""
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)
    return directory


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # The protocol is named, not left at 0: asyncio turns Nagle's delay off only for connections that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Another process on the port is told now, and not after the workers have started.
        listener.listen(BACKLOG)
    except OSError:
        listener.close()
        raise
    return listener


def _base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{host}:{port}/v1"
