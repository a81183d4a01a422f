"""Which headers cross the gateway: the rules as tables, and a caller, a gateway and an upstream that keep to them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from proxy.headers import bearer, to_client, to_upstream, value, values
from tests.bare import EDITS, GENERATIONS, JSON_TYPE, Incoming, Reply, ask, head, order, post
from tests.live import JSON, UPSTREAM_KEY, LiveGateway, ScriptedUpstream, chunked, json_answer, live_gateway, whole

Pairs = list[tuple[bytes, bytes]]

HOP_BY_HOP = [
    b"connection", b"keep-alive", b"proxy-authenticate", b"proxy-authorization", b"proxy-connection", b"te", b"trailer",
    b"transfer-encoding", b"upgrade",
]  # fmt: skip


def sent(headers: Pairs) -> Pairs:
    """What of a caller's headers is among those for the upstream."""
    made = to_upstream(headers, host=b"api.test", key="sk-beans-1", body_bytes=7, request_id="req_1")
    own = [
        (b"host", b"api.test"),
        (b"authorization", b"Bearer sk-beans-1"),
        (b"accept-encoding", b"identity"),
        (b"content-length", b"7"),
        (b"x-beanmeter-request-id", b"req_1"),
    ]
    assert [pair for pair in own if made.count(pair) != 1] == []
    return [pair for pair in made if pair not in own]


@pytest.mark.parametrize(
    "headers",
    [
        [],
        [(b"content-type", b"application/json"), (b"accept", b"*/*")],
        [(b"x-b", b"2"), (b"x-a", b"1"), (b"x-b", b"1"), (b"x-b", b"2")],
        [(b"x-stainless-lang", b"python"), (b"x-stainless-retry-count", b"1"), (b"user-agent", b"OpenAI/Python 3.54")],
        [(b"openai-organization", b"org"), (b"x-request-id", b"mine"), (b"x-empty", b"")],
        [(b"forwarded", b"for=1.2.3.4"), (b"traceparent", b"00-1-2-01"), (b"x-latin", b"\xe9")],
    ],
)
def test_what_is_the_callers_goes_upstream_in_its_order(headers: Pairs) -> None:
    assert sent(headers) == headers


@pytest.mark.parametrize(
    "name",
    [
        *HOP_BY_HOP, b"accept-encoding", b"authorization", b"content-length", b"cookie", b"expect", b"host",
        b"x-beanmeter-request-id", b"x-beanmeter-anything",
    ],
)  # fmt: skip
def test_what_is_the_connections_or_the_gateways_does_not_go_upstream(name: bytes) -> None:
    assert sent([(b"x-a", b"1"), (name, b"x"), (b"x-b", b"2"), (name, b"y")]) == [(b"x-a", b"1"), (b"x-b", b"2")]


@pytest.mark.parametrize(
    ("headers", "left"),
    [
        ([(b"connection", b"x-a"), (b"x-a", b"1"), (b"x-b", b"2")], [(b"x-b", b"2")]),
        ([(b"x-a", b"1"), (b"x-a", b"2"), (b"connection", b"close, X-A ,, ")], []),
        ([(b"connection", b"x-a"), (b"connection", b"keep-alive,x-b"), (b"x-a", b"1"), (b"x-b", b"2")], []),
        ([(b"connection", b"x-other"), (b"x-a", b"1")], [(b"x-a", b"1")]),
        # Nobody can declare away what says how the body is to be read.
        ([(b"connection", b"content-type"), (b"content-type", b"a/b")], [(b"content-type", b"a/b")]),
    ],
)
def test_what_a_connection_header_names_goes_no_further(headers: Pairs, left: Pairs) -> None:
    assert sent(headers) == left
    assert to_client(headers) == left


@pytest.mark.parametrize("named", [b"host", b"authorization", b"accept-encoding", b"content-length", b"x-beanmeter-request-id"])
def test_the_gateways_own_headers_can_not_be_named_away(named: bytes) -> None:
    assert sent([(b"connection", named)]) == []


@pytest.mark.parametrize(
    ("headers", "left"),
    [
        ([], []),
        ([(b"Content-Type", b"a/b"), (b"DATE", b"now")], [(b"content-type", b"a/b"), (b"date", b"now")]),
        ([(b"Set-Cookie", b"a=1"), (b"X-A", b"1"), (b"set-cookie", b"b=2")],
         [(b"set-cookie", b"a=1"), (b"x-a", b"1"), (b"set-cookie", b"b=2")]),
        ([(b"Content-Length", b"5")], [(b"content-length", b"5")]),
        ([(b"X-Request-Id", b"theirs"), (b"X-RateLimit-Limit", b"1")],
         [(b"x-request-id", b"theirs"), (b"x-ratelimit-limit", b"1")]),
        ([(name.title(), b"x") for name in HOP_BY_HOP], []),
        ([(b"X-Beanmeter-Error-Source", b"gateway"), (b"x-beanmeter-remaining-usd", b"1")], []),
    ],
)  # fmt: skip
def test_what_the_upstream_says_goes_to_the_client(headers: Pairs, left: Pairs) -> None:
    assert to_client(headers) == left


