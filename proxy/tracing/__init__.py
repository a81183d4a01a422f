"""Traces: one span an exchange, for whoever has the extra ``otel`` and asks for them. What stands here does nothing: it is
what an exchange is handed while nothing is traced. :mod:`proxy.tracing.spans` does the work.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping
from types import MappingProxyType

from proxy.headers import Headers
from proxy.ledger.accounts import KeyHolder
from proxy.ledger.decisions import Booking
from proxy.prices import Operation, Order
from proxy.settings import PREFIX, Settings, SettingsError

_NOTHING: Mapping[str, str] = MappingProxyType({})


class Span:
    """What is told of one exchange. It ends once, with the first of ``refused``, ``booked`` and ``close``."""

    @property
    def ids(self) -> Mapping[str, str]:
        """``trace_id`` and ``span_id`` for a log line; empty while nothing is traced."""
        return _NOTHING

    def headers(self, headers: Headers) -> Headers:
        """The request's headers for the upstream, with this span as the parent of what the upstream does."""
        return headers

    def refused(self, code: str, *, status: int | None, team: str, order: Order | None) -> None:
        """The gateway said no. ``order`` is ``None`` where the request was not read to its end."""

    def booked(self, holder: KeyHolder, order: Order, hold_micro_usd: int, booking: Booking) -> None:
        """The upstream was asked, and this is what goes to the books."""

    def close(self) -> None:
        """The exchange is over. A span that has not ended by now ends with an error that has no name."""


UNTRACED = Span()


class Tracer:
    """Starts spans of exchanges with one upstream."""

    def start(self, _operation: Operation, _headers: Headers, _request_id: str) -> Span:
        """The span of a request that has arrived with these headers; one that they name is its parent."""
        return UNTRACED


class Tracing:
    """What a process has for its traces, for as long as it serves."""

    def toward(self, _upstream_url: str) -> Tracer:
        """Spans for exchanges with that upstream."""
        return Tracer()

    async def close(self) -> None:
        """Hand over what is still here, for as long as that may take at the end of a process."""


def open_tracing(settings: Settings) -> Tracing:
    """Traces as the settings say. Raises :class:`SettingsError` where one of OpenTelemetry's own variables has a value that
    can't be used."""
    if not settings.traces:
        return Tracing()
    # Of an extra: most gateways have no such package.
    from proxy.tracing.spans import OpenTelemetry

    try:
        return OpenTelemetry()
    except ValueError as error:
        raise SettingsError(f"{PREFIX}TRACES = true: a variable OTEL_... has a value that can't be used: {error}") from None


def check_tracing(settings: Settings) -> None:
    """Raises what :func:`open_tracing` raises: before anything else is begun, and once, however many workers there are."""
    if settings.traces:
        asyncio.run(open_tracing(settings).close())
