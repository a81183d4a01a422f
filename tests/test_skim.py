"""The reader of JSON, as tables of documents; each is fed whole, in 7-byte and in 1-byte pieces, with the same result."""

from __future__ import annotations

import json
import tracemalloc
from collections import deque
from collections.abc import Mapping
from itertools import repeat

import pytest
from hypothesis import given
from hypothesis import strategies as st

from proxy.skim import DEPTH_MAX, FOUND_MAX, NAME_BYTES_MAX, SCALAR_BYTES_MAX, VALUES_MAX, Found, Skim, SkimError

PIECES = (1_000_000, 7, 1)

WATCH = {
    ("size",): 64,
    ("n",): 64,
    ("data",): 0,
    ("data", "*", "b64_json"): 8,
    ("data", "*", "size"): 64,
    ("usage", "total"): 64,
}


def skim(document: bytes, step: int, *, strict: bool, watch: Mapping[tuple[str, ...], int]) -> list[Found]:
    reader = Skim(watch, strict=strict)
    for at in range(0, len(document), step):
        reader.feed(document[at : at + step])
    reader.end()
    assert reader.whole
    return reader.found


def read(document: bytes, *, strict: bool = True, watch: Mapping[tuple[str, ...], int] = WATCH) -> list[Found]:
    """What is found, the same for every cut."""
    results = [skim(document, step, strict=strict, watch=watch) for step in PIECES]
    assert results[0] == results[1] == results[2]
    for found in results[0]:
        assert document[found.start : found.end].startswith(found.raw)
        assert found.whole == (document[found.start : found.end] == found.raw)
    return results[0]


def refuse(document: bytes, *, strict: bool = True) -> set[str]:
    """The messages; the document is refused however it is cut."""
    messages = set()
    for step in PIECES:
        with pytest.raises(SkimError) as error:
            skim(document, step, strict=strict, watch=WATCH)
        messages.add(str(error.value))
    return messages


def nest(levels: int) -> bytes:
    """An object, and arrays in it: ``levels`` brackets deep."""
    return b'{"a":' + b"[" * (levels - 1) + b"]" * (levels - 1) + b"}"


ACCEPTED = [
    b"{}",
    b" \t\r\n{ \t\r\n} \t\r\n",
    b'{"":""}',
    b'{"a":1}',
    b'{"a" : 1 , "b" : 2}',
    b'{"a":0,"b":-0,"c":-1,"d":1.5,"e":1e5,"f":1E+5,"g":1.25e-5,"h":-0.0e0}',
    b'{"a":true,"b":false,"c":null}',
    b'{"a":[]}',
    b'{"a":[[],{},[1],[[2]],{"b":[]}]}',
    b'{"a":[1,"2",true,null,{"n":3}]}',
    rb'{"a":"\"\\\/\b\f\n\r\t\u0000\uD83D\uDE00\ud800"}',
    rb'{"\u0061\"":"x","a":"\\"}',
    rb'{"a":"\\\\\"\\"}',
    '{"a":"äöü 日本語 😀 \x7f\u2028"}'.encode(),
    b'{"n":1,"n":2,"n":3}',
    b'{"a":' + b"1" * SCALAR_BYTES_MAX + b"}",
    b'{"a":0.' + b"1" * (SCALAR_BYTES_MAX - 2) + b"}",
    b'{"' + b"n" * 5_000 + b'":"' + b"x" * 5_000 + b'"}',
    b'{"a":"' + b"x" * 600 + rb"\n" + b"y" * 600 + b'"}',
    b'{"a":"' + rb"\n" * 300 + b"x" * 70 + rb"\u0041" * 300 + b'"}',
    b'{"a":' + b" " * 700 + b"1" + b"\n" * 700 + b"}",
    nest(DEPTH_MAX),
]

