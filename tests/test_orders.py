"""Request bodies and what they ask for, as tables; each is fed whole, in 7-byte and in 1-byte pieces."""

from __future__ import annotations

import contextlib
import json
import threading
import tracemalloc
from collections.abc import Callable, Iterator, Mapping, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import openai
import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refusal
from proxy.orders import Reading, Splice, open_order
from proxy.prices import Operation, Order, parse_card, shipped_card

PIECES = (1_000_000, 7, 1)

CARD = shipped_card()
TWO_MODELS = parse_card(
    'version = "test"\n'
    '[models.small]\nqualities = ["draft", "fine"]\n[models.small.usd_per_image]\n512x512 = { draft = "0.01", fine = "0.02" }\n'
    '[models."gröss"]\nqualities = ["fine"]\n[models."gröss".usd_per_image]\n1024x1024 = { fine = "1" }\n'
)
ALIASES = {"1536x1024": "2016x1344", "square": "1024x1024"}

JSON = b"application/json"
FORM = b"multipart/form-data; boundary=b"

READ = ("model", "size", "quality", "n", "stream")


def read(
    body: bytes,
    content_type: bytes = JSON,
    *,
    step: int = 1_000_000,
    operation: Operation = "edit",
    card: Any = CARD,
    aliases: Mapping[str, str] = ALIASES,
) -> Reading:
    reader = open_order(operation, [content_type], [], card, aliases)
    for at in range(0, len(body), step):
        reader.feed(body[at : at + step])
    return reader.finish()


def read_all(body: bytes, content_type: bytes = JSON, **options: Any) -> Reading:
    readings = [read(body, content_type, step=step, **options) for step in PIECES]
    assert readings[0] == readings[1] == readings[2]
    return readings[0]


def field(name: str, value: str, more: str = "") -> str:
    return f'--b\r\nContent-Disposition: form-data; name="{name}"{more}\r\n\r\n{value}\r\n'


def form(**fields: str) -> bytes:
    return ("".join(field(name, value) for name, value in fields.items()) + "--b--\r\n").encode()


MODEL = '"model":"gpt-image-2"'


def order(
    size: str = "auto",
    quality: str = "auto",
    n: int = 1,
    stream: bool = False,
    model: str = "gpt-image-2",
    operation: Operation = "edit",
) -> Order:
    return Order(operation, model, size, quality, n, stream)


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        ("", order()),
        (',"size":null,"quality":null,"n":null,"stream":null', order()),
        (',"size":"auto","quality":"auto","n":1,"stream":false', order()),
        (',"size":"3840x2160","quality":"high","n":10,"stream":true', order("3840x2160", "high", 10, True)),
        (r',"si\u007ae":"1024\u0078768","quality":"lo\u0077"', order("1024x768", "low")),
        (',"prompt":"a\\nb \\"size\\":\\"x\\" ä","n":3', order(n=3)),
        (',"images":[{"image_url":"data:,","size":"x","n":99}],"size":"2048x2048"', order("2048x2048")),
        (',"extra":{"model":"x","size":1,"n":"x","stream":"x"},"quality":"medium"', order(quality="medium")),
        (',"size ":"x","ns":11,"response_format":"b64_json","partial_images":3', order()),
    ],
)
def test_json(members: str, expected: Order) -> None:
    for body in (f"{{{MODEL}{members}}}", f" {{\n\t{MODEL}{members.replace(':', ' : ')}\r\n}} "):
        assert read_all(body.encode()) == Reading(expected, None, expected)


@pytest.mark.parametrize("n", range(1, 11))
def test_every_count(n: int) -> None:
    assert read_all(f'{{"n":{n},{MODEL}}}'.encode()).order.n == n
    assert read_all(form(n=str(n), model="gpt-image-2"), FORM).order.n == n


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({}, order()),
        ({"size": "auto", "quality": "auto", "n": "1", "stream": "false"}, order()),
        ({"size": "3840x2160", "quality": "high", "n": "10", "stream": "true"}, order("3840x2160", "high", 10, True)),
        ({"stream": "1"}, order(stream=True)),
        ({"stream": "0"}, order()),
        ({"prompt": "size\r\n--\r\n\r\nn=11", "image[]": "x", "Size": "x", "": "x", "size[]": "x"}, order()),
    ],
)
def test_multipart(fields: dict[str, str], expected: Order) -> None:
    assert read_all(form(model="gpt-image-2", **fields), FORM) == Reading(expected, None, expected)
    assert read_all(form(**fields, model="gpt-image-2"), FORM) == Reading(expected, None, expected)


