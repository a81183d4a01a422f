"""The reader of multipart, as tables of forms; each is fed whole, in 7-byte and in 1-byte pieces, with the same result."""

from __future__ import annotations

import tracemalloc
from collections.abc import Sequence
from email.parser import BytesParser

import pytest
from hypothesis import given
from hypothesis import strategies as st
from multipart import MultipartSegment, PushMultipartParser  # type: ignore[import-untyped]

from proxy.forms import HEAD_BYTES_MAX, PARTS_MAX, Field, Form, FormError

PIECES = (1_000_000, 7, 1)

WATCH = {"size": 32, "n": 4}

SIZE = b'Content-Disposition: form-data; name="size"'


def part(head: bytes, value: bytes = b"auto") -> bytes:
    return b"--b\r\n" + head + b"\r\n\r\n" + value + b"\r\n"


def form(*parts: bytes) -> bytes:
    return b"".join(parts) + b"--b--\r\n"


def named(disposition: str) -> bytes:
    return form(part(b"Content-Disposition: " + disposition.encode()))


def read_in(body: bytes, pieces: Sequence[bytes], boundary: bytes = b"b") -> list[Field]:
    reader = Form(boundary, WATCH)
    for piece in pieces:
        reader.feed(piece)
    reader.end()
    for field in reader.found:
        assert body[field.start : field.end].startswith(field.value)
        assert field.whole == (body[field.start : field.end] == field.value)
    return reader.found


def cut(body: bytes, step: int) -> list[bytes]:
    return [body[at : at + step] for at in range(0, len(body), step)]


def read(body: bytes, boundary: bytes = b"b") -> list[Field]:
    results = [read_in(body, cut(body, step), boundary) for step in PIECES]
    assert results[0] == results[1] == results[2]
    return results[0]


def brief(fields: list[Field]) -> list[tuple[str, bytes, bool]]:
    return [(field.name, field.value, field.has_filename) for field in fields]


@pytest.mark.parametrize(
    ("disposition", "fields"),
    [
        ('form-data; name="size"', [("size", False)]),
        ("form-data; name=size", [("size", False)]),
        ('form-data;name="size"', [("size", False)]),
        ('Form-Data ; \tname="size" \t', [("size", False)]),
        ('form-data; name="size"; filename="a.png"', [("size", True)]),
        ('form-data; filename="a.png"; name="size"', [("size", True)]),
        ('form-data; name="size"; filename=""', [("size", True)]),
        ("form-data; name=\"size\"; filename*=utf-8''a.png", [("size", True)]),
        ('form-data; name="size"; filename="日本 ä\'; name=x.png"', [("size", True)]),
        ('form-data; name="size"; filename="C:\\dir\\a.png"', [("size", True)]),
        ('form-data; name="size"; other=1', [("size", False)]),
        ('form-data; name="Size"', []),
        ('form-data; name="size "', []),
        ('form-data; name="size[]"', []),
        ('form-data; name="%22size%22"', []),
        ('form-data; name="a\\b"', []),
        ('form-data; name=""', []),
        ('form-data; name="image[]"; filename="size"', []),
        ('form-data; name="x"; filename="; name=size"', []),
    ],
)
def test_names(disposition: str, fields: list[tuple[str, bool]]) -> None:
    assert [(field.name, field.has_filename) for field in read(named(disposition))] == fields


