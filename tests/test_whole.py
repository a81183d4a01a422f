"""The quick reader of whole documents beside the one for pieces: the same reading, the same refusal, the same delivery, for
bodies as they come and for many thousands that were damaged, twisted and spelled in odd ways."""

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.errors import Refusal
from proxy.orders import READ_FIELDS, Reading, open_order
from proxy.prices import parse_card
from proxy.skim import DEPTH_MAX, SCALAR_BYTES_MAX
from proxy.taps import Delivery, open_tap
from proxy.taps.decoding import STEP_BYTES
from proxy.taps.delivery import IMAGE_PREFIX_BYTES, IMAGES_MAX
from proxy.taps.documents import _read_at_once
from proxy.whole import WHOLE_BYTES_MAX, may_be_whole, read_whole
from tests.test_taps import DOCUMENTS, PNG

# A name that can be written in more bytes than are read of a value, and the longest that can be written in no more.
LONG_NAME = "é" * 180
LONGEST_NAME = "x" * 1_022
CARD = parse_card(
    'version = "test"\n'
    '[models.gpt-image-2]\nqualities = ["low", "high"]\n'
    "[models.gpt-image-2.usd_per_image]\n"
    '1024x1024 = { low = "0.01", high = "0.02" }\n2016x1344 = { low = "0.03", high = "0.04" }\n'
    + "".join(
        f'[models."{name}"]\nqualities = ["low"]\n[models."{name}".usd_per_image]\n512x512 = {{ low = "1" }}\n'
        for name in (LONG_NAME, LONGEST_NAME)
    )
)
ALIASES = {"square": "1024x1024"}

Refused = tuple[int, str, str | None, str]


def read(pieces: list[bytes]) -> Reading | Refused:
    reader = open_order("generation", [b"application/json"], [], CARD, ALIASES)
    try:
        for piece in pieces:
            reader.feed(piece)
        return reader.finish()
    except Refusal as refusal:
        return refusal.status, refusal.code, refusal.param, refusal.message


def deliver(pieces: list[bytes], *, ended_properly: bool = True) -> Delivery:
    tap = open_tap(b"application/json", None)
    for piece in pieces:
        tap.feed(piece)
    return tap.finish(ended_properly=ended_properly)


def cut(body: bytes, step: int) -> list[bytes]:
    return [body[at : at + step] for at in range(0, len(body), step)]


def without_message(told: Reading | Refused) -> object:
    return told if isinstance(told, Reading) else told[:3]


def check_request(body: bytes) -> bool:
    """The one way and the other agree; whether the quick one read it."""
    whole = read([body])
    # After an empty piece the other is not all of the body, and yet all of it is read in one go.
    assert whole == read([b"", body]), body
    for step in (7, 1):
        # Of two faults, where the pieces end decides which one is met first.
        assert without_message(whole) == without_message(read(cut(body, step))), body
    return isinstance(whole, Reading) and may_be_whole(body) and read_whole(body) is not None


def check_answer(body: bytes) -> bool:
    whole = deliver([body])
    for pieces in ([body[:1], body[1:]], cut(body, 7), cut(body, 1)):
        assert whole == deliver(pieces), body
    return _read_at_once(body) is not None


PROMPT = '"prompt":"a bean\\n\\"size\\": \\ud83d\\ude00 ä 😀"'
REQUESTS = [
    f'{{"model":"gpt-image-2",{PROMPT},"size":"1024x1024","quality":"low","n":1}}',
    f'{{ "model": "gpt-image-2", {PROMPT}, "n": 10, "stream": true, "size": null }}\n',
    f'{{"quality":"auto","size":"2016x1344","model":"gpt-image-2",{PROMPT},"stream":false,"n":null}}',
    f'{{"model":"{LONG_NAME}","images":[{{"image_url":"data:,","size":"x","n":[1,2.5e3]}}],"user":"a","output_compression":80}}',
    '{"model":"gpt-image-2","x":{"n":1,"n":2},"y":[],"z":{},"a":[[{"b":[null,true,false,-0.5]}]]}',
    "{}",
]
ANSWERS = [
    *(text for text, _ in DOCUMENTS.values() if len(text) < 1_000),
    '{"created":1760000000,"data":[{"b64_json":"AAAA"}],"size":"1024x1024","quality":"low","usage":{"total_tokens":206,"input_tokens":10}}',
    f'{{"data":[{{"b64_json":"{PNG}","url":null}},{{"url":"data:,{PNG}","revised_prompt":"\\"ä\\""}}],"quality":"auto"}}',
    '{"error":{"message":"m","code":null},"usage":{"input_tokens":1,"output_tokens":2.5,"x":[{"total_tokens":9}]}}\r\n',
]

