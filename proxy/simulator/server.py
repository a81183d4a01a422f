"""The simulated BeansAI as a server: who may ask, which path does what, and one exchange from its request to its end."""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import signal
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any, Literal

import uvloop

from proxy.simulator.answers import Headers, Make, Plan, Step, make_for, plan, plan_fault, plan_ordered_fault
from proxy.simulator.asks import read_ask
from proxy.simulator.bills import Arrival, Arrivals, Bill, Entry
from proxy.simulator.directives import read_directives
from proxy.simulator.faults import Fault, ordered_fault, wrong_key
from proxy.simulator.options import SimulatorOptions
from proxy.simulator.pictures import EDGE_PIXELS_MAX, SEEDS, picture
from proxy.simulator.wire import Refused, Request, RequestReader, Wire

_OPERATIONS: dict[str, Literal["generation", "edit"]] = {"/v1/images/generations": "generation", "/v1/images/edits": "edit"}

_MODELS = "/v1/models"

_picture_path = re.compile(r"/simulator/pictures/([1-9][0-9]{0,3})x([1-9][0-9]{0,3})/([0-9]{1,2})\.png", re.ASCII)

# A gateway opens a connection for every paid request; bursts of them must not be refused.
_BACKLOG = 2048

# When the model's entry in the list says that it was made, in Unix time; any constant would do.
_MODEL_CREATED = 1_760_000_000


class Simulator:
    """A running simulated BeansAI. Made by :func:`running_simulator`."""

    def __init__(self, options: SimulatorOptions) -> None:
        self.options = options
        self.host = ""
        self.port = 0
        self._bill = Bill(options.log_max)
        self._arrivals = Arrivals(options.log_max)
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def base_url(self) -> str:
        """What an SDK takes as its ``base_url``: ``http://HOST:PORT/v1``."""
        return f"http://{self.host}:{self.port}/v1"

    def bill(self) -> dict[str, Any]:
        """``{"total_micro_usd", "entries": [...]}``, as ``GET /simulator/bill`` answers. See :class:`.bills.Entry`."""
        return self._bill.as_dict()

    def requests(self) -> list[dict[str, Any]]:
        """Every request that came under ``/v1``, oldest first, as ``GET /simulator/requests`` answers."""
        return self._arrivals.as_list()

    def reset(self) -> None:
        """Clears the bill and the log. What is being made belongs to the time before, and is on no bill after."""
        self._bill.clear()
        self._arrivals.clear()

    async def start(self, host: str, port: int) -> None:
        self._server = await asyncio.start_server(self._accept, host, port, backlog=_BACKLOG)
        self.host, self.port = self._server.sockets[0].getsockname()[:2]

    async def close(self) -> None:
        """Stops listening and drops every connection, whatever is under way on it."""
        if self._server is not None:
            self._server.close()
        for connection in self._connections:
            connection.cancel()
        await asyncio.gather(*self._connections, return_exceptions=True)

    def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
        self._connections.add(task)
        task.add_done_callback(self._connections.discard)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, request by request, until either side has had enough."""
        wire = Wire(reader, writer)
        requests = RequestReader(reader, wire, self.options.body_bytes_max, self._arrived)
        try:
            while await self._serve_next(requests, wire):
                pass
            await wire.end("close")
        except (OSError, TimeoutError):
            pass
        finally:
            writer.transport.abort()

    async def _serve_next(self, requests: RequestReader, wire: Wire) -> bool:
        """Answers the connection's next request, if there is one; whether another can follow."""
        try:
            async with asyncio.timeout(self.options.idle_seconds):
                request = await requests.next()
        except Refused as refused:
            fault = Fault(refused.status, "The request is too large, or not HTTP.", code="not_http")
            await _send_whole(wire, plan_fault(fault), keep_alive=False)
            return False
        if request is None:
            return False
        if request.arrival.path.startswith("/v1"):
            return await self._exchange(request, wire)
        await _send_whole(wire, self._inside(request.arrival), keep_alive=request.keep_alive)
        return request.keep_alive

    def _arrived(self, arrival: Arrival) -> None:
        if arrival.path.startswith("/v1"):
            self._arrivals.add(arrival)

    async def _exchange(self, request: Request, wire: Wire) -> bool:
        """Answers a request under ``/v1``; whether another can follow on its connection."""
        arrival = request.arrival
        request_id = f"req_{secrets.token_hex(16)}"
        try:
            answer, make = self._answer(request)
        except Fault as fault:
            answer, make = plan_fault(fault), None
        # The picture can take minutes, and the body is no longer needed.
        request.body = bytearray()
        if not request.keep_alive and answer.ending == "proper" and answer.framing != "close":
            answer = replace(answer, headers=(*answer.headers, ("connection", "close")))
        await self._perform(answer, make, arrival, request_id, wire)
        if answer.ending != "proper":
            await wire.end(answer.ending, self.options.silent_seconds)
            return False
        return request.keep_alive and answer.framing != "close"

    async def _perform(self, answer: Plan, make: Make | None, arrival: Arrival, request_id: str, wire: Wire) -> None:
        """Makes, bills and sends an answer, step by step. Making and billing go on when the client has left."""
        begun = time.monotonic()
        entry: Entry | None = None
        left = answer.cut_bytes

        async def send_head() -> None:
            arrival.status = answer.status
            elapsed_ms = int((time.monotonic() - begun) * 1000)
            own = (("x-request-id", request_id), ("openai-processing-ms", str(elapsed_ms)))
            await _send_head(wire, answer, own)

        if answer.head_first:
            await send_head()
        for number, step in enumerate(answer.steps):
            if step.delay_seconds:
                await asyncio.sleep(step.delay_seconds)
            if make is not None and step.images:
                entry = entry or self._open_entry(make, arrival, request_id)
                entry.images += step.images
                entry.micro_usd += step.images * make.image_micro_usd
            if answer.status is None:
                return
            if number == 0 and not answer.head_first:
                await send_head()
            for piece in step.pieces:
                sent = piece[:left]
                await wire.send_body(sent)
                left = None if left is None else left - len(sent)
            if left == 0:
                return
        await wire.finish_body()

    def _open_entry(self, make: Make, arrival: Arrival, request_id: str) -> Entry:
        return self._bill.open(
            request_id=request_id,
            client_request_id=arrival.header("x-beanmeter-request-id"),
            operation=make.ask.operation,
            model=make.ask.model,
            size=make.size,
            quality=make.quality,
        )

    def _answer(self, request: Request) -> tuple[Plan, Make | None]:
        """The answer for a request under ``/v1``, and what is made for it. Raises :class:`Fault`."""
        arrival = request.arrival
        is_models = arrival.path == _MODELS or arrival.path.startswith(f"{_MODELS}/")
        operation = _OPERATIONS.get(arrival.path)
        if operation is None and not is_models:
            raise Fault(404, f"Invalid URL ({arrival.method} {arrival.path})", code="unknown_url")
        key = self._check_key(arrival)
        if arrival.method != ("GET" if operation is None else "POST"):
            raise Fault(405, f"Not allowed to {arrival.method} on {arrival.path}.", code="method_not_allowed")
        if operation is None:
            return _json(200, self._models(arrival.path.removeprefix(_MODELS).removeprefix("/"))), None
        ask = read_ask(operation, arrival.header("content-type") or "", bytes(request.body), self.options.card)
        host = arrival.header("host") or f"{self.host}:{self.port}"
        directives = read_directives(ask.prompt)
        make = make_for(ask, directives, self.options, host=host, created=int(time.time()))
        if directives.error is not None:
            return plan_ordered_fault(ordered_fault(directives.error, key), make), make
        return plan(make), make

    def _check_key(self, arrival: Arrival) -> str:
        scheme, _, key = (arrival.header("authorization") or "").partition(" ")
        expected = self.options.key
        is_right = key.startswith("sk-beans-") if expected is None else key == expected
        if scheme.lower() != "bearer" or not is_right:
            raise wrong_key(key)
        return key

    def _models(self, name: str) -> dict[str, Any]:
        models = [
            {"id": model, "object": "model", "created": _MODEL_CREATED, "owned_by": "beansai"}
            for model in self.options.card.models
        ]
        if not name:
            return {"object": "list", "data": models}
        if name not in self.options.card.models:
            raise Fault(404, f"The model '{name}' does not exist.", param="model", code="model_not_found")
        return next(model for model in models if model["id"] == name)

    def _inside(self, arrival: Arrival) -> Plan:
        """The answer on a path of the simulator's own, which no upstream has."""
        asked = (arrival.method, arrival.path)
        if asked == ("GET", "/simulator/bill"):
            return _json(200, self.bill())
        if asked == ("GET", "/simulator/requests"):
            return _json(200, self.requests())
        if asked == ("POST", "/simulator/reset"):
            self.reset()
            return _json(200, {})
        match = _picture_path.fullmatch(arrival.path)
        if match is None or arrival.method != "GET":
            return plan_fault(Fault(404, f"Invalid URL ({arrival.method} {arrival.path})", code="unknown_url"))
        width, height, seed = (int(group) for group in match.groups())
        data = picture(min(width, EDGE_PIXELS_MAX), min(height, EDGE_PIXELS_MAX), seed % SEEDS)
        return Plan(200, (("content-type", "image/png"),), (Step(pieces=(data,)),))


