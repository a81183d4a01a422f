"""What an operator can tell a running process by signals: end, end at once, read the settings anew. Signals are taken only
here."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import AsyncIterator, Callable
from typing import NamedTuple

import structlog

from proxy.prices import PriceCard
from proxy.settings import PREFIX, Settings, SettingsError, load_card

# What a process has opened when it starts, and can't exchange while it is in use.
FIXED = ("host", "port", "workers", "database_url", "state_dir", "traces")

log = structlog.get_logger(__name__)


class Terms(NamedTuple):
    """By what requests are served: the settings, and the price card that belongs to them."""

    settings: Settings
    card: PriceCard


class Signals:
    """The signals that have come, as events of one event loop."""

    def __init__(self) -> None:
        self.end = asyncio.Event()
        self.end_now = asyncio.Event()
        self.reread = asyncio.Event()

    def listen(self) -> None:
        """Take SIGTERM, SIGINT and SIGHUP from now on."""
        loop = asyncio.get_running_loop()
        loop.add_signal_handler(signal.SIGTERM, self.told_to_end)
        loop.add_signal_handler(signal.SIGINT, self.told_to_end)
        loop.add_signal_handler(signal.SIGHUP, self.reread.set)

    def told_to_end(self) -> None:
        """The first time, open exchanges may finish; the second time nobody wants to wait for them."""
        (self.end_now if self.end.is_set() else self.end).set()

    async def renewals(self, terms: Terms, read: Callable[[], Settings]) -> AsyncIterator[Terms]:
        """New terms, each time that the process is told to read its settings anew. What can't be used is logged, and
        changes nothing."""
        while True:
            await self.reread.wait()
            self.reread.clear()
            try:
                terms = await asyncio.to_thread(_renew, terms, read)
            except (SettingsError, OSError) as error:
                log.error("settings_refused", reason=str(error))
            else:
                log.info("settings_renewed", price_card=terms.card.version)
                yield terms


def _renew(terms: Terms, read: Callable[[], Settings]) -> Terms:
    settings = read()
    if settings.upstream_key is None:
        raise SettingsError(f"no upstream key: set {PREFIX}UPSTREAM_KEY")
    kept = {field: getattr(terms.settings, field) for field in FIXED}
    changed = [PREFIX + field.upper() for field in FIXED if getattr(settings, field) != kept[field]]
    if changed:
        log.warning("settings_not_changed", settings=changed, reason="they take effect when the gateway is started again")
    settings = settings.model_copy(update=kept)
    return Terms(settings, load_card(settings))