@pytest.mark.parametrize(
    ("body", "fields"),
    [
        (form(part(SIZE)), [("size", b"auto", False)]),
        (form(part(SIZE, b"")), [("size", b"", False)]),
        (form(part(SIZE), part(SIZE, b"low")), [("size", b"auto", False), ("size", b"low", False)]),
        (form(part(SIZE, b" auto\r\n")), [("size", b" auto\r\n", False)]),
        (form(part(SIZE, b"\r\n--")), [("size", b"\r\n--", False)]),
        (form(part(SIZE, b"x--b--")), [("size", b"x--b--", False)]),
        (form(part(SIZE, b"\r\r\r\n\n-\r\n-\n\r")), [("size", b"\r\r\r\n\n-\r\n-\n\r", False)]),
        (form(part(SIZE, b"a" * 99)), [("size", b"a" * 32, False)]),
        (form(part(b"Content-Type: text/plain; charset=utf-8\r\n" + SIZE)), [("size", b"auto", False)]),
        (form(part(SIZE + b"\r\nContent-Transfer-Encoding: base64", b"YXV0bw==")), [("size", b"YXV0bw==", False)]),
        (form(part(SIZE + b"\r\nContent-Length: 4")), [("size", b"auto", False)]),
        (form(part(SIZE + b"\r\ncontent-type:")), [("size", b"auto", False)]),
        (form(part(SIZE.upper().replace(b"NAME", b"name").replace(b"SIZE", b"size"))), [("size", b"auto", False)]),
        (form(part(SIZE))[:-2], [("size", b"auto", False)]),
        (form(part(SIZE)) + b"\r\n\r\n", [("size", b"auto", False)]),
        (form(part(SIZE[:-5] + b'image"; filename="a.png"', bytes(range(256)) * 9), part(SIZE)), [("size", b"auto", False)]),
        (form(*[part(SIZE)] * PARTS_MAX), [("size", b"auto", False)] * PARTS_MAX),
        (form(part(SIZE + b"\r\nx: " + b"x" * (HEAD_BYTES_MAX - len(SIZE) - 9))), [("size", b"auto", False)]),
    ],
)
def test_values(body: bytes, fields: list[tuple[str, bytes, bool]]) -> None:
    assert brief(read(body)) == fields


def refuse(body: bytes, boundary: bytes = b"b") -> None:
    for step in PIECES:
        with pytest.raises(FormError):
            read_in(body, cut(body, step), boundary)


WHOLE = form(part(SIZE))


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"--b--\r\n",
        b"--b--",
        b"\r\n" + WHOLE,
        b"preamble\r\n" + WHOLE,
        WHOLE[1:],
        b"-" + WHOLE,
        WHOLE + b"epilogue",
        WHOLE + b"--b\r\n" + SIZE,
        WHOLE + WHOLE,
        *(WHOLE[:end] for end in range(1, len(WHOLE) - 2)),
        WHOLE.replace(b"\r\n", b"\n"),
        WHOLE.replace(b"\r\n", b"\r"),
        WHOLE.replace(b"--b\r\n", b"--b \r\n"),
        WHOLE.replace(b"--b\r\n", b"--b\n"),
        WHOLE.replace(b"--b--", b"--b-x"),
        WHOLE.replace(b"--b--", b"--bb--"),
        WHOLE.replace(b"auto", b"auto\n--b"),
        WHOLE.replace(b"auto", b"auto\r--b"),
        WHOLE.replace(b"auto", b"auto\r--b\r\n"),
        WHOLE.replace(b"auto", b"\r--b"),
        WHOLE.replace(b"auto", b"--b"),
        WHOLE.replace(b"auto\r\n", b""),
        WHOLE.replace(b"auto\r\n", b"auto\n"),
        WHOLE.replace(b"auto\r\n", b"auto\r"),
        WHOLE.replace(b"auto\r\n", b"auto"),
        form(part(b"")),
        form(b"--b\r\n\r\nauto\r\n"),
        form(part(b"Content-Type: text/plain")),
        form(part(b" " + SIZE)),
        form(part(SIZE.replace(b":", b" :"))),
        form(part(SIZE.replace(b": ", b":\r\n "))),
        form(part(SIZE.replace(b"; ", b";\r\n\t"))),
        form(part(SIZE + b"\nX: y")),
        form(part(SIZE + b"\rX: y")),
        form(part(SIZE + b"\r\nno colon")),
        form(part(SIZE + b"\r\n: no name")),
        form(part(SIZE + b"\r\nX: \x00")),
        form(part(SIZE + b"\r\nX: \xff")),
        form(part(SIZE + b"\r\n" + SIZE)),
        form(part(SIZE + b"\r\nContent-Length: 3")),
        form(part(SIZE + b"\r\nContent-Length: 5")),
        form(part(SIZE + b"\r\nContent-Length: +4")),
        form(part(SIZE + b"\r\nContent-Length: 4, 4")),
        form(part(SIZE + b"\r\nX: " + b"x" * HEAD_BYTES_MAX)),
        form(*[part(SIZE)] * (PARTS_MAX + 1)),
    ],
)
def test_broken_forms(body: bytes) -> None:
    refuse(body)


