"""Request bodies while they are read and sent: in memory, on disk, at the border between, and where the disk is full."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import random
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from proxy.orders import Splice
from proxy.spool import MEMORY_BYTES_MAX, PIECE_BYTES, Spool, SpoolFull, spliced_size
from tests.bare import EDITS, GENERATIONS, JSON_TYPE, Reply, ask, head, order, post, request
from tests.live import JSON, Conversation, LiveGateway, ScriptedUpstream, json_answer, live_gateway, whole

MIB = MEMORY_BYTES_MAX

# A file without a name shows up only among the process's own descriptors.
DESCRIPTORS = Path("/proc/self/fd")


def some_bytes(size: int) -> bytes:
    """Bytes of which no two pieces are alike, the same in each run."""
    return random.Random(size).randbytes(size)


def cut(body: bytes, size: int) -> list[bytes]:
    return [body[at : at + size] for at in range(0, len(body), size)]


async def keep(spool: Spool, body: bytes, piece_bytes: int) -> None:
    for piece in cut(body, piece_bytes):
        await spool.append(piece)
    await spool.seal()


async def read(spool: Spool, splice: Splice | None = None) -> bytes:
    content = spool.content(splice)
    pieces = [content] if isinstance(content, bytes) else [piece async for piece in content]
    if len(pieces) > 1:
        assert max(map(len, pieces)) <= PIECE_BYTES
    return b"".join(pieces)


def open_files(directory: Path) -> list[str]:
    """Files of this process in a directory, those without a name too."""
    if not DESCRIPTORS.is_dir():
        pytest.skip(f"this system has no {DESCRIPTORS}, so nobody can say which files are open")
    found = []
    for descriptor in DESCRIPTORS.iterdir():
        try:
            found.append(os.readlink(descriptor))
        except OSError:
            pass  # It was closed meanwhile, as the one is by which the list was read.
    return [path for path in found if path.startswith(str(directory))]


SPLICES: dict[str, Callable[[int], Splice | None]] = {
    "no splice": lambda size: None,
    "nothing for something": lambda size: Splice(size // 2, size // 2 + 1, b""),
    "something for nothing": lambda size: Splice(size // 3, size // 3, b"2016x1344"),
    "longer": lambda size: Splice(size // 2, size // 2 + 1, b"x" * 20),
    "at the beginning": lambda size: Splice(0, 1, b'"2016x1344"'),
    "at the end": lambda size: Splice(size - 1, size, b'"2016x1344"'),
    "all of it": lambda size: Splice(0, size, b"{}"),
    "where a piece ends": lambda size: Splice(min(PIECE_BYTES, size) - 1, min(PIECE_BYTES + 1, size), b"2016x1344"),
}


@pytest.mark.parametrize("splice", SPLICES.values(), ids=SPLICES)
@pytest.mark.parametrize(
    ("size", "piece_bytes"),
    [
        (1, 1),
        (1_000, 7),
        (MIB - 1, 65_536),
        (MIB, 65_536),
        (MIB, MIB),
        (MIB + 1, 65_536),
        (MIB + 1, MIB + 1),
        (2 * MIB, 100_001),
        (3 * MIB + 7, 65_536),
    ],
)
def test_what_was_kept_is_read(tmp_path: Path, size: int, piece_bytes: int, splice: Callable[[int], Splice | None]) -> None:
    body, change = some_bytes(size), splice(size)
    expected = body if change is None else body[: change.start] + change.replacement + body[change.end :]

    async def work() -> None:
        spool = Spool(tmp_path / "spool")
        await keep(spool, body, piece_bytes)
        assert spool.size == size
        assert len(expected) == spliced_size(size, change)
        assert len(open_files(tmp_path)) == (1 if size > MIB else 0)
        # A second time, as a first attempt that reached nobody leaves it.
        assert [await read(spool, change), await read(spool, change)] == [expected, expected]
        spool.close()

    asyncio.run(work())
    assert open_files(tmp_path) == []
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_nothing_at_all(tmp_path: Path) -> None:
    async def work() -> None:
        spool = Spool(tmp_path)
        await spool.seal()
        assert (spool.size, await read(spool)) == (0, b"")
        spool.close()

    asyncio.run(work())


def test_a_small_body_needs_no_disk(tmp_path: Path) -> None:
    async def work() -> None:
        spool = Spool(tmp_path / "spool")
        await keep(spool, some_bytes(MIB), 65_536)
        spool.close()

    asyncio.run(work())
    assert not (tmp_path / "spool").exists()


def test_a_body_can_be_given_up_at_any_time(tmp_path: Path) -> None:
    async def work() -> None:
        for pieces in range(4):
            spool = Spool(tmp_path)
            for _ in range(pieces):
                await spool.append(some_bytes(MIB - 1))
            spool.close()
            spool.close()

    asyncio.run(work())
    assert open_files(tmp_path) == []


@contextmanager
def disk_of(size: int) -> Iterator[None]:
    """No file of this process grows beyond ``size`` bytes: what is written beyond that fails, as on a full disk."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("size", [MIB + 1, 2 * MIB + 1, 3 * MIB])