def test_multipart_fields_that_follow_an_image() -> None:
    body = form(model="gpt-image-2")[:-7].decode() + field("image", "\x00\x7f" * 5_000 + '"size"', '; filename="日本.png"')
    body += field("n", "2") + field("stream", "true") + "--b--"
    assert read_all(body.encode(), FORM).order == order(n=2, stream=True)


@pytest.mark.parametrize(
    ("model", "size", "quality"), [("small", "512x512", "draft"), ("gröss", "1024x1024", "fine"), ("small", "auto", "fine")]
)
def test_each_model_has_its_own_sizes_and_qualities(model: str, size: str, quality: str) -> None:
    asked = order(size, quality, model=model)
    expected = Reading(asked, None, asked)
    fields = {"model": model, "size": size, "quality": quality}
    assert read_all(json.dumps(fields).encode(), card=TWO_MODELS) == expected
    assert read_all(json.dumps(fields, ensure_ascii=False).encode(), card=TWO_MODELS) == expected
    assert read_all(form(**fields), FORM, card=TWO_MODELS) == expected


@pytest.mark.parametrize(
    ("body", "content_type", "size", "forwarded"),
    [
        (
            b'{"model":"gpt-image-2","size":"1536x1024","n":2}',
            JSON,
            "2016x1344",
            b'{"model":"gpt-image-2","size":"2016x1344","n":2}',
        ),
        (
            rb'{"prompt":"1536x1024 \"size\"", "s\u0069ze" : "\u0031536x1024" ,"model":"gpt-image-2"}',
            JSON,
            "2016x1344",
            rb'{"prompt":"1536x1024 \"size\"", "s\u0069ze" : "2016x1344" ,"model":"gpt-image-2"}',
        ),
        (b'{"model":"gpt-image-2","size":"square"}', JSON, "1024x1024", b'{"model":"gpt-image-2","size":"1024x1024"}'),
        (
            form(prompt="1536x1024", size="1536x1024", model="gpt-image-2"),
            FORM,
            "2016x1344",
            form(prompt="1536x1024", size="2016x1344", model="gpt-image-2"),
        ),
    ],
)
def test_an_aliased_size_is_the_one_change(body: bytes, content_type: bytes, size: str, forwarded: bytes) -> None:
    reading = read_all(body, content_type)
    assert reading.order.size == size
    splice = reading.splice
    assert isinstance(splice, Splice)
    assert body[: splice.start] + splice.replacement + body[splice.end :] == forwarded


def test_an_alias_of_what_another_model_has_is_no_alias() -> None:
    with pytest.raises(Refusal, match="Invalid size"):
        read(b'{"model":"small","size":"square"}', card=TWO_MODELS)


Expected = tuple[int, str, str | None]

INVALID_JSON: Expected = (400, "invalid_json", None)
INVALID_FORM: Expected = (400, "invalid_multipart", None)
UNSUPPORTED: Expected = (415, "unsupported_media_type", None)
NO_MODEL: Expected = (400, "missing_required_parameter", "model")
OTHER_MODEL: Expected = (404, "model_not_found", "model")


def invalid(param: str) -> Expected:
    return 400, "invalid_value", param


def twice(param: str) -> Expected:
    return 400, "duplicate_parameter", param


def refused(feed: Callable[[], object]) -> Refusal:
    with pytest.raises(Refusal) as error:
        feed()
    assert json.loads(error.value.body())["error"]["message"]
    return error.value


def told(refusal: Refusal) -> Expected:
    return refusal.status, refusal.code, refusal.param


