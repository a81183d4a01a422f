"""Requests and answers that nobody would write: each gets an answer that has a name, or a closed connection, and the books
still agree with the bill."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httptools

from proxy.errors import Refusal, Unreadable
from proxy.simulator import SimulatorOptions
from tests.bare import EDITS, GENERATIONS
from tests.chaos.crew import Crew, Process, crew
from tests.chaos.framing import FRAMINGS, framed
from tests.chaos.sizes import size
from tests.live import (
    JSON,
    ORDER,
    PATIENCE_SECONDS,
    SSE,
    Conversation,
    ScriptedUpstream,
    completed,
    event,
    json_answer,
    wait_for,
)

REQUESTS = size(2_000, 100_000)
STREAMS = size(500, 10_000)

CLIENTS = 32

# Who has sent all and hears nothing for so long says that nothing more will come. What is then still open hangs.
QUIET_SECONDS = 0.4


def refusals(kind: type[Refusal] = Refusal) -> Iterator[tuple[int, str]]:
    """Status and code of every refusal that the program knows."""
    for one in kind.__subclasses__():
        if "code" in vars(one):
            yield one.status, one.code
        yield from refusals(one)


REFUSALS = {*refusals()}


def test_every_refusal_is_known_here() -> None:
    assert (Unreadable.status, Unreadable.code) in REFUSALS
    assert (429, "insufficient_quota") in REFUSALS


def test_fuzzed_requests(tmp_path: Path, chance: random.Random) -> None:
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path, SimulatorOptions(log_max=2 * REQUESTS)) as team:
        process = team.start(team.plan(max_body_bytes="20000"))
        ends = exchange(process, [mutated_request(team.key, chance) for _ in range(REQUESTS)], check_request)
        print(ends)
        assert {200, 400, 401, 404, 405} <= ends.keys(), "requests that all end alike try little"
        end_in_order(team, process)
        team.audit()


def end_in_order(team: Crew, process: Process) -> None:
    """No charge stays open, and the process has seen nothing that it can't tell."""
    wait_for(lambda: None if any(row["state"] == "forwarded" for row in team.charges().values()) else True)
    assert process.stop() == 0, process.log.read_text()[-5_000:]
    assert "Traceback" not in process.log.read_text()


# Exchanges on bare connections


class Answer:
    """The answers that came back whole; a word of encouragement is none."""

    def __init__(self) -> None:
        self.whole: list[tuple[int, dict[str, str], bytes]] = []
        self._parser = httptools.HttpResponseParser(self)

    def feed(self, data: bytes) -> None:
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        self._headers: dict[str, str] = {}
        self._body = b""

    def on_header(self, name: bytes, value: bytes) -> None:
        self._headers[name.decode("latin-1").lower()] = value.decode("latin-1")

    def on_body(self, data: bytes) -> None:
        self._body += data

    def on_message_complete(self) -> None:
        if self._parser.get_status_code() >= 200:
            self.whole.append((self._parser.get_status_code(), self._headers, self._body))


Check = Callable[[bytes, Answer], int]


def exchange(process: Process, requests: Sequence[bytes], check: Check) -> Counter[int]:
    """Every request on a connection of its own; how many answers had which status, 0 for none."""
    port = int(process.base_url.rpartition(":")[2].removesuffix("/v1"))
    left = iter(requests)
    ends: Counter[int] = Counter()

    async def client() -> None:
        for request in left:
            answer = await converse(port, request)
            try:
                ends[check(request, answer)] += 1
            except AssertionError as error:
                raise AssertionError(f"{request!r}\n{answer.whole}") from error

    async def clients() -> None:
        await asyncio.gather(*(client() for _ in range(CLIENTS)))

    asyncio.run(clients())
    return ends


