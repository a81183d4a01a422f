"""One exchange's life, from the hold to the books: reserve, send, relay, book. The only place that orders these steps.

It runs as a task of its own. The client's leaving, its slowness, or the end of the request that started it never reach it:
whatever was sent upstream is read to its end and booked.
"""

from __future__ import annotations

import asyncio
import re
import time
from collections.abc import Awaitable, Callable, MutableMapping
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol

import structlog

from proxy import headers
from proxy.errors import (
    SOURCE_HEADER,
    LedgerUnavailable,
    Refusal,
    UpstreamCredentials,
    UpstreamFailed,
    UpstreamUnreachable,
)
from proxy.ledger.accounts import KeyHolder
from proxy.ledger.decisions import (
    Admitted,
    Booking,
    Decision,
    Repeatable,
    Reservation,
)
from proxy.ledger.teller import LedgerDown, Left, Teller
from proxy.metrics import Metrics
from proxy.money import MICRO_PER_USD, format_usd
from proxy.orders import Reading
from proxy.outcomes import Outcome, answered, unanswered, unsent
from proxy.prices import Order, PriceCard
from proxy.refusals import refusal_of
from proxy.spool import Spool, spliced_size
from proxy.taps import Delivery, Tap, open_tap
from proxy.tracing import Span, Tracer
from proxy.upstream import Answer, BrokeOff, Unreachable, Upstream

Send = Callable[[MutableMapping[str, Any]], Awaitable[None]]

PATHS = {"generation": b"/images/generations", "edit": b"/images/edits"}

# A reader that takes nothing for so long is let go, so that the upstream, which has an end to come to, is not kept
# waiting until it breaks off itself.
STALLED_SECONDS = 60

# After this share of an exchange's time its reader is no longer waited for: the rest is for reading the upstream to its
# end. An answer that only its reader has slowed down would otherwise end in review.
READER_SHARE = 0.75

# A ledger that has not held the amount by then is away, whatever it does later.
HELD_SECONDS_MAX = 5

# An end that gives room back waits this long for the books, so that whoever has the answer finds the room there. Beyond that
# the outcome is made safe in the journal, and the client is not kept waiting for a database that is away.
BOOKED_FIRST_SECONDS = 0.5

log = structlog.get_logger(__name__)


class Link(Protocol):
    """The client's connection, where the server lets us at it."""

    @property
    def gone(self) -> bool:
        """Whether the client has left."""

    def hang_up(self) -> None:
        """End the connection so that the client sees a broken transfer; what was sent already still reaches it."""

    def answer(self, status: int, head: headers.Headers, body: bytes) -> bool:
        """Send a whole answer now, without waiting for anything; False, and nothing sent, where that can't be done."""


@dataclass(frozen=True, slots=True)
class Desk:
    """What every exchange works with."""

    card: PriceCard
    teller: Teller
    upstream: Upstream
    upstream_key: str
    metrics: Metrics
    tracer: Tracer
    timeout_seconds: float


class Request(NamedTuple):
    """A request that was read whole, checked and priced."""

    request_id: str
    holder: KeyHolder
    reading: Reading
    hold_micro_usd: int
    query: bytes
    headers: headers.Headers
    body: Spool
    repeat: Repeatable | None
    span: Span
    started: float

    @property
    def order(self) -> Order:
        return self.reading.order

    @property
    def charge_id(self) -> str:
        """The charge has the request's id under a name of its own."""
        return "chg" + self.request_id.removeprefix("req")