@pytest.mark.parametrize(
    ("members", "expected"),
    [
        # model
        ('"prompt":"x"', NO_MODEL),
        ('"model":null', NO_MODEL),
        ('"Model":"gpt-image-2"', NO_MODEL),
        ('"model":"dall-e-3"', OTHER_MODEL),
        ('"model":""', OTHER_MODEL),
        ('"model":"gpt-image-2 "', OTHER_MODEL),
        ('"model":"GPT-image-2"', OTHER_MODEL),
        ('"model":"gpt-image-2\\u0000"', OTHER_MODEL),
        ('"model":"\\ud800"', OTHER_MODEL),
        ('"model":"' + "x" * 5_000 + '"', OTHER_MODEL),
        ('"model":2', OTHER_MODEL),
        ('"model":true', OTHER_MODEL),
        ('"model":["gpt-image-2"]', OTHER_MODEL),
        ('"model":{"id":"gpt-image-2"}', OTHER_MODEL),
        # size
        *(
            (f'{MODEL},"size":{size}', invalid("size"))
            for size in (
                '"1536x1025"',
                '"1024X1024"',
                '" 1024x1024"',
                '"1024x1024 "',
                '"1024\\u00d71024"',
                '"1024x1024\\n"',
                '"AUTO"',
                '"Auto"',
                '""',
                '"null"',
                '"1024"',
                '"0x0"',
                '"99999x99999"',
                '"100000x1"',
                '"-1x1"',
                '"Square"',
                "1024",
                "1.5",
                "true",
                "false",
                "[]",
                "{}",
                '["1024x1024"]',
                '{"w":1}',
                '"' + "1" * 5_000 + '"',
                '"1024x1024' + "\\u0020" * 400 + '"',
            )
        ),
        # quality
        *(
            (f'{MODEL},"quality":{quality}', invalid("quality"))
            for quality in (
                '"High"',
                '"hd"',
                '"standard"',
                '" low"',
                '"low "',
                '""',
                '"AUTO"',
                "1",
                "true",
                "[]",
                '["low"]',
                "{}",
                '"\\ud83d"',
            )
        ),
        # n
        *(
            (f'{MODEL},"n":{n}', invalid("n"))
            for n in (
                "0",
                "11",
                "-1",
                "-0",
                "100",
                "1.0",
                "2.0",
                "1e0",
                "1e1",
                "1E1",
                "10.0",
                "0.1",
                "99999999999999999999",
                "1" * 900,
                "true",
                "false",
                '"1"',
                '"2"',
                '""',
                "[1]",
                "[]",
                "{}",
            )
        ),
        (f'{MODEL},"n":01', INVALID_JSON),
        (f'{MODEL},"n":+1', INVALID_JSON),
        (f'{MODEL},"n":NaN', INVALID_JSON),
        # stream
        *(
            (f'{MODEL},"stream":{stream}', invalid("stream"))
            for stream in ('"true"', '"false"', '""', "0", "1", "[]", "{}", "[true]")
        ),
        # twice
        *((f'{MODEL},"{name}":null,"{name}":null', twice(name)) for name in READ[1:]),
        (f"{MODEL},{MODEL}", twice("model")),
        (f'{MODEL},"n":1,"\\u006e":1', twice("n")),
        (f'{MODEL},"size":"1024x1024","prompt":"x","s\\u0069z\\u0065":"1024x1024"', twice("size")),
        (f'{MODEL},"stream":[{{"stream":1}}],"stream":{{}}', twice("stream")),
        # the order of several faults
        ('"n":0,"n":0,"size":1,"size":1', twice("size")),
        ('"model":"x","n":0,"n":0', twice("n")),
        ('"size":1,"quality":1,"n":0', NO_MODEL),
        ('"model":1,"size":1', OTHER_MODEL),
        (f'{MODEL},"stream":1,"n":0,"quality":1,"size":1', invalid("size")),
        (f'{MODEL},"stream":1,"n":0,"quality":1', invalid("quality")),
        (f'{MODEL},"stream":1,"n":0', invalid("n")),
        ('"model":"x","n":0,"n":0,', INVALID_JSON),
    ],
)
def test_json_refusals(members: str, expected: Expected) -> None:
    body = f"{{{members}}}".encode()
    for step in PIECES:
        refusal = refused(lambda step=step: read(body, step=step))  # type: ignore[misc]
        assert told(refusal) == expected
        assert len(refusal.message) < 900


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"null",
        b"[]",
        b'"x"',
        b"{",
        b"{}x",
        b"{}{}",
        b"{'model':'gpt-image-2'}",
        b'{"model":"gpt-image-2",}',
        b'{"model":"gpt-im',
        b'{"model":NaN}',
        b'{"x":Infinity}',
        b'{"x":-Infinity}',
        b'\xef\xbb\xbf{"model":"gpt-image-2"}',
        b'{"x":"\xff"}',
        b'{"x":"\xed\xa0\x80"}',
        b'{"x":"a\nb"}',
        b'{"x":"\\x41"}',
        b'{"x":' + b"[" * 64 + b"]" * 64 + b"}",
        '{"model":"gpt-image-2"}'.encode("utf-16"),
        '{"model":"gpt-image-2"}'.encode("utf-16-le"),
        '{"model":"gpt-image-2"}'.encode("utf-32"),
        b"model=gpt-image-2",
        b"--b\r\n",
        b"{" + b'"n":1,' * 10_001 + b'"n":1}',
    ],
)
def test_bodies_that_are_no_json(body: bytes) -> None:
    for step in PIECES:
        assert told(refused(lambda step=step: read(body, step=step))) == INVALID_JSON  # type: ignore[misc]