async def converse(port: int, request: bytes) -> Answer:
    """Send, and read until the other side closes. It has to, once we have nothing more to say."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    answer = Answer()
    try:
        writer.write(request)
        async with asyncio.timeout(PATIENCE_SECONDS):
            while True:
                try:
                    async with asyncio.timeout(QUIET_SECONDS):
                        data = await reader.read(65_536)
                except TimeoutError:
                    if writer.transport.can_write_eof():
                        writer.write_eof()
                    data = await reader.read(65_536)
                if not data:
                    return answer
                answer.feed(data)
    except ConnectionError:
        return answer
    finally:
        writer.close()


def check_request(request: bytes, answer: Answer) -> int:
    for status, headers, body in answer.whole:
        if headers.get("x-beanmeter-error-source") == "gateway":
            assert (status, json.loads(body)["error"]["code"]) in REFUSALS
        elif "x-beanmeter-request-id" not in headers:
            # The pages that need no key or belong to the gateway itself.
            assert status in (200, 404, 405)
    return answer.whole[0][0] if answer.whole else 0


# Requests

VALUES: list[Any] = [
    *(None, True, False, 0, 1, 2, 10, 11, -1, 1.0, 1e300, 10**30, "", "1", "auto", "high", "HIGH", "hd", "1024x1024"),
    *("1536x1024", "0x0", "\0", "é" * 50, "\ud800", [], {}, [[[]]], {"size": "auto"}, "gpt-image-2", "dall-e-3", "true"),
]
FIELDS = ["model", "size", "quality", "n", "stream", "prompt", "partial_images", "user", "siz\\u0065"]
TOKENS = [
    *(b"\0", b"\r\n", b"\n", b"\r\n\r\n", b"{", b"}", b'"', b"\\", b",", b"\xff\xfe", b"\xef\xbb\xbf", b"NaN", b"1e999"),
    *(b'"n": 2,', b'"size": "auto",', b"[" * 100, b"--bean", b"--bean--", b"%00", b"../", b"?", b"#", b" "),
    *(b"Host: other\r\n", b"Transfer-Encoding: chunked\r\n", b"Content-Length: 5\r\n", b"Expect: 100-continue\r\n"),
    *(b"Upgrade: h2c\r\nConnection: upgrade\r\n", b"Content-Encoding: gzip\r\n", b"Idempotency-Key: bean\r\n"),
]


def mutated_request(key: str, chance: random.Random) -> bytes:
    """A request that is odd in what it says, or in its bytes, or in both."""
    body, kind, path = odd_order(chance)
    lines = [
        (b"Host", b"gateway.test"),
        (b"Authorization", b"Bearer " + key.encode()),
        (b"Content-Type", kind),
        (b"Connection", b"close"),
        (b"Content-Length", b"%d" % len(body)),
    ]
    if chance.random() < 0.1:
        lines.append((b"Idempotency-Key", chance.choice((b"a", b"b", b"", b"\xff", b"x" * 300))))
    if chance.random() < 0.1:
        chance.shuffle(lines)
        lines = lines[: chance.randrange(len(lines) + 1)]
    method = chance.choices((b"POST", b"GET", b"PUT", b"HEAD", b"\xffOST"), (40, 1, 1, 1, 1))[0]
    head = method + b" " + path.encode() + b" HTTP/1.1\r\n" + b"".join(b"%s: %s\r\n" % line for line in lines) + b"\r\n"
    request = head + body
    return mutated(request, chance) if chance.random() < 0.5 else request


def odd_order(chance: random.Random) -> tuple[bytes, bytes, str]:
    """A body, its content type and a path."""
    fields: dict[str, Any] = {**ORDER, "prompt": "a bean [[sim bytes=1000]]"}
    for _ in range(chance.choice((0, 0, 1, 1, 2, 4))):
        fields[chance.choice(FIELDS)] = chance.choice(VALUES)
    path = chance.choices((GENERATIONS, EDITS, GENERATIONS + "/", "/v1/models", "/v1//images/edits"), (10, 6, 1, 1, 1))[0]
    if path == EDITS and chance.random() < 0.7:
        parts = [(name, str(value).encode("utf-8", "surrogatepass")) for name, value in fields.items()]
        parts.insert(chance.randrange(len(parts) + 1), ('image"; filename="bean.png', b"\x89PNG" + chance.randbytes(40)))
        body = b"".join(
            b'--bean\r\nContent-Disposition: form-data; name="%s"\r\n\r\n%s\r\n' % (n.encode(), v) for n, v in parts
        )
        return body + b"--bean--\r\n", b"multipart/form-data; boundary=bean", path
    if path == EDITS:
        fields["images"] = [{"image_url": "data:image/png;base64,iVBORw0KGgo="}]
    text = json.dumps(fields).replace("\\\\u", "\\u")
    kind = chance.choices((b"application/json", b"text/plain", b"application/json; charset=utf-16"), (20, 1, 1))[0]
    return text.encode(), kind, path


def mutated(data: bytes, chance: random.Random) -> bytes:
    """The same with one to three places changed, doubled, moved, or gone."""
    for _ in range(chance.randint(1, 3)):
        start = chance.randrange(len(data) + 1)
        end = min(len(data), start + chance.choice((1, 1, 4, 40)))
        piece = data[start:end]
        change = chance.randrange(7)
        if change == 0:
            piece = bytes(byte ^ 1 << chance.randrange(8) for byte in piece)
        elif change == 1:
            piece = b""
        elif change == 2:
            piece += piece
        elif change in (3, 4):
            piece = chance.choice(TOKENS) + piece
        elif change == 5:
            piece = chance.randbytes(len(piece))
        else:
            data, piece, end = data[:start], b"", start
        data = data[:start] + piece + data[end:]
    return data


# Answers


def test_mutated_streams(tmp_path: Path, chance: random.Random) -> None:
    with crew(f"sqlite:///{tmp_path / 'books.db'}", tmp_path) as team:
        upstream = ScriptedUpstream(team.loop)
        sent: dict[str, bytes | None] = {}

        async def script(conversation: Conversation) -> None:
            answer, body, closes = mutated_answer(chance)
            sent[conversation.request.values("x-beanmeter-request-id")[0]] = body
            await conversation.write(answer)
            if closes:
                await conversation.close()

        upstream.script = script
        # An answer that was changed may promise more than comes: then only the deadline ends it.
        process = team.start(team.plan(upstream_url=upstream.base_url, upstream_timeout_seconds="2"))

        def check(request: bytes, answer: Answer) -> int:
            for _, headers, body in answer.whole:
                expected = sent.get(headers["x-beanmeter-request-id"])
                assert expected is None or body == expected, expected
            return check_request(request, answer)

        orders = [plain_order(team.key, chance) for _ in range(STREAMS)]
        ends = exchange(process, orders, check)
        print(ends)
        assert ends[200]
        end_in_order(team, process)
        rows = team.charges()
        assert len(rows) == STREAMS, "one charge for each request, and for nothing else"
        assert len(upstream.requests) == len(sent), "nothing is sent twice"
        assert sent.keys() <= rows.keys()
        # An upstream that closes at the wrong moment never reads what was sent to it; nobody can know. What was not sent at
        # all, because its client had left by then, costs nothing.
        unseen = {(row["state"], row["reason"]) for request_id, row in rows.items() if request_id not in sent}
        assert unseen <= {("review", "no_answer"), ("released", "unsent")}
        states = Counter(row["state"] for row in rows.values())
        assert {*states} == {"settled", "released", "review"}, states
        upstream.close()


def plain_order(key: str, chance: random.Random) -> bytes:
    body = json.dumps({**ORDER, "n": chance.choice((1, 2)), "stream": chance.random() < 0.7}).encode()
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: gateway.test\r\nAuthorization: Bearer {key}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def mutated_answer(chance: random.Random) -> tuple[bytes, bytes | None, bool]:
    """An answer on the wire; its body where the framing is sound, so that all of it has to arrive; whether it closes."""
    image: dict[str, Any] = {
        "size": chance.choice(("1024x1024", "auto", "3840x2160")),
        "quality": chance.choice(("high", "low", None)),
    }
    usage = {"input_tokens": chance.choice((5, -5, 10**30, "x")), "output_tokens": chance.choice((7, 1.5, None))}
    pieces = [
        event("image_generation.partial_image", b64_json="aW1hZ2U=", partial_image_index=0),
        completed(**image, usage=usage),
        chance.choice((completed(**image), event("error", error={"code": None, "message": "no"}), b": a comment\n\n")),
        b"data: [DONE]\n\n",
    ]
    headers = SSE
    if chance.random() < 0.3:
        pieces, headers = [json_answer(chance.choice((0, 1, 2)), **image, usage=usage)], JSON
    status = chance.choices((200, 400, 500), (8, 1, 1))[0]
    framing = chance.choice(FRAMINGS)
    sound = chance.random() < 0.7
    if sound:
        pieces = [piece for piece in (mutated(piece, chance) for piece in pieces) if piece]
    body = b"".join(pieces)
    answer = framed(framing, status, headers, pieces)
    if sound:
        return answer, body, framing == "close"
    return mutated(answer, chance), None, chance.random() < 0.9