NAMES = [
    *READ_FIELDS,
    "N",
    "Size",
    "\u017fize",
    "mod\\u0065l",
    "\\u006e",
    "created",
    "data",
    "error",
    "usage",
    "b64_json",
    "url",
]
NUMBERS = [
    "0",
    "1",
    "2",
    "10",
    "11",
    "-1",
    "-0",
    "1.0",
    "1e0",
    "1E+1",
    "01",
    "+1",
    "1.",
    ".5",
    "1e",
    "0x1",
    "1_0",
    "\u0661",
    "--1",
]
VALUES = [
    *NUMBERS,
    *("9" * 12, "9" * 13, "9" * SCALAR_BYTES_MAX, "9" * (SCALAR_BYTES_MAX + 1), "1." + "0" * SCALAR_BYTES_MAX),
    *("null", "true", "false", "NaN", "Infinity", "-Infinity", "nul", "True", "undefined", "nullx"),
    *(
        "[]",
        "{}",
        "[1]",
        "[{}]",
        '{"n":1}',
        "[null,[1,{}]]",
        "[" * 63 + "]" * 63,
        "[" * 70 + "]" * 70,
        '{"a":' * 63 + "1" + "}" * 63,
    ),
    *(
        '""',
        '"auto"',
        '"low"',
        '"high"',
        '"1024x1024"',
        '"2016x1344"',
        '"square"',
        '"1024X1024"',
        '"gpt-image-2"',
        '"x"',
        '"1"',
    ),
    *(
        '"lo\\u0077"',
        '"\\u0061uto"',
        '"\\u0032016x1344"',
        '"\\ud800"',
        '"\\ud83d\\ude00"',
        '"\\ude00\\ud83d"',
        '"\\u00"',
        '"\\x41"',
    ),
    *('"' + "\\ud83d\\ude00" * 5 + '"', '"' + "\\ud83d\\ude00" * 6 + '"'),
    *('"' + "\\u0031" * 10 + '"', '"' + "\\u0031" * 11 + '"', '"' + "1" * 62 + '"', '"' + "1" * 63 + '"', '"' + "é" * 31 + '"'),
    *('"' + "\\u00e9" * 170 + '"', '"' + "\\u00e9" * 180 + '"', f'"{LONG_NAME}"', f'"{LONGEST_NAME}"', f'"{LONGEST_NAME}x"'),
    *(
        '"' + "x" * 170 + '"',
        '"a\tb"',
        '"a\nb"',
        '"\x00"',
        '"\x7f"',
        '"\u2028"',
        "'x'",
        '"{[{["',
        '"]}"',
        '"\\\\"',
        '"\\"',
        '"\\/"',
    ),
    *(f'"{PNG}"', f'"data:image/png;base64,{PNG}"', f'"{PNG[:30]}"', '"AAAA"'),
]
NOISE = [
    "{",
    "}",
    "[",
    "]",
    ":",
    ",",
    '"',
    "\\",
    " ",
    "\n",
    "\r\n",
    "\t",
    "\x0b",
    "\xa0",
    "\ufeff",
    "/*x*/",
    "//",
    ";",
    "}}",
    "\x00",
]
BYTES = [
    b"\xff",
    b"\xc3",
    b"\xe2\x82",
    b"\xed\xa0\x80",
    b"\xc0\x80",
    b"\xf4\x90\x80\x80",
    b"\xef\xbb\xbf",
    b"\x00",
    b"\x1f",
    b"\x80",
]

_token = re.compile(rb'"(?:[^"\\]|\\.)*"|[-+.0-9A-Za-z]+|\s+|.', re.DOTALL)
_member = re.compile(rb'("(?:[^"\\]|\\.)*"\s*:\s*(?:"(?:[^"\\]|\\.)*"|[-+.0-9a-z]+|\[[^][]*\]|\{[^{}]*\}))')


def _spelled_with_an_escape(chance: random.Random, body: bytes) -> bytes:
    """One plain letter in a string becomes an escape."""
    letters = [match.start() for match in re.finditer(rb"[A-Za-z0-9]", body)]
    at = chance.choice(letters or [0])
    return body[:at] + b"\\u%04x" % body[at] + body[at + 1 :] if body else body


def _with_a_member(chance: random.Random, body: bytes) -> bytes:
    member = f'"{chance.choice(NAMES)}":{chance.choice(VALUES)}'.encode()
    places = [match.end() for match in re.finditer(rb"\{", body)] or [0]
    at = chance.choice(places[:2] if chance.random() < 0.7 else places)
    return body[:at] + member + (b"," if body[at : at + 1] != b"}" else b"") + body[at:]


def _with_a_member_twice(chance: random.Random, body: bytes) -> bytes:
    members = list(_member.finditer(body))
    if not members:
        return body
    one, other = chance.choice(members), chance.choice(members)
    return body[: other.end()] + b"," + one[1] + body[other.end() :]