class Client:
    """The client's side of an exchange. Writing to one that has left does nothing."""

    __slots__ = ("_broken", "_head", "_link", "_send", "_writing_since", "started")

    def __init__(self, send: Send, link: Link | None) -> None:
        self._send = send
        self._link = link
        self._writing_since: float | None = None
        self._broken = False
        self._head: tuple[int, headers.Headers] | None = None
        self.started = False

    @property
    def gone(self) -> bool:
        """Whether the client is known to have left."""
        return self._link is not None and self._link.gone

    def start(self, status: int, head: headers.Headers) -> None:
        """Begin the answer. Its head goes out with what follows, or with :meth:`flush`."""
        self.started = True
        self._head = status, head

    async def flush(self) -> None:
        """Let the client have the head now: what follows may take its time."""
        head, self._head = self._head, None
        if head is not None:
            await self._timed({"type": "http.response.start", "status": head[0], "headers": head[1]})

    async def write(self, piece: bytes) -> None:
        await self.flush()
        await self._timed({"type": "http.response.body", "body": piece, "more_body": True})

    async def finish(self, piece: bytes = b"") -> None:
        if self._head is not None and self._link is not None and self._link.answer(*self._head, piece):
            self._head = None
            return
        await self.flush()
        await self._timed({"type": "http.response.body", "body": piece, "more_body": False})

    def hang_up(self) -> None:
        """Break the transfer off."""
        if self._link is not None:
            self._link.hang_up()

    async def _timed(self, message: dict[str, Any]) -> None:
        if self._broken:
            return
        # One clock reading a piece instead of one timer a piece: the exchange's watch looks at it now and then.
        self._writing_since = time.monotonic()
        try:
            await self._send(message)
        except Exception as error:
            # What can't be written to a client is the client's loss alone: the upstream is read on, and booked.
            self._broken = True
            log.warning("client_not_written", cause=type(error).__name__)
        self._writing_since = None

    def stalled_for(self) -> float:
        """For how many seconds the client has taken nothing of what is being written."""
        return 0.0 if self._writing_since is None else time.monotonic() - self._writing_since


async def refuse(client: Client, refusal: Refusal, request_id: str) -> None:
    """Answer with a refusal of the gateway's own."""
    body = refusal.body()
    identity = request_id.encode("ascii")
    head = [
        (b"content-type", b"application/json"),
        (b"content-length", b"%d" % len(body)),
        (b"x-request-id", identity),
        (b"x-beanmeter-request-id", identity),
        SOURCE_HEADER,
        *refusal.headers,
    ]
    client.start(refusal.status, head)
    await client.finish(body)


@dataclass(slots=True)
class _Seen:
    """What has been seen of the upstream's answer so far."""

    answer: Answer | None = None
    # The answer's end-to-end headers.
    head: headers.Headers = ()
    tap: Tap | None = None
    reached: bool = True
    # The body was read to its end. Where that is the end of the connection, a cut looks like an end.
    ended: bool = False
    last_piece: bytes = b""

    @property
    def ended_properly(self) -> bool:
        """The answer ended as it was framed, and the framing can tell an end from a cut."""
        return self.ended and self.answer is not None and self.answer.framing != "close"