def test_a_full_disk_is_told_before_the_body_is_read(tmp_path: Path, size: int) -> None:
    """Also where only the last pieces find no room."""

    async def work() -> None:
        spool = Spool(tmp_path)
        with disk_of(size - 1), pytest.raises(SpoolFull):
            await keep(spool, some_bytes(size), 65_536)
        spool.close()

    asyncio.run(work())
    assert open_files(tmp_path) == []


# End to end

PRESET = "2016x1344"
ALIAS = "1536x1024"


@pytest.fixture(scope="module")
def live(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[LiveGateway, ScriptedUpstream]]:
    directory = tmp_path_factory.mktemp("spool")
    settings = {"BEANMETER_SIZE_ALIASES": f"{ALIAS}={PRESET}, Breit \u2194={PRESET}"}
    with live_gateway(f"sqlite:///{directory}/beanmeter.db", directory, settings) as parts:
        yield parts


def in_chunks(key: str, body: bytes, path: str, kind: tuple[str, str]) -> bytes:
    fields = [("Host", "gateway.test"), ("Authorization", f"Bearer {key}"), kind, ("Transfer-Encoding", "chunked")]
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in cut(body, 100_003))
    return head("POST", path, fields) + pieces + b"0\r\n\r\n"


def digest(body: bytes) -> str:
    return hashlib.sha256(body).hexdigest()


def nothing_left(gateway: LiveGateway) -> None:
    assert open_files(gateway.state_dir / "spool") == []
    assert list((gateway.state_dir / "spool").glob("*")) == []


def json_of(size: int) -> bytes:
    """An order of so many bytes, in a spelling of its own, with the fields behind the filling."""
    begun = b'{ "prompt" : "' + b"x" * 20
    rest = b'",\t"size":"1024x1024" ,"quality":"high","model":"gpt-image-2", "user" : "\\u00e9\xc3\xa9"  }\n'
    return begun + b"y" * (size - len(begun) - len(rest)) + rest


@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
@pytest.mark.parametrize("size", [1_000, MIB - 1, MIB, MIB + 1, 2 * MIB, 5 * MIB + 3])
def test_every_byte_goes_upstream(live: tuple[LiveGateway, ScriptedUpstream], path: str, size: int) -> None:
    gateway, upstream = live
    body = json_of(size)
    for data in (post(gateway.key, body, path), in_chunks(gateway.key, body, path, JSON_TYPE)):
        assert ask(gateway, data).status == 200
        sent = upstream.requests[-1]
        assert (sent.sha256, sent.values("content-length")) == (digest(body), [str(size)])
        assert sent.values("transfer-encoding") == []
    nothing_left(gateway)


FORM_TYPE = ("Content-Type", 'multipart/form-data; boundary="a b"')