def _with_another_value(chance: random.Random, body: bytes) -> bytes:
    members = list(re.finditer(rb':\s*("(?:[^"\\]|\\.)*"|[-+.0-9a-z]+)', body))
    if not members:
        return body
    at, end = chance.choice(members).span(1)
    return body[:at] + chance.choice(VALUES).encode() + body[end:]


def _with_tokens_moved(chance: random.Random, body: bytes) -> bytes:
    tokens = _token.findall(body)
    if len(tokens) < 2:
        return body
    one, other = chance.randrange(len(tokens)), chance.randrange(len(tokens))
    match chance.randrange(4):
        case 0:
            tokens[one], tokens[other] = tokens[other], tokens[one]
        case 1:
            tokens[one] = chance.choice(VALUES + NOISE).encode()
        case 2:
            tokens.insert(one, tokens[other])
        case _:
            del tokens[one]
    return b"".join(tokens)


def _with_noise(chance: random.Random, body: bytes) -> bytes:
    at = chance.choice([0, len(body), chance.randint(0, len(body))])
    return body[:at] + chance.choice([*(noise.encode() for noise in NOISE), *BYTES]) + body[at:]


def _with_bytes_changed(chance: random.Random, body: bytes) -> bytes:
    if not body:
        return body
    at, end = sorted((chance.randrange(len(body)), chance.randrange(len(body))))
    match chance.randrange(4):
        case 0:
            return body[:at] + bytes([body[at] ^ 1 << chance.randrange(8)]) + body[at + 1 :]
        case 1:
            return body[:at] + body[at + 1 :]
        case 2:
            return body[:end] + body[at : min(end, at + 40)] + body[end:]
        case _:
            return body[:end]


def _with_space(chance: random.Random, body: bytes) -> bytes:
    tokens = _token.findall(body)
    return b"".join(token + chance.choice([b"", b" ", b"\n", b"\r\n\t"]) for token in tokens)


CHANGES: list[Callable[[random.Random, bytes], bytes]] = [
    _spelled_with_an_escape,
    _with_a_member,
    _with_a_member_twice,
    _with_another_value,
    _with_another_value,
    _with_tokens_moved,
    _with_noise,
    _with_bytes_changed,
    _with_space,
]


def changed(bodies: list[str], seed: int, count: int) -> Iterator[bytes]:
    chance = random.Random(seed)
    for _ in range(count):
        body = chance.choice(bodies).encode()
        for _ in range(chance.choice([1, 1, 1, 2, 2, 3, 5])):
            body = chance.choice(CHANGES)(chance, body)
        yield body


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_request_is_read_the_same_whole_and_in_pieces(seed: int) -> None:
    quick = [check_request(body) for body in changed(REQUESTS, seed, 1_000)]
    # Neither all fault nor all harmless, or this proves nothing.
    assert 100 < sum(quick) < 900


@pytest.mark.parametrize("seed", range(3))
def test_a_changed_answer_is_read_the_same_whole_and_in_pieces(seed: int) -> None:
    quick = [check_answer(body) for body in changed(ANSWERS, seed, 1_000)]
    assert 100 < sum(quick) < 900


@pytest.mark.parametrize("name", ["model", "size", "quality", "n", "stream", "prompt"])
def test_every_value_of_a_request_is_read_the_same(name: str) -> None:
    usual = {"model": '"gpt-image-2"', "size": '"1024x1024"', "quality": '"low"'}
    for value in VALUES:
        members = ",".join(f'"{known}":{spelled}' for known, spelled in {**usual, name: value}.items())
        for body in (f"{{{members}}}", f'{{"{name}":{value}}}', f'{{"model":"{LONG_NAME}","{name}":{value}}}'):
            check_request(body.encode())


@pytest.mark.parametrize(
    "body",
    [
        '{"size":VALUE,"data":[{"b64_json":"PNG"}]}',
        '{"data":[{"b64_json":"PNG"}],"size":"x","quality":VALUE}',
        '{"data":VALUE}',
        '{"data":[VALUE]}',
        '{"data":[{"b64_json":VALUE},{"url":VALUE,"b64_json":"PNG"},{"b64_json":"","b64_json":VALUE,"x":1}]}',
        '{"error":VALUE}',
        '{"created":VALUE,"usage":VALUE}',
        '{"usage":{"input_tokens":VALUE,"total_tokens":5,"total_tokens":VALUE}}',
    ],
)
def test_every_value_of_an_answer_is_read_the_same(body: str) -> None:
    for value in VALUES:
        check_answer(body.replace("PNG", PNG).replace("VALUE", value).encode())


