"""Streams of 20 MB to 8 clients at once, as fast as they are read, beside nginx with ``proxy_buffering off``.

First one stream through each is compared with the file that the upstream sends.
"""

from __future__ import annotations

import hashlib
import http.client
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench import books
from bench.load import ASK_STREAM, Failed, Median, Wrk, take_turns
from bench.machines import GENERATIONS, JSON, Machine, gateway, nginx, scratch, upstream
from bench.table import Row, run, verdict

STREAM_BYTES = 20 * 1_000_000
CLIENTS = 8
ROUNDS = 4
ROUND_SECONDS = 5

TIMES_NGINX_MIN = 0.8
TIMES_NGINX_AIM = 1.2


def make_stream(size_bytes: int) -> bytes:
    """A stream with one image, of exactly ``size_bytes``."""
    head = (
        b"event: image_generation.completed\n"
        b'data: {"type":"image_generation.completed","size":"3840x2160","quality":"high","b64_json":"'
    )
    tail = b'"}\n\ndata: [DONE]\n\n'
    return head + b"Q" * (size_bytes - len(head) - len(tail)) + tail


def compare(machine: Machine, expected: bytes) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", machine.port, timeout=30)
    connection.request("POST", GENERATIONS, ASK_STREAM, {**JSON, **machine.headers})
    answer = connection.getresponse()
    digest = hashlib.sha256(answer.read())
    connection.close()
    if answer.status != 200 or digest.digest() != hashlib.sha256(expected).digest():
        raise Failed(f"{machine.name} answered {answer.status}, and not with what the upstream sent")


def described(median: Median) -> str:
    return f"{median.bytes_a_second / 1e6:,.0f} MB/s, {median.cpu_ms_a_request:.1f} ms CPU a stream"


def stream_file(directory: Path) -> Path:
    path = directory / "stream.sse"
    path.write_bytes(make_stream(STREAM_BYTES))
    return path


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        path = stream_file(directory)
        beans = stack.enter_context(upstream(directory, path))
        machines = [stack.enter_context(start(beans, directory)) for start in (nginx, gateway)]
        for machine in machines:
            compare(machine, path.read_bytes())
        load = Wrk(directory, CLIENTS, text=ASK_STREAM)
        medians = take_turns(load, machines, rounds=ROUNDS, seconds=ROUND_SECONDS)
        books.check(machines[-1].database_url, medians["Beanmeter"].requests)
    times = medians["Beanmeter"].bytes_a_second / medians["nginx"].bytes_a_second
    return [
        Row(
            f"{STREAM_BYTES // 1_000_000} MB streams, {CLIENTS} clients",
            f"{TIMES_NGINX_MIN:g} x nginx; aim {TIMES_NGINX_AIM:g} x",
            f"{described(medians['Beanmeter'])}: {times:.2f} x nginx",
            f"nginx {described(medians['nginx'])}",
            verdict(times >= TIMES_NGINX_MIN),
            {name: asdict(median) for name, median in medians.items()},
        )
    ]


if __name__ == "__main__":
    run(measure, seconds_max=180)