REFUSED = [
    # nothing, or no object
    b"",
    b" ",
    b"1",
    b'"a"',
    b"null",
    b"[]",
    b'[{"a":1}]',
    b"}",
    # cut
    b"{",
    b'{"',
    b'{"a',
    b'{"a"',
    b'{"a":',
    b'{"a":1',
    b'{"a":1,',
    b'{"a":"x',
    b'{"a":"x\\"}',
    b'{"a":[1',
    b'{"a":[1,',
    b'{"a":tr',
    # structure
    b"{,}",
    b"{:}",
    b"{]",
    b"{}}",
    b"{}{}",
    b"{} x",
    b"{}\x00",
    b'{"a"}',
    b'{"a",}',
    b'{"a":}',
    b'{"a"1}',
    b'{"a"::1}',
    b'{"a":1,}',
    b'{"a":1,,"b":2}',
    b'{,"a":1}',
    b'{"a":1 "b":2}',
    b'{"a":1]',
    b'{"a":1;"b":2}',
    b'{"a":[}',
    b'{"a":[1}}',
    b'{"a":[,1]}',
    b'{"a":[1,]}',
    b'{"a":[1,,2]}',
    b'{"a":[1 2]}',
    b'{"a":["b":1]}',
    b'{"a":[]]}',
    b'{"a":1} // comment',
    b'{/**/"a":1}',
    b'{"a":1}\x0c',
    b'{\x0b"a":1}',
    b"{\xc2\xa0}",
    # names
    b"{a:1}",
    b"{'a':1}",
    b"{1:1}",
    b"{null:1}",
    b'{["a"]:1}',
    # numbers
    b'{"a":+1}',
    b'{"a":01}',
    b'{"a":-01}',
    b'{"a":00}',
    b'{"a":-}',
    b'{"a":1.}',
    b'{"a":.5}',
    b'{"a":1e}',
    b'{"a":1e+}',
    b'{"a":1.e1}',
    b'{"a":1.2.3}',
    b'{"a":1e1.5}',
    b'{"a":0x10}',
    b'{"a":1_0}',
    b'{"a":1a}',
    b'{"a":--1}',
    b'{"a":- 1}',
    b'{"a":\xef\xbc\x91}',
    b'{"a":' + b"1" * (SCALAR_BYTES_MAX + 1) + b"}",
    b'{"a":1.' + b"1" * SCALAR_BYTES_MAX + b"}",
    b'{"a":' + b"x" * 5_000,
    # literals
    b'{"a":NaN}',
    b'{"a":-NaN}',
    b'{"a":Infinity}',
    b'{"a":-Infinity}',
    b'{"a":True}',
    b'{"a":TRUE}',
    b'{"a":nul}',
    b'{"a":nulll}',
    b'{"a":truefalse}',
    b'{"a":undefined}',
    b"{\"a\":'b'}",
    # escapes
    rb'{"a":"\x41"}',
    rb'{"a":"\'"}',
    rb'{"a":"\a"}',
    rb'{"a":"\U0041"}',
    rb'{"a":"\u"}',
    rb'{"a":"\u004"}',
    rb'{"a":"\u004g"}',
    rb'{"a":"\u 041"}',
    rb'{"a":"\u+041"}',
    b'{"a":"\\\n"}',
    b'{"a":"\\\x00"}',
    rb'{"a":"' + rb"\n" * 50 + rb'\q"}',
    # encodings
    '{"a":1}'.encode("utf-16"),
    '{"a":1}'.encode("utf-16-le"),
    '{"a":1}'.encode("utf-16-be"),
    '{"a":1}'.encode("utf-32-be"),
    # deep
    nest(DEPTH_MAX + 1),
    b'{"a":' * (DEPTH_MAX + 1) + b"1" + b"}" * (DEPTH_MAX + 1),
]

# What only strict reading refuses: the content of strings, and the byte order mark.
REFUSED_WHEN_STRICT = [
    b'\xef\xbb\xbf{"a":1}',
    *(b'{"a":"x' + bytes([control]) + b'"}' for control in range(0x20)),
    b'{"a":"' + b"x" * 2_000 + b"\x1f" + b"x" * 2_000 + b'"}',
    b'{"a":"\\n\x00"}',
    b'{"a":"\xff"}',
    b'{"a":"\x80"}',
    b'{"a":"\xc3"}',
    b'{"a":"\xc3","b":1}',
    b'{"a":"\xc0\xaf"}',
    b'{"a":"\xe0\x80\x80"}',
    b'{"a":"\xed\xa0\x80"}',
    b'{"a":"\xf4\x90\x80\x80"}',
    b'{"a":"\xf0\x9f\x98"}',
    b'{"\xff":1}',
    b'{"a\x01":1}',
    b'{"a\n":1}',
]