def posted(*parts: str) -> bytes:
    return ("".join(parts) + "--b--\r\n").encode("utf-8", "surrogateescape")


NAMED = field("model", "gpt-image-2")


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (posted(field("prompt", "x")), NO_MODEL),
        (posted(field("model", "")), OTHER_MODEL),
        (posted(field("model", "gpt-image-2\r\n")), OTHER_MODEL),
        (posted(field("model", "null")), OTHER_MODEL),
        (posted(field("model", "\udcff")), OTHER_MODEL),
        (posted(field("model", "gpt-image-2", '; filename="x"')), OTHER_MODEL),
        *(
            (posted(NAMED, field("size", size)), invalid("size"))
            for size in ("", "null", '"1024x1024"', " auto", "1024x1024\n", "x" * 5_000)
        ),
        *(
            (posted(NAMED, field("quality", value)), invalid("quality"))
            for value in ("", "null", "HIGH", "hd", '"low"', "low ")
        ),
        *(
            (posted(NAMED, field("n", n)), invalid("n"))
            for n in ("", "null", "0", "11", "01", "+1", "1.0", "1e0", " 1", "1 ", '"1"', "\uff11")
        ),
        *((posted(NAMED, field("stream", value)), invalid("stream")) for value in ("", "null", "True", "yes", "2", "01", "on")),
        *((posted(NAMED, field(name, "1", '; filename="x"')), invalid(name)) for name in READ[1:]),
        (posted(NAMED, field("n", "1", "; filename*=utf-8''x")), invalid("n")),
        *((posted(NAMED, field(name, "x"), field(name, "x")), twice(name)) for name in READ[1:]),
        (posted(NAMED, NAMED), twice("model")),
        (posted(NAMED, field("n", "1"), field("image", "x", '; filename="x"'), field("n", "1", '; filename="x"')), twice("n")),
        (posted(NAMED, field("n", "1"), field("n", "2"))[:-4], INVALID_FORM),
        (posted(), INVALID_FORM),
        (b"", INVALID_FORM),
        (b"{}", INVALID_FORM),
        (b'{"model":"gpt-image-2"}', INVALID_FORM),
        (posted(NAMED)[:-4], INVALID_FORM),
        (posted(NAMED).replace(b"--b", b"--c"), INVALID_FORM),
        (posted(NAMED).replace(b"\r\n", b"\n"), INVALID_FORM),
        (posted(NAMED) + b"x", INVALID_FORM),
        (b"x\r\n" + posted(NAMED), INVALID_FORM),
        (posted(NAMED.replace("form-data", "attachment")), INVALID_FORM),
        (posted(NAMED.replace('name="model"', "x=model")), INVALID_FORM),
        (posted(NAMED.replace('name="model"', "name*=utf-8''model")), INVALID_FORM),
        (posted(NAMED, field("x", "1", '; name="n"')), INVALID_FORM),
        (posted(NAMED, field("n", "1\n--b")), INVALID_FORM),
    ],
)
def test_multipart_refusals(body: bytes, expected: Expected) -> None:
    for step in PIECES:
        assert told(refused(lambda step=step: read(body, FORM, step=step))) == expected  # type: ignore[misc]


