"""Orders in a form that are refused."""

from __future__ import annotations

import pytest

from tests.bare import EDITS, ask, order, post
from tests.live import LiveGateway, ScriptedUpstream
from tests.refusals.checks import INVALID, NO_MODEL, NOT_A_FORM, OTHER_MODEL, TWICE, Refused, refused
from tests.refusals.forms import FORM_TYPE, form, part

FORM_VALUES = {
    "size": ["1024X1024", " 1024x1024", "1024x1024 ", "1000x1000", "AUTO", "", "null", '"1024x1024"'],
    "quality": ["HIGH", " high", "hd", "", "null"],
    "n": ["0", "11", "1.0", "1e1", "-1", "+1", "01", " 1", "true", "", "null", "\u0661"],
    "stream": ["True", "FALSE", "yes", "", "null", " true", "2"],
}

FORMS: dict[str, tuple[bytes, Refused]] = {
    f"{field} is {value!r}": (form(**{field: value}), INVALID[field])
    for field, values in FORM_VALUES.items()
    for value in values
}
FORMS |= {
    f"{field} is a file": (form(part(field, b"1", '; filename="a"'), **{field: None}), INVALID[field]) for field in INVALID
}
FORMS |= {f"{field} twice": (form(part(field, b"1"), part(field, b"1")), expected) for field, expected in TWICE.items()}
FORMS |= {
    "a duplicate without quotes": (form(part("size", b"auto").replace(b'"size"', b"size")), TWICE["size"]),
    "a duplicate that is a file": (form(part("quality", b"high", '; filename="a"')), TWICE["quality"]),
    "no model": (form(model=None), NO_MODEL),
    "another model": (form(model="dall-e-3"), OTHER_MODEL),
    "model is empty": (form(model=""), OTHER_MODEL),
    "model is null": (form(model="null"), OTHER_MODEL),
    "a value in base64 is not decoded": (
        form(part("size", b"MTAyNHgxMDI0", "\r\nContent-Transfer-Encoding: base64"), size=None),
        INVALID["size"],
    ),
    "empty": (b"", NOT_A_FORM),
    "no parts": (b"--b--\r\n", NOT_A_FORM),
    "not closed": (form().removesuffix(b"--b--\r\n"), NOT_A_FORM),
    "cut in an image": (form()[:-60], NOT_A_FORM),
    "another boundary": (form().replace(b"--b", b"--c"), NOT_A_FORM),
    "bare line feeds": (form().replace(b"\r\n", b"\n"), NOT_A_FORM),
    "a part without a disposition": (form(b"--b\r\nContent-Type: text/plain\r\n\r\nx\r\n"), NOT_A_FORM),
    "a part without a name": (form(b"--b\r\nContent-Disposition: form-data\r\n\r\nx\r\n"), NOT_A_FORM),
    "JSON": (order(), NOT_A_FORM),
}


@pytest.mark.parametrize(("body", "expected"), FORMS.values(), ids=FORMS)
def test_multipart(live: tuple[LiveGateway, ScriptedUpstream], key: str, body: bytes, expected: Refused) -> None:
    refused(live, post(key, body, EDITS, [FORM_TYPE]), expected)


def test_a_form_that_is_right_is_not_refused(live: tuple[LiveGateway, ScriptedUpstream], key: str) -> None:
    assert ask(live[0], post(key, form(n="2", stream="0"), EDITS, [FORM_TYPE])).status == 200
