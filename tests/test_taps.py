"""What answers deliver, as tables of transcripts; each is fed whole, in 7-byte and 1-byte pieces, and cut at every byte."""

from __future__ import annotations

import base64
import contextlib
import gzip
import itertools
import json
import struct
import tracemalloc
import zlib
from collections.abc import Callable, Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.prices import DeliveredImage
from proxy.skim import SkimError
from proxy.taps import Delivery, Usage, open_tap
from proxy.taps.delivery import IMAGES_MAX
from proxy.taps.documents import Document
from proxy.taps.events import LINES_MAX, Events

PNG = base64.b64encode(b"\x89PNG\r\n\x1a\n\x00\x00\x00\x0dIHDR" + struct.pack(">II", 2048, 1152) + bytes(99)).decode()

BARE = DeliveredImage()
LOW = DeliveredImage("1024x1024", "low")
MEASURED = DeliveredImage(measured_size="2048x1152")


def deliver(
    pieces: Iterable[bytes],
    *,
    content_type: bytes | None = None,
    encoding: bytes | None = None,
    ended_properly: bool = True,
) -> Delivery:
    tap = open_tap(content_type, encoding)
    for piece in pieces:
        tap.feed(piece)
    return tap.finish(ended_properly=ended_properly)


def cut(body: bytes, step: int) -> list[bytes]:
    return [body[at : at + step] for at in range(0, len(body), step)]


def done(*images: DeliveredImage, error: bool = False, usage: Usage | None = None) -> Delivery:
    """A known answer, read to its end."""
    return Delivery(images, complete=True, error=error, understood=True, usage=usage)


UNKNOWN = Delivery(complete=True)

COMPLETED = '{"type":"image_generation.completed","b64_json":"AAAA","size":"1024x1024","quality":"low"}'
PARTIAL = '{"type":"image_generation.partial_image","b64_json":"AAAA","partial_image_index":0,"size":"1024x1024"}'
NESTED_ERROR = '{"type":"error","error":{"type":"server_error","code":"x","message":"m","param":null}}'
OK = COMPLETED.encode()


def edited(members: str) -> str:
    """A completed event with these members, and nothing but its data."""
    return f'data: {{"type":"image_edit.completed",{members}}}\n\n'


