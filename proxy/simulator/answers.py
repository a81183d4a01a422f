"""Plans an answer: its head, and the pieces of its body with when each is due and how many images are made by then.

Pure: nothing is sent, billed or waited for here. Pieces share the images' bytes, so that ten images of 30 MB cost what one
does.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from proxy.prices import dimensions
from proxy.simulator.asks import Ask
from proxy.simulator.directives import NEWLINES, Directives, Ending, Framing
from proxy.simulator.faults import Fault
from proxy.simulator.options import SimulatorOptions
from proxy.simulator.pictures import BEANS, EDGE_PIXELS_MAX, SEEDS, padded_base64, picture_base64, seed_of

Headers = tuple[tuple[str, str], ...]

# Stands for an image in a document while its JSON is written; no field of an answer comes from the caller.
_HOLE = "\N{OBJECT REPLACEMENT CHARACTER}"
_HOLE_ENCODED = json.dumps(_HOLE)[1:-1].encode()

# Three cents for a thousand output tokens, which is how the price table came about.
_MICRO_USD_PER_TOKEN = 30

# The order of magnitude; nothing is charged for them. They show how many images the simulator has found in a request.
_TOKENS_PER_INPUT_IMAGE = 300


@dataclass(frozen=True, slots=True)
class Step:
    """After ``delay_seconds``, ``images`` more are made (and billed), and ``pieces`` go out."""

    delay_seconds: float = 0.0
    images: int = 0
    pieces: tuple[bytes, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One answer. ``status`` is ``None`` where nothing is answered; then only the first step's delay and images count.

    ``cut_bytes`` is where the body breaks off, and ``ending`` how. ``head_first`` sends the head before the first delay.
    """

    status: int | None
    headers: Headers
    steps: tuple[Step, ...]
    framing: Framing = "length"
    head_first: bool = False
    cut_bytes: int | None = None
    ending: Ending = "proper"

    @property
    def body_bytes(self) -> int:
        return sum(len(piece) for step in self.steps for piece in step.pieces)


@dataclass(frozen=True, slots=True)
class Make:
    """What is made for an ask: how many images of which cell of the price table, and what the answer says of them."""

    ask: Ask
    directives: Directives
    options: SimulatorOptions
    images: int
    size: str
    quality: str
    image_micro_usd: int
    host: str
    created: int

    @property
    def image_seconds(self) -> float:
        told = self.directives.latency
        return self.options.image_seconds if told is None else told

    @property
    def preview_seconds(self) -> float:
        told = self.directives.preview_latency
        return self.options.preview_seconds if told is None else told

    @property
    def streams(self) -> bool:
        return self.ask.stream and not self.directives.json

    @property
    def said(self) -> dict[str, str]:
        """The fields of an answer that describe its images."""
        about = {"background": "opaque", "output_format": "png"}
        if self.directives.report == "none":
            return about
        size, quality = self.directives.report_size, self.directives.report_quality
        return about | {"quality": quality or self.quality, "size": size or self.size}


def make_for(ask: Ask, directives: Directives, options: SimulatorOptions, *, host: str, created: int) -> Make:
    """What an ask with its directives comes to. ``host`` is where its pictures' URLs point; ``created`` is Unix time.

    Raises :class:`Fault` where a directive for streams meets another answer: a test would believe that it worked.
    """
    prices = options.card.models[ask.model]
    size = _first_in(prices.sizes, directives.report_size, ask.size, options.auto_size)
    quality = _first_in(prices.qualities, directives.report_quality, ask.quality, options.auto_quality)
    images = ask.n if directives.deliver is None else directives.deliver
    price = prices.micro_usd[size, quality]
    make = Make(ask, directives, options, images, size, quality, price, host, created)
    plain = replace(directives, **{name: getattr(Directives(), name) for name in _STREAM_ONLY})
    if not make.streams and plain != directives:
        raise Fault(400, "The prompt has a directive for streams, and no stream is asked for.", code="sim_directive")
    return make


_STREAM_ONLY = ("sse_error_after", "flat_error", "newline", "done", "no_event_lines", "last_blank", "noise", "preview_latency")