@pytest.mark.parametrize(
    ("given", "token"),
    [
        ([], None),
        ([b"Bearer sk-bm-a"], "sk-bm-a"),
        ([b"bearer sk-bm-a"], "sk-bm-a"),
        ([b"BEARER   sk-bm-a "], "sk-bm-a"),
        ([b"Bearer"], ""),
        ([b""], None),
        ([b"sk-bm-a"], None),
        ([b"Basic c2stYm0tYQ=="], None),
        ([b"Bearer\tsk-bm-a"], None),
        ([b"Bearer sk-bm-\xe9"], None),
        ([b"Bearer sk-bm-a", b"Bearer sk-bm-a"], None),
        ([b"Bearer sk-bm-a", b"Basic x"], None),
    ],
)
def test_bearer(given: list[bytes], token: str | None) -> None:
    assert bearer([(b"x-api-key", b"other"), *((b"authorization", one) for one in given)]) == token


def test_values() -> None:
    headers = [(b"a", b"1"), (b"b", b"2"), (b"a", b"3")]
    assert (values(headers, b"a"), values(headers, b"c")) == ([b"1", b"3"], [])
    assert (value(headers, b"a"), value(headers, b"c")) == (b"1", None)


# End to end


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    directory = tmp_path_factory.mktemp("headers")
    with live_gateway(f"sqlite:///{directory}/beanmeter.db", directory) as parts:
        yield parts


OWN = ["x-beanmeter-request-id", "x-beanmeter-reserved-usd"]