@pytest.mark.parametrize(
    "content_type",
    [
        b"application/json",
        b"Application/JSON",
        b" application/json ",
        b"application/json; charset=utf-8",
        b'application/json;charset="UTF-8"',
        b"application/json; charset=us-ascii",
        b"application/json; charset=UTF8",
        b"application/json;",
        b"application/json; x=y; charset=utf-8",
    ],
)
@pytest.mark.parametrize("operation", ["generation", "edit"])
def test_content_types_of_json(content_type: bytes, operation: Operation) -> None:
    body = f"{{{MODEL}}}".encode()
    assert read(body, content_type, operation=operation).order == order(operation=operation)


@pytest.mark.parametrize(
    "content_type",
    [
        b"multipart/form-data; boundary=b",
        b'Multipart/Form-Data;BOUNDARY="b"',
        b"multipart/form-data; charset=utf-8; boundary=b",
        b"multipart/form-data; boundary=b; x=y",
    ],
)
def test_content_types_of_multipart(content_type: bytes) -> None:
    assert read(posted(NAMED), content_type).order == order()
    assert told(refused(lambda: read(posted(NAMED), content_type, operation="generation"))) == UNSUPPORTED


@pytest.mark.parametrize("boundary", ["a'()+_,-./:=?z", "----=_Part_1.2:3/4", "----WebKitFormBoundary7MA4YWxkTrZu0gW"])
def test_boundaries_that_are_no_tokens(boundary: str) -> None:
    body = posted(NAMED).replace(b"--b", b"--" + boundary.encode())
    for spelled in (boundary, f'"{boundary}"'):
        assert read(body, f"multipart/form-data; boundary={spelled}".encode()).order == order()


@pytest.mark.parametrize(
    ("content_types", "content_encodings", "expected"),
    [
        ([], [], UNSUPPORTED),
        ([b""], [], UNSUPPORTED),
        ([b"json"], [], UNSUPPORTED),
        ([b"text/plain"], [], UNSUPPORTED),
        ([b"text/json"], [], UNSUPPORTED),
        ([b"application/x-www-form-urlencoded"], [], UNSUPPORTED),
        ([b"application/vnd.api+json"], [], UNSUPPORTED),
        ([b"application/jsonx"], [], UNSUPPORTED),
        ([b"application/json, text/plain"], [], UNSUPPORTED),
        ([b"application/json", b"application/json"], [], UNSUPPORTED),
        ([b"application/json", b"multipart/form-data; boundary=b"], [], UNSUPPORTED),
        ([b"application/json; charset=utf-16"], [], UNSUPPORTED),
        ([b"application/json; charset=latin-1"], [], UNSUPPORTED),
        ([b"application/json; charset=utf-8; charset=utf-16"], [], UNSUPPORTED),
        ([b"application/json; charset"], [], UNSUPPORTED),
        ([b'application/json; charset="utf-8'], [], UNSUPPORTED),
        ([b"application/json charset=utf-8"], [], UNSUPPORTED),
        ([b"application/json\xff"], [], UNSUPPORTED),
        ([b"multipart/mixed; boundary=b"], [], UNSUPPORTED),
        ([b"application/json"], [b"gzip"], UNSUPPORTED),
        ([b"application/json"], [b"identity, gzip"], UNSUPPORTED),
        ([b"application/json"], [b"identity", b"br"], UNSUPPORTED),
        ([b"application/json"], [b"x"], UNSUPPORTED),
        ([b"multipart/form-data"], [], INVALID_FORM),
        ([b"multipart/form-data; boundary="], [], INVALID_FORM),
        ([b'multipart/form-data; boundary=""'], [], INVALID_FORM),
        ([b'multipart/form-data; boundary="b'], [], INVALID_FORM),
        ([b"multipart/form-data; boundary=b; boundary=c"], [], INVALID_FORM),
        ([b"multipart/form-data; boundary=b; boundary=b"], [], INVALID_FORM),
        ([b"multipart/form-data; boundary=" + b"b" * 71], [], INVALID_FORM),
        ([b'multipart/form-data; boundary="b\xff"'], [], INVALID_FORM),
        ([b'multipart/form-data; boundary="b "'], [], INVALID_FORM),
        ([b"multipart/form-data; boundary*=utf-8''b"], [], INVALID_FORM),
    ],
)
def test_headers_that_are_refused(
    content_types: Sequence[bytes], content_encodings: Sequence[bytes], expected: Expected
) -> None:
    assert told(refused(lambda: open_order("edit", content_types, content_encodings, CARD, ALIASES))) == expected


