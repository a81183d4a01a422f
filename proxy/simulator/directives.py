"""What a prompt can tell the simulator to do, such as ``a cup of coffee [[sim error=500 body=html]]``. Only here is it read.

A prompt travels through every SDK and every gateway unchanged, in JSON and in multipart, so it can order any answer. A block
is ``[[sim NAME NAME=VALUE ...]]``; several blocks count together; a name or value that isn't below is answered with 400.
What is made is billed when it is made, whatever becomes of the answer; ``bill=`` overrides that.

Answers that fail:

- ``error=STATUS``            an error of 300 to 599 in OpenAI's envelope: 400 is a moderation block, 401 echoes a part of the
                              key, 429 carries ``retry-after``, 3xx a ``location``. Nothing is made.
- ``body=json|html|empty``    what the error's body is (``json``)
- ``reset=before-headers``    the connection is reset and nothing answered. Nothing is made.
- ``silent``                  nothing is answered, and the connection stays open up to the simulator's limit. Nothing is made.
- ``cut=50%|BYTES|-BYTES``    the answer breaks off after that part of its body; ``-2`` is two bytes before its end, ``100%``
                              after the whole of it but before the transfer's end (a declared length is one byte too long).
                              Of a JSON answer all images are made, of a stream those that were begun.
- ``end=reset|close|silent``  how ``reset`` and ``cut`` end: a TCP reset, a clean close or silence (``close`` for
                              ``framing=close``, else ``reset``)
- ``sse-error-after=K``       an error event in place of what follows K completed images. K are made. Streams only.
- ``flat-error``              that event without its inner ``error`` object

Answers that surprise:

- ``deliver=K``               K images (0 to 10), however many were asked for. K are made.
- ``report-size=WxH|auto``, ``report-quality=Q``   the answer says this; what is in the price table is also made, and billed
- ``report=none``             the answer says neither size nor quality
- ``cost=MICRO_USD``          what the cost header says, instead of the truth
- ``json``                    a JSON answer to ``stream: true``
- ``url``                     ``url`` in place of ``b64_json``
- ``bytes=BYTES``             the size of each PNG, 1,000 to 32,000,000
- ``latency=SECONDS``         time for each image, or for the whole of an error or silence; up to 600
- ``preview-latency=SECONDS`` time for each preview
- ``set-cookie``, ``duplicate-headers``              two cookies; one header three times

Answers in another form:

- ``framing=length|chunked|close``   how the body's end is told (``chunked`` for streams, else ``length``)
- ``newline=lf|crlf|cr``      what ends a stream's lines (``lf``)
- ``done=no``                 no ``data: [DONE]`` at the stream's end
- ``no-event-lines``          data lines only
- ``last-blank=no|bare``      the stream ends without its blank line; ``bare`` also without the last line's end
- ``noise``                   a byte order mark, comments and an unknown event between the others
- ``image-last``              the image after the fields that describe it, not before

Bills:

- ``bill=yes|no``             all images asked for are billed at once, or none at all
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from proxy.simulator.faults import Fault
from proxy.simulator.pictures import PAYLOAD_BYTES_MAX, PAYLOAD_BYTES_MIN

Ending: TypeAlias = Literal["proper", "reset", "close", "silent"]
Framing: TypeAlias = Literal["length", "chunked", "close"]

# The longest that an image can take: the deadline of a whole exchange.
LATENCY_SECONDS_MAX = 600.0

NEWLINES = {"lf": b"\n", "crlf": b"\r\n", "cr": b"\r"}

# No prompt needs more; a prompt can be megabytes long.
_BLOCKS_MAX = 20

_block = re.compile(r"\[\[sim ([^\[\]]{1,500})\]\]")
_cut = re.compile(r"([0-9]{1,3})%|(-?[0-9]{1,12})", re.ASCII)
_report_size = re.compile(r"auto|[1-9][0-9]{0,3}x[1-9][0-9]{0,3}", re.ASCII)
_report_quality = re.compile(r"[a-z]{1,20}", re.ASCII)
_seconds = re.compile(r"[0-9]{1,3}(\.[0-9]{1,6})?", re.ASCII)


@dataclass(frozen=True, slots=True)
class Cut:
    """Where a body breaks off: a part of it in percent, or a number of bytes from its start (or, negative, its end)."""

    percent: int | None = None
    offset_bytes: int = 0

    def position(self, body_bytes: int) -> int:
        """The number of bytes that are sent of a body that long."""
        if self.percent is not None:
            return body_bytes * self.percent // 100
        offset = self.offset_bytes if self.offset_bytes >= 0 else body_bytes + self.offset_bytes
        return min(max(offset, 0), body_bytes)


@dataclass(frozen=True, slots=True)
class Directives:
    """The directives of one prompt; each field is the directive of its name, ``None`` or false where it wasn't given."""

    error: int | None = None
    body: str = "json"
    reset: str | None = None
    silent: bool = False
    cut: Cut | None = None
    end: Ending | None = None
    sse_error_after: int | None = None
    flat_error: bool = False
    deliver: int | None = None
    report_size: str | None = None
    report_quality: str | None = None
    report: str | None = None
    cost: int | None = None
    json: bool = False
    url: bool = False
    bytes: int | None = None
    latency: float | None = None
    preview_latency: float | None = None
    set_cookie: bool = False
    duplicate_headers: bool = False
    framing: Framing | None = None
    newline: str = "lf"
    done: str = "yes"
    no_event_lines: bool = False
    last_blank: str = "yes"
    noise: bool = False
    image_last: bool = False
    bill: str | None = None