def _first_in(table: tuple[str, ...], *values: str | None) -> str:
    return next((value for value in values if value in table), table[0])


def plan(make: Make) -> Plan:
    """The answer for what is made, as its directives will have it."""
    directives = make.directives
    if directives.silent or directives.reset:
        ending: Ending = "silent" if directives.silent else directives.end or "reset"
        return _billed(Plan(None, (), (Step(directives.latency or 0.0),), ending=ending), make)
    steps = tuple(_stream(make)) if make.streams else (_document(make),)
    headers: Headers = (("content-type", "text/event-stream; charset=utf-8" if make.streams else "application/json"),)
    if make.streams:
        headers += (("cache-control", "no-cache"),)
    cost = directives.cost
    if cost is None and make.options.cost_header:
        cost = sum(step.images for step in steps) * make.image_micro_usd
    if cost is not None:
        headers += (("X-Request-Cost-Micro-Usd", str(cost)),)
    framing: Framing = directives.framing or ("chunked" if make.streams else "length")
    answer = Plan(200, headers + _extras(directives), steps, framing, head_first=make.streams)
    return _billed(_cut(answer, directives), make)


def plan_fault(fault: Fault, directives: Directives | None = None) -> Plan:
    """The answer for a refusal. Nothing is made for it."""
    directives = directives or Directives()
    body, kind = fault.body, "application/json"
    if directives.body == "html":
        body, kind = b"<html><body><h1>%d</h1><p>nginx</p></body></html>\n" % fault.status, "text/html"
    if directives.body == "empty":
        body = b""
    headers: Headers = (("content-type", kind),) if body else ()
    if fault.status == 429:
        headers += (("retry-after", "1"),)
    if 300 <= fault.status < 400:
        headers += (("location", "/v1/models"),)
    step = Step(directives.latency or 0.0, 0, (body,))
    answer = Plan(fault.status, headers + _extras(directives), (step,), directives.framing or "length")
    return _cut(answer, directives)


def plan_ordered_fault(fault: Fault, make: Make) -> Plan:
    """The answer for an error that a directive asked for, which can be billed all the same."""
    return _billed(plan_fault(fault, make.directives), make)


def _billed(answer: Plan, make: Make) -> Plan:
    """The same answer under ``bill=``: all images asked for at once, or none."""
    bill = make.directives.bill
    if bill is None:
        return answer
    first = make.ask.n if bill == "yes" else 0
    steps = tuple(replace(step, images=0 if index else first) for index, step in enumerate(answer.steps))
    return replace(answer, steps=steps)


def _cut(answer: Plan, directives: Directives) -> Plan:
    if directives.cut is None:
        return answer
    ending = directives.end or ("close" if answer.framing == "close" else "reset")
    return replace(answer, cut_bytes=directives.cut.position(answer.body_bytes), ending=ending)


def _extras(directives: Directives) -> Headers:
    headers: Headers = ()
    if directives.set_cookie:
        headers += (("set-cookie", "beans_session=simulated; Path=/; HttpOnly"), ("set-cookie", "beans_node=7; Path=/"))
    if directives.duplicate_headers:
        headers += tuple(("x-beans-node", node) for node in ("first", "second", "first"))
    return headers


def _document(make: Make) -> Step:
    """The JSON answer, made in one go."""
    pictures = [_image(make, index) for index in range(make.images)]
    data = {"data": [fields for fields, _ in pictures]}
    document = {"created": make.created, **_ordered(make, data, make.said), "usage": _usage(make, make.images)}
    payloads = [payload for _, payload in pictures]
    return Step(make.image_seconds * make.images, make.images, tuple(_encoded(document, payloads)))