def strictly(document: bytes) -> object:
    """The document as json.loads has it, without what that takes beyond RFC 8259 in UTF-8."""

    def no_constant(name: str) -> None:
        raise ValueError(name)

    value = json.loads(document.decode("utf-8"), parse_constant=no_constant)
    if not isinstance(value, dict):
        raise ValueError("no object")
    return value


def is_json(document: bytes) -> bool:
    try:
        strictly(document)
    except ValueError:
        return False
    return True


@pytest.mark.parametrize("document", ACCEPTED)
def test_documents_that_are_json(document: bytes) -> None:
    assert is_json(document)
    assert read(document) == read(document, strict=False)


@pytest.mark.parametrize("document", REFUSED)
def test_documents_that_are_not_json(document: bytes) -> None:
    refuse(document)
    refuse(document, strict=False)


@pytest.mark.parametrize("document", REFUSED)
def test_what_is_refused_is_beyond_json_or_beyond_a_limit(document: bytes) -> None:
    too_much = b"1" * 900 in document or document.count(b"[") + document.count(b"{") > DEPTH_MAX
    assert is_json(document) == too_much


@pytest.mark.parametrize("document", REFUSED_WHEN_STRICT)
def test_content_of_strings_is_only_searched_in_strict_reading(document: bytes) -> None:
    assert not is_json(document)
    refuse(document)
    read(document, strict=False)


@pytest.mark.parametrize(
    "document", [b"\xef\xbb{}", b"\xef{}", b" \xef\xbb\xbf{}", b"\xef\xbb\xbf\xef\xbb\xbf{}", b"\xef\xbb\xbf", b"\xef"]
)
def test_a_byte_order_mark_stands_once_and_whole_at_the_start(document: bytes) -> None:
    refuse(document, strict=False)


@pytest.mark.parametrize(
    ("document", "offset"),
    [
        (b"[]", 0),
        (b'{"a":1,}', 7),
        (b'{"a":"\xc3\xa4","b":"\xff"}', 15),
        (b'{"a":"xy\x01"}', 8),
        (rb'{"a":"\n\x"}', 8),
        (b'{"a":[01]}', 6),
        (b"{}  x", 4),
        (b'{"a":1', 6),
    ],
)
def test_messages_say_where(document: bytes, offset: int) -> None:
    (message,) = refuse(document)
    assert message.endswith(f", at offset {offset}")


def brief(found: list[Found]) -> list[tuple[str, int, str, str]]:
    return [(".".join(one.path), one.index, one.kind, one.text()) for one in found]


@pytest.mark.parametrize(
    ("document", "found"),
    [
        (b'{"size":"1024x1024"}', [("size", -1, "string", "1024x1024")]),
        (
            b'{"size":null,"n":10,"size":true}',
            [("size", -1, "null", "null"), ("n", -1, "number", "10"), ("size", -1, "true", "true")],
        ),
        (rb'{"\u0073i\u007Ae":"\u0061uto"}', [("size", -1, "string", "auto")]),
        (b'{"SIZE":"a","size ":"b","siz":"c","sizes":"d","si\\u200bze":"e"}', []),
        (b'{"n":{"n":1},"size":[1,"size"]}', [("n", -1, "object", ""), ("size", -1, "array", "")]),
        (b'{"a":{"size":"x","n":1},"b":[{"size":"x"}],"n":2}', [("n", -1, "number", "2")]),
        (b'{"n":-1.5e3}', [("n", -1, "number", "-1.5e3")]),
        (
            b'{"data":[{"size":"a"},[{"size":"no"}],3,{"x":[0,0,0],"size":"b"}],"usage":{"total":7}}',
            [
                ("data", -1, "array", ""),
                ("data.*.size", 0, "string", "a"),
                ("data.*.size", 3, "string", "b"),
                ("usage.total", -1, "number", "7"),
            ],
        ),
        (b'{"data":{"*":{"size":"a"},"0":{"size":"b"}}}', [("data", -1, "object", "")]),
        (b'{"data":[{"b64_json":"AAAAAAAAAAAA"}]}', [("data", -1, "array", ""), ("data.*.b64_json", 0, "string", "AAAAAAA")]),
    ],
)
def test_what_is_found(document: bytes, found: list[tuple[str, int, str, str]]) -> None:
    assert brief(read(document)) == found
    assert brief(read(document.replace(b":", b" :\n").replace(b",", b"\t, "))) == found


