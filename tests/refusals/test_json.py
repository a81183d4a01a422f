"""Orders in JSON that are refused."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.bare import EDITS, GENERATIONS, ask, order, post
from tests.live import ORDER, LiveGateway, ScriptedUpstream
from tests.refusals.checks import INVALID, NO_MODEL, NOT_JSON, OTHER_MODEL, TWICE, Refused, refused

# Values that are wrong for each field, as they are written in JSON.
WRONG_VALUES = {
    "size": [
        '"1024X1024"', '" 1024x1024"', '"1024x1024 "', '"1024\\u00d71024"', '"1000x1000"', '"01024x1024"', '"1024*1024"',
        '"AUTO"', '"Auto"', '""',
        '"large"', "1024", "0", "true", "false", '["1024x1024"]', '{"width":1024}', '"' + "1" * 2000 + 'x1"',
    ],
    "quality": [
        '"HIGH"', '"High"', '" high"', '"high "', '"hd"', '"standard"', '"AUTO"', '""', "1", "true", "false", '["high"]', "{}",
    ],
    "n": ["true", "false", "1.0", '"2"', "1e1", "10E-1", "0", "-0", "11", "-1", "1.5", '""', "[]", "{}", "1" + "0" * 30],
    "stream": ['"true"', '"false"', "1", "0", "1.0", '""', '"yes"', "[]", "{}"],
}  # fmt: skip


def raw_order(field: str, value: str) -> bytes:
    """The usual order with one member written so."""
    members = {name: json.dumps(usual) for name, usual in ORDER.items()} | {field: value}
    return ("{" + ",".join(f'"{name}":{written}' for name, written in members.items()) + "}").encode()


USUAL = order()[:-1]

JSON_BODIES: dict[str, tuple[bytes, Refused]] = {
    f"{field} is {value[:30]}": (raw_order(field, value), INVALID[field])
    for field, values in WRONG_VALUES.items()
    for value in values
}
JSON_BODIES |= {
    f"{field} twice": (USUAL + f',"{field}":{first},"{field}":{second}}}'.encode(), TWICE[field])
    for field, first, second in [
        ("model", '"gpt-image-2"', '"gpt-image-2"'),
        ("size", '"auto"', '"auto"'),
        ("quality", "null", "null"),
        ("n", "1", "1"),
        ("stream", "false", "true"),
    ]
}
JSON_BODIES |= {
    "a duplicate with an escaped name": (USUAL + b',"s\\u0069ze":"1024x1024"}', TWICE["size"]),
    "a duplicate that is null": (USUAL + b',"model":null}', TWICE["model"]),
    "a duplicate of another type": (USUAL + b',"n":1,"n":[2]}', TWICE["n"]),
    "no model": (b'{"prompt":"a bean"}', NO_MODEL),
    "an empty object": (b"{}", NO_MODEL),
    "model is null": (raw_order("model", "null"), NO_MODEL),
    "model is empty": (raw_order("model", '""'), OTHER_MODEL),
    "model in capitals": (raw_order("model", '"GPT-IMAGE-2"'), OTHER_MODEL),
    "model with a space": (raw_order("model", '"gpt-image-2 "'), OTHER_MODEL),
    "another model": (raw_order("model", '"dall-e-3"'), OTHER_MODEL),
    "model is a number": (raw_order("model", "2"), OTHER_MODEL),
    "model is true": (raw_order("model", "true"), OTHER_MODEL),
    "model is an array": (raw_order("model", '["gpt-image-2"]'), OTHER_MODEL),
    "model is an object": (raw_order("model", '{"id":"gpt-image-2"}'), OTHER_MODEL),
    "nothing": (b"", NOT_JSON),
    "blanks": (b" \r\n\t ", NOT_JSON),
    "an array": (b"[" + order() + b"]", NOT_JSON),
    "a string": (b'"gpt-image-2"', NOT_JSON),
    "a number": (b"1", NOT_JSON),
    "null": (b"null", NOT_JSON),
    "not JSON at all": (b"model=gpt-image-2", NOT_JSON),
    "NaN": (raw_order("extra", "NaN"), NOT_JSON),
    "Infinity": (raw_order("extra", "Infinity"), NOT_JSON),
    "minus Infinity": (raw_order("extra", "-Infinity"), NOT_JSON),
    "65 levels": (raw_order("extra", "[" * 64 + "]" * 64), NOT_JSON),
    "no end": (order()[:-1], NOT_JSON),
    "a second object": (order() + order(), NOT_JSON),
    "something behind it": (order() + b"x", NOT_JSON),
    "a trailing comma": (USUAL + b",}", NOT_JSON),
    "a comment": (USUAL + b"/* */}", NOT_JSON),
    "single quotes": (order().replace(b'"', b"'"), NOT_JSON),
    "a number with a zero first": (raw_order("n", "01"), NOT_JSON),
    "a number with a plus": (raw_order("n", "+1"), NOT_JSON),
    "a number without a whole part": (raw_order("extra", ".5"), NOT_JSON),
    "a control character in text": (raw_order("extra", '"a\nb"'), NOT_JSON),
    "an unknown escape": (raw_order("extra", '"\\x41"'), NOT_JSON),
    "broken UTF-8": (raw_order("extra", '"?"').replace(b"?", b"\xff"), NOT_JSON),
    "UTF-8 cut short": (raw_order("extra", '"?"').replace(b"?", b"\xe2\x82"), NOT_JSON),
    "a surrogate in UTF-8": (raw_order("extra", '"?"').replace(b"?", b"\xed\xa0\x80"), NOT_JSON),
    "a byte order mark": (b"\xef\xbb\xbf" + order(), NOT_JSON),
    "UTF-16, little end first": (order().decode().encode("utf-16-le"), NOT_JSON),
    "UTF-16, big end first": (order().decode().encode("utf-16-be"), NOT_JSON),
    "UTF-16 with a mark": (order().decode().encode("utf-16"), NOT_JSON),
    "UTF-32": (order().decode().encode("utf-32"), NOT_JSON),
}  # fmt: skip


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize(("body", "expected"), JSON_BODIES.values(), ids=JSON_BODIES)
def test_json(live: tuple[LiveGateway, ScriptedUpstream], key: str, path: str, body: bytes, expected: Refused) -> None:
    refused(live, post(key, body, path), expected)


def test_64_levels_and_a_tenth_image_are_not_refused(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    """The other side of the borders above."""
    for body in (raw_order("extra", "[" * 63 + "]" * 63), raw_order("n", "10"), raw_order("extra", '{"size":1,"size":2}')):
        assert ask(live[0], post(key, body)).status == 200


@pytest.mark.parametrize(
    ("asked", "quality", "told"),
    [
        ("1000x1000", "high", "The nearest preset of that shape is 1024x1024, at $0.210700 in high quality"),
        ("1536x1024", "low", "The nearest preset of that shape is 2016x1344, at "),
        ("1920x1080", "medium", "The nearest preset of that shape is 2048x1152, at "),
    ],
)
def test_a_size_outside_the_table_is_answered_with_the_nearest_preset_and_what_is_accepted(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, asked: str, quality: str, told: str
) -> None:
    message = refused(live, post(key, order(size=asked, quality=quality)), INVALID["size"]).error["message"]
    assert f'"{asked}"' in message
    assert told in message
    assert f"in {quality} quality" in message
    accepted = message.rpartition("Accepted: ")[2].rstrip(".").split(", ")
    assert len(accepted) == 28
    assert {"auto", "1024x1024", "2048x1152", "3840x2160"} <= set(accepted)


@pytest.mark.parametrize(
    ("changes", "expected", "told"),
    [
        ({"quality": "hd"}, INVALID["quality"], ['"hd"', "auto", "low", "medium", "high"]),
        ({"n": 11}, INVALID["n"], ["11", "1 to 10"]),
        ({"stream": "yes"}, INVALID["stream"], ['"yes"', "true", "false"]),
        ({"model": "dall-e-3"}, OTHER_MODEL, ['"dall-e-3"', "gpt-image-2"]),
    ],
)
def test_a_wrong_value_is_answered_with_the_accepted_ones(
    live: tuple[LiveGateway, ScriptedUpstream], key: str, changes: dict[str, Any], expected: Refused, told: list[str]
) -> None:
    message = refused(live, post(key, order(**changes)), expected).error["message"]
    assert [word for word in told if word not in message] == []