STREAMS: dict[str, tuple[str, Delivery]] = {
    "as documented": (
        f"event: image_generation.partial_image\ndata: {PARTIAL}\n\n"
        f"event: image_generation.completed\ndata: {COMPLETED}\n\ndata: [DONE]\n\n",
        done(LOW),
    ),
    "crlf": (f"event: image_generation.completed\r\ndata: {COMPLETED}\r\n\r\n", done(LOW)),
    "lone cr": (f"event: image_generation.completed\rdata: {COMPLETED}\r\r", done(LOW)),
    "line ends mixed": (f": a\r\r\n: b\n\rdata: {PARTIAL}\r\n\rdata: {COMPLETED}\n\r\n", done(LOW)),
    "comments": (f": ping\n\n:\n\ndata: {COMPLETED}\n: pong\n\n", done(LOW)),
    "a comment with a field in it": (f":data: {COMPLETED}\n\n: data: {COMPLETED}\n\n", UNKNOWN),
    "no event line": (f"data: {COMPLETED}\n\n", done(LOW)),
    "no space after the colon": (f"event:image_generation.completed\ndata:{COMPLETED}\n\n", done(LOW)),
    "no type in the data": ('event: image_edit.completed\ndata: {"b64_json":"AAAA"}\n\n', done(BARE)),
    "the name after the data": ('data: {"b64_json":"AAAA"}\nevent: image_edit.completed\n\n', done(BARE)),
    "a name goes with one event": ("event: image_edit.completed\ndata: {}\n\ndata: {}\n\n", done(BARE)),
    "the last name counts": ("event: image_edit.completed\nevent: ping\ndata: {}\n\n", UNKNOWN),
    "the type counts before the name": (f"event: image_edit.completed\ndata: {PARTIAL}\n\n", done()),
    "another completed": ('data: {"type":"image_variation.completed"}\n\n', done(BARE)),
    "several data lines": (
        'data: {"type":\ndata: "image_edit.completed",\ndata\ndata:\ndata:  "size":"1x1"}\n\n',
        done(DeliveredImage("1x1")),
    ),
    "a byte order mark": (f"\ufeffdata: {COMPLETED}\n\n", done(LOW)),
    "blank lines first": (f"\r\n\n\ufeff\n\ndata: {COMPLETED}\n\n", done(LOW)),
    "unknown events and fields": (
        'id: 7\nretry: 10\nevent: ping\ndata: {"type":"ping"}\n\nunheard-of: x\ndata: hello\n\ndatum: {}\n\n'
        f"data: {COMPLETED}\n\n",
        done(LOW),
    ),
    "no last blank line": (f"data: {COMPLETED}\n", done(LOW)),
    "no last line end": (f"data: {COMPLETED}", done(LOW)),
    "no last line end, named": ("data: {}\nevent: image_edit.completed", done(BARE)),
    "no blank line between": (f"data: {PARTIAL}\ndata: {COMPLETED}\ndata: {COMPLETED}\ndata: [DONE]", done(LOW, LOW)),
    "no blank line between, named": (
        "event: image_edit.partial_image\ndata: {}\nevent: image_edit.completed\ndata: {}\n"
        "event: image_edit.completed\ndata: {}\n",
        done(BARE, BARE),
    ),
    "size and quality first": (
        'data: {"size":"1x1","quality":"high","type":"image_edit.completed","b64_json":"AAAA"}\n\n',
        done(DeliveredImage("1x1", "high")),
    ),
    "auto is not told": (edited('"size":"auto","quality":"auto"'), done(BARE)),
    "not strings": (edited('"size":1024,"quality":null'), done(BARE)),
    "a size beyond measure": (edited(f'"size":"{"1" * 100}"'), done(BARE)),
    "escapes": (
        'data: {"\\u0074ype":"image_edit\\u002ecompleted","s\\u0069ze":"1\\u0078"}\n\n',
        done(DeliveredImage("1x")),
    ),
    "a url instead": (edited('"url":"https://example.com/a.png"'), done(BARE)),
    "measured": (edited(f'"b64_json":"{PNG}"'), done(MEASURED)),
    "measured from a data url": (edited(f'"b64_json":null,"url":"data:image/png;base64,{PNG}"'), done(MEASURED)),
    "measured, with a quality": (
        edited(f'"b64_json":"{PNG}","size":"auto","quality":"low"'),
        done(DeliveredImage(None, "low", "2048x1152")),
    ),
    "reported, so not measured": (edited(f'"b64_json":"{PNG}","size":"1x1"'), done(DeliveredImage("1x1"))),
    "usage": (
        edited('"usage":{"input_tokens":3,"output_tokens":"4","total_tokens":7,"details":{"output_tokens":9}}'),
        done(BARE, usage=Usage(3, None, 7)),
    ),
    "usage of two": (
        edited('"usage":{"output_tokens":3}') + edited('"usage":{"output_tokens":4,"total_tokens":-1}'),
        done(BARE, BARE, usage=Usage(output_tokens=7)),
    ),
    "nested error": (f"event: error\ndata: {NESTED_ERROR}\n\n", done(error=True)),
    "flat error": ('data: {"type":"error","code":"x","message":"m"}\n\n', done(error=True)),
    "error of another type": ('event: error\ndata: {"type":"server_error","message":"m"}\n\n', done(error=True)),
    "error in plain text": ("event: error\ndata: out of beans\n\n", done(error=True)),
    "error in plain text, no line end": ("event: error\ndata: out of beans", done(error=True)),
    "error without data": ("event: error\n\n", UNKNOWN),
    "error without a type": ('data: {"error":{"message":"m"}}\n\n', done(error=True)),
    "error without a type, under a name": ('event: a.completed\ndata: {"error":{"message":"m"}}\n\n', done(error=True)),
    "no error after all": ('event: image_edit.completed\ndata: {"error":null}\n\n', done(BARE)),
    "error after an image": (f"data: {COMPLETED}\n\nevent: error\ndata: {NESTED_ERROR}\n\n", done(LOW, error=True)),
    "previews only": (f"data: {PARTIAL}\n\n", done()),
    "done only": ("data:[DONE]\r\n\r\n", done()),
    "no word for done": ("data: [DONE\n\ndata: [done]\n\ndata: DONE\n\n: [DONE]\n\n", UNKNOWN),
    "data that never becomes whole": (
        'data: {"type":"image_edit.completed"\n\ndata: {"type":"image_edit.completed",}\n\n',
        UNKNOWN,
    ),
    "data that is not an object": ('event: image_edit.completed\ndata: ["AAAA"]\n\n', UNKNOWN),
    "something behind the object": (f"data: {COMPLETED} ]\n\n", done(LOW)),
    "types that only look alike": (
        'data: {"type":"image_edit.completed.v2"}\n\ndata: {"type":"IMAGE_EDIT.COMPLETED"}\n\ndata: {"type":"completed"}\n\n'
        'data: {"type":"ping","data":{"type":"image_edit.completed"}}\n\n'
        'data: {"type":"ping","x":"\\"type\\":\\"image_edit.completed\\""}\n\n',
        UNKNOWN,
    ),
    "fields that only look alike": (
        f"event: image_edit.completed\n\ndata: {{}}\n\n data: {COMPLETED}\n\nDATA: {COMPLETED}\n\n",
        UNKNOWN,
    ),
    "a page": ("<!doctype html>\n<html><body>data: 502 Bad Gateway</body></html>\n", UNKNOWN),
    "words": ("upstream connect error", UNKNOWN),
    "a list": ('[{"b64_json":"AAAA"}]', UNKNOWN),
    "nothing": ("", UNKNOWN),
    "blank lines": ("\n\n\r\n", UNKNOWN),
}