@pytest.mark.parametrize("content_encodings", [[], [b""], [b"identity"], [b"Identity", b" IDENTITY ,identity"]])
def test_no_content_encoding_is_none(content_encodings: Sequence[bytes]) -> None:
    reader = open_order("generation", [JSON], content_encodings, CARD, ALIASES)
    reader.feed(f"{{{MODEL}}}".encode())
    assert reader.finish().order == order(operation="generation")


@pytest.mark.parametrize(
    ("members", "words"),
    [
        (
            '"size":"1536x1020","quality":"high"',
            ['"1536x1020"', "2016x1344", "$0.217000 in high quality", "1440x480", "auto", "1536x1024"],
        ),
        ('"size":"1000X1000"', ["1024x1024", "$0.005900 in low, $0.052700 in medium, $0.210700 in high quality"]),
        (
            '"size":"1000x1000","quality":"best"',
            ["1024x1024", "$0.005900 in low, $0.052700 in medium, $0.210700 in high quality"],
        ),
        ('"size":"wide"', ['Invalid size: "wide". Accepted: auto, 1024x1024,']),
        ('"size":7', ["Invalid size: 7. Accepted: auto,"]),
        ('"size":[1]', ["Invalid size: an array. Accepted: auto,"]),
        ('"size":"\\u001b[31m\\ud800ä"', [r'"\u001b[31m\ud800\u00e4"']),
        ('"size":"' + "y" * 999 + '"', ['"' + "y" * 64 + '..."']),
        ('"quality":"hd"', ['"hd"', "auto, low, medium, high"]),
        ('"n":11', ["Invalid n: 11.", "from 1 to 10"]),
        ('"n":"2"', ['Invalid n: "2".']),
        ('"n":' + "1" * 500, ["1" * 64 + "..."]),
        ('"stream":1', ["Invalid stream: 1. Accepted: true, false."]),
    ],
)
def test_messages_say_what_to_send(members: str, words: list[str]) -> None:
    refusal = refused(lambda: read(f"{{{MODEL},{members}}}".encode()))
    assert [word for word in words if word not in refusal.message] == []


def test_a_message_lists_the_priced_models() -> None:
    message = refused(lambda: read(b'{"model":"dall-e-3"}', card=TWO_MODELS)).message
    assert message == 'The model "dall-e-3" is not priced here. Priced models: small, gröss.'