def form_of(size: int, asked: bytes) -> bytes:
    """A form with an image of so many bytes between its fields."""

    def part(disposition: bytes, value: bytes) -> bytes:
        return b"--a b\r\nContent-Disposition: form-data; " + disposition + b"\r\n\r\n" + value + b"\r\n"

    image = part(b'name="image"; filename="b\xc3\xa4.png"\r\nContent-Type: image/png', some_bytes(size))
    fields = [part(b"name=" + name, value) for name, value in ((b"size", asked), (b'"quality"', b"high"))]
    return part(b'name="model"', b"gpt-image-2") + image + b"".join(fields) + b"--a b--\r\n"


@pytest.mark.parametrize("size", [1_000, MIB - 400, MIB, 3 * MIB])
@pytest.mark.parametrize(("asked", "sent"), [(b"1024x1024", b"1024x1024"), (ALIAS.encode(), PRESET.encode())])
def test_every_byte_of_a_form_goes_upstream(
    live: tuple[LiveGateway, ScriptedUpstream], size: int, asked: bytes, sent: bytes
) -> None:
    gateway, upstream = live
    body, expected = form_of(size, asked), form_of(size, sent)
    for data in (post(gateway.key, body, EDITS, [FORM_TYPE]), in_chunks(gateway.key, body, EDITS, FORM_TYPE)):
        reply = ask(gateway, data)
        assert reply.status == 200
        received = upstream.requests[-1]
        assert received.sha256 == digest(expected)
        assert received.values("content-length") == [str(len(expected))]
        assert received.values("content-type") == [FORM_TYPE[1]]
        charge = gateway.charge_when_ended(reply.values("x-beanmeter-request-id")[0])
        assert (charge["size"], charge["quality"]) == (sent.decode(), "high")
    nothing_left(gateway)


@pytest.mark.parametrize(
    "written",
    [
        '"1536x1024"',
        '"\\u0031536x1024"',
        '"\\u0031\\u0035\\u0033\\u0036\\u0078\\u0031\\u0030\\u0032\\u0034"',
        '"Breit \u2194"',
        '"Breit \\u2194"',
    ],
)
@pytest.mark.parametrize("filling", [0, MIB - 200, 2 * MIB])
@pytest.mark.parametrize("path", [GENERATIONS, EDITS])
def test_an_aliased_size_is_replaced_and_nothing_else(
    live: tuple[LiveGateway, ScriptedUpstream], path: str, filling: int, written: str
) -> None:
    """The whole string is, however it was written; another size in the same body is not the order's."""
    gateway, upstream = live
    before = '{"prompt":"1536x1024","extra":{"size":"1536x1024"},"filling":"' + "z" * filling + '",\n "s\\u0069ze" : '
    after = ' , "quality":"low","model":"gpt-image-2","user":"1536x1024"}'
    reply = ask(gateway, post(gateway.key, (before + written + after).encode(), path))
    assert reply.status == 200
    expected = (before + f'"{PRESET}"' + after).encode()
    assert upstream.requests[-1].sha256 == digest(expected)
    assert json.loads(expected)["size"] == PRESET
    charge = gateway.charge_when_ended(reply.values("x-beanmeter-request-id")[0])
    assert (charge["size"], charge["asked_size"], charge["basis"]) == (PRESET, PRESET, "requested")


@pytest.mark.parametrize("asked", ["1536X1024", " 1536x1024", "breit \u2194", "1024x1536"])
def test_a_size_that_is_almost_an_alias_is_refused(live: tuple[LiveGateway, ScriptedUpstream], asked: str) -> None:
    gateway, upstream = live
    sent = len(upstream.requests)
    reply = ask(gateway, post(gateway.key, order(size=asked)))
    assert (reply.status, reply.error["param"]) == (400, "size")
    assert ALIAS in reply.error["message"]
    assert len(upstream.requests) == sent