def test_watched_arrays_in_arrays() -> None:
    watch = {("a", "*", "*"): 64, ("a", "*"): 64}
    found = read(b'{"a":[[1,[2],3],4,[5]]}', watch=watch)
    assert [(one.path, one.index, one.raw) for one in found] == [
        (("a", "*"), 0, b""),
        (("a", "*", "*"), 0, b"1"),
        (("a", "*", "*"), 1, b""),
        (("a", "*", "*"), 2, b"3"),
        (("a", "*"), 1, b"4"),
        (("a", "*"), 2, b""),
        (("a", "*", "*"), 0, b"5"),
    ]


def test_offsets_are_those_of_the_document() -> None:
    document = ' \n{"ä":"' + "ß" * 700 + '" , "size" : "auto" ,\n"data":[{"b64_json":"' + "A" * 999 + '","size":"low"}]}  '
    body = document.encode()
    assert [body[one.start : one.end] for one in read(body)] == [b'"auto"', b"[", b'"' + b"A" * 999 + b'"', b'"low"']
    marked = b"\xef\xbb\xbf" + body
    assert [one.start - 3 for one in read(marked, strict=False)] == [one.start for one in read(body)]


def test_a_name_is_found_in_its_longest_spelling() -> None:
    name = "n" * 80
    spelled = "".join(f"\\u{ord(letter):04x}" for letter in name)
    assert len(spelled) + 2 == NAME_BYTES_MAX
    document = f'{{"{spelled}":1,"{spelled}n":2,"{name}":3}}'.encode()
    assert [one.raw for one in read(document, watch={(name,): 9})] == [b"1", b"3"]


@pytest.mark.parametrize(
    ("token", "keep", "text"),
    [
        (rb'"abcdef"', 0, ""),
        (rb'"abcdef"', 1, ""),
        (rb'"abcdef"', 4, "abc"),
        (rb'"abcdef"', 7, "abcdef"),
        (rb'"abcdef"', 8, "abcdef"),
        (rb'"a\ncdef"', 3, "a"),
        (rb'"a\ncdef"', 4, "a\n"),
        (rb'"a\u0041cdef"', 7, "a"),
        (rb'"a\u0041cdef"', 8, "aA"),
        (rb'"a\\cdef"', 3, "a"),
        ('"aßc"'.encode(), 3, "a"),
        ('"aßc"'.encode(), 4, "aß"),
        (rb'"a\ud83d\ude00b"', 8, "a"),
        (rb'"a\ud83d\ude00b"', 10, "a"),
        (rb'"a\ud83d\ude00b"', 14, "a😀"),
        (rb'"a\ud83db"', 99, "a\ud83db"),
        (rb'"\ude00\ud83d"', 99, "\ude00\ud83d"),
    ],
)
def test_text_of_tokens_whole_and_cut(token: bytes, keep: int, text: str) -> None:
    (found,) = read(b'{"n":' + token + b"}", watch={("n",): keep})
    assert (found.text(), found.whole) == (text, keep >= len(token))
    assert found.end - found.start == len(token)


def test_text_of_broken_utf8_in_lax_reading() -> None:
    (found,) = read(b'{"n":"a\xffb\x01c"}', strict=False)
    assert found.text() == "a\ufffdb\x01c"


@pytest.mark.parametrize(
    ("opening", "piece", "message"),
    [
        (b'{"a":[', b"[]," * 1_000, f"more than {VALUES_MAX} values"),
        (b"{", b'"a":{},' * 1_000, f"more than {VALUES_MAX} values"),
        (b"{", b'"n":1,' * 1_000, f"more than {FOUND_MAX} values of the kind"),
        (b'{"a":', b"[[]," * 1_000, f"more than {DEPTH_MAX} levels"),
        (b'{"a":', b"1" * 100, f"more than {SCALAR_BYTES_MAX} bytes"),
    ],
)
def test_endless_documents_meet_a_limit(opening: bytes, piece: bytes, message: str) -> None:
    reader = Skim(WATCH, strict=True)
    reader.feed(opening)
    with pytest.raises(SkimError, match=message):
        deque(map(reader.feed, repeat(piece)), maxlen=0)