@pytest.mark.parametrize(
    "disposition",
    [
        "form-data",
        "form-data;",
        "attachment; name=size",
        "form-datax; name=size",
        'form-data name="size"',
        'form-data; name="size";',
        'form-data; name="size" x',
        'form-data; name="size"; name="n"',
        'form-data; name="size"; name="size"',
        'form-data; name="x"; filename="a"; filename="b"',
        "form-data; name*=utf-8''size",
        "form-data; name=\"x\"; name*=utf-8''size",
        "form-data; name*0=si; name*1=ze",
        'form-data; Name="size"',
        'form-data; name="x"; NAME="size"',
        'form-data; name="size',
        'form-data; name=size"',
        "form-data; name='si ze'",
        "form-data; name=",
        "form-data; name=size[]",
        "form-data; name = size",
        'form-data; name="x\\"; name=\\"size"',
        'form-data; name="x"; filename="a\\"; name="size"',
        'form-data; name="x"; filename="a\\"; name=\\"size\\""',
        'form-data; name="si\\ze"',
        'form-data; name="s%69ze"',
        "form-data; name=s%69ze",
        'form-data; name="x", name="size"',
        'form-data; name="x"; filename="a"b"',
    ],
)
def test_dispositions_that_readers_could_take_differently(disposition: str) -> None:
    refuse(named(disposition))


@pytest.mark.parametrize(
    "boundary", [b"b", b"b" * 70, b"----WebKitFormBoundaryAbC123", b"a b'()+_,-./:=?z", b"0123456789abcdef0123456789abcdef"]
)
def test_boundaries(boundary: bytes) -> None:
    assert brief(read(form(part(SIZE)).replace(b"--b", b"--" + boundary), boundary)) == [("size", b"auto", False)]


@pytest.mark.parametrize("boundary", [b"", b" ", b"b ", b"b" * 71, b"b\r\n", b'b"', b"b;", b"\xff", b"b\x00"])
def test_boundaries_that_cannot_be(boundary: bytes) -> None:
    with pytest.raises(FormError):
        Form(boundary, WATCH)


def test_files_are_not_kept() -> None:
    reader = Form(b"b", WATCH)
    reader.feed(part(SIZE[:-5] + b'image"; filename="a.png"')[:-2])
    piece = bytes(range(256)) * 256
    tracemalloc.start()
    for _ in range(100):
        reader.feed(piece)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    reader.feed(b"\r\n" + form(part(SIZE)))
    reader.end()
    assert peak < 4 * len(piece)
    assert [field.value for field in reader.found] == [b"auto"]


def by_library(body: bytes) -> list[tuple[str, bytes, bool]]:
    """The watched fields as the library ``multipart`` reads them."""
    fields: list[tuple[str, bytes, bool]] = []
    with PushMultipartParser(b"b") as parser:
        for event in parser.parse(body):
            if isinstance(event, MultipartSegment):
                fields.append((event.name or "", b"", event.filename is not None))
            elif event is not None:
                name, value, has_filename = fields[-1]
                fields[-1] = (name, value + bytes(event), has_filename)
    return [field for field in fields if field[0] in WATCH]