def _json(status: int, value: object) -> Plan:
    return Plan(status, (("content-type", "application/json"),), (Step(pieces=(json.dumps(value).encode(),)),))


async def _send_head(wire: Wire, answer: Plan, own: Headers) -> None:
    assert answer.status is not None
    # A body that is cut only after its last byte would otherwise have ended well.
    beyond = 1 if answer.cut_bytes == answer.body_bytes else 0
    await wire.send_head(answer.status, (*own, *answer.headers), answer.framing, answer.body_bytes + beyond)


async def _send_whole(wire: Wire, answer: Plan, *, keep_alive: bool) -> None:
    await _send_head(wire, answer, () if keep_alive else (("connection", "close"),))
    for step in answer.steps:
        for piece in step.pieces:
            await wire.send_body(piece)
    await wire.finish_body()


@asynccontextmanager
async def running_simulator(
    options: SimulatorOptions | None = None, *, host: str = "127.0.0.1", port: int = 0
) -> AsyncIterator[Simulator]:
    """A simulator that listens while the block runs; port 0 takes a free one. Raises ``OSError`` if it can't listen."""
    simulator = Simulator(options or SimulatorOptions())
    await simulator.start(host, port)
    try:
        yield simulator
    finally:
        await simulator.close()


def run_simulator(
    options: SimulatorOptions | None = None,
    *,
    host: str = "127.0.0.1",
    port: int = 8081,
    ready: Callable[[Simulator], None] | None = None,
) -> None:
    """Runs a simulator until SIGINT or SIGTERM. ``ready`` is called once it listens. Raises ``OSError`` if it can't."""

    async def run() -> None:
        told = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, told.set)
        async with running_simulator(options, host=host, port=port) as simulator:
            if ready is not None:
                ready(simulator)
            await told.wait()

    uvloop.run(run())
