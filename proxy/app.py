"""Wiring: settings become a running gateway. Nothing is decided here."""

from __future__ import annotations

import asyncio
import os
import socket
import sys
import tempfile
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from datetime import UTC, datetime
from pathlib import Path

import uvicorn
from prometheus_client import CollectorRegistry, ProcessCollector
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.supervisors import Multiprocess

from proxy import logs
from proxy.endpoints import make_endpoints
from proxy.errors import MethodNotAllowed
from proxy.exchange import Client, Desk, refuse
from proxy.gateway import Gateway
from proxy.keyring import Keyring
from proxy.ledger.engine import Database
from proxy.ledger.migrate import migrate
from proxy.ledger.teller import Teller
from proxy.metrics import MULTIPROCESS_DIR, Metrics
from proxy.prices import Operation, PriceCard
from proxy.server import make_config
from proxy.settings import Settings, load, load_card
from proxy.tokens import new_request_id
from proxy.upstream import Upstream

# The paths on the way of money, spelled so and not otherwise: another spelling of a path is another path.
PRICED: dict[bytes, Operation] = {b"/v1/images/generations": "generation", b"/v1/images/edits": "edit"}

# How long the last bookings may take when the process ends.
CLOSE_SECONDS = 10


def utc_now() -> datetime:
    """The clock of a running gateway."""
    return datetime.now(UTC)


class Application:
    """The ASGI application. The priced paths go straight to the gateway, everything else to Starlette."""

    def __init__(self, settings: Settings, card: PriceCard) -> None:
        self._settings = settings
        self._card = card
        registry = CollectorRegistry()
        ProcessCollector(registry=registry)
        self._metrics = Metrics(registry)
        self._database = Database(settings.database_url.get_secret_value())
        self._keyring = Keyring(self._database, utc_now, settings.revocation_seconds)
        self._gateway: Gateway | None = None
        self._rest: ASGIApp = make_endpoints(self._database, self._keyring, card, self._metrics, utc_now, self._lifespan)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        operation = PRICED.get(scope["raw_path"]) if scope["type"] == "http" else None
        if operation is None or self._gateway is None:
            await self._rest(scope, receive, send)
        elif scope["method"] != "POST":
            await refuse(Client(send, None), MethodNotAllowed("POST"), new_request_id(utc_now()))
        else:
            await self._gateway.handle(operation, scope, receive, send)

    @asynccontextmanager
    async def _lifespan(self, _app: object) -> AsyncIterator[None]:
        settings = self._settings
        assert settings.upstream_key is not None
        teller = Teller(self._database, utc_now, self._metrics)
        upstream = Upstream(settings.upstream_url)
        desk = Desk(
            card=self._card,
            teller=teller,
            upstream=upstream,
            upstream_key=settings.upstream_key.get_secret_value(),
            metrics=self._metrics,
            timeout_seconds=settings.upstream_timeout_seconds,
        )
        self._gateway = Gateway(
            desk,
            self._keyring,
            utc_now,
            aliases=settings.size_aliases,
            max_body_bytes=settings.max_body_bytes,
            spool_directory=Path(settings.state_dir) / "spool",
        )
        teller.start()
        try:
            yield
        finally:
            # Exchanges first, for they book; the teller next, for it writes; then what both used.
            await self._gateway.close()
            await teller.close(CLOSE_SECONDS)
            await upstream.close()
            self._database.close()


def from_environment() -> Application:
    """The application of a worker process, which finds its settings where its parent found them."""
    logs.configure(sys.stderr)
    settings = load(os.environ, Path.cwd())
    return Application(settings, load_card(settings))


class _Server(uvicorn.Server):
    """A server that says when it listens."""

    def __init__(self, config: uvicorn.Config, ready: Callable[[], None]) -> None:
        super().__init__(config)
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        await super().startup(sockets)
        if self.started:
            self._ready()


def serve(settings: Settings, ready: Callable[[str], None] = lambda _: None) -> int:
    """Run the gateway until it is told to stop; the exit status of the process.

    Migrates the database first. ``ready`` is called with the base URL once connections are accepted. Raises
    ``SettingsError``, ``SchemaError``, SQLAlchemy's errors, and ``OSError`` where the address can't be listened on.
    """
    card = load_card(settings)
    _migrate(settings)
    listener = _listen(settings.host, settings.port)
    base_url = _base_url(listener)
    if settings.workers == 1:
        config = make_config(Application(settings, card), settings.drain_seconds)
        server = _Server(config, lambda: ready(base_url))
        server.run(sockets=[listener])
        return 0 if server.started else 1
    config = make_config("proxy.app:from_environment", settings.drain_seconds, factory=True, workers=settings.workers)
    with tempfile.TemporaryDirectory(prefix="metrics-", dir=_state_dir(settings)) as directory:
        os.environ[MULTIPROCESS_DIR] = directory
        ready(base_url)
        Multiprocess(config, sockets=[listener]).run()
    return 0


@asynccontextmanager
async def running(settings: Settings, host: str, port: int) -> AsyncIterator[str]:
    """A gateway in this event loop; its base URL. Port 0 takes a free one."""
    card = load_card(settings)
    await asyncio.to_thread(_migrate, settings)
    listener = _listen(host, port)
    listening = asyncio.Event()
    server = _Server(make_config(Application(settings, card), settings.drain_seconds), listening.set)
    # The caller's own signal handlers stay in charge.
    task = asyncio.create_task(server._serve([listener]))
    waiting = asyncio.create_task(listening.wait())
    try:
        await asyncio.wait((task, waiting), return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            raise RuntimeError("the gateway did not start; the log says why") from task.exception()
        yield _base_url(listener)
    finally:
        waiting.cancel()
        server.should_exit = True
        await task


def _migrate(settings: Settings) -> None:
    database = Database(settings.database_url.get_secret_value())
    try:
        migrate(database)
    finally:
        database.close()


def _state_dir(settings: Settings) -> Path:
    settings.state_dir.mkdir(parents=True, exist_ok=True)
    return settings.state_dir


def _listen(host: str, port: int) -> socket.socket:
    family, _, _, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
    # The protocol is named, not left at 0: asyncio turns Nagle's delay off only for connections that say they are TCP.
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind(address)
        # Another process on the port is told now, and not after the workers have started.
        listener.listen(2048)
    except OSError:
        listener.close()
        raise
    listener.set_inheritable(True)
    return listener


def _base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    host = {"0.0.0.0": "127.0.0.1", "::": "[::1]"}.get(host, f"[{host}]" if ":" in host else host)  # noqa: S104
    return f"http://{host}:{port}/v1"