def answered(live: tuple[LiveGateway, ScriptedUpstream], answer: bytes, *more: tuple[str, str], key: str = "") -> Reply:
    """What a caller gets when the upstream answers so."""
    gateway, upstream = live
    upstream.answer(answer)
    return ask(gateway, post(key or gateway.key, order(), headers=[JSON_TYPE, *more]))


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_a_caller_s_headers_arrive_upstream(live: tuple[LiveGateway, ScriptedUpstream], path: str) -> None:
    gateway, upstream = live
    upstream.answer(whole(200, JSON, json_answer()))
    given = [
        ("Host", "gateway.test"),
        ("X-Stainless-Lang", "python"),
        ("Cookie", "session=theirs"),
        ("Accept", "application/json"),
        ("accept-encoding", "gzip, deflate, br"),
        ("X-Twice", "b"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-Hop", "gone"),
        ("Keep-Alive", "timeout=5"),
        ("TE", "trailers"),
        ("Proxy-Authorization", "Basic x"),
        ("x-stainless-retry-count", "1"),
        ("X-Twice", "a"),
        ("Authorization", f"Bearer {gateway.key}"),
        ("X-Beanmeter-Request-Id", "forged"),
        JSON_TYPE,
        ("Content-Length", str(len(order()))),
    ]
    reply = ask(gateway, head("POST", path, given) + order())
    assert reply.status == 200
    assert upstream.requests[-1].headers == [
        ("host", f"127.0.0.1:{upstream.port}"),
        ("authorization", f"Bearer {UPSTREAM_KEY}"),
        ("x-stainless-lang", "python"),
        ("accept", "application/json"),
        ("x-twice", "b"),
        ("x-stainless-retry-count", "1"),
        ("x-twice", "a"),
        ("content-type", "application/json"),
        ("accept-encoding", "identity"),
        ("content-length", str(len(order()))),
        ("x-beanmeter-request-id", reply.values("x-beanmeter-request-id")[0]),
    ]


def test_nothing_is_added_upstream_that_the_caller_did_not_send(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    _, upstream = live
    answered(live, whole(200, JSON, json_answer()))
    names = [name for name, _ in upstream.requests[-1].headers]
    own = ["accept-encoding", "content-length", "x-beanmeter-request-id"]
    assert names == ["host", "authorization", "content-type", *own]


def test_an_answer_s_headers_arrive_at_the_client(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    theirs = [
        ("Date", "Sun, 22 Nov 2026 16:00:00 GMT"),
        ("X-B", "2"),
        ("X-A", "1"),
        ("Connection", "keep-alive, X-Hop"),
        ("X-B", "1"),
        ("X-Hop", "gone"),
        ("Keep-Alive", "timeout=5"),
        ("Proxy-Authenticate", "Basic"),
        ("Set-Cookie", "a=1; Path=/"),
        ("Set-Cookie", "b=2"),
        ("X-Request-Id", "theirs"),
        ("X-Request-Cost-Micro-Usd", "210700"),
        ("X-Beanmeter-Error-Source", "gateway"),
        ("X-Beanmeter-Reserved-Usd", "0"),
        ("Content-Type", "application/json"),
    ]
    body = json_answer()
    kept = [(name.lower(), value) for name, value in theirs]
    kept = [pair for pair in kept if not pair[0].startswith(("connection", "x-hop", "keep-alive", "proxy-", "x-beanmeter-"))]
    for answer, framing in (
        (whole(200, theirs, body), ("content-length", str(len(body)))),
        (chunked(200, theirs, [body]), ("transfer-encoding", "chunked")),
    ):
        reply = answered(live, answer)
        assert reply.body == body
        assert [name for name, _ in reply.headers if name.startswith("x-beanmeter-")] == OWN
        others = [pair for pair in reply.headers if pair[0] not in OWN]
        assert sorted(others) == sorted([*kept, framing])
        assert [pair for pair in others if pair != framing] == kept
        assert reply.values("x-beanmeter-reserved-usd") == ["0.210700"]


def test_an_answer_with_two_framings_is_not_passed_on(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """Two readers could take two different answers from it."""
    reply = answered(live, chunked(200, [*JSON, ("Content-Length", "5")], [json_answer()]))
    assert (reply.status, reply.error["code"]) == (502, "upstream_failed")


def test_what_is_left_is_told_where_there_is_a_hard_budget(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, _ = live
    key_id, key = gateway.add_team("blue")
    answer = whole(200, JSON, json_answer())

    def left() -> tuple[list[str], list[str]]:
        reply = answered(live, answer, key=key)
        return [name for name in reply.names if name.startswith("x-beanmeter-")], reply.values("x-beanmeter-remaining-usd")

    assert left() == (OWN, [])
    gateway.set_budget(100, team="blue", soft=True)
    assert left() == (OWN, [])
    three = [*OWN, "x-beanmeter-remaining-usd"]
    gateway.set_budget(10_000_000, "day", team="blue")
    # Two images are settled before, this one is held.
    assert left() == (three, ["9.367900"])
    gateway.set_budget(5_000_000, "total", team="blue", key_id=key_id)
    assert left() == (three, ["4.157200"])


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_passed_on_and_not_followed(live: tuple[LiveGateway, ScriptedUpstream], status: int) -> None:
    gateway, upstream = live
    before, connections = len(upstream.requests), upstream.connections
    to = f"{upstream.base_url}/images/generations?again"
    reply = answered(live, whole(status, [("Location", to)], b"elsewhere"))
    assert (reply.status, reply.values("location"), reply.body) == (status, [to], b"elsewhere")
    assert len(upstream.requests) == before + 1
    assert upstream.connections <= connections + 1
    charge = gateway.charge_when_ended(reply.values("x-beanmeter-request-id")[0])
    assert (charge["state"], charge["settled_micro_usd"]) == ("released", 0)


def test_cookies_reach_their_own_caller_and_no_other(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    gateway, upstream = live
    _, other = gateway.add_team("other")
    first = answered(live, whole(200, [*JSON, ("Set-Cookie", "session=first; Path=/; Domain=127.0.0.1")], json_answer()))
    assert first.values("set-cookie") == ["session=first; Path=/; Domain=127.0.0.1"]
    for key, more in ((gateway.key, [("Cookie", "session=first")]), (other, [("Cookie", "session=first")]), (other, [])):
        reply = answered(live, whole(200, JSON, json_answer()), *more, key=key)
        assert reply.values("set-cookie") == []
        assert upstream.requests[-1].values("cookie") == []


def test_callers_on_one_connection_keep_their_answers_apart(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """As a proxy in front of the gateway shares its connections."""
    gateway, upstream = live
    _, other = gateway.add_team("another")
    with gateway.connect() as connection:
        incoming = Incoming(connection)
        cookies = []
        for key, cookie in ((gateway.key, "red"), (other, "blue"), (gateway.key, "")):
            upstream.answer(whole(200, [*JSON, *([("Set-Cookie", cookie)] if cookie else [])], json_answer()))
            connection.sendall(post(key, order()))
            reply = incoming.reply()
            assert reply is not None
            cookies.append(reply.values("set-cookie"))
    assert cookies == [["red"], ["blue"], []]


@pytest.mark.parametrize("written", ["a  ", "a\t", " \ta", "", "a b\tc", "\u00e9\u00ff", "a" * 8_000])
def test_a_value_arrives_without_the_blanks_around_it(live: tuple[LiveGateway, ScriptedUpstream], written: str) -> None:
    _, upstream = live
    assert answered(live, whole(200, JSON, json_answer()), ("X-Written", written)).status == 200
    assert upstream.requests[-1].values("x-written") == [written.strip(" \t")]