class Exchange:
    """One priced request on its way. :meth:`run` it in ``task``, which nobody cancels but the end of the process."""

    def __init__(
        self, desk: Desk, request: Request, client: Client, loop: asyncio.AbstractEventLoop, task: asyncio.Task[Any]
    ) -> None:
        self._desk = desk
        self._request = request
        self._client = client
        self._loop = loop
        self._task = task
        self._seen = _Seen()
        self._watch: asyncio.TimerHandle | None = None
        self._sent_at = 0.0
        self._conversing = False
        self._expired = False
        self._let_go = False

    async def run(self) -> None:
        """Hold, send, relay, book. Returns when the charge is in the books, or with a refusal when nothing was held."""
        try:
            if self._client.gone:
                self._desk.metrics.refused(self._request.holder.team, "client_gone")
                self._tell_refused("client_gone", None)
                return
            decision = await self._reserve()
            if isinstance(decision, Admitted):
                await self._carry_out(decision)
            else:
                await self._refuse(refusal_of(decision))
        finally:
            self._request.body.close()
            self._request.span.close()

    async def _reserve(self) -> Decision | LedgerUnavailable:
        request, started = self._request, time.perf_counter()
        job = Reservation(
            charge_id=request.charge_id,
            request_id=request.request_id,
            team_id=request.holder.team_id,
            key_id=request.holder.key_id,
            order=request.order,
            hold_micro_usd=request.hold_micro_usd,
            price_card=self._desk.card.version,
            timeout_seconds=self._desk.timeout_seconds,
            repeat=request.repeat,
        )
        answer = self._desk.teller.reserve(job)
        patience = self._loop.call_later(HELD_SECONDS_MAX, self._desk.teller.expire, answer)
        try:
            return await answer
        except LedgerDown:
            return LedgerUnavailable()
        except asyncio.CancelledError:
            self._desk.teller.withdraw(job, answer)
            raise
        finally:
            patience.cancel()
            self._desk.metrics.overhead.labels("reserve").observe(time.perf_counter() - started)

    async def _carry_out(self, admitted: Admitted) -> None:
        """From here on the charge is in the books as forwarded: every way out of this function books its end."""
        inflight = self._desk.metrics.inflight.labels(self._request.order.operation)
        inflight.inc()
        cancelled: BaseException | None = None
        try:
            if self._client.gone:
                # It left while the hold was made. Nothing has been sent, so nothing has to be paid.
                self._seen.reached = False
            else:
                await self._converse(admitted)
        except asyncio.CancelledError as error:  # The process ends: what is known by now is booked first.
            cancelled = error
        except Exception:
            self._desk.metrics.internal_errors.labels("exchange").inc()
            log.exception("exchange_failed", request_id=self._request.request_id)
        try:
            outcome, delivery = self._conclude()
        except Exception:  # A reader that fails on an answer must not leave its charge open: a person looks at it.
            self._desk.metrics.internal_errors.labels("answer").inc()
            log.exception("answer_not_read", request_id=self._request.request_id)
            outcome, delivery = unanswered(self._request.reading.dearest, self._request.hold_micro_usd), Delivery()
        booking = self._booking(outcome, delivery)
        try:
            left, noted = None if admitted.counted else self._leave(booking), False
            try:
                noted = left is not None and await left.noted
            except asyncio.CancelledError as error:  # The process ends: the client gets its end once what was left is booked.
                cancelled = error
            booked = self._desk.teller.book(booking) if left is None else left.booked
            try:
                if noted:
                    await self._end(outcome, delivery)
            finally:
                self._tell(booking)
            if not noted:
                if not await self._done_within(booked, BOOKED_FIRST_SECONDS):
                    await self._desk.teller.secure(booking)
                await self._end(outcome, delivery)
                await booked
        finally:
            if self._watch is not None:
                self._watch.cancel()
            inflight.dec()
        if cancelled is not None:
            raise cancelled

    async def _done_within(self, future: asyncio.Future[Any], seconds: float) -> bool:
        """Wait until the future is done, or for so long. It is left as it is; asyncio's own ways cost several times as much."""
        waiting: asyncio.Future[None] = self._loop.create_future()

        def wake(*_: object) -> None:
            if not waiting.done():
                waiting.set_result(None)

        future.add_done_callback(wake)
        patience = self._loop.call_later(seconds, wake)
        try:
            await waiting
        finally:
            patience.cancel()
            future.remove_done_callback(wake)
        return future.done()

    async def _converse(self, admitted: Admitted) -> None:
        """Send the request and relay the answer, within the deadline of the whole exchange."""
        self._sent_at = time.monotonic()
        self._conversing = True
        self._watch = self._loop.call_later(self._patience / 2, self._look)
        try:
            self._seen.answer = answer = await self._post()
            try:
                await self._relay(answer, admitted)
            finally:
                answer.close()
        except Unreachable:
            self._seen.reached = False
        except BrokeOff as error:
            log.warning("upstream_broke_off", request_id=self._request.request_id, cause=str(error))
        except asyncio.CancelledError:
            # The watch's, at the deadline; unless the process ends as well.
            if not self._expired or self._task.uncancel():
                raise
            log.warning("upstream_broke_off", request_id=self._request.request_id, cause="TimeoutError")
        finally:
            self._conversing = False

    async def _post(self) -> Answer:
        request, upstream = self._request, self._desk.upstream
        operation, splice = request.order.operation, request.reading.splice
        head = headers.to_upstream(
            request.headers,
            host=upstream.host,
            key=self._desk.upstream_key,
            body_bytes=spliced_size(request.body.size, splice),
            request_id=request.request_id,
        )
        answer = await upstream.post(PATHS[operation], request.query, head, request.body.content(splice))
        # Whatever of the body is on disk has been sent, and an answer can take minutes.
        request.body.close()
        self._desk.metrics.upstream_responses.labels(operation, f"{answer.status // 100}xx").inc()
        if answer.status == 429:
            self._desk.metrics.upstream_rate_limited.labels(operation).inc()
        return answer

    async def _relay(self, answer: Answer, admitted: Admitted) -> None:
        """Pass the answer on, piece by piece as it comes. The last piece, where it is known to be the last, is kept for
        :meth:`_end`."""
        head = self._seen.head = headers.to_client(answer.headers)
        tap = self._seen.tap = open_tap(headers.value(head, b"content-type"), headers.value(head, b"content-encoding"))
        # The body of a 401 can echo the organisation's key, and its status says all that the books need.
        if answer.status == 401:
            return
        self._client.start(answer.status, [*head, *self._own_headers(admitted)])
        if not answer.arrived:
            await self._client.flush()
        operation = self._request.order.operation
        relayed, left = 0, answer.length
        while (piece := await answer.piece()) is not None:
            tap.feed(piece)
            if not relayed:
                self._desk.metrics.first_byte.labels(operation).observe(time.monotonic() - self._sent_at)
            relayed += len(piece)
            if left is not None and relayed == left:
                self._seen.last_piece = piece
            else:
                await self._client.write(piece)
        self._seen.ended = True
        self._desk.metrics.response_bytes.labels(operation).inc(relayed)

    def _own_headers(self, admitted: Admitted) -> list[tuple[bytes, bytes]]:
        own = [
            (b"x-beanmeter-request-id", self._request.request_id.encode("ascii")),
            (b"x-beanmeter-reserved-usd", format_usd(self._request.hold_micro_usd).encode("ascii")),
        ]
        if admitted.remaining_micro_usd is not None:
            own.append((b"x-beanmeter-remaining-usd", format_usd(admitted.remaining_micro_usd).encode("ascii")))
        return own

    def _conclude(self) -> tuple[Outcome, Delivery]:
        """What the exchange's end means for the charge."""
        seen, hold = self._seen, self._request.hold_micro_usd
        # What the upstream may have taken the request for: it answers to that, and bills it.
        order = self._request.reading.dearest
        if seen.answer is None or seen.tap is None:
            return unanswered(order, hold) if seen.reached else unsent(order), Delivery()
        delivery = seen.tap.finish(ended_properly=seen.ended_properly)
        return answered(self._desk.card, order, hold, seen.answer.status, delivery), delivery

    def _booking(self, outcome: Outcome, delivery: Delivery) -> Booking:
        answer, head = self._seen.answer, self._seen.head
        return Booking(
            charge_id=self._request.charge_id,
            team_id=self._request.holder.team_id,
            outcome=outcome,
            upstream_status=None if answer is None else answer.status,
            upstream_cost_micro_usd=_stated_cost(headers.value(head, b"x-request-cost-micro-usd")),
            upstream_request_id=_printable(headers.value(head, b"x-request-id")),
            input_tokens=delivery.usage.input_tokens if delivery.usage else None,
            output_tokens=delivery.usage.output_tokens if delivery.usage else None,
        )

    def _leave(self, booking: Booking) -> Left | None:
        """Leave the booking of an answer to the teller, so that its end need not wait: where nobody can tell the difference by
        what is refused, since what is booked is what was held and no budget has more room afterwards, nor by a kill, since the
        outcome is noted first. An exchange that counts against a limit is not left: its end makes room."""
        outcome = booking.outcome
        if outcome.settled_micro_usd + outcome.reserved_micro_usd < self._request.hold_micro_usd:
            return None
        return self._desk.teller.leave(booking) if self._seen.ended_properly else None

    async def _end(self, outcome: Outcome, delivery: Delivery) -> None:
        """Let the client have the end that the upstream's answer had: a whole one, a broken one, or a refusal of ours."""
        seen = self._seen
        if not self._client.started:
            if not self._client.gone:
                await self._refuse(self._failure())
        elif seen.ended_properly or self._looks_whole(outcome, delivery):
            await self._client.finish(seen.last_piece)
        else:
            await self._client.write(seen.last_piece)
            self._client.hang_up()

    def _looks_whole(self, outcome: Outcome, delivery: Delivery) -> bool:
        """Of an answer that ends with its connection: whether all that was to come has come."""
        answer, tap = self._seen.answer, self._seen.tap
        if answer is None or tap is None or not self._seen.ended:
            return False
        if answer.status >= 300 or delivery.complete:
            return True
        return not tap.reads_document and outcome.images_delivered >= self._request.reading.dearest.n

    def _failure(self) -> Refusal:
        if not self._seen.reached:
            return UpstreamUnreachable()
        answer = self._seen.answer
        return UpstreamCredentials() if answer is not None and answer.status == 401 else UpstreamFailed()

    def _tell(self, booking: Booking) -> None:
        """Count an exchange that has ended, and log it."""
        try:
            self._count(booking)
        except Exception:  # Such as a full disk under the metrics of several workers: the client still gets its end.
            log.exception("exchange_not_counted", request_id=self._request.request_id)

    def _count(self, booking: Booking) -> None:
        """Metrics, and the one log line of an exchange."""
        metrics, request, outcome = self._desk.metrics, self._request, booking.outcome
        order, team, seconds = request.order, request.holder.team, time.perf_counter() - request.started
        metrics.requests.labels(team, order.operation, outcome.state).inc()
        metrics.duration.labels(order.operation, outcome.state).observe(seconds)
        image = (team, order.model, order.operation, outcome.size, outcome.quality)
        if outcome.images_delivered:
            metrics.images.labels(*image).inc(outcome.images_delivered)
            metrics.spend.labels(*image).inc(outcome.settled_micro_usd / MICRO_PER_USD)
        if outcome.settled_micro_usd > request.hold_micro_usd:
            metrics.overrun.inc()
            log.error("overrun", request_id=request.request_id, team=team, held_micro_usd=request.hold_micro_usd)
        if outcome.state != "review" and booking.upstream_cost_micro_usd not in (None, outcome.settled_micro_usd):
            metrics.cost_mismatch.inc()
            log.error("cost_mismatch", request_id=request.request_id, stated_micro_usd=booking.upstream_cost_micro_usd)
        log.info(
            "exchange",
            request_id=request.request_id,
            team=team,
            key_id=request.holder.key_id,
            operation=order.operation,
            model=order.model,
            size=outcome.size,
            quality=outcome.quality,
            stream=order.stream,
            state=outcome.state,
            reason=outcome.reason,
            images=outcome.images_delivered,
            settled_micro_usd=outcome.settled_micro_usd,
            reserved_micro_usd=outcome.reserved_micro_usd,
            upstream_status=booking.upstream_status,
            seconds=round(seconds, 4),
            **request.span.ids,
        )
        request.span.booked(request.holder, order, request.hold_micro_usd, booking)

    async def _refuse(self, refusal: Refusal) -> None:
        request = self._request
        self._desk.metrics.refused(request.holder.team, refusal.code)
        team, ids = request.holder.team, request.span.ids
        log.info("refused", request_id=request.request_id, team=team, code=refusal.code, status=refusal.status, **ids)
        self._tell_refused(refusal.code, refusal.status)
        await refuse(self._client, refusal, request.request_id)

    def _tell_refused(self, code: str, status: int | None) -> None:
        request = self._request
        request.span.refused(code, status=status, team=request.holder.team, order=request.order)

    def _look(self) -> None:
        """Look after time: end the conversation at its deadline, and let a reader go that takes nothing any more, or too slowly
        for what is left of it. Looks twice within the time that a reader is given."""
        left = self._sent_at + self._desk.timeout_seconds - time.monotonic()
        again = self._patience / 2
        self._watch = self._loop.call_later(min(again, left) if left > 0 else again, self._look)
        if left <= 0 and self._conversing and not self._expired:
            self._expired = True
            self._task.cancel()
        if not self._let_go:
            late = left < (1 - READER_SHARE) * self._desk.timeout_seconds
            waited = self._client.stalled_for()
            if waited > self._patience or (late and waited > 0):
                log.warning("reader_stalled", request_id=self._request.request_id)
                self._client.hang_up()
                self._let_go = True

    @property
    def _patience(self) -> float:
        """How many seconds a reader may take nothing: so few that there is time to look more than once."""
        return min(STALLED_SECONDS, self._desk.timeout_seconds / 4)


def _stated_cost(value: bytes | None) -> int | None:
    """What the upstream says that the request cost, in micro-USD; ``None`` where it says nothing that can be read."""
    return int(value) if value is not None and re.fullmatch(rb"[0-9]{1,15}", value) else None


def _printable(value: bytes | None) -> str | None:
    """An id of the upstream's, cut to what a column should hold."""
    if value is None or not re.fullmatch(rb"[!-~]{1,256}", value):
        return None
    return value[:128].decode("ascii")
