"""Spans as OpenTelemetry has them, with the names of its conventions for generative AI. The only file that knows its SDK,
and loaded only where traces are asked for.

A span says who asked, what for, and what became of it, in words from closed sets. A prompt, a key, a file's name, a header or
a message never get into one.
"""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Mapping
from urllib.parse import urlsplit

import structlog
from opentelemetry import trace
from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.resources import OTELResourceDetector, Resource
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

from proxy import __version__
from proxy.headers import Headers, values
from proxy.ledger.accounts import KeyHolder
from proxy.ledger.decisions import Booking
from proxy.outcomes import Outcome
from proxy.prices import Operation, Order
from proxy.tracing import UNTRACED, Span, Tracer, Tracing

# The conventions' word for making things of any kind. Ours for what exactly is in `beanmeter.operation`.
OPERATION = "generate_content"
PROVIDER = "beansai"

# A parent takes 55 bytes, and a vendor's state has to get through up to 512; four of them may want to.
PARENT_BYTES_MAX = 512
STATE_BYTES_MAX = 2_048

# At the end of a process, its last spans are worth this much of waiting.
FLUSH_SECONDS = 5

# A receiver that is away fails every batch, for as long as it is away.
TROUBLE_SECONDS = 60

# How exchanges end that are not errors: all that was asked for, or a part of it with a proper end.
_WELL = {"delivered", "delivered_fewer"}

_ERROR = trace.Status(trace.StatusCode.ERROR)
_PROPAGATED = (b"traceparent", b"tracestate")
_propagator = TraceContextTextMapPropagator()

log = structlog.get_logger(__name__)


class OpenTelemetry(Tracing):
    """The SDK with its exporter, set up by its own variables: ``OTEL_EXPORTER_OTLP_ENDPOINT``, ``OTEL_SERVICE_NAME`` and so on.

    Spans wait in a queue of bounded length and are sent by a thread of the SDK's; what finds no room is dropped there.
    """

    def __init__(self) -> None:
        ours = {"service.name": "beanmeter", "service.version": __version__}
        # What the operator calls the service counts more than what we call it.
        resource = Resource.create(ours).merge(OTELResourceDetector().detect())
        processor = BatchSpanProcessor(OTLPSpanExporter())
        self._provider = TracerProvider(resource=resource, shutdown_on_exit=False)
        self._provider.add_span_processor(processor)
        self._tracer = self._provider.get_tracer("beanmeter", __version__)
        self._trouble = _Trouble()
        self._trouble.listen()

    def toward(self, upstream_url: str) -> Tracer:
        url = urlsplit(upstream_url)
        port = url.port or (443 if url.scheme == "https" else 80)
        return _Tracer(self._tracer, {"server.address": url.hostname or "", "server.port": port})

    async def close(self) -> None:
        # The SDK has no limit that can be set: its thread is left behind where the receiver does not answer.
        ending = threading.Thread(target=self._provider.shutdown, daemon=True)
        ending.start()
        await asyncio.to_thread(ending.join, FLUSH_SECONDS)
        if ending.is_alive():
            log.warning("traces_not_flushed", waited_seconds=FLUSH_SECONDS)
        self._trouble.leave()


class _Tracer(Tracer):
    def __init__(self, tracer: trace.Tracer, server: Mapping[str, str | int]) -> None:
        self._tracer = tracer
        self._always = {
            "gen_ai.operation.name": OPERATION,
            "gen_ai.provider.name": PROVIDER,
            "gen_ai.output.type": "image",
            **server,
        }

    def start(self, operation: Operation, headers: Headers, request_id: str) -> Span:
        span = self._tracer.start_span(
            OPERATION,
            context=_propagator.extract(_carrier(headers)),
            kind=trace.SpanKind.CLIENT,
            attributes={**self._always, "beanmeter.operation": operation, "beanmeter.request_id": request_id},
        )
        # There is none where OTEL_SDK_DISABLED says so.
        return _Exchange(span) if span.get_span_context().is_valid else UNTRACED