DOCUMENTS: dict[str, tuple[str, Delivery]] = {
    "as documented": (
        '{"created":1,"data":[{"b64_json":"AAAA","revised_prompt":"a bean"}],"size":"1024x1024","quality":"low",'
        '"usage":{"total_tokens":7,"input_tokens":3,"output_tokens":4}}',
        done(LOW, usage=Usage(3, 4, 7)),
    ),
    "size and quality first": (
        '{"size":"1024x1024","quality":"low","data":[{"b64_json":"AAAA"},{"url":"https://example.com"}]}',
        done(LOW, LOW),
    ),
    "auto is not told": ('{"size":"auto","quality":"auto","data":[{"b64_json":"AAAA"}]}', done(BARE)),
    "white space": ('\ufeff\r\n\t { "data" : [ { "b64_json" : "AAAA" } , { } ] } \r\n', done(BARE, BARE)),
    "keep-alive white space": (" \n" * 5000 + '{"data":[{}]}', done(BARE)),
    "measured": (f'{{"data":[{{"b64_json":"{PNG}"}},{{"b64_json":"AAAA"}}]}}', done(MEASURED, BARE)),
    "measured, escaped": (
        '{"data":[{"b64_json":"' + PNG.replace("/", "\\/").replace("A", "\\u0041") + '"}]}',
        done(MEASURED),
    ),
    "reported, so not measured": (
        f'{{"data":[{{"b64_json":"{PNG}"}}],"size":"1024x1024","quality":"low"}}',
        done(LOW),
    ),
    "elements that are no images": (
        '{"data":[null,1,"x",[],[{"b64_json":"AAAA"}],{"b64_json":null},{"b64_json":""},{"url":null,"b64_json":null},{"url":""}]}',
        done(),
    ),
    "elements that are images": (
        '{"data":[{"b64_json":null,"url":"u"},{"b64_json":"AAAA","url":null},{"revised_prompt":"p"},{},{"x":{"b64_json":null}}]}',
        done(BARE, BARE, BARE, BARE, BARE),
    ),
    "look-alikes elsewhere": (
        '{"created":1,"b64_json":"AAAA","data":[],"more":{"data":[{"b64_json":"AAAA"}]},"x":"\\"data\\":[{}]"}',
        done(),
    ),
    "only created": ('{"created":1}', done()),
    "no data": ('{"created":1,"data":null}', done()),
    "an error": ('{"error":{"message":"m","type":"t","param":null,"code":null}}', done(error=True)),
    "an error in a word": ('{"error":"out of beans"}', done(error=True)),
    "no error after all": ('{"error":null,"created":1,"data":[{}]}', done(BARE)),
    "unknown": ('{"detail":"Not Found","error":null}', UNKNOWN),
    "empty object": ("{}", UNKNOWN),
    "something behind it": ('{"data":[{}]}}\n{"data":[{}]}', done(BARE)),
    "cut before the end": (
        '{"created":1,"data":[{"b64_json":"AAAA"}],"size":"1024x1024","quality":"low"',
        Delivery((LOW,), understood=True),
    ),
    "cut in the second image": (
        '{"created":1,"data":[{"b64_json":"AAAA"},{"b64_json":"AA',
        Delivery((BARE,), understood=True),
    ),
    "cut behind the second image": (
        '{"created":1,"data":[{"b64_json":"AAAA"},{"b64_json":"AA"',
        Delivery((BARE, BARE), understood=True),
    ),
    "cut behind an element without an image": ('{"data":[{"b64_json":null}', Delivery((), understood=True)),
    "broken": ('{"data":[{"b64_json":"AAAA"},],"size":"1x1"}', Delivery((BARE,), understood=True)),
    "cut error": ('{"error":{"mess', Delivery(error=True, understood=True)),
}

