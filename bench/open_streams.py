"""Slow streams that are open at once through one process, with an event every five seconds on each: the memory that each of
them takes, and how much later than sent its events arrive.

In the end the upstream ends all streams, every one of which must reach its client whole, and the books.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from typing import IO, Any

from bench import books
from bench.load import Failed
from bench.machines import ROOT, Machine, allow_descriptors, free_port, gateway, running, scratch
from bench.table import Row, run, verdict

STREAMS = 5_000
STREAMS_AIM = 9_800
WATCHING_SECONDS = 20

STREAM_BYTES_MAX = 50_000
DELAY_P99_MS_MAX = 200

# Beside two for each stream, to the client and to the upstream: what a gateway has open itself.
DESCRIPTORS_OF_ITS_OWN = 100


def line(output: IO[str]) -> str:
    """The next line of the readers. Raises :class:`Failed` where they gave up instead."""
    read = output.readline().strip()
    if not read or read.startswith("FAILED"):
        raise Failed(read.removeprefix("FAILED").strip() or "the readers ended early")
    return read


def watch(machine: Machine, beans: Machine, streams: int) -> dict[str, Any]:
    """What was seen of so many streams, and what the gateway's memory grew by for each of them, in bytes."""
    before = machine.pss_bytes()
    key = machine.headers["Authorization"].removeprefix("Bearer ")
    command = [sys.executable, "-m", "bench.readers", str(streams), str(WATCHING_SECONDS), str(machine.port), key]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as readers:
        try:
            assert readers.stdout is not None
            line(readers.stdout)
            os.kill(beans.pid, signal.SIGUSR1)
            line(readers.stdout)
            cpu_seconds = machine.cpu_seconds()
            time.sleep(WATCHING_SECONDS / 2)
            grown = machine.pss_bytes() - before
            seen: dict[str, Any] = json.loads(line(readers.stdout))
            cpu_seconds = machine.cpu_seconds() - cpu_seconds
            os.kill(beans.pid, signal.SIGUSR2)
            seen |= json.loads(line(readers.stdout))
        finally:
            readers.kill()
    return seen | {
        "before_bytes": before,
        "bytes_a_stream": round(grown / streams),
        "cpu_ms_an_event": round(1000 * cpu_seconds / seen["events"], 4),
    }


def one(streams: int) -> dict[str, Any]:
    with ExitStack() as stack:
        directory = stack.enter_context(scratch())
        port = free_port()
        command = [sys.executable, "-m", "bench.upstreams", "events", str(port)]
        beans = stack.enter_context(running("upstream", command, directory, port, environment={"PYTHONPATH": str(ROOT)}))
        machine = stack.enter_context(gateway(beans, directory))
        seen = watch(machine, beans, streams)
        if seen["completed"] == streams:
            books.check(machine.database_url, streams)
    return seen


def row(streams: int, *, judged: bool) -> Row:
    name = f"{streams:,} open slow streams, one process"
    limits = f"delay p99 under {DELAY_P99_MS_MAX} ms"
    must = f"at most {STREAM_BYTES_MAX // 1000} KB each, {limits}" if judged else f"aim: {limits}"
    try:
        seen = one(streams)
    except Failed as reason:
        return Row(name, must, f"failed: {reason}", "", "not met" if judged else "shown")
    whole = seen["streams"] == seen["completed"] == streams
    met = whole and seen["bytes_a_stream"] <= STREAM_BYTES_MAX and seen["p99_ms"] < DELAY_P99_MS_MAX
    return Row(
        name,
        must,
        f"{seen['bytes_a_stream'] / 1000:.1f} KB each, delay p50 {seen['p50_ms']:.1f} ms, p99 {seen['p99_ms']:.1f} ms, "
        f"{seen['cpu_ms_an_event']:.3f} ms CPU an event, {seen['completed']:,} ended whole",
        "",
        verdict(met) if judged else "shown",
        seen,
    )


def measure() -> list[Row]:
    allow_descriptors(2 * STREAMS_AIM + DESCRIPTORS_OF_ITS_OWN)
    return [row(STREAMS, judged=True), row(STREAMS_AIM, judged=False)]


if __name__ == "__main__":
    run(measure, seconds_max=480)
