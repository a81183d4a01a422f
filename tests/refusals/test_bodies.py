"""Bodies that are refused for how they come: their type, their encoding, their boundary, their length."""

from __future__ import annotations

import pytest

from tests.bare import EDITS, GENERATIONS, JSON_TYPE, ask, head, order, post
from tests.live import LiveGateway, ScriptedUpstream
from tests.refusals.checks import MAX_BODY_BYTES, NOT_A_FORM, OTHER_MEDIA, TOO_LARGE, refused
from tests.refusals.forms import FORM_TYPE, form, part

TYPES = {
    "none": [],
    "text": ["text/plain"],
    "a form of fields": ["application/x-www-form-urlencoded"],
    "octets": ["application/octet-stream"],
    "no JSON but near": ["application/jsonx"],
    "JSON with a suffix": ["application/problem+json"],
    "JSON lines": ["application/jsonl"],
    "JSON in UTF-16": ["application/json; charset=utf-16"],
    "JSON in two charsets": ["application/json; charset=utf-8; charset=latin-1"],
    "two of them": ["application/json", "application/json"],
    "two in one": ["application/json, application/json"],
    "empty": [""],
    "no type at all": ["json"],
}


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize("values", TYPES.values(), ids=TYPES)
def test_other_content_types(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, values: list[str]) -> None:
    refused(live, post(key, order(), path, [("Content-Type", value) for value in values]), OTHER_MEDIA)


def test_a_form_is_for_edits_only(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    refused(live, post(key, form(), GENERATIONS, [FORM_TYPE]), OTHER_MEDIA)


@pytest.mark.parametrize("encoding", ["gzip", "br", "deflate", "zstd", "x-gzip", "GZIP", "identity, gzip", "gzip, gzip"])
@pytest.mark.parametrize(("path", "kind", "body"), [(GENERATIONS, JSON_TYPE, order()), (EDITS, FORM_TYPE, form())])
def test_content_encodings(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, kind: tuple[str, str], body: bytes, encoding: str
) -> None:
    refused(live, post(key, body, path, [kind, ("Content-Encoding", encoding)]), OTHER_MEDIA)


@pytest.mark.parametrize(
    "boundary",
    [
        "",
        "; boundary=",
        '; boundary=""',
        "; boundary=b; boundary=b",
        "; boundary=" + "b" * 71,
        "; boundary=b\u00e9",
        "; Boundary",
    ],
)
def test_boundaries(live: tuple[LiveGateway, ScriptedUpstream], key: str, boundary: str) -> None:
    refused(live, post(key, form(), EDITS, [("Content-Type", "multipart/form-data" + boundary)]), NOT_A_FORM)


def in_chunks(key: str, body: bytes, path: str, kind: tuple[str, str], size: int = 8_192) -> bytes:
    """A POST whose length nobody knows beforehand."""
    fields = [("Host", "gateway.test"), ("Authorization", f"Bearer {key}"), kind, ("Transfer-Encoding", "chunked")]
    pieces = [body[at : at + size] for at in range(0, len(body), size)]
    return head("POST", path, fields) + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_body_over_the_limit(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str) -> None:
    fitting = order(prompt="x" * (MAX_BODY_BYTES - len(order(prompt=""))))
    assert len(fitting) == MAX_BODY_BYTES
    too_large = fitting + b" "
    for data in (post(key, too_large, path), in_chunks(key, too_large, path, JSON_TYPE)):
        message = refused(live, data, TOO_LARGE).error["message"]
        assert str(MAX_BODY_BYTES) in message
    for data in (post(key, fitting, path), in_chunks(key, fitting, path, JSON_TYPE)):
        assert ask(live[0], data).status == 200


def test_a_form_over_the_limit(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    body = form(part("image[]", b"x" * MAX_BODY_BYTES, '; filename="b.png"'))
    for data in (post(key, body, EDITS, [FORM_TYPE]), in_chunks(key, body, EDITS, FORM_TYPE)):
        refused(live, data, TOO_LARGE)


def test_a_body_that_is_declared_too_large_is_refused_before_it_comes(
    live: tuple[LiveGateway, ScriptedUpstream], key: str
) -> None:
    fields = [("Host", "gateway.test"), ("Authorization", f"Bearer {key}"), JSON_TYPE, ("Content-Length", str(10**15 - 1))]
    refused(live, head("POST", GENERATIONS, fields), TOO_LARGE)