JSON: st.SearchStrategy[Any] = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=9)
    | st.sampled_from(["auto", "low", "1024x1024"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), inner, max_size=4)
    ),
    max_leaves=12,
)
OBJECTS = st.dictionaries(st.sampled_from(NAMES) | st.text(max_size=3), JSON, max_size=6)


@given(OBJECTS, st.booleans(), st.sampled_from([None, 0, 2]))
def test_any_object_is_read_the_same_whole_and_in_pieces(value: dict[str, Any], ascii_only: bool, indent: int | None) -> None:
    for members in (value, {"model": "gpt-image-2"} | value):
        body = json.dumps(members, ensure_ascii=ascii_only, indent=indent).encode("utf-8", "surrogatepass")
        check_request(body)
        check_answer(body)


@given(st.binary(max_size=80))
def test_any_bytes_are_read_the_same_whole_and_in_pieces(junk: bytes) -> None:
    for body in (
        junk,
        b"{" + junk + b"}",
        b'{"model":"gpt-image-2","x":"' + junk + b'"}',
        b'{"data":[{"url":"' + junk + b'"}]}',
    ):
        check_request(body)
        check_answer(body)


def test_what_is_usual_is_read_at_once() -> None:
    assert all(read_whole(body.encode()) for body in REQUESTS[:-1])
    assert all(_read_at_once(text.encode()) for text in ANSWERS[-3:])


def test_whatever_may_be_cut_by_a_limit_of_the_other_reader_is_not_read_at_once() -> None:
    assert min(IMAGE_PREFIX_BYTES, STEP_BYTES) >= WHOLE_BYTES_MAX
    room = WHOLE_BYTES_MAX - len('{"x":""}')
    assert may_be_whole(b'{"x":"' + b"x" * room + b'"}')
    assert not may_be_whole(b'{"x":"' + b"x" * (room + 1) + b'"}')
    assert _read_at_once(b'{"data":[' + b"1," * (IMAGES_MAX - 1) + b"1]}") is not None
    assert _read_at_once(b'{"data":[' + b"1," * IMAGES_MAX + b"1]}") is None


@pytest.mark.parametrize("length", [WHOLE_BYTES_MAX - 1, WHOLE_BYTES_MAX, WHOLE_BYTES_MAX + 1])
def test_at_the_limit_both_ways_agree(length: int) -> None:
    request = b'{"model":"gpt-image-2","n":2,"prompt":"%b"}'
    assert isinstance(read([request % (b"x" * (length - len(request) + 2))]), Reading)
    check_request(request % (b"x" * (length - len(request) + 2)))
    answer = b'{"data":[{"b64_json":"%b"}]}'
    check_answer(answer % (PNG.encode() + b"A" * (length - len(answer) + 2 - len(PNG))))


@pytest.mark.parametrize(
    ("document", "members"),
    [
        (b"{}", {}),
        (b'{"a":"\\u0062","c":[1,1.0,-0],"d":null,"e":true} \n', {"a": "b", "c": [b"1", b"1.0", b"-0"], "d": None, "e": True}),
        (b'{"a":{"b":{},"b":[{}]}}', {"a": (("b", ()), ("b", [()]))}),
        (b'{"a":' + b"[" * (DEPTH_MAX - 1) + b"]" * (DEPTH_MAX - 1) + b"}", ...),
        (b'{"a":' + b"1" * SCALAR_BYTES_MAX + b"}", {"a": b"1" * SCALAR_BYTES_MAX}),
        (b'{"a":' + b"[" * DEPTH_MAX + b"]" * DEPTH_MAX + b"}", None),
        (b'{"a":' + b"1" * (SCALAR_BYTES_MAX + 1) + b"}", None),
        (b'{"a":1,"\\u0061":1}', None),
        (b'{"a":"' + b"[" * DEPTH_MAX + b'"}', None),
        (b"", None),
        (b" {}", None),
        (b"[]", None),
        (b"{}x", None),
        (b"{}\xc2\xa0", None),
        (b"\xef\xbb\xbf{}", None),
        (b'{"a":NaN}', None),
        (b'{"a":-Infinity}', None),
        ('{"a":\u0661}'.encode(), None),
        (b'{"a":"\xff"}', None),
        (b'{"a":"\xed\xa0\x80"}', None),
        (b'{"a":"\n"}', None),
    ],
)
def test_what_the_members_are(document: bytes, members: object) -> None:
    found = read_whole(document)
    assert found is not None if members is ... else found == members


def test_a_request_is_not_taken_for_whole_before_its_end() -> None:
    body = b'{"model":"gpt-image-2"}'
    assert isinstance(read([body]), Reading)
    assert read([body, b" \n"]) == read([body])
    for more in (b"x", body, b"\x00"):
        told = read([body, more])
        assert told == read([body + more])
        assert without_message(told) == (400, "invalid_json", None)