@pytest.mark.parametrize("strict", [True, False])
@pytest.mark.parametrize(
    "filling", [b"QUJD" * 16_384, rb"\n\u00e4" * 8_192, b'\\"' * 32_768, "日本語!".encode() * 6_554, (b"x" * 65 + rb"\/") * 900]
)
def test_long_strings_are_not_kept(filling: bytes, strict: bool) -> None:
    reader = Skim({("b64_json",): 16}, strict=strict)
    reader.feed(b'{"b64_json":"')
    tracemalloc.start()
    for _ in range(200):
        reader.feed(filling)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    reader.feed(b'","a":"' + filling + b'"}')
    reader.end()
    assert peak < 600_000
    assert [(one.raw, one.end - one.start) for one in reader.found] == [(b'"' + filling[:15], 200 * len(filling) + 2)]


NAMES = st.sampled_from(["size", "n", "data", "*", "ä"]) | st.text(max_size=4)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(NAMES, inner, max_size=4),
    max_leaves=20,
)
CUTS = st.lists(st.integers(1, 40), min_size=1, max_size=20)


@given(st.text(), st.integers(1, 40))
def test_a_cut_string_is_decoded_the_same_with_an_escape_in_it(text: str, keep: int) -> None:
    token = json.dumps(text, ensure_ascii=False).encode("utf-8", "replace")
    told = []
    for head, room in ((b'"x', keep + 1), (b'"\\u0078', keep + 6)):
        skim = Skim({("a",): room}, strict=False)
        skim.feed(b'{"a":' + head + token[1:] + b"}")
        told.append(skim.found[0].text())
    assert told[0] == told[1]


def feed(document: bytes, cuts: list[int], *, strict: bool = True) -> list[Found] | None:
    """What is found when the document comes in pieces of these lengths, over and over; None if it is refused."""
    reader = Skim(WATCH, strict=strict)
    at = turn = 0
    try:
        while at < len(document):
            size = cuts[turn % len(cuts)]
            reader.feed(document[at : at + size])
            at, turn = at + size, turn + 1
        reader.end()
    except SkimError:
        return None
    return reader.found


@given(
    st.dictionaries(st.sampled_from(["size", "n", "data"]) | st.text(max_size=4), JSON, max_size=5),
    CUTS,
    st.booleans(),
    st.booleans(),
)
def test_any_document_is_read_as_json_loads_reads_it(
    value: dict[str, object], cuts: list[int], ascii_only: bool, spaced: bool
) -> None:
    text = json.dumps(value, ensure_ascii=ascii_only, indent=1 if spaced else None)
    found = feed(text.encode("utf-8"), cuts)
    assert found is not None
    for name in ("size", "n"):
        seen = [one for one in found if one.path == (name,)]
        assert len(seen) == (name in value)
        if seen and seen[0].whole:
            assert json.loads(seen[0].raw) == value[name]


@given(st.text(alphabet='{}[]:,"\\ntrue0123456789.-+eEu \n\x00ä', max_size=30) | st.text(max_size=10), CUTS)
def test_any_text_is_taken_only_if_json_loads_takes_it(text: str, cuts: list[int]) -> None:
    document = ('{"a":' + text + "}").encode("utf-8", "surrogatepass")
    found = feed(document, cuts)
    assert found == feed(document, [len(document)])
    assert (found is not None) == is_json(document)


@given(st.binary(max_size=40), CUTS)
def test_any_bytes_in_a_string_are_taken_only_if_json_loads_takes_them(content: bytes, cuts: list[int]) -> None:
    document = b'{"size":"' + content + b'"}'
    found = feed(document, cuts)
    assert found == feed(document, [len(document)])
    assert feed(document, cuts, strict=False) == feed(document, [len(document)], strict=False)
    try:
        value = strictly(document)
    except ValueError:
        assert found is None
    else:
        assert found is not None
        assert isinstance(value, dict)
        assert [one.text() for one in found if one.path == ("size",)][-1] == value["size"]