ANSWERS = {f"stream: {name}": (text.encode(), expected) for name, (text, expected) in STREAMS.items()} | {
    f"json: {name}": (text.encode(), expected) for name, (text, expected) in DOCUMENTS.items()
}

each_answer = pytest.mark.parametrize(("body", "expected"), ANSWERS.values(), ids=ANSWERS.keys())


@pytest.mark.parametrize("step", [100_000, 7, 1])
@each_answer
def test_what_was_delivered(body: bytes, expected: Delivery, step: int) -> None:
    assert deliver(cut(body, step)) == expected


@each_answer
def test_a_wrong_label_changes_nothing(body: bytes, expected: Delivery) -> None:
    for content_type in (b"text/event-stream", b"application/json", b"text/html; charset=utf-8"):
        if body.strip():
            assert deliver([body], content_type=content_type) == expected


def test_an_empty_answer_is_judged_by_its_label() -> None:
    assert deliver([], content_type=b"application/json; charset=utf-8") == Delivery()
    assert deliver([b" \n"], content_type=b"Application/Problem+JSON") == Delivery()
    assert deliver([b""], content_type=b"text/event-stream") == UNKNOWN
    assert deliver([], content_type=b"text/event-stream", ended_properly=False) == Delivery()


@pytest.mark.parametrize(
    ("text", "complete"),
    [
        (f"data: {COMPLETED}\n\n", False),
        (f"data: {COMPLETED}", False),
        (f"data: {COMPLETED}\n\ndata: [DONE]", True),
        (f"data: {COMPLETED}\n\nevent: error\ndata: {NESTED_ERROR}", True),
        (f"data: {COMPLETED}\n\nevent: error\ndata: out of be", False),
        ('{"data":[{"b64_json":"AAAA"}],"size":"1024x1024","quality":"low"}', True),
        ('{"data":[{"b64_json":"AAAA"}],"size":"1024x1024","quality":"low"', False),
    ],
)
def test_when_an_answer_is_complete_although_its_transfer_is_not(text: str, complete: bool) -> None:
    delivery = deliver([text.encode()], ended_properly=False)
    assert (delivery.images, delivery.complete) == ((LOW,), complete)


@each_answer
def test_what_is_known_of_a_cut_answer_only_grows(body: bytes, expected: Delivery) -> None:
    images, complete, understood = 0, False, False
    for end in range(min(len(body), 1000) + 1):
        delivery = deliver([body[:end]], ended_properly=False)
        assert images <= len(delivery.images) <= len(expected.images)
        assert complete <= delivery.complete <= expected.complete
        assert understood <= delivery.understood <= expected.understood
        images, complete, understood = len(delivery.images), delivery.complete, delivery.understood


@pytest.mark.parametrize("line_end", [b"\n", b"\r\n", b"\r"])
def test_an_image_counts_from_the_last_byte_of_its_data_on(line_end: bytes) -> None:
    event = b"event: image_generation.completed" + line_end + b"data: " + OK + line_end * 2
    body = b": hello" + line_end * 2 + event + event
    first = body.index(OK) + len(OK)
    second = body.rindex(OK) + len(OK)
    for end in range(len(body) + 1):
        assert deliver([body[:end]], ended_properly=False).images == (LOW,) * ((end >= first) + (end >= second))


def test_an_image_of_a_document_counts_from_the_end_of_its_string_on() -> None:
    body = b'{"created":1,"data":[{"x":"p","b64_json":"AAAA"},{"url":"https://a"},{"b64_json":null},{}],"size":"auto"}'
    # An element that names no image is known to be one when the next thing after it is read.
    ends = [body.index(token) + len(token) for token in (b'"AAAA"', b'"https://a"', b'"auto"')]
    for end in range(len(body) + 1):
        assert len(deliver([body[:end]], ended_properly=False).images) == sum(end >= known for known in ends)