def out_of_room(gateway: LiveGateway, upstream: ScriptedUpstream, data: bytes) -> None:
    """The request is refused for want of room, and costs nothing."""
    before = upstream.connections, len(upstream.requests), len(gateway.charges())
    reply = ask(gateway, data)
    assert (reply.status, reply.error["type"], reply.error["code"]) == (503, "server_error", "storage_unavailable")
    assert 1 <= int(reply.values("retry-after")[0]) <= 60
    assert reply.values("x-beanmeter-error-source") == ["gateway"]
    assert (upstream.connections, len(upstream.requests), len(gateway.charges())) == before


@pytest.mark.parametrize("size", [MIB + 1, 2 * MIB + 1, 3 * MIB])
def test_a_full_disk_costs_nothing(live: tuple[LiveGateway, ScriptedUpstream], size: int) -> None:
    gateway, upstream = live
    body = json_of(size)
    for data in (post(gateway.key, body), in_chunks(gateway.key, body, GENERATIONS, JSON_TYPE)):
        with disk_of(size - 1):
            out_of_room(gateway, upstream, data)
            # What needs no disk goes on.
            assert ask(gateway, request("GET", "/v1/models", key=gateway.key)).status == 200
        nothing_left(gateway)
        assert ask(gateway, data).status == 200
        assert upstream.requests[-1].sha256 == digest(body)


def test_a_state_directory_that_is_none(tmp_path: Path) -> None:
    with live_gateway(f"sqlite:///{tmp_path}/beanmeter.db", tmp_path) as (gateway, upstream):
        spool = tmp_path / "spool"
        if spool.exists():
            spool.rmdir()
        spool.write_bytes(b"")
        out_of_room(gateway, upstream, post(gateway.key, json_of(2 * MIB)))
        assert ask(gateway, post(gateway.key, json_of(MIB))).status == 200
        spool.unlink()
        assert ask(gateway, post(gateway.key, json_of(2 * MIB))).status == 200


def test_a_large_body_is_let_go_when_the_answer_begins(live: tuple[LiveGateway, ScriptedUpstream]) -> None:
    """An answer can take minutes, and the disk is needed for others."""
    gateway, upstream = live
    seen: list[list[str]] = []
    begun, go_on = asyncio.Event(), asyncio.Event()
    answer = whole(200, JSON, json_answer())

    async def in_two_parts(conversation: Conversation) -> None:
        seen.append(open_files(gateway.state_dir / "spool"))
        await conversation.write(answer[:-10])
        begun.set()
        await go_on.wait()
        await conversation.write(answer[-10:])

    async def release() -> None:
        go_on.set()

    usual, upstream.script = upstream.script, in_two_parts
    with gateway.connect() as connection:
        connection.sendall(post(gateway.key, json_of(2 * MIB)))
        assert connection.recv(12) == b"HTTP/1.1 200"
        assert len(seen[0]) == 1
        nothing_left(gateway)
        gateway.loop.run(release())
    upstream.script = usual


@pytest.mark.parametrize(
    ("data", "status"),
    [
        (lambda key: post(key, json_of(2 * MIB).replace(b"high", b"dear")), 400),
        (lambda key: post(key, json_of(2 * MIB) + b"}"), 400),
        (lambda key: post(key, form_of(2 * MIB, b"1x1"), EDITS, [FORM_TYPE]), 400),
        (lambda key: post(key, form_of(2 * MIB, b"auto")[:-5], EDITS, [FORM_TYPE]), 400),
        (lambda key: post(key, b" " * (65 * MIB)), 413),
        (lambda key: in_chunks(key, b" " * (65 * MIB), GENERATIONS, JSON_TYPE), 413),
    ],
)
def test_a_large_body_that_is_refused_leaves_nothing(
    live: tuple[LiveGateway, ScriptedUpstream], data: Callable[[str], bytes], status: int
) -> None:
    gateway, upstream = live
    sent = len(upstream.requests)
    reply: Reply = ask(gateway, data(gateway.key))
    assert reply.status == status
    nothing_left(gateway)
    assert len(upstream.requests) == sent
