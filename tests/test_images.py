"""Sizes read from real image files: PNG made by hand, JPEG and WebP as an image library wrote them."""

from __future__ import annotations

import base64
import struct
import zlib
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.images import decode_base64, measure, measure_base64


def png(width: int, height: int) -> bytes:
    """A whole black greyscale PNG."""

    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    rows = zlib.compress(bytes(height * (1 + (width + 7) // 8)))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", rows) + chunk(b"IEND", b"")


JPEG_BASELINE = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////////////////////////////"
    "////////2wBDAf//////////////////////////////////////////////////////////////////////////////////////wAARCAAJABED"
    "ASIAAhEBAxEB/8QAFQABAQAAAAAAAAAAAAAAAAAAAAL/xAAUEAEAAAAAAAAAAAAAAAAAAAAA/8QAFgEBAQEAAAAAAAAAAAAAAAAAAAED/8QAFBEB"
    "AAAAAAAAAAAAAAAAAAAAAP/aAAwDAQACEQMRAD8AkBGgAD//2Q=="
)

JPEG_PROGRESSIVE = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/2wBDAP//////////////////////////////////////////////////////////////////////////////"
    "////////wgALCAAIBAABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAAAAL/2gAIAQEAAAABkAAAAAAAAAAAAAAAAAAAAB//xAAUEAEAAAAAAAAAAAAA"
    "AAAAAABw/9oACAEBAAEFAgD/xAAUEAEAAAAAAAAAAAAAAAAAAABw/9oACAEBAAY/AgD/xAAUEAEAAAAAAAAAAAAAAAAAAABw/9oACAEBAAE/IQD/"
    "2gAIAQEAAAAQAAAAAAAAAAAAAAAAAAAAAP/EABQQAQAAAAAAAAAAAAAAAAAAAHD/2gAIAQEAAT8QAP/Z"
)

# With an orientation that turns it by a quarter, and a colour profile whose bytes look like frame headers.
JPEG_EXIF = base64.b64decode(
    "/9j/4AAQSkZJRgABAQAAAQABAAD/4QA0RXhpZgAATU0AKgAAAAgAAgEOAAIAAAAGAAAAJgESAAMAAAABAAYAAAAAAABzY2VuZQD/4gA0SUNDX1BS"
    "T0ZJTEUAAQH/wAARCAABAAH/wAARCAABAAH/wAARCAABAAH/wAARCAABAAH/2wBDAP//////////////////////////////////////////////"
    "////////////////////////////////////////wAALCAAQB+ABAREA/8QAFQABAQAAAAAAAAAAAAAAAAAAAAP/xAAUEAEAAAAAAAAAAAAAAAAA"
    "AAAA/9oACAEBAAA/AJgAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA"
    "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA//2Q=="
)

WEBP_LOSSY = base64.b64decode(
    "UklGRkIAAABXRUJQVlA4IDYAAAAwAwCdASohABUAP83m7XA/uDIrJWgD8DmJZwDH5A8KmggAAP7l+j+onsI777btGN+Jc2aiAAA="
)

WEBP_LOSSLESS = base64.b64decode(
    "UklGRmQAAABXRUJQVlA4TFgAAAAv/8X/AAcQ0f/+BwQCyf7oCxTR/4z//Oc///nPf/7zn//85z//+c9//vOf//znP//5z3/+85///Oc///nPf/7z"
    "n//85z//+c9//vOf//znP//5z3/+838H"
)

WEBP_EXTENDED = base64.b64decode(
    "UklGRmYAAABXRUJQVlA4WAoAAAAIAAAAfwIAAAAAVlA4TBQAAAAvfwIAAAdQgVQIIAAKmv7HiIj+B0VYSUYsAAAATU0AKgAAAAgAAgEOAAIAAAAG"
    "AAAAJgESAAMAAAABAAYAAAAAAABzY2VuZQA="
)

IMAGES = {
    "png": (png(7, 5), "7x5"),
    "png of a preset": (png(3840, 2160), "3840x2160"),
    "jpeg baseline": (JPEG_BASELINE, "17x9"),
    "jpeg progressive": (JPEG_PROGRESSIVE, "1024x8"),
    "jpeg with exif and a profile": (JPEG_EXIF, "2016x16"),
    "webp lossy": (WEBP_LOSSY, "33x21"),
    "webp lossless": (WEBP_LOSSLESS, "1536x1024"),
    "webp extended": (WEBP_EXTENDED, "640x1"),
}


@pytest.mark.parametrize(("image", "size"), IMAGES.values(), ids=IMAGES.keys())
def test_a_whole_image_is_measured(image: bytes, size: str) -> None:
    assert measure(image) == size


@pytest.mark.parametrize(("image", "size"), IMAGES.values(), ids=IMAGES.keys())
def test_a_cut_image_is_measured_rightly_or_not_at_all(image: bytes, size: str) -> None:
    told = [measure(image[:cut]) for cut in range(len(image) + 1)]
    first = told.index(size)
    assert told == [None] * first + [size] * (len(told) - first)


@pytest.mark.parametrize("marker", sorted(set(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}))
def test_every_jpeg_frame_header_tells_the_size(marker: int) -> None:
    assert measure(JPEG_BASELINE.replace(b"\xff\xc0", bytes((0xFF, marker)), 1)) == "17x9"


@pytest.mark.parametrize(
    ("between", "size"),
    [
        (b"\xff\xff\xff", "17x9"),
        (b"\xff\x01", "17x9"),
        (b"\xff\xd0\xff\xff\xd8", "17x9"),
        (b"\xff\xe1\xff\xff" + bytes(65533), "17x9"),
        (b"\xff\xc4\x00\x03\x00\xff\xc8\x00\x02\xff\xcc\x00\x02", "17x9"),
        (b"\xff\xfe\x00\x0b\xff\xc0\x00\x11\x08\x00\x01\x00\x01", "17x9"),
        (b"\x00", None),
        (b"\xff\xd9", None),
        (b"\xff\xda\x00\x02", None),
    ],
    ids=["fill", "tem", "bare", "longest", "tables", "comment", "junk", "end", "scan"],
)
def test_what_may_stand_before_a_jpeg_frame_header(between: bytes, size: str | None) -> None:
    assert measure(JPEG_BASELINE[:2] + between + JPEG_BASELINE[2:]) == size


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"GIF89a\x10\x00\x10\x00",
        b"<svg width='16' height='16'>",
        b"RIFF\x24\x00\x00\x00WAVEfmt \x10\x00\x00\x00" + bytes(16),
        b"RIFF\x24\x00\x00\x00WEBPALPH\x10\x00\x00\x00" + bytes(16),
        WEBP_LOSSY.replace(b"\x9d\x01\x2a", b"\x9d\x01\x2b"),
        WEBP_LOSSLESS.replace(b"\x00\x00\x00\x2f", b"\x00\x00\x00\x2e"),
        png(7, 5).replace(b"IHDR", b"CgBI"),
        png(0, 5),
        JPEG_BASELINE.replace(b"\x08\x00\x09\x00\x11", b"\x08\x00\x00\x00\x11"),
    ],
)
def test_what_is_no_image_has_no_size(data: bytes) -> None:
    assert measure(data) is None