def deflate_bare(body: bytes) -> bytes:
    deflater = zlib.compressobj(wbits=-zlib.MAX_WBITS)
    return deflater.compress(body) + deflater.flush()


def gzip_in_members(body: bytes) -> bytes:
    return b"".join(map(gzip.compress, cut(body, 50)))


ENCODED: dict[str, tuple[bytes, Callable[[bytes], bytes]]] = {
    "gzip": (b"gzip", gzip.compress),
    "gzip in members": (b" X-Gzip ", gzip_in_members),
    "deflate": (b"deflate", zlib.compress),
    "bare deflate": (b"deflate", deflate_bare),
    "identity": (b"identity", bytes),
    "empty": (b"", bytes),
}


@pytest.mark.parametrize("step", [100_000, 7, 1])
@pytest.mark.parametrize("name", ENCODED)
def test_an_encoded_answer_is_read(name: str, step: int) -> None:
    encoding, encode = ENCODED[name]
    many_steps = ('{"data":[{"b64_json":"' + "A" * 300_000 + '"}]}', done(BARE))
    for text, expected in (STREAMS["as documented"], STREAMS["previews only"], DOCUMENTS["as documented"], many_steps):
        assert deliver(cut(encode(text.encode()), step), encoding=encoding) == expected


@pytest.mark.parametrize("name", ["gzip", "deflate", "bare deflate"])
def test_an_encoded_answer_that_is_cut_is_not_complete(name: str) -> None:
    encoding, encode = ENCODED[name]
    encoded = encode(b"data: " + OK + b"\n\n")
    for end in range(1, len(encoded)):
        assert not deliver([encoded[:end]], encoding=encoding).complete


@pytest.mark.parametrize("encoding", [b"br", b"zstd", b"compress", b"gzip, gzip", b"\xff"])
def test_an_unknown_encoding_is_not_understood(encoding: bytes) -> None:
    assert deliver([b"data: " + OK + b"\n\n"], encoding=encoding) == Delivery()
    assert deliver([], encoding=encoding) == Delivery()


@pytest.mark.parametrize("encoding", [b"gzip", b"deflate"])
def test_what_only_claims_to_be_encoded_is_not_understood(encoding: bytes) -> None:
    assert deliver([b"data: " + OK + b"\n\n"], encoding=encoding) == Delivery()


def test_images_before_a_fault_of_the_encoding_count() -> None:
    encoded = gzip.compress(b"data: " + OK + b"\n\n")
    assert deliver([encoded + b"\xff\xff"], encoding=b"gzip") == Delivery((LOW,), understood=True)


TOKENS = [
    *("\n", "\r", "\r\n", "\n\n", ":", "{", "}", "[", "]", '"', ",", " ", "\\", "\\u00", '{"', '{"data":[{', "},{", "\ufeff"),
    *("data: ", "data:", "event: ", ": ", "[DONE]", "error", "image_edit.completed", "image_edit.partial_image"),
    *('"type":', '"b64_json":', '"url":', '"size":', '"quality":', '"error":', '"data":[', '"created":1'),
    *('"usage":{"input_tokens":1}', '"AAAA"', '"auto"', '"1x1"', "null", "true", "12", '"error"', '"image_edit.completed"'),
    *(COMPLETED, PARTIAL, NESTED_ERROR, PNG),
]

bodies = st.lists(st.one_of(st.sampled_from(TOKENS).map(str.encode), st.binary(max_size=5)), max_size=30).map(b"".join)


@given(body=bodies, cuts=st.lists(st.integers(0, 600), max_size=8), ended_properly=st.booleans())
def test_pieces_make_no_difference(body: bytes, cuts: list[int], ended_properly: bool) -> None:
    bounds = [0, *sorted(min(at, len(body)) for at in cuts), len(body)]
    pieces = [body[start:end] for start, end in itertools.pairwise(bounds)]
    whole = deliver([body], ended_properly=ended_properly)
    assert deliver(pieces, ended_properly=ended_properly) == whole
    assert deliver(cut(body, 1), ended_properly=ended_properly) == whole


@given(body=st.one_of(st.binary(), bodies), encoding=st.sampled_from([None, b"gzip", b"deflate", b"br"]))
def test_no_bytes_break_it(body: bytes, encoding: bytes | None) -> None:
    assert len(deliver([body], encoding=encoding).images) <= len(body)


@given(body=bodies)
def test_the_stream_reader_has_no_faults_to_hide(body: bytes) -> None:
    """A tap swallows faults so that the relay goes on; this looks behind it."""
    events = Events()
    for piece in cut(body, 11):
        events.feed(piece)
    events.end()
    events.delivery()