def read_directives(prompt: str) -> Directives:
    """The directives in a prompt. Raises :class:`Fault` (400, code ``sim_directive``) for one that doesn't exist."""
    found: dict[str, Any] = {}
    for number, block in enumerate(_block.finditer(prompt)):
        if number == _BLOCKS_MAX:
            raise _unknown(f"more than {_BLOCKS_MAX} blocks")
        for word in block[1].split():
            name, has_value, value = word.partition("=")
            if name not in TAKES:
                raise _unknown(word)
            take = TAKES[name]
            if (take is None) == bool(has_value):
                raise _unknown(word)
            found[name.replace("-", "_")] = True if take is None else take(word, value)
    return Directives(**found)


def _unknown(word: str) -> Fault:
    return Fault(
        400, f"The simulator knows no directive {word!r}; see its documentation.", param="prompt", code="sim_directive"
    )


def _one_of(*values: str) -> Callable[[str, str], str]:
    def take(word: str, value: str) -> str:
        if value not in values:
            raise _unknown(word)
        return value

    return take


def _whole(least: int, most: int) -> Callable[[str, str], int]:
    def take(word: str, value: str) -> int:
        if not re.fullmatch(r"[0-9]{1,12}", value, re.ASCII) or not least <= int(value) <= most:
            raise _unknown(word)
        return int(value)

    return take


def _like(pattern: re.Pattern[str]) -> Callable[[str, str], str]:
    def take(word: str, value: str) -> str:
        if not pattern.fullmatch(value):
            raise _unknown(word)
        return value

    return take


def _take_cut(word: str, value: str) -> Cut:
    match = _cut.fullmatch(value)
    if match is None or (match[1] and int(match[1]) > 100):
        raise _unknown(word)
    return Cut(percent=int(match[1])) if match[1] else Cut(offset_bytes=int(match[2]))


def _take_seconds(word: str, value: str) -> float:
    if not _seconds.fullmatch(value) or float(value) > LATENCY_SECONDS_MAX:
        raise _unknown(word)
    return float(value)


# Each directive's name, and what reads its value; ``None`` for those that take none.
TAKES: dict[str, Callable[[str, str], Any] | None] = {
    "error": _whole(300, 599),
    "body": _one_of("json", "html", "empty"),
    "reset": _one_of("before-headers"),
    "silent": None,
    "cut": _take_cut,
    "end": _one_of("reset", "close", "silent"),
    "sse-error-after": _whole(0, 10),
    "flat-error": None,
    "deliver": _whole(0, 10),
    "report-size": _like(_report_size),
    "report-quality": _like(_report_quality),
    "report": _one_of("none"),
    "cost": _whole(0, 10**12 - 1),
    "json": None,
    "url": None,
    "bytes": _whole(PAYLOAD_BYTES_MIN, PAYLOAD_BYTES_MAX),
    "latency": _take_seconds,
    "preview-latency": _take_seconds,
    "set-cookie": None,
    "duplicate-headers": None,
    "framing": _one_of("length", "chunked", "close"),
    "newline": _one_of(*NEWLINES),
    "done": _one_of("yes", "no"),
    "no-event-lines": None,
    "last-blank": _one_of("yes", "no", "bare"),
    "noise": None,
    "image-last": None,
    "bill": _one_of("yes", "no"),
}