@pytest.mark.parametrize(
    ("content_type", "body", "fault"),
    [
        (JSON, b'{"model":"gpt-image-2","n":1,', b"}"),
        (JSON, b'{"model":"gpt-image-2","prompt":"', b"\x00"),
        (JSON, b"[", b""),
        (FORM, b"--b", b"x"),
        (FORM, posted(NAMED), b"x"),
        (FORM, b"", b"{"),
    ],
)
def test_a_broken_body_is_refused_before_its_end(content_type: bytes, body: bytes, fault: bytes) -> None:
    reader = open_order("edit", [content_type], [], CARD, ALIASES)
    assert told(refused(lambda: (reader.feed(body), reader.feed(fault)))) in (INVALID_JSON, INVALID_FORM)  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("content_type", "opening", "ending"),
    [
        (JSON, b'{"prompt":"', b'",' + MODEL.encode() + b',"n":2}'),
        (JSON, b'{"size":"', b'",' + MODEL.encode() + b"}"),
        (JSON, b'{"', b'":1,' + MODEL.encode() + b',"n":2}'),
        (FORM, field("image", "", '; filename="x"').encode()[:-2], b"\r\n" + posted(NAMED, field("n", "2"))),
        (FORM, field("size", "").encode()[:-2], b"\r\n" + posted(NAMED)),
    ],
)
def test_memory_does_not_grow_with_the_body(content_type: bytes, opening: bytes, ending: bytes) -> None:
    reader = open_order("edit", [content_type], [], CARD, ALIASES)
    piece = b"QUJD" * 16_384
    reader.feed(opening)
    tracemalloc.start()
    for _ in range(100):
        reader.feed(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    reader.feed(ending)
    assert peak < 4 * len(piece)
    if b"size" in opening:
        assert told(refused(reader.finish)) == invalid("size")
    else:
        assert reader.finish().order == order(n=2)


# What the SDKs send.


class _Recorder(ThreadingHTTPServer):
    """Takes any POST, keeps its Content-Type headers and body, and answers 400."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _RecorderHandler)
        self.requests: list[tuple[list[bytes], bytes]] = []


class _RecorderHandler(BaseHTTPRequestHandler):
    def do_POST(self) -> None:
        assert isinstance(self.server, _Recorder)
        content_types = [value.encode("latin-1") for value in self.headers.get_all("Content-Type", [])]
        self.server.requests.append((content_types, self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(400)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args: object) -> None:
        """Says nothing on stderr."""


@pytest.fixture(scope="module")
def recorder() -> Iterator[_Recorder]:
    with _Recorder() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.mark.parametrize(
    ("operation", "arguments", "expected"),
    [
        ("generation", {"prompt": 'ä\n"size"'}, order()),
        ("generation", {"prompt": "x", "size": "2048x1152", "quality": "low", "n": 2}, order("2048x1152", "low", 2)),
        ("generation", {"prompt": "x", "stream": True, "partial_images": 2, "extra_body": {"a": {"n": 5}}}, order(stream=True)),
        ("edit", {"prompt": "x", "image": b"\x89PNG\r\n\r\n--b--"}, order()),
        (
            "edit",
            {"prompt": "x", "image": ('ä"b\\c; name=size.png', b"\x00" * 999), "stream": True, "n": 3},
            order(n=3, stream=True),
        ),
        (
            "edit",
            {
                "prompt": "x\r\n",
                "image": [("a.png", b"1"), ("b.png", b"")],
                "mask": b"m",
                "size": "1024x1024",
                "quality": "high",
            },
            order("1024x1024", "high"),
        ),
        ("edit", {"prompt": "x", "image": b"i", "stream": False, "extra_body": {'we"ird': "1", "user_": ["a", "b"]}}, order()),
    ],
)
def test_what_the_python_sdk_sends(
    recorder: _Recorder, operation: Operation, arguments: dict[str, Any], expected: Order
) -> None:
    url = f"http://127.0.0.1:{recorder.server_address[1]}/v1"
    with openai.OpenAI(base_url=url, api_key="none", max_retries=0) as client, contextlib.suppress(openai.BadRequestError):
        call: Any = client.images.generate if operation == "generation" else client.images.edit
        call(model="gpt-image-2", **arguments)
    content_types, body = recorder.requests.pop()
    assert len(content_types) == 1
    reading = read_all(body, content_types[0], operation=operation)
    read = Order(operation, expected.model, expected.size, expected.quality, expected.n, expected.stream)
    assert reading == Reading(read, None, read)


def test_what_the_node_sdk_sends() -> None:
    """As Node's own FormData writes it: fields and files in the caller's order, and older versions end without CRLF."""
    boundary = "----formdata-undici-012345678901"
    body = (
        field("image[]", "\x00\r\n\x01", '; filename="ä%22.png"')
        + field("prompt", "x")
        + NAMED
        + field("image[]", "", '; filename="b.png"').replace("\r\n\r\n", "\r\nContent-Type: image/png\r\n\r\n", 1)
        + field("n", "2")
        + field("stream", "true")
        + "--b--"
    ).replace("--b", "--" + boundary)
    for end in ("", "\r\n"):
        reading = read_all((body + end).encode(), f"multipart/form-data; boundary={boundary}".encode())
        assert reading.order == order(n=2, stream=True)


# Whatever comes, the end is a reading or a refusal; and what is taken says the same to another reader.

VALUES: st.SearchStrategy[Any] = st.sampled_from(
    [None, True, False, 0, 1, 2, 10, 11, 1.0, "auto", "1024x1024", "1536x1024", "low", "high", "1", "gpt-image-2", [], {}]
)
BODIES = st.dictionaries(st.sampled_from(READ) | st.text(max_size=3), VALUES | st.text(max_size=8), max_size=6)


def read_or_refuse(body: bytes, step: int) -> Reading | Refusal:
    try:
        return read(body, step=step)
    except Refusal as refusal:
        return refusal


@given(BODIES, st.integers(1, 30), st.booleans())
def test_any_object_is_read_as_json_loads_reads_it(value: dict[str, Any], step: int, ascii_only: bool) -> None:
    body = json.dumps({"model": "gpt-image-2"} | value, ensure_ascii=ascii_only).encode()
    reading = read_or_refuse(body, step)
    if isinstance(reading, Refusal):
        assert reading.code in ("invalid_value", "model_not_found", "missing_required_parameter")
        return
    read_elsewhere = json.loads(body)
    if reading.splice is None:
        assert reading.order.size == (read_elsewhere.get("size") or "auto")
    else:
        assert (read_elsewhere["size"], reading.order.size) == ("1536x1024", "2016x1344")
    assert reading.order.model == read_elsewhere["model"]
    assert reading.order.quality == (read_elsewhere.get("quality") or "auto")
    assert reading.order.n == (1 if read_elsewhere.get("n") is None else read_elsewhere["n"])
    assert reading.order.stream is bool(read_elsewhere.get("stream"))


TOKENS = st.sampled_from(
    [
        "{",
        "}",
        "[",
        "]",
        ":",
        ",",
        '"',
        "\\u006e",
        "\\",
        "1",
        "null",
        " ",
        "ä",
        *(f'"{name}"' for name in READ),
        '"auto"',
        MODEL,
    ]
)


@given(st.lists(TOKENS, max_size=20), st.integers(1, 9))
def test_any_pieces_of_json_end_in_a_reading_or_a_refusal(pieces: list[str], step: int) -> None:
    for body in ("".join(pieces).encode(), f"{{{MODEL},{''.join(pieces)}}}".encode()):
        with contextlib.suppress(Refusal):
            read(body, step=step)
            assert json.loads(body)["model"] == "gpt-image-2"


@given(st.binary(max_size=60), st.lists(st.sampled_from([*READ, "x"]), max_size=3), st.integers(1, 30))
def test_any_form_ends_in_a_reading_or_a_refusal(junk: bytes, names: list[str], step: int) -> None:
    value = junk.decode("latin-1")
    for body in (
        junk,
        posted(NAMED, *(field(name, value) for name in names)),
        posted(NAMED, *(field(value, name) for name in names)),
    ):
        with contextlib.suppress(Refusal):
            assert read(body, FORM, step=step).order.model == "gpt-image-2"


SIZE = "1024x1024"


@pytest.mark.parametrize(
    ("fields", "held"),
    [
        ('"N": 10', (SIZE, "low", 10)),
        ('"n": 1, "N": 10', (SIZE, "low", 10)),
        ('"Size": "2880x2880"', ("auto", "low", 1)),
        ('"\\u017fize": "2880x2880"', ("auto", "low", 1)),
        ('"QUALITY": "high"', (SIZE, "auto", 1)),
        ('"\\u017fTREAM": true, "Model": "x", "Prompt": ""', (SIZE, "low", 1)),
    ],
)
def test_a_name_that_another_reader_would_take_for_ours_is_held_at_its_dearest(fields: str, held: tuple[str, str, int]) -> None:
    reader = open_order("generation", [b"application/json"], [], shipped_card(), {})
    reader.feed(f'{{"model": "gpt-image-2", "size": "{SIZE}", "quality": "low", {fields}}}'.encode())
    reading = reader.finish()
    assert (reading.order.size, reading.order.quality, reading.order.n) == (SIZE, "low", 1)
    assert (reading.dearest.size, reading.dearest.quality, reading.dearest.n) == held


def test_a_form_in_another_character_set_is_not_read() -> None:
    with pytest.raises(Refusal) as refused:
        open_order("edit", [b"multipart/form-data; boundary=B; charset=utf-7"], [], shipped_card(), {})
    assert (refused.value.status, refused.value.code) == (415, "unsupported_media_type")


def test_with_several_models_a_doubtful_model_is_refused() -> None:
    table = 'qualities = ["low"]\nusd_per_image = { 512x512 = { low = "%s" } }\n'
    card = parse_card(f'version = "1"\n[models.cheap]\n{table % "0.01"}[models.dear]\n{table % "5"}')
    reader = open_order("generation", [b"application/json"], [], card, {})
    reader.feed(b'{"model": "cheap", "Model": "dear"}')
    with pytest.raises(Refusal) as refused:
        reader.finish()
    assert (refused.value.code, refused.value.param) == ("duplicate_parameter", "model")
