"""Logs: one JSON object a line, the libraries' like our own. What must not be seen in a log is taken out here and
nowhere else: keys, passwords, query strings, local variables."""

from __future__ import annotations

import asyncio
import atexit
import json
import logging
import re
import threading
from collections.abc import Mapping
from datetime import UTC, datetime
from typing import TextIO

import msgspec
import structlog
from structlog.processors import TimeStamper, add_log_level, format_exc_info
from structlog.stdlib import ProcessorFormatter, add_logger_name
from structlog.typing import EventDict, Processor, WrappedLogger

REDACTED = "[redacted]"

# An event of ours is flat and short; these stop a library's that is neither.
_MAX_DEPTH = 6
_MAX_ITEMS = 100
_MAX_CHARACTERS = 16_384
_MAX_LINE = 2_048

_SECRET = re.compile(
    r"(?<![0-9A-Za-z])sk-[0-9A-Za-z_-]{4,}"  # team keys and upstream keys
    r"|(?i:\bbearer\s+)[!-~]+"
    r"|(?<=://)[^\s/@?#]*:[^\s/@]*(?=@)"  # user and password of a database URL
)


# Follows what can end a path; a placeholder in an SQL statement doesn't.
_QUERY = re.compile(r"(?<=[\w/.~%-])\?[^\s\"'<>]+")


def configure(stream: TextIO) -> None:
    """Sends every log line of this process to ``stream``, as a rule standard error. May be called again.

    A line has ``timestamp`` (UTC), ``level``, ``event``, then the event's fields; an exception is a traceback in
    ``exception``. Our own events count from INFO on, the standard library's logging from WARNING on: what libraries
    do in the ordinary course our own events tell better, and without addresses.
    """
    _destination.stream = stream
    structlog.configure(
        processors=_PROCESSORS,
        wrapper_class=_Events,
        logger_factory=structlog.WriteLoggerFactory(file=_destination),  # type: ignore[arg-type]  # it writes, no more
        cache_logger_on_first_use=True,
    )
    handler = logging.StreamHandler(_destination)
    handler.setFormatter(
        ProcessorFormatter(
            foreign_pre_chain=[*_GATHERING, add_logger_name],
            processors=[ProcessorFormatter.remove_processors_meta, *_RENDERING],
        )
    )
    logging.basicConfig(handlers=[handler], level=logging.WARNING, force=True)
    # Of a line that can't be written it would print the parts, with whatever is secret in them.
    logging.raiseExceptions = False


class _Events(structlog.make_filtering_bound_logger(logging.INFO)):  # type: ignore[misc]  # a class made at run time
    """What a module logs with."""

    def info(self, event: str, /, *args: object, **fields: object) -> None:
        """A line in the ordinary course, of which each exchange has one: rendered at once, without the way through the
        processors, which takes as long as all the rest of it."""
        if args or "exc_info" in fields or self._context or self._processors[-1] is not _render:
            super().info(event, *args, **fields)
        else:
            _destination.write(_line({"timestamp": _now(), "level": "info", "event": event, **fields}) + "\n")
            _destination.flush()


def _now() -> str:
    # As the processors' TimeStamper spells it.
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


class _Destination:
    """Where lines go. Loggers keep it for as long as they live, so that the stream behind it can change.

    Lines of one turn of the event loop go out together, for each write is a call into the kernel that every client waits for.
    """

    def __init__(self) -> None:
        self.stream: TextIO | None = None
        self._lines: list[str] = []
        self._emitting = threading.RLock()
        # The loop that was asked to let them out, until it does, and its thread.
        self._asked: asyncio.AbstractEventLoop | None = None
        self._thread = 0

    def write(self, text: str) -> None:
        self._lines.append(text)
        if not self._is_asked() and (loop := _loop()) is not None:
            self._asked, self._thread = loop, threading.get_ident()
            loop.call_soon(self._emit)

    def flush(self) -> None:
        if not self._is_asked() and _loop() is None:
            self._emit()

    def _is_asked(self) -> bool:
        """Whether this thread's loop will let them out. To ask which loop runs is a call into the kernel each time."""
        # Looked at once: another thread may let them out at any moment.
        asked = self._asked
        return asked is not None and self._thread == threading.get_ident() and asked.is_running()

    def _emit(self) -> None:
        # What another thread has taken out first is written first.
        with self._emitting:
            self._asked = None
            lines, self._lines = self._lines, []
            try:
                if self.stream is not None and lines:
                    self.stream.write("".join(lines))
                    self.stream.flush()
            except (OSError, ValueError):
                # Nobody reads the log any more. An exchange still has to be paid for and booked.
                pass


def _loop() -> asyncio.AbstractEventLoop | None:
    try:
        return asyncio.get_running_loop()
    except RuntimeError:
        return None


_destination = _Destination()
# A loop that is broken off may leave lines behind.
atexit.register(_destination.flush)


# Made once: json.dumps makes an encoder at each call that asks for anything but its own.
_encode = json.JSONEncoder(separators=(",", ":")).encode

# An eighth of the time, for a line that has nothing else in it: of bytes, for one, it would make letters in which no secret is
# recognised.
_encode_plain = msgspec.json.Encoder().encode
_PLAIN = frozenset({str, int, float, bool, type(None)})


def _render(_: WrappedLogger, __: str, event: EventDict) -> str:
    """The event as JSON in reading order."""
    head = {name: event.pop(name) for name in ("timestamp", "level", "event") if name in event}
    return _line({**head, **event})


def _line(event: Mapping[str, object]) -> str:
    """The event as JSON, without secrets and query strings."""
    try:
        line = _encode_plain(event).decode() if _PLAIN.issuperset(map(type, event.values())) else _encode(event)
    except (TypeError, ValueError):
        line = ""
    # Most lines have nothing in them to be taken out, and looking at one line is cheaper than at twenty values.
    if not line or not line.isascii() or len(line) > _MAX_LINE or _suspicious(line):
        line = _encode({name: _cleaned(value, _MAX_DEPTH) for name, value in event.items()})
    return line


def _suspicious(line: str) -> bool:
    """Whether anything of the two kinds can be in it, or the one character of ASCII that JSON lets through as it is and no
    terminal should get."""
    # Plain searches take a tenth of the time of one pattern.
    return "?" in line or "@" in line or "sk-" in line or "\x7f" in line or "bearer" in line.lower()


def _cleaned(value: object, depth: int) -> object:
    if isinstance(value, str):
        return _cleaned_text(value)
    if value is None or isinstance(value, int | float):
        return value
    if isinstance(value, Mapping) and depth:
        return {_cleaned_text(str(name)): _cleaned(value[name], depth - 1) for name in list(value)[:_MAX_ITEMS]}
    if isinstance(value, list | tuple | set | frozenset) and depth:
        return [_cleaned(item, depth - 1) for item in list(value)[:_MAX_ITEMS]]
    return _cleaned_text(repr(value))


def _cleaned_text(text: str) -> str:
    if len(text) > _MAX_CHARACTERS:
        # A traceback says what it is about at its end.
        half = _MAX_CHARACTERS // 2
        text = f"{text[:half]} ... {text[-half:]}"
    return _QUERY.sub("", _SECRET.sub(REDACTED, text))


_GATHERING: list[Processor] = [add_log_level, TimeStamper(fmt="iso", utc=True)]
_RENDERING: list[Processor] = [format_exc_info, _render]
# One list for as long as the process lives: a logger keeps the one that it has met first.
_PROCESSORS: list[Processor] = [*_GATHERING, *_RENDERING]
