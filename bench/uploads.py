"""Edits whose upload is 50 MB, from 8 clients at once, beside nginx.

The gateway reads a body whole before it forwards any of it, since what an edit costs can stand at its end. So does nginx with
``proxy_request_buffering on``, which it is compared with; the other kind, which passes on what comes, is shown.
"""

from __future__ import annotations

import sys
from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from bench import books
from bench.load import Median, Wrk, take_turns
from bench.machines import EDITS, ROOT, free_port, gateway, nginx, running, scratch
from bench.table import Row, run, verdict

UPLOAD_BYTES = 50 * 1_000_000
CLIENTS = 8
ROUNDS = 3
ROUND_SECONDS = 8

GROWTH_BYTES_MAX = 80 * 1_000_000
TIMES_NGINX_MIN = 0.5

BOUNDARY = "beanmeter-bench-4f1d"
UNBUFFERED = "nginx, unbuffered"


def write_upload(path: Path) -> None:
    """A form as OpenAI's SDK for Python sends it: the fields, then the image."""
    fields = {"model": "gpt-image-2", "prompt": "now roasted", "size": "1024x1024", "quality": "low", "n": "1"}
    parts = [
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="{name}"\r\n\r\n{value}\r\n' for name, value in fields.items()
    ]
    parts.append(
        f'--{BOUNDARY}\r\nContent-Disposition: form-data; name="image"; filename="bean.png"\r\nContent-Type: image/png\r\n\r\n'
    )
    head, tail = "".join(parts).encode(), f"\r\n--{BOUNDARY}--\r\n".encode()
    # Bytes of every value, as an image has them, line ends and dashes among them.
    image = bytes(range(256)) * (UPLOAD_BYTES // 256 + 1)
    path.write_bytes(head + image[: UPLOAD_BYTES - len(head) - len(tail)] + tail)


def described(median: Median) -> str:
    return f"{median.requests_a_second * UPLOAD_BYTES / 1e6:,.0f} MB/s, {median.cpu_ms_a_request:.0f} ms CPU an upload"


def measure() -> list[Row]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        path = directory / "upload"
        write_upload(path)
        port = free_port()
        command = [sys.executable, "-m", "bench.upstreams", "uploads", str(port)]
        beans = stack.enter_context(running("upstream", command, directory, port, environment={"PYTHONPATH": str(ROOT)}))
        ours = stack.enter_context(gateway(beans, directory))
        machines = [
            stack.enter_context(nginx(beans, directory)),
            ours,
            stack.enter_context(nginx(beans, directory, name=UNBUFFERED, buffer_requests=False)),
        ]
        before = ours.rss_bytes()
        form = {"Content-Type": f"multipart/form-data; boundary={BOUNDARY}"}
        load = Wrk(directory, CLIENTS, path=EDITS, body=path, headers=form)
        medians = take_turns(load, machines, rounds=ROUNDS, seconds=ROUND_SECONDS, warm_up_seconds=ROUND_SECONDS)
        peak = ours.peak_rss_bytes()
        books.check(ours.database_url, medians["Beanmeter"].requests)
    mb = 1_000_000
    times = medians["Beanmeter"].requests_a_second / medians["nginx"].requests_a_second
    name = f"uploads of {UPLOAD_BYTES // mb} MB, {CLIENTS} clients"
    return [
        Row(
            f"{name}: memory",
            f"grows by {GROWTH_BYTES_MAX // mb} MB or less",
            f"{(peak - before) / mb:+.1f} MB, from {before / mb:.1f} to {peak / mb:.1f} MB",
            "",
            verdict(peak - before <= GROWTH_BYTES_MAX),
            {"before_bytes": before, "peak_bytes": peak, "growth_bytes": peak - before},
        ),
        Row(
            f"{name}: speed",
            f"{TIMES_NGINX_MIN:g} x nginx that reads a body whole first, as we do",
            f"{described(medians['Beanmeter'])}: {times:.2f} x nginx",
            f"nginx {described(medians['nginx'])}; with proxy_request_buffering off {described(medians[UNBUFFERED])}",
            verdict(times >= TIMES_NGINX_MIN),
            {one: asdict(median) for one, median in medians.items()},
        ),
    ]


if __name__ == "__main__":
    run(measure, seconds_max=240)