@given(st.sampled_from([b"", b"\x89PNG\r\n\x1a\n", b"\xff\xd8", b"\xff\xd8\xff", b"RIFF____WEBPVP8"]), st.binary())
def test_no_bytes_break_it(head: bytes, tail: bytes) -> None:
    size = measure(head + tail)
    assert size is None or all(0 < int(edge) < 2**32 for edge in size.split("x"))


SPELLINGS: dict[str, Callable[[bytes], str]] = {
    "plain": lambda data: base64.b64encode(data).decode(),
    "unpadded": lambda data: base64.b64encode(data).decode().rstrip("="),
    "url-safe": lambda data: base64.urlsafe_b64encode(data).decode(),
    "in lines": lambda data: base64.encodebytes(data).decode(),
    "in crlf lines": lambda data: base64.encodebytes(data).decode().replace("\n", "\r\n"),
    "data url": lambda data: "data:image/png;base64," + base64.b64encode(data).decode(),
    "shouted data url": lambda data: "DATA:;BASE64," + base64.urlsafe_b64encode(data).decode(),
}


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@given(data=st.binary(max_size=200), cut=st.integers(0, 300))
def test_base64_cut_anywhere_gives_the_bytes_so_far(spell: Callable[[bytes], str], data: bytes, cut: int) -> None:
    text = spell(data)
    head, comma, letters = text.rpartition(",")
    assert decode_base64(text) == data
    whole_letters = len("".join(letters[:cut].split()).rstrip("="))
    assert decode_base64(head + comma + letters[:cut]) == data[: whole_letters * 3 // 4]


@pytest.mark.parametrize("spell", SPELLINGS.values(), ids=SPELLINGS.keys())
@pytest.mark.parametrize("image", [image for image, _ in IMAGES.values()], ids=IMAGES.keys())
def test_an_image_in_base64_is_measured_as_its_bytes_are(image: bytes, spell: Callable[[bytes], str]) -> None:
    text = spell(image)
    assert measure_base64(text) == measure(image)
    for at in range(min(len(text), 200)):
        for changed in (text[:at], text[:at] + " \n" * 50 + text[at:], text[:at] + "=" + text[at:]):
            assert measure_base64(changed) == measure(decode_base64(changed))


@given(st.text(), st.sampled_from(["", "data:", "data:,data:,", *(spell(png(7, 5)) for spell in SPELLINGS.values())]))
def test_no_text_breaks_the_decoder(text: str, head: str) -> None:
    assert len(decode_base64(text)) <= len(text)
    assert measure_base64(head + text) == measure(decode_base64(head + text))


def test_base64_ends_at_the_first_foreign_character() -> None:
    assert decode_base64("QUJD*QUJD") == b"ABC"
    assert decode_base64("QUJD=QUJD") == b"ABC"
    assert decode_base64("QUJDé") == b"ABC"
    assert decode_base64("data:image/png;base64") == b""
