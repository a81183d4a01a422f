"""The simulated BeansAI on the wire: through OpenAI's own SDK, and through bare sockets where it is to misbehave."""

from __future__ import annotations

import asyncio
import base64
import hashlib
import json
import os
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import tomllib
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from decimal import Decimal
from http.client import HTTPConnection
from importlib import resources
from typing import Any

import openai
import pytest
from openai.types import ImageGenCompletedEvent, ImageGenPartialImageEvent

from proxy.simulator import Simulator, SimulatorOptions, directives, fingerprint, pictures, running_simulator

KEY = "sk-beans-0123456789abcdef"
MODEL = "gpt-image-2"
SMALL_PNG = pictures.picture(64, 48, 1)
DATA_URL = "data:image/png;base64," + base64.b64encode(SMALL_PNG).decode()

# Nothing here waits for long; this only keeps a broken simulator from stopping the suite.
PATIENCE_SECONDS = 20


@contextmanager
def simulator_in_thread(options: SimulatorOptions) -> Iterator[Simulator]:
    """A simulator on a loop of its own, as the SDK's blocking client needs it."""
    ready = threading.Event()
    running: list[tuple[Simulator, asyncio.AbstractEventLoop, asyncio.Event]] = []

    async def run() -> None:
        async with running_simulator(options) as simulator:
            told = asyncio.Event()
            running.append((simulator, asyncio.get_running_loop(), told))
            ready.set()
            await told.wait()

    thread = threading.Thread(target=asyncio.run, args=(run(),))
    thread.start()
    assert ready.wait(PATIENCE_SECONDS)
    simulator, loop, told = running[0]
    yield simulator
    loop.call_soon_threadsafe(told.set)
    thread.join()


@pytest.fixture(scope="module")
def shared() -> Iterator[Simulator]:
    options = SimulatorOptions(silent_seconds=0.05, body_bytes_max=40_000_000)
    with simulator_in_thread(options) as simulator:
        yield simulator


@pytest.fixture
def simulator(shared: Simulator) -> Simulator:
    shared.reset()
    return shared


@pytest.fixture
def client(simulator: Simulator) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(api_key=KEY, base_url=simulator.base_url, max_retries=0) as client:
        yield client


def price_table() -> dict[tuple[str, str], int]:
    """Micro-USD by (size, quality), read from the card's text without the program's own reader."""
    card = tomllib.loads(resources.files("proxy").joinpath("cards/gpt-image-2.toml").read_text("utf-8"))
    rows: dict[str, dict[str, str]] = card["models"][MODEL]["usd_per_image"]
    return {(size, quality): int(Decimal(usd) * 1_000_000) for size, row in rows.items() for quality, usd in row.items()}


PRICES = price_table()
SIZES = sorted({size for size, _ in PRICES})


def chunks_of(png: bytes) -> dict[bytes, bytes]:
    """A PNG's chunks by name, every checksum verified."""
    assert png.startswith(b"\x89PNG\r\n\x1a\n")
    chunks = {}
    position = 8
    while position < len(png):
        (length,) = struct.unpack_from(">I", png, position)
        name, data = png[position + 4 : position + 8], png[position + 8 : position + 8 + length]
        assert struct.unpack_from(">I", png, position + 8 + length)[0] == zlib.crc32(name + data)
        chunks[name] = data
        position += 12 + length
    assert [*chunks][0 :: len(chunks) - 1] == [b"IHDR", b"IEND"]
    return chunks


