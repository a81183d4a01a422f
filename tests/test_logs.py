"""Log lines: their shape, and what never gets into one."""

from __future__ import annotations

import io
import json
import logging
import sys
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
def test_keys_and_query_strings_are_taken_out_wherever_they_stand(
    stream: io.StringIO, said: str, logged: str, place: Any
) -> None:
    log.warning("odd", value=place(said))
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