def by_mail_reader(body: bytes) -> list[tuple[str, bytes, bool]]:
    """The watched fields as the standard library reads them."""
    message = BytesParser().parsebytes(b"Content-Type: multipart/form-data; boundary=b\r\n\r\n" + body)
    fields: list[tuple[str, bytes, bool]] = []
    for one in message.get_payload():
        assert not isinstance(one, str)
        value = one.get_payload(decode=True)
        assert isinstance(value, bytes)
        fields.append((str(one.get_param("name", header="Content-Disposition")), value, one.get_filename() is not None))
    return [field for field in fields if field[0] in WATCH]


# Pieces of forms, and whatever comes near: what is taken has to be the same form to every reader.
FRAGMENTS = st.lists(
    st.sampled_from(
        [
            b"--b\r\n",
            b"--b--\r\n",
            b"--b",
            b"--",
            b"\r\n",
            b"\r\n\r\n",
            b"\n",
            b"\r",
            b"-",
            b"b",
            b" ",
            b"\t",
            b";",
            b'"',
            b"\\",
            SIZE,
            SIZE + b"\r\n\r\n",
            b'; filename="a.png"',
            b'; name="n"',
            b"; name=n",
            b"auto",
            b"Content-Type: text/plain",
            b"Content-Length: 4\r\n",
            part(SIZE),
            part(SIZE, b"low"),
            part(SIZE.replace(b"size", b"image")),
        ]
    ),
    max_size=14,
).map(b"".join)


@given(FRAGMENTS, FRAGMENTS, st.lists(st.integers(1, 20), min_size=1, max_size=9))
def test_what_is_taken_is_the_same_form_to_other_readers(opening: bytes, inside: bytes, cuts: list[int]) -> None:
    for body in (opening, part(SIZE, inside) + b"--b--", part(SIZE + inside) + part(SIZE) + b"--b--"):
        try:
            found = brief(read_in(body, [body]))
        except FormError:
            refuse(body)
            continue
        pieces: list[bytes] = []
        at = 0
        while at < len(body):
            step = cuts[len(pieces) % len(cuts)]
            pieces.append(body[at : at + step])
            at += step
        assert brief(read_in(body, pieces)) == found
        whole = [(name, value, has_filename) for name, value, has_filename in by_library(body)]
        assert [(name, value[: WATCH[name]], has_filename) for name, value, has_filename in whole] == found


@pytest.mark.parametrize(
    "body",
    [
        WHOLE,
        form(part(SIZE), part(SIZE.replace(b"size", b"n"), b"2")),
        named("form-data; name=size"),
        named('form-data; name="x"; filename="; name=size"'),
        named('form-data; name="size"; filename="a.png"'),
        form(part(SIZE, b"")),
        form(part(SIZE, b"x--b--")),
        form(part(SIZE.replace(b"size", b"image"), b"\x00\xff"), part(SIZE)),
    ],
)
def test_forms_read_by_three_readers(body: bytes) -> None:
    assert brief(read(body)) == by_library(body) == by_mail_reader(body)


@pytest.mark.parametrize(
    ("name", "content_type", "read"),
    [
        ("n", "text/plain", True),
        ("n", "text/plain; charset=utf-8", True),
        ("n", 'text/plain; charset="US-ASCII"', True),
        ("n", "text/plain; charset=utf-7", False),
        ("n", "text/plain; Charset = UTF-16", False),
        ("image", "text/plain; charset=utf-16", True),
        ("_charset_", "text/plain", False),
    ],
)
def test_a_field_that_other_readers_would_decode_differently_is_refused(name: str, content_type: str, read: bool) -> None:
    part = f'--B\r\nContent-Disposition: form-data; name="{name}"\r\nContent-Type: {content_type}\r\n\r\n1\r\n--B--\r\n'
    form = Form(b"B", {"n": 8})
    if read:
        form.feed(part.encode())
        form.end()
    else:
        with pytest.raises(FormError, match="character set"):
            form.feed(part.encode())
