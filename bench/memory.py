"""How much memory the gateway takes while 64 answers of 30 MB pass through it at once, half of them to readers that stall.

``python bench/memory.py`` starts an upstream and a gateway as processes of their own, on loopback, and prints the figures as
JSON and as a row for a Markdown table. The gateway may grow by 80 MB; beyond that the exit status is 1.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from proxy.ledger import accounts  # noqa: E402 - runs from a checkout that is not installed
from proxy.ledger.engine import Database  # noqa: E402
from proxy.ledger.migrate import migrate  # noqa: E402

ANSWERS = 64
ANSWER_BYTES = 30 * 1_000_000
GROWTH_BYTES_MAX = 80 * 1_000_000

# The whole of it is over in a few seconds; a gateway that lets itself be held up by its stalled readers never is.
RUN_SECONDS_MAX = 50
START_SECONDS_MAX = 10

# Larger pieces than this no upstream's own server writes at once.
PIECE_BYTES = 256 * 1024


# The upstream


def make_answer() -> bytes:
    """A stream with one image, of exactly :data:`ANSWER_BYTES`."""
    head = b'event: image_generation.completed\ndata: {"type":"image_generation.completed","b64_json":"'
    tail = b'"}\n\ndata: [DONE]\n\n'
    return head + b"Q" * (ANSWER_BYTES - len(head) - len(tail)) + tail


async def run_upstream() -> None:
    """Answers every request with the same stream, as fast as it is taken; prints its port."""
    answer = memoryview(make_answer())

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).lower()
                length = re.search(rb"content-length: (\d+)", head)
                assert length is not None
                await reader.readexactly(int(length[1]))
                writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n")
                for start in range(0, len(answer), PIECE_BYTES):
                    piece = answer[start : start + PIECE_BYTES]
                    writer.write(b"%x\r\n" % len(piece))
                    writer.write(piece)
                    writer.write(b"\r\n")
                    await writer.drain()
                writer.write(b"0\r\n\r\n")
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0, backlog=2 * ANSWERS)
    print(server.sockets[0].getsockname()[1], flush=True)
    await server.serve_forever()


@contextmanager
def upstream() -> Iterator[int]:
    process = subprocess.Popen([sys.executable, __file__, "upstream"], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield int(process.stdout.readline())
    finally:
        process.kill()
        process.wait()


# The gateway


@contextmanager
def gateway(upstream_port: int, directory: Path) -> Iterator[tuple[int, int, str]]:
    """A gateway with one team: its process id, its port and a key."""
    database_url = f"sqlite:///{directory / 'beanmeter.db'}"
    database = Database(database_url)
    migrate(database)
    with database.writing() as connection:
        accounts.add_team(connection, "bench", now=datetime.now(UTC), actor="bench")
        key = accounts.add_key(connection, "bench", now=datetime.now(UTC), actor="bench").key
    database.close()
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("BEANMETER_")} | {
        "PYTHONPATH": str(ROOT),
        "BEANMETER_UPSTREAM_URL": f"http://127.0.0.1:{upstream_port}/v1",
        "BEANMETER_UPSTREAM_KEY": "sk-beans-bench",
        "BEANMETER_DATABASE_URL": database_url,
        "BEANMETER_STATE_DIR": str(directory / "var"),
        "BEANMETER_DRAIN_SECONDS": "1",
    }
    command = [sys.executable, "-m", "proxy.cli", "serve", "--port", str(port)]
    with (directory / "log").open("wb") as log:
        process = subprocess.Popen(command, env=environment, cwd=directory, stdout=log, stderr=log)
    try:
        wait_until_listening(process, port, directory / "log")
        yield process.pid, port, key
    finally:
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(START_SECONDS_MAX)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def wait_until_listening(process: subprocess.Popen[bytes], port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS_MAX
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            if process.poll() is not None or time.monotonic() > deadline:
                raise SystemExit(f"the gateway did not start:\n{log.read_text(errors='replace')}") from None
            time.sleep(0.02)


def memory_bytes(pid: int, name: str) -> int:
    """A figure of the system's about a process: ``VmRSS`` is what it has now, ``VmHWM`` the most that it had."""
    found = re.search(rf"^{name}:\s+(\d+) kB$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


# The readers


async def ask(port: int, key: str) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request, and come back once its answer has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=PIECE_BYTES)
    body = json.dumps({"model": "gpt-image-2", "prompt": "x", "size": "3840x2160", "quality": "high", "stream": True}).encode()
    head = f"POST /v1/images/generations HTTP/1.1\r\nHost: bench\r\nAuthorization: Bearer {key}\r\n"
    writer.write(head.encode() + b"Content-Type: application/json\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body))
    status = (await reader.readuntil(b"\r\n\r\n")).split(b" ")[1]
    assert status == b"200", status
    return reader, writer


async def read_answer(reader: asyncio.StreamReader) -> str:
    """The digest of a chunked body that is read to its end."""
    digest = hashlib.sha256()
    while size := int(await reader.readuntil(b"\r\n"), 16):
        left = size
        while left:
            piece = await reader.read(min(left, PIECE_BYTES))
            assert piece, "the answer was cut"
            digest.update(piece)
            left -= len(piece)
        await reader.readexactly(2)
    return digest.hexdigest()


async def load(pid: int, port: int, key: str) -> tuple[int, int]:
    """All answers at once; what the gateway's memory was before and at its peak, in bytes."""
    expected = hashlib.sha256(make_answer()).hexdigest()
    before = memory_bytes(pid, "VmRSS")
    async with asyncio.timeout(RUN_SECONDS_MAX):
        opened = await asyncio.gather(*(ask(port, key) for _ in range(ANSWERS)))
        # Half read to the end; the others, whose answers have begun just as well, are left waiting the whole time.
        digests = await asyncio.gather(*(read_answer(reader) for reader, _ in opened[::2]))
        peak = memory_bytes(pid, "VmHWM")
        for _, writer in opened:
            writer.transport.abort()
    assert set(digests) == {expected}, "an answer changed on its way"
    return before, peak


def main() -> int:
    started = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="beanmeter-memory-") as directory, upstream() as upstream_port:
        with gateway(upstream_port, Path(directory)) as (pid, port, key):
            before, peak = asyncio.run(load(pid, port, key))
        seconds = time.monotonic() - started
    growth = peak - before
    figures = {
        "answers": ANSWERS,
        "stalled": ANSWERS // 2,
        "answer_bytes": ANSWER_BYTES,
        "before_bytes": before,
        "peak_bytes": peak,
        "growth_bytes": growth,
        "growth_bytes_max": GROWTH_BYTES_MAX,
        "seconds": round(seconds, 1),
    }
    print(json.dumps(figures))
    mb = 1_000_000
    print(
        f"| memory, {ANSWERS} x {ANSWER_BYTES // mb} MB, {ANSWERS // 2} readers stalled "
        f"| {before / mb:.1f} MB before | {peak / mb:.1f} MB at peak | {growth / mb:+.1f} MB |"
    )
    return 0 if growth <= GROWTH_BYTES_MAX else 1


if __name__ == "__main__":
    if sys.argv[1:] == ["upstream"]:
        asyncio.run(run_upstream())
    else:
        sys.exit(main())
