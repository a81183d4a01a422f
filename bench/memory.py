"""How much memory the gateway takes while 64 answers of 30 MB pass through it at once, half of them to readers that stall.

The other half is read to its end and compared. The gateway's memory may grow by 80 MB.
"""

from __future__ import annotations

import asyncio
import hashlib
import time
from contextlib import ExitStack

from bench.load import ASK_STREAM
from bench.machines import GENERATIONS, Machine, gateway, scratch, upstream
from bench.streams import make_stream
from bench.table import Row, run, verdict

ANSWERS = 64
ANSWER_BYTES = 30 * 1_000_000
GROWTH_BYTES_MAX = 80 * 1_000_000

# The whole of it is over in a few seconds; a gateway that lets itself be held up by its stalled readers never is.
LOAD_SECONDS_MAX = 50

PIECE_BYTES = 256 * 1024


async def ask(machine: Machine) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
    """Send a request, and come back once its answer has begun."""
    reader, writer = await asyncio.open_connection("127.0.0.1", machine.port, limit=PIECE_BYTES)
    head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: bench\r\nAuthorization: {machine.headers['Authorization']}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(ASK_STREAM)}\r\n\r\n"
    writer.write(head.encode() + ASK_STREAM.encode())
    answer = (await reader.readuntil(b"\r\n\r\n")).lower()
    assert answer.startswith(b"http/1.1 200 "), answer
    assert b"\r\ncontent-length: %d\r\n" % ANSWER_BYTES in answer, answer
    return reader, writer


async def read_answer(reader: asyncio.StreamReader) -> bytes:
    """The digest of a body that is read to its end."""
    digest = hashlib.sha256()
    left = ANSWER_BYTES
    while left:
        piece = await reader.read(min(left, PIECE_BYTES))
        assert piece, "the answer was cut"
        digest.update(piece)
        left -= len(piece)
    return digest.digest()


async def load(machine: Machine, expected: bytes) -> tuple[int, int]:
    """All answers at once; what the gateway's memory was before and at its peak, in bytes."""
    before = machine.rss_bytes()
    async with asyncio.timeout(LOAD_SECONDS_MAX):
        opened = await asyncio.gather(*(ask(machine) for _ in range(ANSWERS)))
        # Half read to the end; the others, whose answers have begun just as well, are left waiting the whole time.
        digests = await asyncio.gather(*(read_answer(reader) for reader, _ in opened[::2]))
        peak = machine.peak_rss_bytes()
        for _, writer in opened:
            writer.transport.abort()
    assert set(digests) == {expected}, "an answer changed on its way"
    return before, peak


def measure() -> list[Row]:
    answer = make_stream(ANSWER_BYTES)
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        path = directory / "stream.sse"
        path.write_bytes(answer)
        machine = stack.enter_context(gateway(stack.enter_context(upstream(directory, path)), directory))
        started = time.monotonic()
        before, peak = asyncio.run(load(machine, hashlib.sha256(answer).digest()))
        seconds = time.monotonic() - started
    mb = 1_000_000
    return [
        Row(
            f"{ANSWERS} answers of {ANSWER_BYTES // mb} MB, {ANSWERS // 2} readers stalled",
            f"memory grows by {GROWTH_BYTES_MAX // mb} MB or less",
            f"{(peak - before) / mb:+.1f} MB, from {before / mb:.1f} to {peak / mb:.1f} MB, in {seconds:.1f} s",
            "",
            verdict(peak - before <= GROWTH_BYTES_MAX),
            {"before_bytes": before, "peak_bytes": peak, "growth_bytes": peak - before, "seconds": round(seconds, 2)},
        )
    ]


if __name__ == "__main__":
    run(measure, seconds_max=120)