@given(body=bodies)
def test_the_document_reader_has_no_faults_but_those_of_the_document(body: bytes) -> None:
    document = Document()
    with contextlib.suppress(SkimError):
        for piece in cut(b'{"data":[{' + body, 11):
            document.feed(piece)
    document.delivery()


def peak_bytes(pieces: list[bytes], encoding: bytes | None = None) -> tuple[Delivery, int]:
    """What they deliver, and the most memory that is held at once while these pieces go by, apart from themselves."""
    tracemalloc.start()
    try:
        delivery = deliver(pieces, encoding=encoding)
        return delivery, tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


HALF_MEGABYTE = PNG.encode() + b"A" * 500_000

# Room for the beginning of one image, its decoded forms and a step's bytes; a thirtieth of what goes by.
PEAK_BYTES = 600_000


@pytest.mark.parametrize("size", [b"", b',"size":"1024x1024","quality":"low"'])
def test_a_long_line_takes_no_memory(size: bytes) -> None:
    head = b'data: {"type":"image_edit.completed","b64_json":"'
    delivery, peak = peak_bytes([head, *[HALF_MEGABYTE] * 40, b'"' + size + b"}\n\n"])
    assert delivery == done(LOW if size else MEASURED)
    assert peak < PEAK_BYTES


def test_ten_large_images_in_a_document_take_no_memory() -> None:
    image = [b'{"b64_json":"', *[HALF_MEGABYTE] * 8, b'"}']
    delivery, peak = peak_bytes([b'{"created":1,"data":[', *image, *[b",", *image] * 9, b"]}"])
    assert delivery == done(*[MEASURED] * 10)
    assert peak < PEAK_BYTES


@pytest.mark.parametrize(
    "head", [b"", b"event: ", b": ", b"data: ", b'data: {"', b'data: {"type":"', b'data: {"x":', b"{", b'{"size":"']
)
def test_what_never_ends_takes_no_memory(head: bytes) -> None:
    _, peak = peak_bytes([head, *[b"x" * 500_000] * 40])
    assert peak < PEAK_BYTES


@pytest.mark.parametrize(
    "line", [b"\n", b":\n", b"data: {\n", b"event: x\n", b"data: {}\n\n", b'data: {"type":"a.completed"}\n\n']
)
def test_many_small_lines_take_no_memory(line: bytes) -> None:
    _, peak = peak_bytes([b"data: {}\n\n", *[line * 2_000] * 10])
    # 1,000 recorded images are half of it; to keep ten bytes of every line would be more.
    assert peak < 200_000


@pytest.mark.parametrize("body", [b'{"data":[' + b"{}," * 3000, b'data: {"type":"a.completed"}\n\n' * 3000])
def test_no_more_images_are_recorded_than_anyone_can_ask_for(body: bytes) -> None:
    assert len(deliver(cut(body, 1000)).images) == IMAGES_MAX


def test_a_bomb_takes_no_memory() -> None:
    deflater = zlib.compressobj(9, wbits=16 + zlib.MAX_WBITS)
    head = deflater.compress(b'data: {"type":"image_edit.completed","b64_json":"')
    middle = [deflater.compress(bytes(5_000_000)) for _ in range(10)]
    bomb = b"".join([head, *middle, deflater.compress(b'"}\n\n'), deflater.flush()])
    assert len(bomb) < 100_000
    delivery, peak = peak_bytes([bomb], encoding=b"gzip")
    assert delivery == done(BARE)
    assert peak < PEAK_BYTES


def test_reading_stops_after_more_lines_than_any_answer_has() -> None:
    event = b"data: " + OK + b"\n\n"
    lines = b"\n" * (LINES_MAX // 4)
    assert deliver([event, *[lines] * 5, event]) == Delivery((LOW,), understood=True)


def test_the_document_reader_reads_what_json_writers_write() -> None:
    document = {"created": 1, "data": [{"b64_json": PNG, "revised_prompt": 'ä"\\\u2028😀'}] * 3, "usage": {"total_tokens": 5}}
    for ensure_ascii in (True, False):
        for indent in (None, 2):
            body = json.dumps(document, ensure_ascii=ensure_ascii, indent=indent).encode()
            assert deliver([body]) == done(*[MEASURED] * 3, usage=Usage(total_tokens=5))