def size_of(png: bytes) -> str:
    """``WxH`` of a PNG whose pixels decode to just that many."""
    chunks = chunks_of(png)
    width, height, depth = struct.unpack_from(">IIB", chunks[b"IHDR"])
    assert len(zlib.decompress(chunks[b"IDAT"])) == height * (1 + (width * depth + 7) // 8)
    return f"{width}x{height}"


def decoded(b64_json: str | None) -> bytes:
    assert b64_json is not None
    return base64.b64decode(b64_json, validate=True)


def post(simulator: Simulator, path: str, body: bytes, **headers: str) -> tuple[int, dict[str, str], bytes]:
    connection = HTTPConnection(simulator.host, simulator.port, timeout=PATIENCE_SECONDS)
    try:
        sent = {"authorization": f"Bearer {KEY}", "content-type": "application/json"}
        sent |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection.request("POST", path, body, sent)
        answer = connection.getresponse()
        return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()
    finally:
        connection.close()


def get(simulator: Simulator, path: str, **headers: str) -> tuple[int, bytes]:
    connection = HTTPConnection(simulator.host, simulator.port, timeout=PATIENCE_SECONDS)
    try:
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def request_bytes(prompt: str, *, close: bool = False, **fields: object) -> bytes:
    body = json.dumps({"model": MODEL, "prompt": prompt, "size": "1024x768", "quality": "low", **fields}).encode()
    return (
        f"POST /v1/images/generations HTTP/1.1\r\nhost: beans\r\nauthorization: Bearer {KEY}\r\n"
        f"content-type: application/json\r\ncontent-length: {len(body)}\r\n{'connection: close' if close else 'x-a: b'}\r\n\r\n"
    ).encode() + body


def on_the_wire(simulator: Simulator, sent: bytes) -> tuple[bytes, str]:
    """Every byte that comes back until the connection ends, and how it ended: ``closed`` or ``reset``."""
    with socket.create_connection((simulator.host, simulator.port), PATIENCE_SECONDS) as connection:
        connection.sendall(sent)
        received = bytearray()
        try:
            while data := connection.recv(65_536):
                received += data
        except ConnectionResetError:
            return bytes(received), "reset"
        return bytes(received), "closed"


def ordered(simulator: Simulator, directive: str, **fields: object) -> tuple[str, bytes, str]:
    """Head, body bytes and end of the connection for a prompt with a directive."""
    received, end = on_the_wire(simulator, request_bytes(f"a cup [[sim {directive}]]", close=True, **fields))
    head, _, body = received.partition(b"\r\n\r\n")
    return head.decode("latin-1").lower(), body, end


def billed_images(simulator: Simulator) -> int:
    return sum(entry["images"] for entry in simulator.bill()["entries"])


# Pictures


@pytest.mark.parametrize("size", SIZES)
def test_a_picture_has_its_size_and_decodes(size: str) -> None:
    width, height = map(int, size.split("x"))
    assert size_of(pictures.picture(width, height, 3)) == size


def test_a_prompt_has_its_own_picture_and_previews_have_fewer_beans() -> None:
    assert len({pictures.picture(64, 64, seed) for seed in range(pictures.SEEDS)}) == pictures.SEEDS
    assert len({pictures.picture(512, 512, 1, beans) for beans in range(pictures.BEANS + 1)}) == pictures.BEANS + 1


@pytest.mark.parametrize(
    ("size", "asked_bytes", "bytes_long"),
    [
        ("1024x1024", 1_000, 1_000),
        ("1440x480", 65_537, 65_537),
        ("3840x2160", 1_000_000, 1_000_000),
        ("1024x768", 30_000_000, 30_000_000),
        ("2880x2880", 1_000, 1_087),
    ],
)
def test_a_padded_picture_is_exactly_as_long_as_asked(size: str, asked_bytes: int, bytes_long: int) -> None:
    width, height = map(int, size.split("x"))
    png = base64.b64decode(pictures.padded_base64(width, height, asked_bytes))
    assert (size_of(png), len(png)) == (size, bytes_long)


# Through the SDK


def test_generate_answers_with_the_pictures_that_were_asked_for(client: openai.OpenAI, simulator: Simulator) -> None:
    raw = client.images.with_raw_response.generate(
        model=MODEL, prompt="beans", size="2048x1152", quality="high", n=3, response_format="b64_json"
    )
    answer = raw.parse()
    assert answer.data is not None
    assert [size_of(decoded(image.b64_json)) for image in answer.data] == ["2048x1152"] * 3
    assert (answer.size, answer.quality, answer.output_format) == ("2048x1152", "high", "png")
    assert raw.headers["x-request-cost-micro-usd"] == str(3 * PRICES["2048x1152", "high"])
    assert raw.headers["openai-processing-ms"].isdecimal()
    assert [entry["request_id"] for entry in simulator.bill()["entries"]] == [raw.headers["x-request-id"]]


def test_the_image_model_that_is_served_is_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "beansai"
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("dall-e-2")


@pytest.mark.parametrize("asked", [{}, {"size": "auto", "quality": "auto"}, {"size": None, "quality": None}])
def test_what_is_left_open_is_chosen_and_reported(client: openai.OpenAI, simulator: Simulator, asked: dict[str, Any]) -> None:
    answer = client.images.generate(model=MODEL, prompt="beans", **asked)
    assert (answer.size, answer.quality) == ("1024x1024", "medium")
    assert simulator.bill()["total_micro_usd"] == PRICES["1024x1024", "medium"]


def test_the_bill_adds_up_over_the_whole_price_table(client: openai.OpenAI, simulator: Simulator) -> None:
    for size, quality in PRICES:
        client.images.generate(model=MODEL, prompt="[[sim bytes=1000]]", size=size, quality=quality, n=2)  # type: ignore[call-overload]
    bill = simulator.bill()
    assert {(e["size"], e["quality"]): e["micro_usd"] for e in bill["entries"]} == {
        cell: 2 * price for cell, price in PRICES.items()
    }
    assert bill["total_micro_usd"] == 2 * sum(PRICES.values())


@pytest.mark.parametrize("previews", [0, 1, 3])
def test_a_stream_has_previews_and_then_the_image(client: openai.OpenAI, simulator: Simulator, previews: int) -> None:
    events = list(
        client.images.generate(
            model=MODEL, prompt="beans", size="1024x1024", quality="low", n=2, stream=True, partial_images=previews
        )
    )
    one = [*["image_generation.partial_image"] * previews, "image_generation.completed"]
    assert [event.type for event in events] == one * 2
    assert [e.partial_image_index for e in events if isinstance(e, ImageGenPartialImageEvent)] == [*range(previews)] * 2
    assert {size_of(decoded(event.b64_json)) for event in events} == {"1024x1024"}
    assert len({event.b64_json for event in events}) == len(events)
    assert [e.usage.output_tokens for e in events if isinstance(e, ImageGenCompletedEvent)] == [197, 197]
    assert simulator.bill()["total_micro_usd"] == 2 * PRICES["1024x1024", "low"]


@pytest.mark.parametrize(
    ("files", "input_images"),
    [
        ({"image": SMALL_PNG}, 1),
        ({"image": [SMALL_PNG, SMALL_PNG, SMALL_PNG]}, 3),
        ({"image": SMALL_PNG, "mask": SMALL_PNG}, 2),
        ({"image": [("naïve bean.png", SMALL_PNG), ("b.png", SMALL_PNG)], "mask": SMALL_PNG}, 3),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_edits_take_the_sdks_multipart(
    client: openai.OpenAI, simulator: Simulator, files: dict[str, Any], input_images: int, stream: bool
) -> None:
    asked: dict[str, Any] = {"model": MODEL, "prompt": "more beans", "size": "1024x1024", "quality": "low", "n": 2}
    answer: Any = client.images.edit(**asked, **files, stream=stream)
    if stream:
        events = list(answer)
        assert [event.type for event in events] == ["image_edit.completed"] * 2
        usage = events[0].usage
    else:
        assert len(answer.data) == 2
        usage = answer.usage
    assert usage.input_tokens_details.image_tokens == 300 * input_images
    (entry,) = simulator.bill()["entries"]
    assert (entry["operation"], entry["images"], entry["micro_usd"]) == ("edit", 2, 2 * PRICES["1024x1024", "low"])


def test_edits_take_json_with_data_urls_and_file_ids(simulator: Simulator) -> None:
    body = {"model": MODEL, "prompt": "x", "images": [{"image_url": DATA_URL}, {"file_id": "file-1"}]}
    status, _, answer = post(simulator, "/v1/images/edits", json.dumps(body | {"mask": {"image_url": DATA_URL}}).encode())
    assert status == 200
    assert json.loads(answer)["usage"]["input_tokens_details"]["image_tokens"] == 900


@pytest.mark.parametrize(
    ("status", "exception"),
    [
        (400, openai.BadRequestError),
        (401, openai.AuthenticationError),
        (403, openai.PermissionDeniedError),
        (404, openai.NotFoundError),
        (409, openai.ConflictError),
        (422, openai.UnprocessableEntityError),
        (429, openai.RateLimitError),
        (500, openai.InternalServerError),
        (529, openai.InternalServerError),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_an_ordered_error_is_the_sdks_exception(
    client: openai.OpenAI, simulator: Simulator, status: int, exception: type[openai.APIStatusError], stream: bool
) -> None:
    with pytest.raises(exception) as caught:
        client.images.generate(model=MODEL, prompt=f"beans [[sim error={status}]]", stream=stream)
    assert isinstance(caught.value.body, dict)
    assert caught.value.body.keys() == {"message", "type", "param", "code"}
    assert simulator.bill()["entries"] == []
    assert [request["status"] for request in simulator.requests()] == [status]


def test_directives_work_in_multipart_too(client: openai.OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.images.edit(model=MODEL, prompt="[[sim error=400]]", image=SMALL_PNG)
    assert caught.value.code == "moderation_blocked"


def test_an_sse_error_after_some_images_is_the_sdks_exception(client: openai.OpenAI, simulator: Simulator) -> None:
    stream = client.images.generate(model=MODEL, prompt="[[sim sse-error-after=2]]", n=5, stream=True)
    assert [next(stream).type for _ in range(2)] == ["image_generation.completed"] * 2
    with pytest.raises(openai.APIError):
        next(stream)
    assert billed_images(simulator) == 2


# Keys


def test_a_wrong_key_is_refused_and_echoed_in_part(simulator: Simulator) -> None:
    status, _, body = post(simulator, "/v1/images/generations", b"{}", authorization="Bearer sk-wrong-abcdefghijklmnop")
    error = json.loads(body)["error"]
    assert (status, error["code"]) == (401, "invalid_api_key")
    assert "sk-wrong************mnop" in error["message"]


def test_with_a_key_configured_no_other_is_accepted() -> None:
    with simulator_in_thread(SimulatorOptions(key="sk-beans-only")) as simulator:
        assert get(simulator, "/v1/models", authorization="Bearer sk-beans-only")[0] == 200
        assert get(simulator, "/v1/models", authorization="Bearer sk-beans-other")[0] == 401
        assert get(simulator, "/v1/models")[0] == 401


# What it refuses

GENERATIONS, EDITS = "/v1/images/generations", "/v1/images/edits"


@pytest.mark.parametrize(
    ("path", "body", "status", "code", "param"),
    [
        (GENERATIONS, b"{", 400, "invalid_json", None),
        (GENERATIONS, b"[]", 400, "invalid_json", None),
        (GENERATIONS, b"[" * 100_000, 400, "invalid_json", None),
        (GENERATIONS, b'{"prompt":"a"}', 400, "missing_required_parameter", "model"),
        (GENERATIONS, b'{"model":"gpt-image-2"}', 400, "missing_required_parameter", "prompt"),
        (GENERATIONS, b'{"model":"dall-e-3","prompt":"a"}', 404, "model_not_found", "model"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","size":"1536x1024"}', 400, "invalid_value", "size"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","size":1024}', 400, "invalid_value", "size"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","quality":"hd"}', 400, "invalid_value", "quality"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","n":0}', 400, "invalid_value", "n"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","n":11}', 400, "invalid_value", "n"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","n":true}', 400, "invalid_value", "n"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","stream":1}', 400, "invalid_value", "stream"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"a","partial_images":4}', 400, "invalid_value", "partial_images"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"[[sim eror=500]]"}', 400, "sim_directive", "prompt"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"[[sim error=99]]"}', 400, "sim_directive", "prompt"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"[[sim silent=yes]]"}', 400, "sim_directive", "prompt"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"[[sim cut=101%]]"}', 400, "sim_directive", "prompt"),
        (GENERATIONS, b'{"model":"gpt-image-2","prompt":"[[sim done=no]]"}', 400, "sim_directive", None),
        (EDITS, b'{"model":"gpt-image-2","prompt":"a"}', 400, "missing_required_parameter", "images"),
        (EDITS, b'{"model":"gpt-image-2","prompt":"a","images":[]}', 400, "invalid_value", "image"),
        (EDITS, b'{"model":"gpt-image-2","prompt":"a","images":[{}]}', 400, "invalid_value", "images[0]"),
        (EDITS, b'{"model":"gpt-image-2","prompt":"a","images":[{"image_url":"http:a"}]}', 400, "invalid_value", "images[0]"),
        ("/v1/embeddings", b"{}", 404, "unknown_url", None),
        ("/v1/images/generations/", b"{}", 404, "unknown_url", None),
        ("/v1/models", b"{}", 405, "method_not_allowed", None),
    ],
)  # fmt: skip
def test_what_no_image_service_takes_is_refused(
    simulator: Simulator, path: str, body: bytes, status: int, code: str, param: str | None
) -> None:
    got, _, answer = post(simulator, path, body)
    error = json.loads(answer)["error"]
    assert (got, error["code"], error["param"]) == (status, code, param)
    assert simulator.bill() == {"total_micro_usd": 0, "entries": []}


@pytest.mark.parametrize(
    ("content_type", "body", "status", "code"),
    [
        ("text/plain", b"a", 415, "unsupported_content_type"),
        ("multipart/form-data", b"a", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=x", b"--x\r\n", 400, "invalid_multipart"),
        ("multipart/form-data; boundary=x", b"--x--\r\n", 400, "invalid_value"),
    ],
)
def test_bodies_of_another_kind_are_refused(
    simulator: Simulator, content_type: str, body: bytes, status: int, code: str
) -> None:
    got, _, answer = post(simulator, EDITS, body, content_type=content_type)
    assert (got, json.loads(answer)["error"]["code"]) == (status, code)


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"GET / HTTP/9.9\r\n\r\n", b"400"),
        (b"\0\1\2\r\n\r\n", b"400"),
        (b"GET / HTTP/1.1\r\nx: " + b"y" * 70_000, b"431"),
        (b"POST /v1/images/edits HTTP/1.1\r\ncontent-length: 40000001\r\n\r\n" + b"x" * 40_000_001, b"413"),
    ],
    ids=["version", "binary", "head", "body"],
)
def test_what_is_too_large_or_not_http_ends_the_connection(simulator: Simulator, sent: bytes, status: bytes) -> None:
    received, _ = on_the_wire(simulator, sent)
    assert received.startswith(b"HTTP/1.1 " + status)


# On the wire


@pytest.mark.parametrize("directive", ["reset=before-headers", "cut=0", "cut=10", "cut=50%", "cut=-1", "cut=100%"])
@pytest.mark.parametrize("stream", [False, True])
def test_a_reset_is_a_reset(simulator: Simulator, directive: str, stream: bool) -> None:
    _, body, end = ordered(simulator, directive, stream=stream)
    assert end == "reset"
    assert not body.endswith(b"0\r\n\r\n")


def test_a_cut_answer_has_exactly_its_part_of_the_body(simulator: Simulator) -> None:
    _, whole, end = ordered(simulator, "bytes=3000000 report=none")
    assert end == "closed"
    document = json.loads(whole)
    for directive, part in [("50%", len(whole) // 2), ("7", 7), ("-2", len(whole) - 2), ("0%", 0), ("100%", len(whole))]:
        head, body, end = ordered(simulator, f"bytes=3000000 report=none cut={directive}")
        declared = re.search(r"content-length: ([0-9]+)", head)
        assert declared is not None
        assert (len(body), end) == (part, "reset")
        # A whole document, too, is in a transfer that never ended.
        assert int(declared[1]) > part
    assert json.loads(body)["data"] == document["data"]


@pytest.mark.parametrize(
    ("directive", "head_has", "ended"),
    [
        ("framing=close", "connection: close", "closed"),
        ("framing=close cut=50%", "connection: close", "closed"),
        ("framing=close cut=50% end=reset", "connection: close", "reset"),
        ("framing=length cut=50% end=close", "content-length: ", "closed"),
        ("framing=chunked cut=50% end=close", "transfer-encoding: chunked", "closed"),
        ("framing=chunked cut=50% end=silent", "transfer-encoding: chunked", "closed"),
        ("framing=chunked", "transfer-encoding: chunked", "closed"),
        ("framing=length", "content-length: ", "closed"),
    ],
)
@pytest.mark.parametrize("stream", [False, True])
def test_framing_is_as_ordered(simulator: Simulator, directive: str, head_has: str, ended: str, stream: bool) -> None:
    head, body, end = ordered(simulator, directive, stream=stream)
    framings = re.findall("^(content-length|transfer-encoding|connection): ", head, re.MULTILINE)
    assert head_has in head
    assert not {"content-length", "transfer-encoding"} <= set(framings)
    assert end == ended
    assert (b"usage" in body) == ("cut" not in directive)
    assert body.endswith(b"0\r\n\r\n") == (directive == "framing=chunked")


def test_a_clean_close_with_nothing_said(simulator: Simulator) -> None:
    assert ordered(simulator, "reset=before-headers end=close") == ("", b"", "closed")
    assert ordered(simulator, "silent") == ("", b"", "closed")
    assert [request["status"] for request in simulator.requests()] == [None, None]


@pytest.mark.parametrize(
    ("directive", "content_type", "body_is"),
    [
        ("error=502 body=html", "text/html", rb"<html>.*502.*</html>\n"),
        ("error=503 body=empty", None, b""),
        ("error=500", "application/json", rb'\{"error": .*\}'),
        ("error=500 body=html cut=20", "text/html", b".{20}"),
        ("error=307", "application/json", rb'\{"error": .*\}'),
    ],
)
def test_error_bodies_are_as_ordered(simulator: Simulator, directive: str, content_type: str | None, body_is: bytes) -> None:
    head, body, _ = ordered(simulator, directive)
    assert f" {directive[6:9]} " in head.splitlines()[0]
    assert (f"content-type: {content_type}" in head) == (content_type is not None)
    assert re.fullmatch(body_is, body, re.DOTALL)


@pytest.mark.parametrize(
    ("directive", "form"),
    [
        ("json", r'\{.*"usage".*\}'),
        ("bytes=1000", r'event: image_generation\.completed\ndata: \{"type".*\}\n\ndata: \[DONE\]\n\n'),
        ("bytes=1000 newline=crlf", r'event: image_generation\.completed\r\ndata: \{.*\}\r\n\r\ndata: \[DONE\]\r\n\r\n'),
        ("bytes=1000 newline=cr", r"event: image_generation\.completed\rdata: \{.*\}\r\rdata: \[DONE\]\r\r"),
        ("bytes=1000 done=no", r"event: image_generation\.completed\ndata: \{.*\}\n\n"),
        ("bytes=1000 done=no last-blank=no", r"event: image_generation\.completed\ndata: \{.*\}\n"),
        ("bytes=1000 done=no last-blank=bare", r"event: image_generation\.completed\ndata: \{.*\}"),
        ("bytes=1000 last-blank=bare newline=crlf", r"event: .*\r\ndata: \{.*\}\r\n\r\ndata: \[DONE\]"),
        ("bytes=1000 done=no no-event-lines", r'data: \{"type": "image_generation\.completed".*\}\n\n'),
        ("noise", "\ufeff: noise\n\nevent: .*\ndata: .*\n\nevent: image.progress\n.*\n\n: noise\n\ndata: .DONE.\n\n"),
        ("bytes=1000 image-last", r'event: .*\ndata: \{"type": .*"size": .*"b64_json": .*\n\n'),
        ("bytes=1000 report=none done=no", r'event: .*\ndata: (?!.*"(size|quality)":).*\n\n'),
        ("report-size=auto report-quality=high", r'event: .*\ndata: .*"quality": "high", "size": "auto".*\n\n'),
        ("url", r'event: .*\ndata: .*"url": "http://.*\.png".*\n\n'),
        ("deliver=0", r"data: \[DONE\]\n\n"),
        ("sse-error-after=0", r'event: error\ndata: \{"type": "error", "error": \{"type": "server_error", .*\}\}\n\n'),
        ("sse-error-after=0 flat-error", r'event: error\ndata: \{"type": "error", "code": null, "message": .*\}\n\n'),
    ],
)  # fmt: skip
def test_streams_have_the_form_that_is_ordered(simulator: Simulator, directive: str, form: str) -> None:
    head, body, _ = ordered(simulator, f"framing=length {directive}", stream=True)
    assert re.fullmatch(form, body.decode(), re.DOTALL)
    assert ("text/event-stream" in head) == (directive != "json")


def test_headers_are_as_ordered(simulator: Simulator) -> None:
    head, _, _ = ordered(simulator, "set-cookie duplicate-headers cost=5")
    lines = head.splitlines()
    assert len([line for line in lines if line.startswith("set-cookie: ")]) == 2
    assert [line for line in lines if line.startswith("x-beans-node: ")] == [
        f"x-beans-node: {n}" for n in ("first", "second", "first")
    ]
    assert "x-request-cost-micro-usd: 5" in lines


def test_the_cost_header_can_be_left_out() -> None:
    with simulator_in_thread(SimulatorOptions(cost_header=False)) as simulator:
        head, _, _ = ordered(simulator, "bytes=1000")
    assert "x-request-id" in head
    assert "cost" not in head


def test_a_picture_is_found_behind_its_url(client: openai.OpenAI, simulator: Simulator) -> None:
    answer = client.images.generate(model=MODEL, prompt="beans [[sim url]]", size="1088x608")
    assert answer.data is not None
    origin, found, path = str(answer.data[0].url).partition("/simulator/")
    assert origin == simulator.base_url.removesuffix("/v1")
    status, png = get(simulator, found + path)
    assert (status, size_of(png)) == (200, "1088x608")


def test_every_directive_is_documented() -> None:
    assert directives.__doc__ is not None
    documented = set(re.findall(r"``([a-z-]+)(?:=[^`]*)?``", directives.__doc__))
    assert set(directives.TAKES) == documented & set(directives.TAKES)


# Bills


@pytest.mark.parametrize(
    ("directive", "stream", "images"),
    [
        ("bytes=1000", False, 4),
        ("bytes=1000", True, 4),
        ("json", True, 4),
        ("bill=no", False, 0),
        ("bill=no", True, 0),
        ("error=500", False, 0),
        ("error=500 bill=yes", False, 4),
        ("error=500 body=html bill=yes", True, 4),
        ("reset=before-headers", False, 0),
        ("reset=before-headers bill=yes", True, 4),
        ("silent", True, 0),
        ("silent bill=yes", False, 4),
        ("deliver=1", False, 1),
        ("deliver=3", True, 3),
        ("deliver=0", False, 0),
        ("deliver=1 bill=yes", True, 4),
        ("cut=50%", False, 4),
        ("cut=40% bytes=9000", True, 2),
        ("cut=50% bill=yes", True, 4),
        ("cut=50% bill=no", True, 0),
        ("cut=0", True, 1),
        ("cut=100%", True, 4),
        ("cut=30% framing=close", False, 4),
        ("sse-error-after=1", True, 1),
        ("sse-error-after=0", True, 0),
        ("sse-error-after=0 bill=yes", True, 4),
    ],
)
def test_what_was_made_is_billed_whatever_became_of_the_answer(
    simulator: Simulator, directive: str, stream: bool, images: int
) -> None:
    ordered(simulator, f"{directive} latency=0.001", n=4, stream=stream)
    assert billed_images(simulator) == images
    assert simulator.bill()["total_micro_usd"] == images * PRICES["1024x768", "low"]


@pytest.mark.parametrize(
    ("directive", "cell", "said"),
    [
        ("report-size=2048x2048", ("2048x2048", "low"), ("2048x2048", "low")),
        ("report-quality=high", ("1024x768", "high"), ("1024x768", "high")),
        ("report-size=2880x2880 report-quality=high", ("2880x2880", "high"), ("2880x2880", "high")),
        ("report-size=999x999 report-quality=ultra", ("1024x768", "low"), ("999x999", "ultra")),
        ("report-size=auto report-quality=auto", ("1024x768", "low"), ("auto", "auto")),
        ("report=none", ("1024x768", "low"), (None, None)),
    ],
)
def test_what_is_reported_is_made_and_billed(
    simulator: Simulator, directive: str, cell: tuple[str, str], said: tuple[str, str]
) -> None:
    _, body, _ = ordered(simulator, directive)
    answer = json.loads(body)
    assert (answer.get("size"), answer.get("quality")) == said
    assert size_of(decoded(answer["data"][0]["b64_json"])) == cell[0]
    assert simulator.bill()["total_micro_usd"] == PRICES[cell]


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_hangs_up_is_billed_for_what_is_made_all_the_same(simulator: Simulator, stream: bool) -> None:
    with socket.create_connection((simulator.host, simulator.port), PATIENCE_SECONDS) as connection:
        connection.sendall(request_bytes("[[sim latency=0.05 bytes=3000000]]", n=4, stream=stream))
        if stream:
            connection.recv(1)
    deadline = time.monotonic() + PATIENCE_SECONDS
    while billed_images(simulator) < 4 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert simulator.bill()["total_micro_usd"] == 4 * PRICES["1024x768", "low"]


def test_the_bill_names_the_gateways_request(client: openai.OpenAI, simulator: Simulator) -> None:
    client.images.generate(model=MODEL, prompt="a", extra_headers={"x-beanmeter-request-id": "bm-1"})
    client.images.generate(model=MODEL, prompt="a")
    assert [entry["client_request_id"] for entry in simulator.bill()["entries"]] == ["bm-1", None]


# The log


def test_the_log_shows_what_came_and_keeps_no_key(simulator: Simulator) -> None:
    body = json.dumps({"model": MODEL, "prompt": "bénéfice", "size": "1024x1024", "quality": "low"}).encode()
    post(simulator, "/v1/images/generations?a=b%20c", body, x_twice="1")
    (request,) = simulator.requests()
    assert (request["method"], request["path"], request["query"]) == ("POST", "/v1/images/generations", "a=b%20c")
    assert (request["body_bytes"], request["body_sha256"]) == (len(body), hashlib.sha256(body).hexdigest())
    assert (request["complete"], request["status"]) == (True, 200)
    assert ["authorization", fingerprint(f"Bearer {KEY}")] in request["headers"]
    assert ["x-twice", "1"] in request["headers"]
    assert KEY not in json.dumps(request)


def test_a_body_that_never_ends_is_logged_and_not_answered(simulator: Simulator) -> None:
    with socket.create_connection((simulator.host, simulator.port), PATIENCE_SECONDS) as connection:
        connection.sendall(request_bytes("a")[:-1])
        connection.shutdown(socket.SHUT_WR)
        assert connection.recv(1) == b""
    (request,) = simulator.requests()
    assert (request["complete"], request["status"]) == (False, None)


def test_bill_and_log_are_served_and_cleared(client: openai.OpenAI, simulator: Simulator) -> None:
    client.images.generate(model=MODEL, prompt="a")
    assert json.loads(get(simulator, "/simulator/bill")[1]) == simulator.bill()
    assert json.loads(get(simulator, "/simulator/requests")[1]) == simulator.requests()
    assert simulator.requests()
    assert post(simulator, "/simulator/reset", b"")[0] == 200
    assert simulator.bill() == {"total_micro_usd": 0, "entries": []}
    assert simulator.requests() == []
    assert get(simulator, "/simulator/nothing")[0] == 404


def test_bill_and_log_are_bounded_and_the_total_stays_whole() -> None:
    with simulator_in_thread(SimulatorOptions(log_max=3)) as simulator:
        for _ in range(5):
            ordered(simulator, "bytes=1000")
        assert len(simulator.requests()) == len(simulator.bill()["entries"]) == 3
        assert simulator.bill()["total_micro_usd"] == 5 * PRICES["1024x768", "low"]


# Connections


def test_one_connection_takes_many_requests_even_sent_at_once(simulator: Simulator) -> None:
    sent = request_bytes("[[sim bytes=1000]]") * 4 + request_bytes("[[sim bytes=1000 framing=chunked]]", close=True)
    received, end = on_the_wire(simulator, sent)
    assert (received.count(b"HTTP/1.1 200 OK\r\n"), end) == (5, "closed")
    assert billed_images(simulator) == 5


def test_a_chunked_body_and_one_that_waits_for_permission(simulator: Simulator) -> None:
    head, _, body = request_bytes("a", close=True).partition(b"\r\n\r\n")
    chunked = re.sub(rb"content-length: [0-9]+", b"transfer-encoding: chunked", head)
    pieces = b"".join(b"%x\r\n%b\r\n" % (1, body[i : i + 1]) for i in range(len(body)))
    received, _ = on_the_wire(simulator, chunked + b"\r\n\r\n" + pieces + b"0\r\nx-trailer: y\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 200 OK\r\n")
    received, _ = on_the_wire(simulator, head + b"\r\nexpect: 100-continue\r\n\r\n" + body)
    assert received.startswith(b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\n")


def test_a_large_edit_arrives_whole(simulator: Simulator) -> None:
    png = base64.b64decode(pictures.padded_base64(1024, 1024, 20_000_000))
    body = json.dumps(
        {"images": [{"image_url": "data:image/png;base64," + base64.b64encode(png).decode()}], "model": MODEL, "prompt": "a"}
    ).encode()
    assert post(simulator, EDITS, body)[0] == 200
    (request,) = simulator.requests()
    assert (request["body_bytes"], request["body_sha256"]) == (len(body), hashlib.sha256(body).hexdigest())


def test_ten_large_images_arrive_whole(simulator: Simulator) -> None:
    with socket.create_connection((simulator.host, simulator.port), PATIENCE_SECONDS) as connection:
        connection.sendall(request_bytes("[[sim bytes=3000000 framing=close]]", n=10, stream=True))
        with connection.makefile("rb") as answer:
            body = answer.read()
    lines = [line.removeprefix(b"data: ") for line in body.splitlines() if line.startswith(b"data: {")]
    assert [len(decoded(json.loads(line)["b64_json"])) for line in lines] == [3_000_000] * 10


def test_a_client_that_has_closed_its_side_still_gets_the_whole_answer(simulator: Simulator) -> None:
    with socket.create_connection((simulator.host, simulator.port), PATIENCE_SECONDS) as connection:
        connection.sendall(request_bytes("[[sim bytes=9000000]]"))
        connection.shutdown(socket.SHUT_WR)
        with connection.makefile("rb") as answer:
            body = answer.read().partition(b"\r\n\r\n")[2]
    assert len(decoded(json.loads(body)["data"][0]["b64_json"])) == 9_000_000


def test_it_runs_as_a_process_until_it_is_told_to_stop() -> None:
    program = "from proxy.simulator import run_simulator; run_simulator(port=0, ready=lambda s: print(s.port, flush=True))"
    with subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, env=dict(os.environ)) as process:
        try:
            assert process.stdout is not None
            address = ("127.0.0.1", int(process.stdout.readline()))
            with socket.create_connection(address, PATIENCE_SECONDS) as connection:
                connection.sendall(request_bytes("[[sim reset=before-headers]]"))
                with pytest.raises(ConnectionResetError):
                    connection.recv(1)
        finally:
            process.send_signal(signal.SIGTERM)
        assert process.wait(PATIENCE_SECONDS) == 0