class _Exchange(Span):
    def __init__(self, span: trace.Span) -> None:
        context = span.get_span_context()
        self._span = span
        self._open = True
        self._ids = {
            "trace_id": trace.format_trace_id(context.trace_id),
            "span_id": trace.format_span_id(context.span_id),
        }

    @property
    def ids(self) -> Mapping[str, str]:
        return self._ids

    def headers(self, headers: Headers) -> Headers:
        carrier: dict[str, str] = {}
        _propagator.inject(carrier, trace.set_span_in_context(self._span))
        others = [(name, value) for name, value in headers if name not in _PROPAGATED]
        return [*others, *((name.encode("ascii"), value.encode("ascii")) for name, value in carrier.items())]

    def refused(self, code: str, *, status: int | None, team: str, order: Order | None) -> None:
        told: dict[str, str | int | bool] = {} if order is None else _asked(order)
        if team:
            told["beanmeter.team"] = team
        if status is not None:
            told["http.response.status_code"] = status
        self._end(order, told, code)

    def booked(self, holder: KeyHolder, order: Order, hold_micro_usd: int, booking: Booking) -> None:
        outcome = booking.outcome
        told: dict[str, str | int | bool] = {
            **_asked(order),
            "beanmeter.team": holder.team,
            "beanmeter.key_id": holder.key_id,
            "beanmeter.size": outcome.size,
            "beanmeter.quality": outcome.quality,
            "beanmeter.images_delivered": outcome.images_delivered,
            "beanmeter.outcome": outcome.state,
            "beanmeter.reason": outcome.reason,
            "beanmeter.hold_micro_usd": hold_micro_usd,
            "beanmeter.settled_micro_usd": outcome.settled_micro_usd,
            "beanmeter.reserved_micro_usd": outcome.reserved_micro_usd,
        }
        known = {
            "http.response.status_code": booking.upstream_status,
            "gen_ai.usage.input_tokens": booking.input_tokens,
            "gen_ai.usage.output_tokens": booking.output_tokens,
            "beanmeter.upstream_request_id": booking.upstream_request_id,
        }
        told.update({name: value for name, value in known.items() if value is not None})
        self._end(order, told, _error(outcome, booking.upstream_status))

    def close(self) -> None:
        self._end(None, {}, "_OTHER")

    def _end(self, order: Order | None, told: dict[str, str | int | bool], error: str | None) -> None:
        if not self._open:
            return
        self._open = False
        if order is not None:
            self._span.update_name(f"{OPERATION} {order.model}")
        if error is not None:
            told["error.type"] = error
            self._span.set_status(_ERROR)
        self._span.set_attributes(told)
        self._span.end()


def _carrier(headers: Headers) -> dict[str, list[str]]:
    """What names a parent, where it is one and of a bearable length. Two of them are none."""
    parents = values(headers, b"traceparent")
    if len(parents) != 1 or len(parents[0]) > PARENT_BYTES_MAX:
        return {}
    states = values(headers, b"tracestate")
    if sum(map(len, states)) > STATE_BYTES_MAX:
        states = []
    return {"traceparent": [parents[0].decode("latin-1")], "tracestate": [state.decode("latin-1") for state in states]}


def _asked(order: Order) -> dict[str, str | int | bool]:
    asked: dict[str, str | int | bool] = {
        "gen_ai.request.model": order.model,
        "beanmeter.size": order.size,
        "beanmeter.quality": order.quality,
        "beanmeter.images_requested": order.n,
    }
    # The conventions leave out what is usual.
    if order.n != 1:
        asked["gen_ai.request.choice.count"] = order.n
    if order.stream:
        asked["gen_ai.request.stream"] = True
    return asked


def _error(outcome: Outcome, status: int | None) -> str | None:
    """The kind of error, from a closed set: the status of an answer that is one, else what the books say of the end."""
    if status is not None and status >= 400:
        return str(status)
    return None if outcome.reason in _WELL else outcome.reason


class _Trouble(logging.Handler):
    """Says what the SDK has to say, once a minute at the most, with how often it was left unsaid."""

    def __init__(self) -> None:
        super().__init__(logging.WARNING)
        self._logger = logging.getLogger("opentelemetry")
        self._next = 0.0
        self._unsaid = 0

    def listen(self) -> None:
        self._logger.addHandler(self)
        self._logger.propagate = False

    def leave(self) -> None:
        self._logger.removeHandler(self)
        self._logger.propagate = True

    def emit(self, record: logging.LogRecord) -> None:
        if time.monotonic() < self._next:
            self._unsaid += 1
            return
        log.warning("traces_troubled", reason=record.getMessage(), unsaid=self._unsaid)
        self._next, self._unsaid = time.monotonic() + TROUBLE_SECONDS, 0
