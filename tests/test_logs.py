"""Log lines: their shape, and what never gets into one."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import sys
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import structlog
from pydantic import SecretStr

from proxy import logs

log = structlog.get_logger()


@pytest.fixture
def stream() -> Iterator[io.StringIO]:
    """A configured stream; the logging of the rest of the tests is put back afterwards."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    # pytest's own handlers live on the root logger, and configuring closes what it replaces.
    root.handlers.clear()
    stream = io.StringIO()
    logs.configure(stream)
    yield stream
    logs.configure(sys.stderr)
    logging.raiseExceptions = True
    root.handlers[:] = handlers
    root.setLevel(level)


def lines(stream: io.StringIO) -> list[dict[str, Any]]:
    return [json.loads(line) for line in stream.getvalue().splitlines()]


def test_a_line_says_when_how_bad_and_what_in_this_order(stream: io.StringIO) -> None:
    log.info("charge.settled", team="studio", settled_micro_usd=210_700)
    (line,) = lines(stream)
    assert list(line) == ["timestamp", "level", "event", "team", "settled_micro_usd"]
    assert line["timestamp"].endswith("Z")
    assert line["level"] == "info"
    assert line["settled_micro_usd"] == 210_700


def test_debugging_is_left_out(stream: io.StringIO) -> None:
    log.debug("charge.looked_at")
    assert lines(stream) == []


@pytest.mark.parametrize(
    ("said", "logged"),
    [
        ("key sk-bm-abcdefghijklmnop refused", "key [redacted] refused"),
        ("sk-beans-0123456789", "[redacted]"),
        ("(sk-proj_Ab-12)", "([redacted])"),
        ("authorization: Bearer abc.def/ghi=", "authorization: [redacted]"),
        ("BEARER abc", "[redacted]"),
        ("postgresql://app:hunter2@db.example/beanmeter", "postgresql://[redacted]@db.example/beanmeter"),
        ("GET /v1/models?token=1&x=2 HTTP/1.1", "GET /v1/models HTTP/1.1"),
        ("https://images.example/a.png?sig=abc", "https://images.example/a.png"),
        ("https://images.example?sig=abc", "https://images.example"),
        # What only looks a little like it stays readable.
        ("task-1234 and desk-top", "task-1234 and desk-top"),
        ("INSERT INTO charges VALUES (?, ?,?)", "INSERT INTO charges VALUES (?, ?,?)"),
        ("did you mean BEANMETER_PORT?", "did you mean BEANMETER_PORT?"),
    ],
)
@pytest.mark.parametrize(
    "place",
    [
        lambda text: text,
        lambda text: [text],
        lambda text: {"headers": {text: (text,)}},
        lambda text: ValueError(text),
        lambda text: text.encode(),
    ],
)
@pytest.mark.parametrize("level", ["info", "warning"])
def test_keys_and_query_strings_are_taken_out_wherever_they_stand(
    stream: io.StringIO, said: str, logged: str, place: Any, level: str
) -> None:
    getattr(log, level)("odd", value=place(said))
    (line,) = lines(stream)
    assert logged in json.dumps(line)
    assert said == logged or said not in json.dumps(line)


def test_a_secret_of_the_settings_shows_as_stars(stream: io.StringIO) -> None:
    log.info("started", admin_token=SecretStr("very-secret"))
    assert "very-secret" not in stream.getvalue()


def test_an_exception_is_told_without_local_variables_and_without_keys(stream: io.StringIO) -> None:
    def fail(prompt: str) -> None:
        raise RuntimeError("upstream said: sk-beans-0123456789")

    try:
        fail("a picture of my " + "grandmother")
    except RuntimeError:
        log.exception("exchange.broken", charge="chg_1")
    (line,) = lines(stream)
    assert line["level"] == "error"
    assert "RuntimeError: upstream said: [redacted]" in line["exception"]
    assert "my grandmother" not in stream.getvalue()


def test_libraries_are_heard_from_warnings_on_through_the_same_renderer(stream: io.StringIO) -> None:
    logging.getLogger("uvicorn.access").info("GET /v1/models")
    logging.getLogger("sqlalchemy.engine").warning("slow %s", "Bearer abc")
    (line,) = lines(stream)
    assert (line["level"], line["event"], line["logger"]) == ("warning", "slow [redacted]", "sqlalchemy.engine")


def test_a_line_that_can_not_be_written_is_not_told_in_parts(stream: io.StringIO, capsys: pytest.CaptureFixture[str]) -> None:
    logging.getLogger("sqlalchemy.engine").warning("%d rows", "Bearer abc")
    assert "abc" not in stream.getvalue() + "".join(capsys.readouterr())


@pytest.mark.parametrize("character", ["\0", "\n", "\x1b", "\x7f", "\x9b", "\u2028", "\ud800"])
def test_no_character_moves_a_terminal_or_ends_a_line(stream: io.StringIO, character: str) -> None:
    log.info("odd", value=f"a{character}b")
    (line,) = stream.getvalue().splitlines()
    assert character not in line
    assert json.loads(line)["value"] == f"a{character}b"


def test_a_loop_and_a_thread_that_log_at_once_lose_nothing(stream: io.StringIO) -> None:
    ended = threading.Event()

    def other() -> None:
        while not ended.is_set():
            log.info("thread")

    async def main() -> None:
        for number in range(100_000):
            log.info("loop", number=number)
            if number % 10 == 0:
                await asyncio.sleep(0)

    interval = sys.getswitchinterval()
    thread = threading.Thread(target=other)
    thread.start()
    try:
        # So that each interrupts the other wherever it can be interrupted.
        sys.setswitchinterval(1e-6)
        asyncio.run(main())
    finally:
        sys.setswitchinterval(interval)
        ended.set()
        thread.join()
    log.info("end")
    assert [line["number"] for line in lines(stream) if line["event"] == "loop"] == list(range(100_000))


def test_a_library_without_end_is_cut(stream: io.StringIO) -> None:
    endless: list[Any] = []
    endless.append(endless)
    log.info("odd", text="a" * 100_000, items=list(range(100_000)), endless=endless)
    assert len(stream.getvalue()) < 20_000


def test_the_stream_can_change_and_can_go_away(stream: io.StringIO) -> None:
    log.info("first")
    second = io.StringIO()
    logs.configure(second)
    log.info("second")
    second.close()
    log.info("third")
    assert [line["event"] for line in lines(stream)] == ["first"]