def _stream(make: Make) -> Iterator[Step]:
    """The events of a stream: each image's previews and then itself, an error if there is to be one, and the end."""
    directives = make.directives
    name = "image_generation" if make.ask.operation == "generation" else "image_edit"
    completed = make.images if directives.sse_error_after is None else min(make.images, directives.sse_error_after)
    events: list[Step] = [Step(pieces=(b"\xef\xbb\xbf: noise", b"\n\n"))] if directives.noise else []
    for index in range(completed):
        for preview in range(make.ask.partial_images):
            fields, payload = _image(make, index, BEANS * (preview + 1) // (make.ask.partial_images + 1))
            event = {"type": f"{name}.partial_image", **_ordered(make, fields, _dated(make)), "partial_image_index": preview}
            events.append(_event(make, event, [payload], make.preview_seconds, 0))
        fields, payload = _image(make, index)
        event = {"type": f"{name}.completed", **_ordered(make, fields, _dated(make)), "usage": _usage(make, 1)}
        events.append(_event(make, event, [payload], make.image_seconds, 1))
        if directives.noise:
            events.append(Step(pieces=(b'event: image.progress\ndata: {"type":"image.progress"}\n\n: noise\n\n',)))
    if directives.sse_error_after is not None:
        events.append(_error_event(make))
    elif directives.done == "yes":
        events.append(Step(pieces=(b"data: [DONE]", b"\n\n")))
    return _in_lines(events, directives)


def _dated(make: Make) -> dict[str, Any]:
    return {"created_at": make.created, **make.said}


def _ordered(make: Make, image: dict[str, Any], about: dict[str, Any]) -> dict[str, Any]:
    return {**about, **image} if make.directives.image_last else {**image, **about}


def _image(make: Make, index: int, beans: int = BEANS) -> tuple[dict[str, str], bytes]:
    """The fields that hold the image, and the payload that belongs where they have the hole."""
    width, height = (min(edge, EDGE_PIXELS_MAX) for edge in dimensions(make.size))
    seed = (seed_of(make.ask.prompt) + index) % SEEDS
    if make.directives.url:
        return {"url": _HOLE}, f"http://{make.host}/simulator/pictures/{width}x{height}/{seed}.png".encode("ascii", "replace")
    if make.directives.bytes is not None:
        return {"b64_json": _HOLE}, padded_base64(width, height, make.directives.bytes)
    return {"b64_json": _HOLE}, picture_base64(width, height, seed, beans)


def _usage(make: Make, images: int) -> dict[str, Any]:
    output = round(make.image_micro_usd / _MICRO_USD_PER_TOKEN) * images
    text, image = len(make.ask.prompt) // 4 + 1, _TOKENS_PER_INPUT_IMAGE * (make.ask.references + make.ask.has_mask)
    details = {"text_tokens": text, "image_tokens": image}
    return {
        "total_tokens": text + image + output,
        "input_tokens": text + image,
        "output_tokens": output,
        "input_tokens_details": details,
    }


def _encoded(document: dict[str, Any], payloads: list[bytes]) -> Iterator[bytes]:
    """The document's JSON in pieces, each hole filled with the next payload."""
    first, *rest = json.dumps(document).encode().split(_HOLE_ENCODED)
    yield first
    for payload, text in zip(payloads, rest, strict=True):
        yield payload
        yield text


def _event(make: Make, event: dict[str, Any], payloads: list[bytes], delay_seconds: float, images: int) -> Step:
    head = b"" if make.directives.no_event_lines else b"event: %s\n" % event["type"].encode()
    return Step(delay_seconds, images, (head + b"data: ", *_encoded(event, payloads), b"\n\n"))


def _error_event(make: Make) -> Step:
    error = {"code": None, "message": "The server had an error while making your image.", "param": None}
    if make.directives.flat_error:
        return _event(make, {"type": "error", **error}, [], 0.0, 0)
    return _event(make, {"type": "error", "error": {"type": "server_error", **error}}, [], 0.0, 0)


def _in_lines(events: list[Step], directives: Directives) -> Iterator[Step]:
    """The events with the newlines asked for, and the end asked for."""
    if events and directives.last_blank != "yes":
        *before, last = events[-1].pieces
        end = {"no": b"\n", "bare": b""}[directives.last_blank]
        events[-1] = replace(events[-1], pieces=(*before, last.removesuffix(b"\n\n") + end))
    newline = NEWLINES[directives.newline]
    for step in events:
        # Images and JSON hold no newline of their own.
        yield replace(step, pieces=tuple(piece.replace(b"\n", newline) for piece in step.pieces))
